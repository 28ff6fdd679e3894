"""State changes of nodes: becoming ready, done or failed, and poisoning what needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from feste.backend import Response
from feste.draw import Determinism
from feste.errors import FesteError, NotStarted, UpstreamFailed
from feste.events import NodeFinished
from feste.fused import PREVIOUS, Fused
from feste.node import PENDING, Node
from feste.scheduler.fallbacks import Elsewhere
from feste.scheduler.run import Run
from feste.scheduler.states import (
    DONE,
    FAILED,
    JOINED,
    KEPT,
    NOT_STARTED,
    OPEN,
    READY,
    RUNNING,
    SENT,
    SKIPPED,
    STATES,
    WAITING,
)
from feste.wording import counted

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Lifecycle"]


class Lifecycle:
    """Move nodes from state to state.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self._settling: deque[tuple[Run, int, Any, int]] = deque()

    @property
    def is_settling(self) -> bool:
        """Whether a node is being given its value; after an exception, others wait for ever."""
        return bool(self._settling)

    def ready(self, run: Run, i: int) -> None:
        """Start a node whose inputs are all available."""
        run.ready_at[i] = self.brain.now
        node = run.program.nodes[i]
        kept = run.program.keepers[i][0].value
        if kept is not PENDING:
            self.brain.journaling.store_kept(run, i, kept)
            return
        kept = self.brain.handing.known(run, i)
        if kept is not PENDING:
            self.done(run, i, kept, KEPT)
            return
        if node.value is not PENDING:  # a constant that an optimization put there
            self.done(run, i, node.value, DONE)
            return
        if run.stopping:
            self.end(run, i, NOT_STARTED)
            return
        if not self.brain.joins.begins(run, i, node):
            return
        paid = self.paid(run, i)
        if paid is not None and i not in run.emitters:
            self._go_on(run, i, paid)
            return
        run.state[i] = READY
        where = self.brain.dispatcher.place(run, i)
        if where:
            self.brain.dispatcher.push(run, where, run.program.rank[i], i)

    def _go_on(self, run: Run, i: int, paid: Any) -> None:
        """Continue from what an earlier run paid for: an unparsed response, or returned nodes."""
        if isinstance(paid, Elsewhere):
            self.brain.fallbacks.turn(run, i, paid.turns)
            paid = paid.response
        if isinstance(paid, Response):
            self.brain.calls.parse_again(run, i, paid)
        else:
            run.state[i] = RUNNING
            self.brain.growth.compile(run, i, paid)

    def paid(self, run: Run, i: int) -> Any:
        """Return what an earlier run paid for on the way to a node's value, or None.

        :param run: the run.
        :param i: the node's position.
        """
        for keeper in run.program.keepers[i]:
            if keeper.paid is not None:
                return keeper.paid
        return None

    def keep_paid(self, run: Run, i: int, paid: Any) -> None:
        """Let a node keep what was paid for before its value is made of it.

        :param run: the run.
        :param i: the node's position.
        :param paid: a :class:`~feste.backend.Response` or an emission; None to forget it.
        """
        if i in run.turns and isinstance(paid, Response):
            paid = Elsewhere(run.turns[i], paid)
        if run.keep != "none":
            for keeper in run.program.keepers[i]:
                if keeper.value is PENDING:
                    keeper.paid = paid

    def done(self, run: Run, i: int, value: Any, state: int) -> None:
        """Give a node its value. A queue replaces recursion when consumers are done at once."""
        self._settling.append((run, i, value, state))
        if len(self._settling) == 1:
            while self._settling:
                self._settle(*self._settling[0])
                self._settling.popleft()

    def _settle(self, run: Run, i: int, value: Any, state: int) -> None:
        if run.state[i] >= OPEN:
            return
        program = run.program
        node = program.nodes[i]
        run.values[i] = value
        if run.outlet is not None:
            run.outlet.keep(program.keepers[i], value)
        if node.op.kind == "call":
            run.calls_done += 1
        if run.keep != "none":
            paid = node.op.kind == "call" or i in run.emitters
            if paid or (run.keep == "all" and not run.executor.remote):
                for kept in program.keepers[i]:
                    if kept.value is PENDING:
                        kept.value, kept.paid = value, None
        self.end(run, i, state)
        for j in program.consumers[i]:
            run.pending[j] -= 1
            if not run.pending[j] and run.state[j] == WAITING:
                self.ready(run, j)

    def take_apart(self, run: Run, i: int, at: int) -> int:
        """Make each step of a fused node a node of its own; return the position of the one under way.

        Those before it are done, and nobody holds their values; those after it wait. The last stays
        at the node's position.

        :param run: the run.
        :param i: the position of the node; any other node is left as it is.
        :param at: the number of the step under way; -1 if the node got to its end.
        """
        program = run.program
        op = program.nodes[i].op
        if type(op) is not Fused or at == -1:
            return i
        nodes = [step.node for step in op.steps]
        high = program.rank[i] + len(nodes)
        places = [run.append(node, high - n, (node,)) for n, node in enumerate(nodes[:-1], 1)]
        places.append(i)
        inputs, state = program.deps[i], run.state[i]
        program.nodes[i], run.state[i] = nodes[-1], WAITING
        run.state[places[at]] = state
        if worker := run.workers.take(i):
            run.workers.put(places[: at + 1], worker)
        for n, j in enumerate(places):
            run.ready_at[j] = run.ready_at[i]
            if n < at:
                run.gone[j] = 1
                self.end(run, j, DONE)
                continue
            sources = op.steps[n].sources
            run.connect(j, [places[n - 1] if s == PREVIOUS else inputs[s] for s in sources])
            if n > at and run.stopping:
                self.end(run, j, NOT_STARTED)
        self.let_go(run, inputs)
        return places[at]

    def fail(self, run: Run, i: int, error: FesteError, *, final: bool = False) -> None:
        """Fail a node, and poison every node that needs it; unless another backend may be asked.

        :param run: the run.
        :param i: the node's position.
        :param error: why.
        :param final: whether no other backend is left to ask.
        """
        if not final and self.brain.fallbacks.pass_on(run, i, error):
            return
        self._record(run, i, error)
        self.end(run, i, FAILED)
        self.poison(run, i, error)
        run.series.calls_failed += run.program.nodes[i].op.kind == "call"
        if run.stopping:
            return
        if run.on_error == "stop":
            self.brain.stop(run)
        elif self._has_failed_too_often(run):
            failed = counted(run.series.calls_failed, "call")
            self.brain.stop(run, f"{failed} failed (max_failures={run.max_failures})")

    def _has_failed_too_often(self, run: Run) -> bool:
        most, series = run.max_failures, run.series
        if isinstance(most, float):
            most *= series.calls + sum(r.calls for r in self.brain.runs if r.series is series)
        return most is not None and 0 < series.calls_failed >= most

    def leave(self, run: Run, i: int, told: NotStarted) -> None:
        """End a node that will not be started, though its run goes on, and poison what needs it."""
        node = run.program.nodes[i]
        told.origin, told.node = node.where, node.key
        run.left = run.left or told
        run.errors[i] = told
        self.end(run, i, NOT_STARTED)
        self.poison(run, i, told)

    def lose(self, run: Run, i: int, error: FesteError) -> None:
        """Fail a node that was done but whose value could not be fetched."""
        self._record(run, i, error)
        run.state[i] = FAILED
        run.values[i] = None

    def _record(self, run: Run, i: int, error: FesteError) -> None:
        node = run.program.nodes[i]
        if not error.origin:
            error.origin = node.where
        if hasattr(error, "node") and not error.node:
            error.node = node.key
        run.errors[i] = error
        run.failed.append(i)

    def poison(self, run: Run, root: int, error: FesteError) -> None:
        key = run.program.nodes[root].key
        roots: tuple[FesteError, ...] = (error,)
        if isinstance(error, UpstreamFailed) and error.roots:
            roots = error.roots
            error, key = roots[0], getattr(roots[0], "node", "") or key
        stack = list(run.program.consumers[root])
        while stack:
            j = stack.pop()
            if run.state[j] >= OPEN:
                continue
            node = run.program.nodes[j]
            run.errors[j] = UpstreamFailed(
                f"{node.key} was not run: {type(error).__name__} in {key}: {error.message}",
                origin=node.where,
                node=node.key,
                roots=roots,
            )
            self.end(run, j, SKIPPED)
            stack.extend(run.program.consumers[j])

    def end(self, run: Run, i: int, state: int) -> None:
        """Put a node into its final state."""
        before = run.state[i]
        self.brain.waits.ended(run, i, before)
        run.state[i] = state
        run.open -= 1
        node = run.program.nodes[i]
        if before < SENT or before == JOINED:
            self.brain.lists.drop(run, i)
        if run.feeders is not None:
            self.brain.groups.ended(run, i)
        self.brain.joins.ended(run, i, node, state)
        if node.op.kind == "call":
            self.brain.flights.ended(run, i)
        self.let_go(run, run.program.deps[i])
        if not run.uses[i]:
            self.release(run, i)
        if run.outlet is not None:
            self.brain.handing.ended(run, i)
        if i in run.emitting:
            run.emitting.discard(i)
            if not run.emitting:
                held, run.held = run.held, []
                for j in held:
                    if not run.uses[j]:
                        self.release(run, j)
        worker = run.workers.take(i) if run.workers.rows else ""
        if NodeFinished.name in run.heard:
            self._tell(run, i, node, state, worker)
        if not run.open:
            self.brain.end_if_done(run)

    def let_go(self, run: Run, deps: Sequence[int]) -> None:
        """Release those values that a node which no longer needs them was the last to need.

        :param run: the run.
        :param deps: the positions of its inputs.
        """
        for d in deps:
            run.uses[d] -= 1
            if not run.uses[d]:
                self.release(run, d)

    def release(self, run: Run, i: int) -> None:
        """Release an unneeded value, unless a task may still return a node that needs it."""
        if run.emitting and run.program.nodes[i].determinism is not Determinism.PURE:
            run.held.append(i)
            return
        if run.outlet is not None and run.outlet.is_own(run.program.keepers[i]):
            return
        run.gone[i] = 1
        if run.executor.remote and run.state[i] == DONE:
            self.brain.act("release", run.executor, run.values[i])
        run.values[i] = None

    def _tell(self, run: Run, i: int, node: Node, state: int, worker: str) -> None:
        now = self.brain.now - run.started
        ready = run.ready_at[i] - run.started if run.ready_at[i] >= 0 else now
        self.brain.act("notify", run, partial(_finished, run, i, node, state, now, ready, worker))


def _finished(
    run: Run, i: int, node: Node, state: int, now: float, ready: float, worker: str
) -> NodeFinished:
    """Make a node's event; called on the observers' thread, since resolving a line is slow."""
    error = run.errors.get(i)
    return NodeFinished(
        run.name,
        now,
        node.key,
        node.op.name,
        node.op.kind,
        STATES[state],  # type: ignore[arg-type]
        ready,
        node.where,
        str(error) if error is not None else "",
        worker,
    )
