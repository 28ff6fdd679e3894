"""Form shared requests while the graph runs: decide for each group whether to wait or to send.

Nobody has to tune a delay, because the graph knows who can still come. The calls of a group are sent

- when they fill a request,
- when no other can come without a further request,
- when waiting costs more than a request saves: with k calls waiting and the next one expected in d
  seconds, if k * d exceeds the price of a request; and whatever is expected, when the waiting of all
  of them together has reached that price. The latter bounds the loss by twice the best possible
  (Dooly, Goldman and Scott, "TCP dynamic acknowledgment delay", 1998).

They are not sent while their account's gate could not take them anyway: requests grow meanwhile. The
price is the seconds that a request takes besides its calls, as measured (objective "balanced"),
nothing ("latency"), or without limit ("cost").
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from feste.backend import Request
from feste.scheduler.batching.feeders import Feeders
from feste.scheduler.batching.queue import Queue
from feste.scheduler.run import Run

if TYPE_CHECKING:
    from feste.scheduler.admission.gate import Gate
    from feste.scheduler.brain import Brain

__all__ = ["Groups"]


class Groups:
    """Decide when the calls of groups are sent; shared by all runs, though no request mixes them.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: Queues to decide about, in order, and those that wait for a gate.
        self._changed: dict[Queue, None] = {}
        self._shut: dict[Gate[Any], dict[Queue, None]] = {}

    # --- what happens to calls --------------------------------------------------------------------

    def join(self, run: Run, i: int, key: Hashable) -> None:
        """Let a call that a task has returned join the group of calls like it.

        :param run: the run.
        :param i: its position; it has no inputs yet.
        :param key: what the calls of the group have in common.
        """
        if run.feeders is None:
            run.feeders = Feeders(run, ())
        run.feeders.join(key, i)

    def arrive(self, run: Run, calls: Sequence[tuple[int, Request]]) -> bool:
        """Let calls wait for others of their group; return False if they have none.

        :param run: the run.
        :param calls: their positions and requests; all of one group.
        """
        queue = run.feeders and run.feeders.queue_of.get(calls[0][0])
        if not queue:
            return False
        queue.accrue(self.brain.now)
        if queue.gate is None:
            queue.gate = self.brain.gates.gate_of(queue.call, calls[0][1])
        for i, request in calls:
            queue.add(i, request, run.program.rank[i])
            self.brain.waits.arrived(run, i, queue.gate)
        if run.settings["objective"] == "cost":
            self.changed(run)  # others may have waited for this one's calls
        self._changed[queue] = None
        return True

    def leave(self, run: Run, i: int) -> None:
        """Forget a call that will not share a request: it has its answer already, or needs none.

        :param run: the run.
        :param i: its position.
        """
        queue = run.feeders and run.feeders.queue_of.get(i)
        if queue:
            queue.accrue(self.brain.now)
            queue.remove(i)
            self.changed(run)

    def ended(self, run: Run, i: int) -> None:
        """Note the end of any node.

        :param run: the run.
        :param i: its position.
        """
        if run.feeders is not None:
            run.feeders.release(i)
            run.expected.pop(i, None)
            if run.feeders.emitted(i):
                self.changed(run)

    def changed(self, run: Run) -> None:
        """Decide again about the groups of a run, since less can come to them than before.

        :param run: the run.
        """
        if run.feeders is not None:
            self._changed.update((q, None) for q in run.feeders.queues.values() if q.present)

    def wait_for(self, gate: Gate[Any]) -> bool:
        """Return whether groups wait until a gate has room.

        :param gate: the gate.
        """
        return gate in self._shut

    # --- decisions --------------------------------------------------------------------------------

    def decide(self) -> None:
        """Send what need not wait any longer."""
        for gate in [g for g, queues in self._shut.items() if self._opens(g, queues)]:
            for queue in self._shut.pop(gate):
                queue.waited, queue.accrued_at = 0.0, self.brain.now
                self._changed[queue] = None
        while self._changed:
            queue = next(iter(self._changed))
            del self._changed[queue]
            if queue.present and not queue.run.stopping:
                self._decide(queue)

    def _opens(self, gate: Gate[Any], queues: Iterable[Queue]) -> bool:
        has_room = gate.room(self.brain.now) > 0
        room = self.brain.windows.room
        return any((has_room and room(q.run.executor) > 0) or self._is_passed_by(q) for q in queues)

    def _is_passed_by(self, queue: Queue) -> bool:
        """Whether the backend of a group is down, and its calls ask another one."""
        return bool(queue.present) and self.brain.outages.is_passed_by(queue.call, queue.sample)

    def _decide(self, queue: Queue) -> None:
        assert queue.gate is not None, "known since the first call arrived"
        if self._is_passed_by(queue):
            self._send(queue, len(queue.present))
            return
        room = queue.gate.room(self.brain.now)
        room = int(min(room, self.brain.windows.room(queue.run.executor)))
        if room < 1:
            self._shut.setdefault(queue.gate, {})[queue] = None
            self.brain.gates.watch(queue.gate)
            return
        most = max(
            1, min(queue.call.max_items, self.brain.lists.taken(queue.call, queue.sample).items)
        )
        if queue.is_full(most) or not self._waits(queue):
            self._send(queue, most * room)

    def _waits(self, queue: Queue) -> bool:
        """Whether it is worth to wait for further calls of the group."""
        run, now = queue.run, self.brain.now
        feeders = run.feeders
        assert feeders is not None, "it has queues"
        objective = run.settings["objective"]
        if objective == "latency":
            return False
        if objective == "cost":
            if queue.near or feeders.emitters:
                return True
            return not self._goes_first(queue, feeders)
        if not queue.near and not feeders.emitters:
            return False
        price = self.brain.latencies.of(queue.call).base
        waited = queue.accrue(now)
        calls = len(queue.present)
        if waited >= price - 1e-9:
            return False
        expected = feeders.next_arrival(queue, now, partial(self._seconds, run))
        if calls * (expected - now) > price:
            return False
        rest = max(1e-6, (price - waited) / calls)
        if now + rest < queue.wakes_at:
            queue.wakes_at = now + rest
            self.brain.later(rest, lambda now: self._look_again(queue))
        return True

    def _look_again(self, queue: Queue) -> None:
        queue.wakes_at = float("inf")
        self._changed[queue] = None

    def _goes_first(self, queue: Queue, feeders: Feeders) -> bool:
        """Whether no other group should be sent before this one, so that more of its calls come."""
        elsewhere = feeders.held_elsewhere(queue)
        if not elsewhere:
            return True
        if feeders.are_moving:
            return False
        waiting = [q for q in feeders.queues.values() if q.present]
        return queue is max(waiting, key=lambda q: _readiness(q, feeders.held_elsewhere(q)))

    def _seconds(self, run: Run, i: int) -> float:
        """Return how long a node is expected to take; 0 if it is not known."""
        node = run.program.nodes[i]
        if node.call is not None:
            return self.brain.latencies.of(node.call).seconds()
        return self.brain.durations.of(node.op.name)

    def _send(self, queue: Queue, most: int) -> None:
        run = queue.run
        assert run.feeders is not None, "it has queues"
        queue.accrued_at = self.brain.now
        calls = queue.take(most)
        for i, _ in calls:
            run.feeders.release(i)
        self.brain.lists.send(run, calls)
        self.changed(run)


def _readiness(queue: Queue, elsewhere: int) -> tuple[float, int]:
    """Return how large a share of a group's next calls is ready, and how urgent they are.

    A group that is ready as a whole loses nothing by going first. See Chen et al., "ED-Batch", 2023.
    """
    ready = len(queue.present)
    return ready / (ready + elsewhere), queue.urgency
