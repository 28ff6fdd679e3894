"""The admission gate: it limits the requests in flight for one account at one endpoint.

The limit starts low and doubles every round trip until the provider refuses (slow start), then
grows by one per round trip. A refusal for rate halves it, at most once per round trip, and closes
the gate for everyone for as long as the provider asks. See Chiu and Jain, "Analysis of the increase
and decrease algorithms for congestion avoidance", 1989.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from feste.backend import Limits
from feste.backend.limits import CEILING, START

__all__ = ["Gate"]

P = TypeVar("P")


class Gate(Generic[P]):
    """One gate: it holds the waiting requests, and the brain asks which may be sent.

    :param limits: the user's limits for the account.

    >>> gate = Gate(Limits(concurrency=1))
    >>> gate.push("a", 0), gate.push("b", 5)
    (None, None)
    >>> gate.pop(0.0), gate.pop(0.0)
    ('b', None)
    >>> gate.left(0.0, 1.0)
    >>> gate.pop(1.0)
    'a'
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.ceiling = CEILING
        self.limit = float(START)
        self.in_flight = 0
        #: Requests that are being packed, and will queue here.
        self.coming = 0
        self.closed_until = 0.0
        #: When the brain will check this gate again by itself.
        self.wakes_at = 0.0
        self._slow_start = True
        self._halved_at = float("-inf")
        self._queue: list[tuple[int, int, P]] = []
        self._count = 0
        #: Keyed by `id()`: a client may define its own `__eq__`.
        self._said: dict[int, tuple[weakref.ref[Any], int]] = {}
        if limits is not None:
            self._take(limits.concurrency)

    def heed(self, client: Any, limits: Limits) -> None:
        """Apply a client's limits. If several living clients share the account, the lowest limit wins.

        :param client: the client.
        :param limits: its limits.
        """
        said = limits.concurrency or 0
        known = self._said.get(id(client))
        if (
            known is None
            or known[1] != said
            or any(ref() is None for ref, _ in self._said.values())
        ):
            self._said[id(client)] = (weakref.ref(client), said)
            self._said = {name: one for name, one in self._said.items() if one[0]() is not None}
            self._take(min((n for _, n in self._said.values() if n), default=None))

    def _take(self, concurrency: int | None) -> None:
        """Use the user's limit, or start to probe for one."""
        never_refused = self._halved_at == float("-inf")
        if concurrency is not None:
            self.limit = float(concurrency) if never_refused else min(self.limit, concurrency)
        elif self.ceiling < CEILING:  # the client that gave a limit is gone: start to probe
            self.limit = float(START) if never_refused else min(self.limit, START)
        self.ceiling = concurrency or CEILING
        self._slow_start = never_refused and concurrency is None

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, item: P, rank: int) -> None:
        """Add an item to the queue.

        :param item: the item.
        :param rank: its priority: the highest goes first, equal ones in order of arrival.
        """
        self._count += 1
        heapq.heappush(self._queue, (-rank, self._count, item))

    def room(self, now: float) -> int:
        """Return how many more requests it would admit now.

        :param now: the time in seconds on the brain's clock.
        """
        if now < self.closed_until:
            return 0
        return max(0, int(self.limit) - self.in_flight - self.coming - len(self._queue))

    def pop(self, now: float) -> P | None:
        """Return the next item that may go, counted as in flight; None if none may go.

        :param now: the time in seconds on the brain's clock.
        """
        if not self._queue or self.in_flight >= int(self.limit) or now < self.closed_until:
            return None
        self.in_flight += 1
        return heapq.heappop(self._queue)[2]

    def left(self, sent: float, now: float) -> None:
        """Record a request that was served.

        :param sent: the time at which it was sent.
        :param now: the time in seconds on the brain's clock.
        """
        self.in_flight -= 1
        if sent > self._halved_at:
            self.limit = min(
                self.ceiling, self.limit + (1.0 if self._slow_start else 1.0 / self.limit)
            )

    def lost(self) -> None:
        """Record a request whose outcome says nothing about the limit."""
        self.in_flight -= 1

    def throttled(self, sent: float, now: float, wait: float | None) -> None:
        """Record a request that was refused for rate.

        :param sent: the time at which it was sent.
        :param now: the time in seconds on the brain's clock.
        :param wait: the seconds that the provider asks everyone to wait, or None.
        """
        self.in_flight -= 1
        self._slow_start = False
        if sent > self._halved_at:  # one cut for all requests that were in flight together
            self._halved_at = now
            self.limit = max(1.0, self.limit / 2)
        if wait is not None:
            self.closed_until = max(self.closed_until, now + wait)

    def drop(self, unwanted: Callable[[P], bool]) -> list[P]:
        """Remove the unwanted items from the queue and return them.

        :param unwanted: decides whether an item is unwanted.
        """
        dropped = [item for _, _, item in self._queue if unwanted(item)]
        if dropped:
            self._queue = [entry for entry in self._queue if not unwanted(entry[2])]
            heapq.heapify(self._queue)
        return dropped
