"""``feste.as_completed``: values in the order in which they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from feste import context
from feste._compute.items import Item, Items
from feste._compute.iterating import Results
from feste._compute.results import forget_report
from feste.context import Settings
from feste.delayed import FesteDelayed

__all__ = ["as_completed"]

R = TypeVar("R")


@overload
def as_completed(
    nodes: Iterable[FesteDelayed[R]], **settings: Any
) -> Results[tuple[FesteDelayed[R], R]]: ...
@overload
def as_completed(nodes: Iterable[R], **settings: Any) -> Results[tuple[R, Any]]: ...
def as_completed(nodes: Iterable[Any], **settings: Any) -> Results[tuple[Any, Any]]:
    """Iterate over ``(node, value)`` in the order in which the values come.

    All nodes are one run, optimized as by :func:`compute`. Plain values, as in eager mode, come first,
    each with itself; a container with nodes comes when all of these have ended. Leaving the loop, or
    ``close()``, stops the run and cancels requests that nobody else waits for.

    :param nodes: lazy values; each occurrence gives one pair.
    :param settings: settings for this run, as for :func:`compute`. With ``on_error="return"`` the
        value of a failed node is its error; else failed ones are left out.
    :returns: an iterator over pairs, sync and async; the run begins with its first step.
    :raises RunFailed: from the iterator, after all other pairs, if a node failed.

    >>> import feste
    >>> double = feste.task(lambda x: 2 * x)
    >>> nodes = [double(1), double(2)]
    >>> sorted(value for node, value in as_completed(nodes))
    [2, 4]
    """
    return _Completed(nodes, context.settings(**settings))


class _Completed(Items[tuple[Any, Any]]):
    def __init__(self, nodes: Iterable[Any], settings: Settings) -> None:
        super().__init__(settings)
        self._items: list[Item] = []
        for node in nodes:
            item = Item(node, node)
            if item.missing:
                self._items.append(item)
            else:
                self._ready.append((node, node))
        self._waiting = len(self._items)

    def _work(self) -> Callable[[], None] | None:
        if not self._items:
            return None
        items, self._items = self._items, []
        forget_report()
        return lambda: self._run(items, self._settings, grows=False)

    def _done(self, item: Item, value: Any) -> None:
        self._ready.append((item.name, value))
