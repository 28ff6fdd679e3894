"""The calls of one group in one run, which wait for each other."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request

if TYPE_CHECKING:
    from feste.scheduler.admission.gate import Gate
    from feste.scheduler.run import Run

__all__ = ["Queue"]


class Queue:
    """The calls of one group: those that wait to share a request, and those that may still come.

    :param call: their operation.
    """

    __slots__ = (
        "accrued_at",
        "call",
        "far",
        "gate",
        "heap",
        "near",
        "present",
        "run",
        "size",
        "soon",
        "tokens",
        "waited",
        "wakes_at",
        "witness",
    )

    def __init__(self, run: Run, call: Call[Any]) -> None:
        self.run = run
        self.call = call
        #: Where their requests queue; known with the first one.
        self.gate: Gate[Any] | None = None
        #: The calls that wait, and their tokens and bytes if requests are limited by these.
        self.present: dict[int, Request] = {}
        self.tokens = self.size = 0
        #: Their positions, the highest rank first; those of calls that have left stay there.
        self.heap: list[tuple[int, int]] = []
        #: The calls that may still come: those behind no held call, and the others.
        self.near: set[int] = set()
        self.far: set[int] = set()
        #: Estimated arrivals of near ones, the earliest first; never later than they are now.
        self.soon: list[tuple[float, int]] = []
        #: The waiting of all present calls together, in seconds, up to a time.
        self.waited = 0.0
        self.accrued_at = 0.0
        #: When the brain looks at it again by itself.
        self.wakes_at = float("inf")
        #: A far call that another group holds up, as far as is known.
        self.witness = -1

    def add(self, i: int, request: Request, rank: int) -> None:
        """Let a call wait here.

        :param i: its position.
        :param request: its request.
        :param rank: its priority.
        """
        self.near.discard(i)
        self.far.discard(i)
        self.witness = -1
        self.present[i] = request
        heapq.heappush(self.heap, (-rank, i))
        self._count(request, 1)

    def remove(self, i: int) -> None:
        """Forget a call: it does not wait here, and will not come.

        :param i: its position.
        """
        self.near.discard(i)
        self.far.discard(i)
        if i in self.present:
            self._count(self.present.pop(i), -1)

    def _count(self, request: Request, step: int) -> None:
        rule = self.call.rule
        if rule is not None and (rule.max_tokens is not None or rule.max_bytes is not None):
            self.tokens += step * request.tokens
            self.size += step * request.size

    def take(self, most: int) -> list[tuple[int, Request]]:
        """Return so many of the calls that wait, in the order of the graph, and forget them.

        :param most: the maximum number.
        """
        taken: list[tuple[int, Request]] = []
        while self.heap and len(taken) < most:
            _, i = heapq.heappop(self.heap)
            if i in self.present:
                taken.append((i, self.present[i]))
                self.remove(i)
        if not self.present:
            self.heap.clear()
        self.waited = 0.0
        return sorted(taken, key=lambda one: one[0])

    def is_full(self, most: int) -> bool:
        """Return whether one request can take no more than what waits.

        :param most: how many calls it can take.
        """
        rule = self.call.rule
        one_more = len(self.present) + 1, self.tokens + 1, self.size + 1
        return rule is None or rule.exceeds(*one_more, most)

    @property
    def urgency(self) -> int:
        """The highest rank of the calls that wait; there is one."""
        return max(self.run.program.rank[i] for i in self.present)

    @property
    def sample(self) -> Request:
        """The request of any call that waits: they go to one gate, and differ in the item."""
        return next(iter(self.present.values()))

    @property
    def is_open(self) -> bool:
        """Whether any of its calls waits or may still come."""
        return bool(self.present or self.near or self.far)

    def accrue(self, now: float) -> float:
        """Return the seconds that its calls have waited together, while a request could have been sent.

        :param now: the time on the brain's clock.
        """
        self.waited += len(self.present) * (now - self.accrued_at)
        self.accrued_at = now
        return self.waited
