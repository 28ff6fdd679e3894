"""Say what an executor did that no executor may, and ask it so that this costs its own runs only."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from feste.errors import PluginError
from feste.wording import raised_at

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain
    from feste.scheduler.executor import Executor, PyTask

T = TypeVar("T")

__all__ = ["Questions", "fault", "raised"]


def fault(executor: object, did: str) -> PluginError:
    """Return the error for something that no executor may do.

    :param executor: the executor.
    :param did: what it did.
    """
    kind = type(executor)
    return PluginError(f"the executor {kind.__module__}.{kind.__qualname__} {did}")


def raised(executor: object, method: str, error: BaseException) -> PluginError:
    """Return the error for an exception that one of an executor's methods raised.

    :param executor: the executor.
    :param method: the method's name.
    :param error: the exception.
    """
    said = f"raised in {method}: {type(error).__name__}: {error} ({raised_at(error)})"
    told = fault(executor, said)
    told.__cause__ = error
    return told


class Questions:
    """What the brain asks executors; the runs of one that raises, or answers nonsense, end.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def capacity(self, executor: Executor, where: str) -> int:
        """Return how many chunks may run at once in one place; 0 if the executor cannot tell."""
        return self._ask(executor, "capacity", partial(executor.capacity, where), _is_number, 0)

    def chunk_seconds(self, executor: Executor, where: str) -> float:
        """Return how many seconds of work may share a chunk; 0 if the executor cannot tell."""
        asked = partial(executor.chunk_seconds, where)
        return self._ask(executor, "chunk_seconds", asked, _is_number, 0.0)

    def window(self, executor: Executor) -> int | None:
        """Return how many requests it takes at once; None for any number, or if it cannot tell."""
        return self._ask(executor, "window", lambda: executor.window, _is_window, None)

    def has_lost(self, executor: Executor, work: int | list[PyTask]) -> bool:
        """Return whether it will never report some work; False if it cannot tell."""
        asked = partial(executor.has_lost, work)
        return self._ask(executor, "has_lost", asked, lambda lost: True, False)

    def _ask(
        self,
        executor: Executor,
        what: str,
        ask: Callable[[], T],
        fits: Callable[[Any], bool],
        otherwise: T,
    ) -> T:
        try:
            answer = ask()
            if fits(answer):
                return answer
            told = fault(executor, f"answers {answer!r} for {what}")
        except Exception as error:  # of a plugin
            told = raised(executor, what, error)
        if any(run.executor is executor and not run.interrupted for run in self.brain.runs):
            self.brain.later(0.0, lambda now: self.brain.on_fault(executor, told))
        return otherwise


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)


def _is_window(value: Any) -> bool:
    return value is None or _is_number(value)
