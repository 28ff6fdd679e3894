"""Who can still join a shared request: the calls of a group that may arrive without another one.

A call of a group is *held* until its request is sent. A node is *behind* the held calls that it needs,
directly or through nodes that are not held. What is behind nothing moves by itself: it arrives, or
fails. So a group whose remaining calls are all behind held ones gains nothing by waiting for time to
pass. The counters follow each event in constant time for each connection, without walks through the
graph: a call is held and let go once.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING

from feste.scheduler.batching.queue import Queue
from feste.scheduler.states import GATHERED, OPEN, PREPARING, READY, RUNNING

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["Feeders"]

#: How many steps an estimate of an arrival may look at; what is beyond counts as no time.
_STEPS = 64
#: How many tasks that may return calls are asked when they end.
_EMITTERS = 16
#: How many nodes are visited to find out whether a group waits for another one.
_VISITS = 20_000


class Feeders:
    """The groups of one run, and what stands before the calls that are still to come.

    :param run: the run; its calls are held from here on.
    :param groups: the key and the positions of the calls of each group.
    """

    def __init__(self, run: Run, groups: Iterable[tuple[Hashable, Iterable[int]]]) -> None:
        self.run = run
        self.queues: dict[Hashable, Queue] = {}
        self.queue_of: dict[int, Queue] = {}
        self.held: set[int] = set()
        #: For each node, how many of its inputs are held, or behind held ones.
        self._behind: dict[int, int] = {}
        #: Tasks that have not returned yet and may return calls of any group.
        self._emitters = set(run.emitting)
        for key, members in groups:
            for i in members:
                self._enter(key, i)
        stack = list(self.held)
        for i in stack:  # grows while it is read
            for c in run.program.consumers[i]:
                self._behind[c] = self._behind.get(c, 0) + 1
                if self._behind[c] == 1 and c not in self.held:
                    stack.append(c)
        for i, queue in self.queue_of.items():
            (queue.far if self._behind.get(i) else queue.near).add(i)
        #: Those of the emitters that move by themselves.
        self.emitters = {i for i in self._emitters if not self._behind.get(i)}

    def _enter(self, key: Hashable, i: int) -> Queue:
        queue = self.queues.get(key)
        if queue is None:
            call = self.run.program.nodes[i].call
            assert call is not None, "only calls are grouped"
            queue = self.queues[key] = Queue(self.run, call)
        self.queue_of[i] = queue
        self.held.add(i)
        return queue

    def join(self, key: Hashable, i: int) -> None:
        """Add a new node, which has no inputs yet, to a group.

        :param key: the group.
        :param i: the position of the node.
        """
        queue = self._enter(key, i)
        queue.near.add(i)
        heapq.heappush(queue.soon, (0.0, i))

    def connected(self, i: int, deps: Iterable[int]) -> None:
        """Note that a node has got further inputs.

        :param i: its position.
        :param deps: their positions.
        """
        more = sum(self._blocks(d) for d in deps)
        if more:
            before = self._behind.get(i, 0)
            self._behind[i] = before + more
            if not before:
                self._turned(i, behind=True)
                if i not in self.held:
                    self._spread(i, 1)

    def _blocks(self, i: int) -> bool:
        return i in self.held or self._behind.get(i, 0) > 0

    def _spread(self, i: int, step: int) -> None:
        """Tell all nodes behind a node that it begins (1) or ceases (-1) to hold them up."""
        stack = [i]
        while stack:
            for c in self.run.program.consumers[stack.pop()]:
                count = self._behind[c] = self._behind.get(c, 0) + step
                if count == (step > 0):
                    self._turned(c, behind=step > 0)
                    if c not in self.held:
                        stack.append(c)

    def _turned(self, i: int, *, behind: bool) -> None:
        """Move a node between those that move by themselves and those that do not."""
        if i in self._emitters:
            (self.emitters.discard if behind else self.emitters.add)(i)
        queue = self.queue_of.get(i)
        if queue is None:
            return
        if behind and i in queue.near:
            queue.near.remove(i)
            queue.far.add(i)
        elif not behind and i in queue.far:
            queue.far.remove(i)
            queue.near.add(i)
            heapq.heappush(queue.soon, (0.0, i))

    def hold(self, i: int) -> None:
        """Let a node hold up what needs it, since it waits for something outside this run.

        :param i: its position.
        """
        if i not in self.held:
            self.held.add(i)
            if not self._behind.get(i):
                self._spread(i, 1)

    def release(self, i: int) -> None:
        """Let a node go: it was sent, or it has ended.

        :param i: its position.
        """
        if i in self.held:
            self.held.remove(i)
            if not self._behind.get(i):
                self._spread(i, -1)

    def emitted(self, i: int) -> bool:
        """Note that no further calls come from a node; return whether any could have.

        :param i: its position.
        """
        self.emitters.discard(i)
        if i not in self._emitters:
            return False
        self._emitters.remove(i)
        return True

    @property
    def are_moving(self) -> bool:
        """Whether anything may still arrive in any group without a further request."""
        return bool(self.emitters) or any(queue.near for queue in self.queues.values())

    # --- estimates --------------------------------------------------------------------------------

    def next_arrival(self, queue: Queue, now: float, seconds: Callable[[int], float]) -> float:
        """Return when the next call is expected in a queue; infinity if none can come by itself.

        :param queue: the queue.
        :param now: the time on the brain's clock.
        :param seconds: returns the expected duration of a node, by its position.
        """
        some = itertools.islice(self.emitters, _EMITTERS)
        soonest = min((self._ends(i, now, seconds) for i in some), default=float("inf"))
        soon = queue.soon
        if len(soon) < len(queue.near):  # those that were near from the beginning
            soon[:] = [(0.0, i) for i in queue.near]
        while soon:
            known, i = soon[0]
            if i not in queue.near:
                heapq.heappop(soon)
                continue
            if known >= soonest:
                break
            expected = self._begins(i, now, seconds, [_STEPS])
            if expected <= max(now, known) + 1e-9 or len(soon) == 1:
                return min(soonest, expected)
            heapq.heapreplace(soon, (expected, i))
        return soonest

    def _begins(
        self, i: int, now: float, seconds: Callable[[int], float], steps: list[int]
    ) -> float:
        """Return when all inputs of a node are expected to be there."""
        at = now
        for d in self.run.program.deps[i]:
            if self.run.state[d] < OPEN and steps[0] > 0:
                steps[0] -= 1
                at = max(at, self._ends(d, now, seconds, steps))
        return at

    def _ends(
        self,
        i: int,
        now: float,
        seconds: Callable[[int], float],
        steps: list[int] | None = None,
    ) -> float:
        """Return when a node is expected to end, at the earliest now."""
        run = self.run
        known = run.expected.get(i)
        if known is not None:
            return max(now, known)
        begun = run.state[i] in (READY, RUNNING, PREPARING, GATHERED)
        begin = run.ready_at[i] if begun else self._begins(i, now, seconds, steps or [_STEPS])
        return max(now, begin + seconds(i))

    def held_elsewhere(self, queue: Queue) -> int:
        """Return how many calls of a group wait for other groups only, so that they may still come.

        :param queue: the group's queue.
        """
        if not queue.far or not any(q.is_open for q in self.queues.values() if q is not queue):
            return 0
        if queue.witness in queue.far:
            return 1
        behind = set(self._behind_of(queue))
        others = queue.far - behind
        queue.witness = next(iter(others), -1)
        return len(others)

    def _behind_of(self, queue: Queue) -> Iterator[int]:
        """Yield the group's calls that need one of those that wait in its queue."""
        run = self.run
        seen = set(queue.present)
        stack = list(seen)
        while stack and len(seen) < _VISITS:
            for c in run.program.consumers[stack.pop()]:
                if c not in seen and run.state[c] < OPEN:
                    seen.add(c)
                    stack.append(c)
                    if c in queue.far:
                        yield c
