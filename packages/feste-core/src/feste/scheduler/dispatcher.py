"""Start ready Python work in order of priority, in chunks where tasks are small or form a chain."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from feste.draw import Determinism
from feste.fused import Halted, StepFailed
from feste.node import PENDING
from feste.scheduler.batching.flights import SHAREABLE
from feste.scheduler.emission import Emission
from feste.scheduler.executor import CHUNK, QUICK, Executor, PyTask
from feste.scheduler.faults import fault, raised
from feste.scheduler.halves import prepare_request
from feste.scheduler.run import Run
from feste.scheduler.states import (
    DONE,
    FINISHING,
    NOT_STARTED,
    OPEN,
    PREPARING,
    READY,
    REPLAYED,
    RUNNING,
    WAITING,
)
from feste.scheduler.work import guard

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Dispatcher"]

#: Seconds between checks of a chunk; one that made no progress returns its unstarted tasks.
TAIL = 0.005
_MOST = 256
#: The stages that make values of answers that are here: they run also when the run stops.
_PAID = ("unpack", "parse")
_FIRST_GUESS = 5e-5


class Dispatcher:
    """Assign ready Python work to free places of executors.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self.busy: dict[tuple[Executor, str], int] = {}
        self.chunks: dict[int, list[PyTask]] = {}
        self._places: dict[int, tuple[Executor, str]] = {}
        self.cost: dict[str, float] = {}

    def push(self, run: Run, where: str, rank: int, what: int | PyTask) -> None:
        heapq.heappush(run.ready.setdefault(where, []), (-rank, self.brain.number(), what))

    def place(self, run: Run, i: int) -> str:
        """Return where a node's Python runs; if the executor raises, fail the node and return "".

        :param run: the run.
        :param i: the node's position.
        """
        op: Any = run.program.nodes[i].op
        if op.kind == "call":
            return QUICK
        try:
            where: Any = run.executor.place(op)
        except BaseException as error:  # a plugin may raise anything
            told = raised(run.executor, "place", error)
        else:
            if isinstance(where, str) and where:
                return where
            told = fault(run.executor, f"answers {where!r} for place")
        self.brain.lifecycle.fail(run, i, told)
        return ""

    def hand_out(self) -> None:
        """Start ready work wherever a place is free: runs in turn, the critical path first."""
        progress = True
        while progress:
            progress = False
            for run in self.brain.runs:
                for where, heap in run.ready.items():
                    if heap and self._free(run.executor, where):
                        self._give(run, where, heap)
                        progress = True
        if len(self.brain.runs) > 1:
            self.brain.runs.append(self.brain.runs.pop(0))

    def _free(self, executor: Executor, where: str) -> bool:
        return self.busy.get((executor, where), 0) < self.brain.questions.capacity(executor, where)

    def _give(self, run: Run, where: str, heap: list[tuple[int, int, Any]]) -> None:
        chunk: list[PyTask] = []
        cost = 0.0
        place = (run.executor, where)
        limit = self.brain.questions.chunk_seconds(run.executor, where)
        small, most = min(limit, CHUNK), _MOST
        if limit > CHUNK:  # more than a place's fair share only of what is not worth spreading
            free = self.brain.questions.capacity(*place) - self.busy.get(place, 0)
            most = min(most, -(-len(heap) // max(1, free)))
        while heap and (
            not chunk
            or (cost < limit and len(chunk) < most)
            or (cost < small and len(chunk) < _MOST)
        ):
            what = heapq.heappop(heap)[2]
            if type(what) is PyTask:
                if _is_wanted(what):
                    chunk.append(what)
                    cost += self._cost(what, limit)
            elif run.state[what] == READY:
                task = self._begin(run, what)
                chunk.append(task)
                cost += self._cost(task, limit)
                if cost < limit and task.stage == "run":
                    cost = self._chain(run, where, what, task, chunk, cost, limit)
        if not chunk:
            return
        self.busy[place] = self.busy.get(place, 0) + 1
        self.chunks[id(chunk)], self._places[id(chunk)] = chunk, place
        if len(chunk) > 1 and limit <= CHUNK:
            self.brain.later(TAIL, lambda now: self._reclaim(run.executor, chunk))
        self.brain.act("call", run.executor, where, chunk)

    def _cost(self, task: PyTask, limit: float) -> float:
        known = self.cost.get(task.name)
        if known is not None:
            return known
        user = task.stage == "run" and task.node.op.kind == "task"
        return max(limit, CHUNK) if user else _FIRST_GUESS

    def _begin(self, run: Run, i: int) -> PyTask:
        node = run.program.nodes[i]
        values = [run.values[d] for d in run.program.deps[i]]
        op: Any = node.op
        if op.kind == "call":
            run.state[i] = PREPARING
            prefixes = run.prefixes.get(i, ())
            keyed = run.answers is not None or node.determinism in SHAREABLE
            profiles = run.profiles if run.caps else None
            args = (op, node.draw, node.args, values, keyed, prefixes, profiles)
            return PyTask(run, i, "prepare", prepare_request, args, {}, [], f"{op.name}.prepare")
        return self._start(run, i, values)

    def _start(self, run: Run, i: int, values: list[Any]) -> PyTask:
        node = run.program.nodes[i]
        op: Any = node.op
        run.state[i] = RUNNING
        task = PyTask(run, i, "run", op.fn, node.args, node.kwargs, values, op.name)
        if getattr(op, "once", False):
            guard(task)
        return task

    def _chain(
        self,
        run: Run,
        where: str,
        i: int,
        task: PyTask,
        chunk: list[PyTask],
        cost: float,
        limit: float,
    ) -> float:
        """Extend the chunk along its chain: add each next node that waits only for the last task."""
        program = run.program
        while cost < limit and len(chunk) < _MOST:
            consumers = program.consumers[i]
            if len(consumers) != 1 or program.nodes[i].op.emits:
                break
            j = consumers[0]
            node = program.nodes[j]
            if (
                run.state[j] != WAITING
                or run.pending[j] != 1
                or node.op.kind == "call"
                or self.place(run, j) != where
                or program.keepers[j][0].value is not PENDING
                or self.brain.lifecycle.paid(run, j) is not None
                or (
                    node.determinism is not Determinism.PURE
                    and not self.brain.joins.claim(run, j, node)
                )
            ):
                break
            values = [task if d == i else run.values[d] for d in program.deps[j]]
            task = self._start(run, j, values)
            run.ready_at[j] = self.brain.now
            chunk.append(task)
            cost += self._cost(task, limit)
            i = j
        return cost

    def _reclaim(self, executor: Executor, chunk: list[PyTask]) -> None:
        if self.chunks.get(id(chunk)) is chunk:
            self.brain.act("reclaim", executor, chunk)
            self.brain.later(TAIL, lambda now: self._reclaim(executor, chunk))

    def on_free(self, executor: Executor, where: str, chunk: list[PyTask]) -> None:
        """Handle the end of a chunk."""
        if self.chunks.pop(id(chunk), None) is None:
            return  # started by an earlier brain that broke
        place = self._places.pop(id(chunk))
        self.busy[place] -= 1
        if not self.busy[place]:  # nothing keeps an executor that is done with
            del self.busy[place]
        if place[1] != where:
            said = f"reported free for a chunk in {where!r} that was given to it in {place[1]!r}"
            self.brain.on_fault(executor, fault(executor, said))

    def on_returned(self, executor: Executor, tasks: list[PyTask]) -> None:
        """Put tasks of a chunk that were not started back into the queue."""
        for task in tasks:
            run, i = task.run, task.index
            if not _is_wanted(task):
                continue
            if run.stopping and task.stage not in _PAID:
                self.brain.lifecycle.end(run, i, NOT_STARTED)
            elif task.stage != "run":
                self.push(run, QUICK, run.program.rank[i] + FINISHING, task)
            elif run.pending[i]:
                run.state[i] = WAITING
            else:
                run.state[i] = READY
                where = self.place(run, i)
                if where:
                    self.push(run, where, run.program.rank[i], i)

    def on_done(
        self,
        executor: Executor,
        task: PyTask,
        ok: bool,
        value: Any,
        seconds: float,
        worker: str = "",
    ) -> None:
        """Handle the end of one piece of Python."""
        name = task.name
        known = self.cost.get(name)
        # a thread that waits for the GIL inflates wall time, so one outlier must not count for much
        self.cost[name] = seconds if known is None else 0.8 * known + 0.2 * min(seconds, 4 * known)
        self.brain.durations.note(name, seconds)
        run = task.run
        run.seconds[name] += seconds
        self.brain.waits.ran(task, ok, value, seconds)
        if worker:
            run.workers.ran(task, seconds, worker)
        if _is_wanted(task):
            self.brain.stages[task.stage](run, task, ok, value, seconds)

    def on_ran(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        """Handle the end of a node's own Python."""
        if seconds > CHUNK:
            begun = self.brain.now - seconds
            lane = f"{task.node.op.kind} {task.name}"
            waited = max(0.0, begun - run.ready_at[task.index])
            end = self.brain.now - run.started
            worker = run.workers.of(task.index)
            run.spans.append((lane, task.key, begun - run.started, end, waited, ok, worker))
        if type(value) is StepFailed and value.error is not None:
            step = self.brain.lifecycle.take_apart(run, task.index, value.at)
            value.error.__cause__ = value.__cause__  # which does not travel with it
            self.brain.lifecycle.fail(run, step, value.error)
        elif not ok:
            self.brain.lifecycle.fail(run, task.index, value)
        elif type(value) is Emission:
            self.brain.growth.compile(run, task.index, value)
        elif type(value) is Halted:  # the run starts nothing new
            step = self.brain.lifecycle.take_apart(run, task.index, value.at)
            self.brain.lifecycle.done(run, step, value.value, DONE)
        else:
            self.brain.lifecycle.done(run, task.index, value, REPLAYED if task.replayed else DONE)


def _is_wanted(task: PyTask) -> bool:
    """Whether a node still waits for a task, or it has paid answers that are not kept yet."""
    state = task.run.state
    return task.stage == "unpack" or any(state[i] < OPEN for i in task.members)
