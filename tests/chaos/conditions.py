"""Conditions that a program of the chaos suite imposes on itself: a wrong clock, other patience."""

from __future__ import annotations

import random
import threading
import time
from importlib import import_module
from typing import Any

import feste
from feste.plugins import registry

__all__ = ["Order", "impose", "named"]

#: Seconds that the clock is wrong by, one after the other by chance; half of the steps go back.
_OFFSETS = (0.0, 3600.0, -3600.0, 86400.0, -86400.0, 1.0, -1.0)
_EVERY = 0.05


def named(name: str) -> Any:
    """Return what a name such as ``"module:attribute"`` stands for."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def impose(todo: dict[str, Any]) -> None:
    """Impose what the program is told to.

    ``constants`` gives values to constants of Feste, by ``"module:name"``; ``clock`` is the seed of
    jumps of the time of day.

    :param todo: what the program is told.
    """
    for name, value in todo.get("constants", {}).items():
        module, _, attribute = name.partition(":")
        assert hasattr(import_module(module), attribute), name
        setattr(import_module(module), attribute, value)
    if (seed := todo.get("clock")) is not None:
        _Clock(seed).start()


class _Clock(threading.Thread):
    """Lets the time of day jump every 50 ms."""

    def __init__(self, seed: int) -> None:
        super().__init__(daemon=True, name="feste-chaos-clock")
        self.chance, self.offset, self.true = random.Random(seed), 0.0, time.time
        time.time = lambda: self.true() + self.offset

    def run(self) -> None:
        while True:
            self.offset = self.chance.choice(_OFFSETS)
            time.sleep(_EVERY)


class Order:
    """Hears what happens in a run, and counts the requests that begin after it was stopped."""

    def __init__(self) -> None:
        self.stopped = False
        self.late = 0
        registry().manager.register(self)

    @feste.hookimpl
    def feste_node_finished(self, event: Any) -> None:
        """Notice that a node will not be begun."""
        self.stopped = self.stopped or event.state == "not_started"

    @feste.hookimpl
    def feste_request_started(self, event: Any) -> None:
        """Count a request."""
        self.late += self.stopped
