"""``feste.map``: a function over more items than memory holds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from numbers import Integral
from operator import length_hint
from typing import Any, Literal, TypeVar, overload

from feste import context
from feste._compute.items import Item, Items
from feste._compute.iterating import Results
from feste._compute.results import forget_report
from feste.context import Settings
from feste.delayed import FesteDelayed
from feste.errors import ConfigError, RunFailed
from feste.node import Node
from feste.report.headway import Course
from feste.scheduler.emission import REPACK
from feste.scheduler.growth import unfused
from feste.scheduler.run import Run

__all__ = ["map"]

T = TypeVar("T")
R = TypeVar("R")

#: The default window: about twice the most requests that a gate lets be in flight (512), so that the
#: gate stays busy while finished items wait for their turn.
WINDOW = 1_000
#: New items are taken when this part of the window is free, so that they can share requests.
_PART = 4
#: Seconds after which items that were taken are begun, although the window is not full.
_PATIENCE = 0.2
#: The fewest items that a run takes in before the next one begins, which frees what it held.
_LEAST = 256
_FAILED = object()
_END = object()


@overload
def map(
    fn: Callable[[T], FesteDelayed[R]],
    iterable: Iterable[T],
    *,
    window: int = WINDOW,
    ordered: Literal[True] = True,
    **settings: Any,
) -> Results[R]: ...
@overload
def map(
    fn: Callable[[T], FesteDelayed[R]],
    iterable: Iterable[T],
    *,
    window: int = WINDOW,
    ordered: Literal[False],
    **settings: Any,
) -> Results[tuple[int, R]]: ...
@overload
def map(
    fn: Callable[[T], Any],
    iterable: Iterable[T],
    *,
    window: int = WINDOW,
    ordered: bool = True,
    **settings: Any,
) -> Results[Any]: ...
def map(
    fn: Callable[[Any], Any],
    iterable: Iterable[Any],
    *,
    window: int = WINDOW,
    ordered: bool = True,
    **settings: Any,
) -> Results[Any]:
    """Compute what a function makes of each item, with a window of items under way at a time.

    The items may be more than memory holds, or endless: what was handed out is freed. New items are
    taken as others are handed out, without waiting for a whole window, and share requests with those
    under way. If the iterable or the function raises, what is under way is handed out first, then
    the error is raised. Leaving the loop, or ``close()``, stops all.

    :param fn: ``fn(item)`` returns a lazy value, or a container with some, or a plain value; called
        on the thread of the loop, in order, so that draws are the same in every run.
    :param iterable: the items.
    :param window: the most items that are under way or wait to be handed out.
    :param ordered: True gives values in the order of the items; False gives ``(index, value)`` as
        they come.
    :param settings: settings as for :func:`compute`. With ``on_error="return"`` the value of a
        failed item is its error; else failed ones are left out.
    :returns: an iterator, sync and async; nothing begins before its first step.
    :raises RunFailed: from the iterator, after all other values, if an item failed.
    :raises ConfigError: if the window is no whole number above 0, or the function is ``async def``
        and no task.

    >>> import feste
    >>> double = feste.task(lambda x: 2 * x)
    >>> list(feste.map(double, range(5), window=2))
    [0, 2, 4, 6, 8]
    """
    if not isinstance(window, Integral) or isinstance(window, bool) or window < 1:
        raise ConfigError(f"window={window!r}: it is a whole number of items, at least 1")
    if inspect.iscoroutinefunction(fn):
        raise ConfigError(
            f"feste.map: {getattr(fn, '__name__', fn)} is async def, so its values would be coroutines "
            "that nobody awaits: make it a @feste.task"
        )
    return _Map(fn, iterable, window, ordered, context.settings(**settings))


class _Map(Items[Any]):
    def __init__(
        self,
        fn: Callable[[Any], Any],
        iterable: Iterable[Any],
        window: int,
        ordered: bool,
        settings: Settings,
    ) -> None:
        super().__init__(settings, Course(name="map", in_items=True))
        self._fn = fn
        self._source: Iterator[Any] | None = iter(iterable)
        #: What may know its length, until the first items are taken; only a progress line needs it.
        self._sized = iterable if settings["progress"] is True else None
        self._window = window
        self._ordered = ordered
        #: How many items were taken from the source, and how many of them left the window.
        self._taken = 0
        self._left = 0
        #: Values that wait for their turn, by index, and whose turn it is.
        self._finished: dict[int, Any] = {}
        self._turn_of = 0
        self._has_taken = False
        self._raised: BaseException | None = None
        #: How many items the growing run has taken in.
        self._grown = 0
        self._since = Node(REPACK).seq
        forget_report()

    # --- taking items in --------------------------------------------------------------------------

    @property
    def _is_due(self) -> bool:
        """Whether items should be taken; one time for each result, if some are ready."""
        free = self._window - (self._taken - self._left)
        enough = free >= max(1, self._window // _PART) or not self._waiting
        return (
            self._source is not None
            and free > 0
            and enough
            and not (self._has_taken and self._ready)
        )

    def _work(self) -> Callable[[], None] | None:
        source = self._source
        if source is not None and self._series.stopped:  # what would be taken would not be started
            self._source = None
            return self._seal
        if source is None or not self._is_due:
            return None
        self._has_taken = True
        items = self._pull(source)
        self._waiting += len(items)
        return partial(self._add, items) if items or self._source is None else None

    def _pull(self, source: Iterator[Any]) -> list[Item]:
        """Take items from the source: until the window is full, one is plain, or time has passed."""
        if self._sized is not None:
            self._course.of, self._sized = _length(self._sized), None
        items: list[Item] = []
        until = time.monotonic() + _PATIENCE
        while self._taken - self._left < self._window:
            try:
                given = next(source, _END)
                if given is _END:
                    self._source = None
                    self._course.of = self._taken
                    break
                item = Item(self._taken, self._fn(given))
            except Exception as error:
                self._source, self._raised = None, _raisable(error)
                break
            self._taken += 1
            if not item.missing:
                self._settle(item)
                break
            items.append(item)
            if time.monotonic() > until:
                break
        return items

    def _add(self, items: list[Item]) -> None:
        if items:
            run = self._growing
            settings = unfused(self._settings, run.program.rewrites if run is not None else 0)
            self._run(items, settings, grows=True)
            self._grown += len(items)
        if self._source is None or self._grown >= max(self._window, _LEAST):
            self._grown = 0
            self._seal()

    def _ended(self, run: Run) -> None:
        if run is self._growing:  # stopped by an error or by its store: take nothing more
            self._source = None
        super()._ended(run)

    # --- handing values out -----------------------------------------------------------------------

    def _done(self, item: Item, value: Any) -> None:
        if self._ordered:
            self._finished[item.name] = value
            self._advance()
        else:
            self._ready.append((item.name, value))

    def _dropped(self, item: Item) -> None:
        if self._ordered:
            self._done(item, _FAILED)
        else:
            self._left += 1

    def _advance(self) -> None:
        while self._turn_of in self._finished:
            value = self._finished.pop(self._turn_of)
            self._turn_of += 1
            if value is _FAILED:
                self._left += 1
            else:
                self._ready.append(value)

    def _pop(self) -> Any:
        self._left += 1
        self._has_taken = False
        return self._ready.popleft()

    @property
    def _is_over(self) -> bool:
        return self._source is None and super()._is_over

    def _finish(self) -> None:
        if self._raised is None:
            super()._finish()
            return
        try:
            super()._finish()
        except RunFailed as failed:
            raise self._raised from failed
        raise self._raised


def _length(iterable: Iterable[Any]) -> int | None:
    """Return how many items there seem to be; None if that is not known."""
    try:
        return length_hint(iterable) or None
    except Exception:  # a data set's own; its items may be fine
        return None


def _raisable(error: Exception) -> Exception:
    """Return an error that ends no loop in silence, as generators do."""
    if not isinstance(error, (StopIteration, StopAsyncIteration)):
        return error
    told = RuntimeError(f"the function of feste.map raised {type(error).__name__}")
    told.__cause__ = error
    return told
