"""Say what an executor did that no executor may, and ask it so that this costs its own runs only."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from feste.errors import PluginError
from feste.wording import raised_at

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain
    from feste.scheduler.executor import Executor, PyTask

T = TypeVar("T")

__all__ = ["Questions", "fault", "is_number", "misled", "plain", "raised"]


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


def misled(executor: object, report: str, error: BaseException) -> PluginError | None:
    """Return the error for a report that the brain could not handle; None if that is Feste's bug.

    :param executor: the executor that reported; what Feste's own ones report is right.
    :param report: the name of the report.
    :param error: what it led to.
    """
    if type(executor).__module__.partition(".")[0] == "feste":
        return None
    said = f"{type(error).__name__}: {error} ({raised_at(error)})"
    told = fault(executor, f"reported {report} with what Feste cannot handle: {said}")
    told.__cause__ = error
    return told


def is_number(value: Any) -> bool:
    """Return whether a value is a number, of Python or of a library such as NumPy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return not math.isnan(value)


def plain(number: Any) -> Any:
    """Return a number as one of Python, since those of a library may overflow."""
    return int(number) if isinstance(number, numbers.Integral) else float(number)


class Questions:
    """What the brain asks executors; the runs of one that raises, or answers nonsense, end.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def capacity(self, executor: Executor, where: str) -> int:
        """Return how many chunks may run at once in one place; 0 if the executor cannot tell."""
        return self._ask(executor, "capacity", partial(executor.capacity, where), is_number, 0)

    def chunk_seconds(self, executor: Executor, where: str) -> float:
        """Return how many seconds of work may share a chunk; 0 if the executor cannot tell."""
        asked = partial(executor.chunk_seconds, where)
        return self._ask(executor, "chunk_seconds", asked, is_number, 0.0)

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
                return plain(answer) if is_number(answer) else answer
            told = fault(executor, f"answers {answer!r} for {what}")
        except BaseException as error:  # a plugin may raise anything
            told = raised(executor, what, error)
        if self.brain.harmed(executor):
            self.brain.later(0.0, lambda now: self.brain.on_fault(executor, told))
        return otherwise


def _is_window(value: Any) -> bool:
    return value is None or is_number(value)
