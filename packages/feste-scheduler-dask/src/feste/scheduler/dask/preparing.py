"""What a user wants done on each worker before its first work: once in each process."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

from feste.errors import NodeError
from feste.scheduler import describe

__all__ = ["Prepare", "prepared"]

Prepare = Callable[[], Any] | str
"""A function, sync or async, or its ``"module:name"``."""

_lock = threading.Lock()
#: What came of it, by the name of the client.
_outcomes: dict[str, NodeError | None] = {}


def prepared(name: str, prepare: Prepare | None) -> NodeError | None:
    """Prepare this process if that is not done yet; blocks until it is.

    :param name: the name of the client whose preparation it is.
    :param prepare: what to call, or None.
    :returns: why it failed, or None.

    >>> prepared("a client", lambda: print("loading the model"))
    loading the model
    >>> prepared("a client", lambda: print("loading the model"))
    """
    if prepare is None:
        return None
    with _lock:
        if name not in _outcomes:
            _outcomes[name] = _call(prepare)
        return _outcomes[name]


def _call(prepare: Prepare) -> NodeError | None:
    try:
        if isinstance(prepare, str):
            module, _, attribute = prepare.partition(":")
            prepare = getattr(import_module(module), attribute)
        assert callable(prepare), "checked as a setting"
        done = prepare()
        if inspect.iscoroutine(done):
            asyncio.run(done)
    except BaseException as error:  # users' code may raise anything, even SystemExit
        told = describe(error)
        return NodeError(
            f"prepare_worker failed on a Dask worker: {told.args[0]}",
            cause_type=type(error).__name__,
            traceback=getattr(told, "traceback", ""),
        )
    return None
