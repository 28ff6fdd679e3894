"""The queue of a gate: fair between runs, and by rank within each.

The run that has had the fewest tokens so far goes next. That is what deficit round robin
approximates with rounds and quanta (Shreedhar and Varghese, "Efficient fair queuing using deficit
round robin", 1995); with a heap of runs it is exact, for requests of any size.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from feste.backend import Request

__all__ = ["FairQueue", "Place"]

P = TypeVar("P")


class Place(Generic[P]):
    """The place of an item in a queue.

    :param item: the item.
    :param request: its request.
    """

    __slots__ = ("gone", "item", "lane", "request")

    def __init__(self, item: P, request: Request | None, lane: _Lane[P]) -> None:
        self.item = item
        self.request = request
        self.lane = lane
        #: Whether it was removed.
        self.gone = False


class _Lane(Generic[P]):
    """The items of one run."""

    __slots__ = ("had", "held", "places", "size", "waits")

    def __init__(self) -> None:
        #: How many of its items are in the queue.
        self.size = 0
        #: Why its turn does not come for now.
        self.held: set[str] = set()
        #: The tokens that it has had, as compared with the other lanes.
        self.had = 0.0
        self.places: list[tuple[int, int, Place[P]]] = []
        #: Whether it is among those that wait for their turn.
        self.waits = False


class FairQueue(Generic[P]):
    """Items of several lanes, one for each run; every operation takes O(log n).

    A lane is a name, so that the queue keeps no run alive.

    >>> queue = FairQueue()
    >>> for item, lane in ("a1", "A"), ("a2", "A"), ("a3", "A"), ("b1", "B"):
    ...     queue.push(item, 0, lane)
    >>> [queue.pop(1.0) for _ in range(4) if queue.peek()]
    ['a1', 'b1', 'a2', 'a3']
    """

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane[P]] = {}
        self._turns: list[tuple[float, int, _Lane[P]]] = []
        self._places: dict[int, Place[P]] = {}
        self._held: dict[str, _Lane[P]] = {}
        self._count = 0
        #: What the lane whose turn it was last had had then: a new lane begins there.
        self._level = 0.0
        self._prune_at = 64

    def __len__(self) -> int:
        return len(self._places)

    @property
    def turns(self) -> int:
        """The number of items in lanes whose turn may come."""
        return len(self._places) - sum(lane.size for lane in self._held.values())

    @property
    def held_by(self) -> str:
        """Why all items have to wait, if they are of lanes that are held; else an empty text."""
        if self.turns:
            return ""
        return next((why for lane in self._held.values() for why in lane.held), "")

    def hold(self, lane: str, why: str) -> None:
        """Let other lanes have their turns, until :meth:`let_go` for the same reason.

        :param lane: the lane.
        :param why: the reason, as in CAUSES.
        """
        found = self._lanes.setdefault(lane, _Lane())
        found.held.add(why)
        self._held[lane] = found

    def let_go(self, lane: str, why: str) -> None:
        """Let a lane have turns again, if nothing else holds it.

        :param lane: the lane.
        :param why: the reason that is no more.
        """
        found = self._held.get(lane)
        if found is not None:
            found.held.discard(why)
            if not found.held:
                del self._held[lane]
                if found.size:
                    self._line_up(found)

    def _line_up(self, lane: _Lane[P]) -> None:
        if not lane.waits and not lane.held:
            lane.waits = True
            lane.had = max(lane.had, self._level)
            self._count += 1
            heapq.heappush(self._turns, (lane.had, self._count, lane))

    def push(self, item: P, rank: int, lane: str = "", request: Request | None = None) -> None:
        """Add an item.

        :param item: the item; it is not in the queue yet.
        :param rank: its priority in its lane: the highest goes first, equal ones in order of arrival.
        :param lane: whose it is.
        :param request: its request.
        """
        found = self._lanes.get(lane)
        if found is None:
            if len(self._lanes) >= self._prune_at:
                self._prune()
            found = self._lanes[lane] = _Lane()
        self._count += 1
        place = self._places[id(item)] = Place(item, request, found)
        found.size += 1
        heapq.heappush(found.places, (-rank, self._count, place))
        self._line_up(found)

    def peek(self) -> Place[P] | None:
        """Return the place of the item whose turn it is, or None if there is none."""
        while self._turns:
            lane = self._turns[0][2]
            while lane.places and lane.places[0][2].gone:
                heapq.heappop(lane.places)
            if lane.places and not lane.held:
                return lane.places[0][2]
            heapq.heappop(self._turns)[2].waits = False
        return None

    def pop(self, tokens: float) -> P:
        """Remove and return the item that :meth:`peek` has shown.

        :param tokens: what it costs its lane.
        """
        had, _, lane = self._turns[0]
        place = heapq.heappop(lane.places)[2]
        del self._places[id(place.item)]
        lane.size -= 1
        self._level = had
        lane.had = had + tokens
        self._count += 1
        heapq.heapreplace(self._turns, (lane.had, self._count, lane))
        return place.item

    def remove(self, item: P) -> bool:
        """Remove an item; return whether it was in the queue.

        :param item: the item.
        """
        place = self._places.pop(id(item), None)
        if place is not None:
            place.gone = True
            place.lane.size -= 1
        return place is not None

    def drop(self, lane: str) -> list[P]:
        """Remove a whole lane, and return its items.

        :param lane: the lane.
        """
        found = self._lanes.pop(lane, None)
        self._held.pop(lane, None)
        if found is None:
            return []
        items = [place.item for _, _, place in found.places if not place.gone]
        for item in items:
            del self._places[id(item)]
        found.places, found.size = [], 0
        return items

    def items(self) -> list[P]:
        """Return all items, in no order."""
        return [place.item for place in self._places.values()]

    def has(self, lane: str) -> bool:
        """Return whether a lane has items.

        :param lane: the lane.
        """
        found = self._lanes.get(lane)
        return found is not None and found.size > 0

    def _prune(self) -> None:
        """Forget lanes that are empty and have no debt to those that wait."""
        self._lanes = {
            name: lane
            for name, lane in self._lanes.items()
            if lane.places or lane.held or lane.had > self._level
        }
        self._prune_at = max(64, 2 * len(self._lanes))
