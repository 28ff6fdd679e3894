"""The admission gate: how many requests one account may have in flight at one endpoint.

It begins with a few, doubles them every round trip until the provider says stop (slow start), then
adds one a round trip; a refusal for rate halves them, at most once a round trip, and closes the gate
for everyone for the time the provider asks. See Chiu and Jain, "Analysis of the increase and decrease
algorithms for congestion avoidance", 1989.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from feste.backend import Limits

__all__ = ["CEILING", "START", "Gate"]

P = TypeVar("P")

START = 10
CEILING = 512


class Gate(Generic[P]):
    """One gate. It holds what waits; the brain asks it what may go.

    :param limits: what the user says of the account.

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
        self.closed_until = 0.0
        #: When the brain will look again by itself.
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
        """Use what the user knows, or find out."""
        never_refused = self._halved_at == float("-inf")
        if concurrency is not None:
            self.limit = float(concurrency) if never_refused else min(self.limit, concurrency)
        elif self.ceiling < CEILING:  # whoever knew a limit is gone: begin to find out
            self.limit = float(START) if never_refused else min(self.limit, START)
        self.ceiling = concurrency or CEILING
        self._slow_start = never_refused and concurrency is None

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, item: P, rank: int) -> None:
        """Let something wait.

        :param item: what waits.
        :param rank: the highest goes first; equals go in the order they came.
        """
        self._count += 1
        heapq.heappush(self._queue, (-rank, self._count, item))

    def pop(self, now: float) -> P | None:
        """Return what may go now, counted as in flight; None if nothing may.

        :param now: seconds on the brain's clock.
        """
        if not self._queue or self.in_flight >= int(self.limit) or now < self.closed_until:
            return None
        self.in_flight += 1
        return heapq.heappop(self._queue)[2]

    def left(self, sent: float, now: float) -> None:
        """Note that a request was served.

        :param sent: when it was sent.
        :param now: seconds on the brain's clock.
        """
        self.in_flight -= 1
        if sent > self._halved_at:
            self.limit = min(
                self.ceiling, self.limit + (1.0 if self._slow_start else 1.0 / self.limit)
            )

    def lost(self) -> None:
        """Note that a request ended in a way that says nothing about the limit."""
        self.in_flight -= 1

    def throttled(self, sent: float, now: float, wait: float | None) -> None:
        """Note that a request was refused for rate.

        :param sent: when it was sent.
        :param now: seconds on the brain's clock.
        :param wait: seconds the provider asks everyone to wait, or None.
        """
        self.in_flight -= 1
        self._slow_start = False
        if sent > self._halved_at:  # one cut for all that were in flight together
            self._halved_at = now
            self.limit = max(1.0, self.limit / 2)
        if wait is not None:
            self.closed_until = max(self.closed_until, now + wait)

    def drop(self, unwanted: Callable[[P], bool]) -> list[P]:
        """Take out what need not wait any more, and return it.

        :param unwanted: tells whether something is such.
        """
        dropped = [item for _, _, item in self._queue if unwanted(item)]
        if dropped:
            self._queue = [entry for entry in self._queue if not unwanted(entry[2])]
            heapq.heapify(self._queue)
        return dropped
