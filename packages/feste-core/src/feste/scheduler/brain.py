"""The brain: decides what happens next. A plain state machine without I/O, clock or threads.

``on(events, now)`` takes what happened and returns what to do; whoever drives it does it and comes
back with what happened then. Events and actions are tuples that begin with a name:

.. code-block:: text

    events    ("submit", run)                                 a new run
              ("stop", run, grace)                            end it; requests in flight have so long
              ("grown", run, i, program, packed)              what the nodes that a task returned became
              ("done", executor, task, ok, value, seconds)    a piece of Python ended
              ("returned", executor, tasks)                   pieces of a chunk that were not begun
              ("free", executor, where, chunk)                a chunk is through
              ("sent", executor, handle, ok, value, seconds)  a request ended
              ("fetched", executor, handle, values)           values came here
              ("capacity", executor, where)                   hands have more or fewer places
    actions   ("call", executor, where, chunk)   ("reclaim", executor, chunk)
              ("send", executor, handle, call, request)   ("cancel", executor, handle)
              ("fetch", executor, handle, refs)   ("release", executor, ref)
              ("grow", run, i, packed)   ("notify", event)   ("finish", run)

The way of a call's node: WAITING for inputs, READY, PREPARING its request, GROUPED until its batch is
complete, QUEUED at the gate, SENT, PARSING, DONE. A task's node: WAITING, READY, RUNNING, DONE.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from feste.backend import Call, Request, Response
from feste.draw import Determinism, Draw
from feste.errors import (
    Ambiguous,
    CallError,
    CountMismatch,
    FesteError,
    GraphError,
    Interrupted,
    InvalidRequest,
    MalformedResponse,
    NodeError,
    RateLimited,
    UpstreamFailed,
)
from feste.events import NodeFinished, RequestFinished, RunFinished, RunStarted
from feste.node import PENDING, Node, fill
from feste.scheduler.batcher import Group, packed, unpacked
from feste.scheduler.executor import Executor, PyTask
from feste.scheduler.gate import Gate
from feste.scheduler.program import Program
from feste.scheduler.retry import RetryPolicy
from feste.scheduler.run import (
    DONE,
    FAILED,
    GROUPED,
    JOINED,
    NOT_STARTED,
    OPEN,
    PARSING,
    PREPARING,
    QUEUED,
    READY,
    REPLAYED,
    RUNNING,
    SENT,
    SKIPPED,
    STATES,
    WAITING,
    Run,
)

__all__ = ["Brain", "Emission"]

Event = tuple[Any, ...]
Action = tuple[Any, ...]

#: Small tasks are handed out together until they are expected to take this many seconds.
CHUNK = 0.001
#: A chunk that takes longer than this many seconds gives back what it has not begun.
TAIL = 0.005
_MOST = 256
_FIRST_GUESS = 5e-5
_FINISHING = 1 << 40  # halves of paid calls go before anything that is only about to start


class Emission:
    """What a task returned, with nodes inside: not a value yet.

    :param packed: the result with slots for the nodes.
    :param nodes: the nodes.
    """

    __slots__ = ("nodes", "packed")

    def __init__(self, packed: Any, nodes: list[Node]) -> None:
        self.packed = packed
        self.nodes = nodes


class _Repack:
    """The op of a node whose task returned nodes: puts their values in place."""

    name = "repack"
    kind = "data"
    identity = "repack"
    emits = False
    executor = "thread"
    is_async = False

    def determinism(self, args: Any, kwargs: Any) -> Determinism:
        return Determinism.PURE

    @staticmethod
    def fn(value: Any) -> Any:
        return value


_REPACK = _Repack()


class Parcel:
    """One request on its way: queued, sent, or waiting to be sent again."""

    __slots__ = (
        "ambiguous",
        "attempt",
        "call",
        "dead",
        "gate",
        "members",
        "ready",
        "request",
        "requests",
        "run",
        "sent",
        "since",
    )

    def __init__(
        self,
        run: Run,
        call: Call[Any],
        members: list[int],
        requests: list[Request],
        request: Request,
        gate: Gate[Parcel],
        now: float,
    ) -> None:
        self.run = run
        self.call = call
        self.members = members
        self.requests = requests
        self.request = request
        self.gate = gate
        self.ready = now
        self.since = now
        self.sent = now
        self.attempt = 0
        self.ambiguous = 0
        self.dead = False


class Brain:
    """All runs of the process, and the gates they share.

    :param policy: when failed requests are sent again.
    :param seed: of the jitter.
    """

    def __init__(self, policy: RetryPolicy | None = None, seed: int | None = None) -> None:
        self.policy = policy or RetryPolicy()
        self.rng = random.Random(seed)
        self.runs: list[Run] = []
        self.gates: dict[tuple[str, str, str], Gate[Parcel]] = {}
        self.parcels: dict[int, Parcel] = {}
        self.fetches: dict[int, Run] = {}
        self.joined: dict[Any, list[tuple[Run, int]]] = {}
        self.busy: dict[tuple[Executor, str], int] = {}
        self.chunks: dict[int, list[PyTask]] = {}
        self.cost: dict[str, float] = {}
        self.no_lists: set[tuple[str, str]] = set()
        self.timers: list[tuple[float, int, Callable[[float], None]]] = []
        self.now = 0.0
        self._count = itertools.count(1)
        self._actions: list[Action] = []
        self._settling: deque[tuple[Run, int, Any, int]] = deque()

    # --- the way in and out -----------------------------------------------------------------------

    def on(self, events: Iterable[Event], now: float) -> list[Action]:
        """Take what happened and return what to do.

        :param events: what happened, oldest first.
        :param now: seconds on any clock that never goes back.
        """
        self.now = now
        for event in events:
            getattr(self, f"_on_{event[0]}")(*event[1:])
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2](now)
        self._admit()
        self._hand_out()
        actions, self._actions = self._actions, []
        return actions

    @property
    def wake_at(self) -> float | None:
        """When :meth:`on` must be called again at the latest, on its clock."""
        return self.timers[0][0] if self.timers else None

    def _later(self, seconds: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.timers, (self.now + seconds, next(self._count), what))

    # --- runs -------------------------------------------------------------------------------------

    def _on_submit(self, run: Run) -> None:
        run.started = self.now
        self.runs.append(run)
        if run.observed:
            begun = RunStarted(run.name, 0.0, len(run.program.nodes), run.calls, run.wall)
            self._actions.append(("notify", begun))
        for i, pending in enumerate(run.pending):
            if not pending and run.state[i] == WAITING:
                self._ready(run, i)
        self._end_if_done(run)

    def _on_stop(self, run: Run, grace: float) -> None:
        if run.ended is not None:
            return
        run.cancelled = True
        self._halt(run)
        if grace <= 0:
            self._interrupt(run)
        else:
            self._later(grace, lambda now: self._interrupt(run))

    def _halt(self, run: Run) -> None:
        """Start nothing new; what is under way goes on."""
        run.stopping = True
        queued = {QUEUED, GROUPED, WAITING, READY, JOINED}
        dead = [p for p in self._waiting_parcels(run)]
        for parcel in dead:
            parcel.dead = True
            parcel.gate.drop({id(parcel)})
        for i, state in enumerate(run.state):
            if state in queued:
                self._end(run, i, NOT_STARTED)
        run.ready.clear()
        run.groups.clear()
        self._end_if_done(run)

    def _waiting_parcels(self, run: Run) -> Iterator[Parcel]:
        for gate in self.gates.values():
            yield from (entry[2] for entry in gate._queue if entry[2].run is run)

    def _interrupt(self, run: Run) -> None:
        """Give up what is still under way."""
        if run.ended is not None:
            return
        for handle, parcel in self.parcels.items():
            if parcel.run is run:
                self._actions.append(("cancel", run.executor, handle))
        for i, state in enumerate(run.state):
            if state < OPEN:
                sent = state in (SENT, PARSING)
                run.errors[i] = Interrupted(
                    "the run was stopped before this was done",
                    origin=run.program.nodes[i].where,
                    billed="unknown" if sent else "no",
                )
                self._end(run, i, NOT_STARTED)
        self._end_if_done(run)

    def _end_if_done(self, run: Run) -> None:
        if run.open or run.ended is not None:
            return
        run.ended = self.now
        for i in run.outputs:
            if run.state[i] == NOT_STARTED and i not in run.errors:
                node = run.program.nodes[i]
                run.errors[i] = UpstreamFailed(
                    f"{node.key} was not started: the run was stopped", origin=node.where
                )
        wanted = [i for i in run.outputs if run.state[i] in (DONE, REPLAYED)]
        if run.executor.remote and wanted:
            handle = next(self._count)
            self.fetches[handle] = run
            refs = [run.values[i] for i in wanted]
            self._actions.append(("fetch", run.executor, handle, refs))
        else:
            self._finish(run)

    def _on_fetched(self, executor: Executor, handle: int, values: list[Any]) -> None:
        run = self.fetches.pop(handle)
        wanted = [i for i in run.outputs if run.state[i] in (DONE, REPLAYED)]
        for i, value in zip(wanted, values, strict=True):
            if isinstance(value, FesteError):
                run.errors[i] = value
            else:
                run.values[i] = value
        self._finish(run)

    def _finish(self, run: Run) -> None:
        self.runs.remove(run)
        if run.observed:
            usage = [(r.input_tokens or 0, r.output_tokens or 0) for r in run.requests]
            ended = RunFinished(
                run.name,
                self.now - run.started,
                run.count_states(),
                len(run.requests),
                sum(u[0] for u in usage),
                sum(u[1] for u in usage),
                run.cancelled,
            )
            self._actions.append(("notify", ended))
        self._actions.append(("finish", run))

    # --- nodes begin and end ----------------------------------------------------------------------

    def _ready(self, run: Run, i: int) -> None:
        """All inputs of a node are there."""
        run.ready_at[i] = self.now
        node = run.program.nodes[i]
        kept = run.program.keepers[i][0].value
        if kept is not PENDING:
            self._done(run, i, kept, REPLAYED)
            return
        if node.value is not PENDING:  # a constant that a pass put there
            self._done(run, i, node.value, DONE)
            return
        if run.stopping:
            self._end(run, i, NOT_STARTED)
            return
        if node.determinism is not Determinism.PURE:
            shared = self._shared_name(run, node)
            others = self.joined.setdefault(shared, [])
            if others and others[0] != (run, i):  # another run is at it: wait for its answer
                others.append((run, i))
                run.state[i] = JOINED
                self._drop_from_group(run, i)
                return
            if not others:
                others.append((run, i))
        run.state[i] = READY
        where = "thread" if node.op.kind == "call" else run.executor.place(node.op)
        self._push(run, where, run.program.rank[i], i)

    def _shared_name(self, run: Run, node: Node) -> Any:
        """Under which name a node in flight is known to other runs that hold it."""
        return node.key if node.op.kind == "call" else (node.key, id(run.executor))

    def _push(self, run: Run, where: str, rank: int, what: int | PyTask) -> None:
        heapq.heappush(run.ready.setdefault(where, []), (-rank, next(self._count), what))

    def _done(self, run: Run, i: int, value: Any, state: int) -> None:
        """A node has its value. Followers that are done at once wait in line: no recursion."""
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
        if node.op.kind == "call":
            run.calls_done += 1
        if run.keep != "none" and state == DONE:
            paid = node.op.kind == "call" or i in run.emitters
            if paid or (run.keep == "all" and not run.executor.remote):
                for kept in program.keepers[i]:
                    kept.value = value
        self._end(run, i, state)
        for j in program.consumers[i]:
            run.pending[j] -= 1
            if not run.pending[j] and run.state[j] == WAITING:
                self._ready(run, j)

    def _fail(self, run: Run, i: int, error: FesteError) -> None:
        """A node failed: everything that needs it is poisoned."""
        node = run.program.nodes[i]
        if not error.origin:
            error.origin = node.where
        if hasattr(error, "node") and not error.node:
            error.node = node.key
        run.errors[i] = error
        run.failed.append(i)
        self._end(run, i, FAILED)
        self._poison(run, i, error)
        if run.on_error == "stop" and not run.stopping:
            self._halt(run)

    def _poison(self, run: Run, root: int, error: FesteError) -> None:
        stack = list(run.program.consumers[root])
        while stack:
            j = stack.pop()
            if run.state[j] >= OPEN:
                continue
            node = run.program.nodes[j]
            run.errors[j] = UpstreamFailed(
                f"{node.key} was not run: {type(error).__name__} in "
                f"{run.program.nodes[root].key}: {error}",
                origin=node.where,
                node=node.key,
                roots=(error,),
            )
            self._end(run, j, SKIPPED)
            stack.extend(run.program.consumers[j])

    def _end(self, run: Run, i: int, state: int) -> None:
        """Bring a node into its final state."""
        before = run.state[i]
        run.state[i] = state
        run.open -= 1
        node = run.program.nodes[i]
        if before < SENT or before == JOINED:
            self._drop_from_group(run, i)
        if node.determinism is not Determinism.PURE:
            self._tell_joined(run, i, node, state)
        for d in run.program.deps[i]:
            run.uses[d] -= 1
            if not run.uses[d]:
                self._release(run, d)
        if not run.uses[i]:
            self._release(run, i)
        if run.observed:
            self._tell(run, i, node, state)
        if not run.open:
            self._end_if_done(run)

    def _release(self, run: Run, i: int) -> None:
        if run.state[i] in (DONE, REPLAYED) and run.executor.remote and run.state[i] == DONE:
            self._actions.append(("release", run.executor, run.values[i]))
        run.values[i] = None

    def _tell(self, run: Run, i: int, node: Node, state: int) -> None:
        error = run.errors.get(i)
        finished = NodeFinished(
            run.name,
            self.now - run.started,
            node.key,
            node.op.name,
            node.op.kind,
            STATES[state],  # type: ignore[arg-type]
            run.ready_at[i] - run.started if run.ready_at[i] else self.now - run.started,
            node.where,
            str(error) if error is not None else "",
        )
        self._actions.append(("notify", finished))

    def _tell_joined(self, run: Run, i: int, node: Node, state: int) -> None:
        shared = self._shared_name(run, node)
        others = self.joined.get(shared)
        if not others or others[0] != (run, i):
            if others and (run, i) in others:
                others.remove((run, i))
            return
        del self.joined[shared]
        for other, j in others[1:]:
            if other.state[j] != JOINED:
                continue
            if state in (DONE, REPLAYED):
                self._done(other, j, run.values[i], REPLAYED)
            elif state == FAILED:
                self._fail(other, j, run.errors[i])
            else:
                other.state[j] = WAITING
                self._ready(other, j)

    # --- handing out Python -----------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give ready work to free hands, runs in turn, the critical path first."""
        progress = True
        while progress:
            progress = False
            for run in self.runs:
                for where, heap in run.ready.items():
                    if heap and self._free(run.executor, where):
                        self._give(run, where, heap)
                        progress = True
        if len(self.runs) > 1:
            self.runs.append(self.runs.pop(0))

    def _free(self, executor: Executor, where: str) -> bool:
        return self.busy.get((executor, where), 0) < executor.capacity(where)

    def _give(self, run: Run, where: str, heap: list[tuple[int, int, Any]]) -> None:
        chunk: list[PyTask] = []
        cost = 0.0
        chunking = run.executor.chunking and where == "thread"
        while heap and (not chunk or (chunking and cost < CHUNK and len(chunk) < _MOST)):
            what = heapq.heappop(heap)[2]
            if type(what) is PyTask:
                if run.state[what.index] < OPEN:
                    chunk.append(what)
                    cost += self._cost(what)
            elif run.state[what] == READY:
                task = self._begin(run, what)
                chunk.append(task)
                cost += self._cost(task)
                if chunking and cost < CHUNK and task.stage == "run":
                    cost = self._chain(run, what, task, chunk, cost)
        if not chunk:
            return
        place = (run.executor, where)
        self.busy[place] = self.busy.get(place, 0) + 1
        self.chunks[id(chunk)] = chunk
        if len(chunk) > 1:
            self._later(TAIL, lambda now: self._reclaim(run.executor, chunk))
        self._actions.append(("call", run.executor, where, chunk))

    def _cost(self, task: PyTask) -> float:
        known = self.cost.get(task.name)
        if known is not None:
            return known
        user = task.stage == "run" and task.run.program.nodes[task.index].op.kind == "task"
        return CHUNK if user else _FIRST_GUESS

    def _begin(self, run: Run, i: int) -> PyTask:
        node = run.program.nodes[i]
        values = [run.values[d] for d in run.program.deps[i]]
        op: Any = node.op
        if op.kind == "call":
            run.state[i] = PREPARING
            args = (op, node.draw, node.args, values)
            return PyTask(run, i, "prepare", _prepared, args, {}, [], f"{op.name}.prepare")
        run.state[i] = RUNNING
        return PyTask(run, i, "run", op.fn, node.args, node.kwargs, values, op.name)

    def _chain(self, run: Run, i: int, task: PyTask, chunk: list[PyTask], cost: float) -> float:
        """Let the chunk go on with what only its last task is waited for by."""
        program = run.program
        while cost < CHUNK and len(chunk) < _MOST:
            consumers = program.consumers[i]
            if len(consumers) != 1 or program.nodes[i].op.emits:
                break
            j = consumers[0]
            node = program.nodes[j]
            if (
                run.state[j] != WAITING
                or run.pending[j] != 1
                or node.op.kind not in ("task", "prompt")
                or run.executor.place(node.op) != "thread"
                or program.keepers[j][0].value is not PENDING
                or (node.determinism is not Determinism.PURE and not self._claim(run, j, node))
            ):
                break
            values = [task if d == i else run.values[d] for d in program.deps[j]]
            op: Any = node.op
            task = PyTask(run, j, "run", op.fn, node.args, node.kwargs, values, op.name)
            run.state[j] = RUNNING
            run.ready_at[j] = self.now
            chunk.append(task)
            cost += self._cost(task)
            i = j
        return cost

    def _claim(self, run: Run, i: int, node: Node) -> bool:
        """Whether no other run is at this node; it is this run's from now on."""
        others = self.joined.setdefault(self._shared_name(run, node), [(run, i)])
        return others[0] == (run, i)

    def _reclaim(self, executor: Executor, chunk: list[PyTask]) -> None:
        if self.chunks.get(id(chunk)) is chunk:
            self._actions.append(("reclaim", executor, chunk))

    def _on_free(self, executor: Executor, where: str, chunk: list[PyTask]) -> None:
        self.chunks.pop(id(chunk), None)
        self.busy[executor, where] -= 1

    def _on_capacity(self, executor: Executor, where: str) -> None:
        """Places changed; handing out looks at them anew after every event."""

    def _on_returned(self, executor: Executor, tasks: list[PyTask]) -> None:
        for task in tasks:
            run, i = task.run, task.index
            if run.state[i] >= OPEN:
                continue
            if run.stopping:
                self._end(run, i, NOT_STARTED)
            elif task.stage != "run":
                self._push(run, "thread", run.program.rank[i] + _FINISHING, task)
            elif run.pending[i]:
                run.state[i] = WAITING
            else:
                run.state[i] = READY
                self._push(run, executor.place(run.program.nodes[i].op), run.program.rank[i], i)

    def _on_done(
        self, executor: Executor, task: PyTask, ok: bool, value: Any, seconds: float
    ) -> None:
        name = task.name
        known = self.cost.get(name)
        self.cost[name] = seconds if known is None else 0.8 * known + 0.2 * seconds
        run = task.run
        run.seconds[name] += seconds
        if run.state[task.index] < OPEN or task.stage in ("pack", "unpack"):
            getattr(self, f"_{task.stage}_done")(run, task, ok, value, seconds)

    def _run_done(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        if seconds > CHUNK:
            begun = self.now - seconds
            lane = f"{run.program.nodes[task.index].op.kind} {task.name}"
            waited = max(0.0, begun - run.ready_at[task.index])
            end = self.now - run.started
            run.spans.append((lane, task.key, begun - run.started, end, waited, ok))
        if not ok:
            self._fail(run, task.index, value)
        elif type(value) is Emission:
            self._actions.append(("grow", run, task.index, value))
        else:
            self._done(run, task.index, value, DONE)

    # --- the graph grows --------------------------------------------------------------------------

    def _on_grown(self, run: Run, i: int, program: Any, packed: Any) -> None:
        """A task returned nodes: they join the run, and its own value is made of theirs."""
        if run.state[i] >= OPEN:
            return
        if isinstance(program, FesteError):
            self._fail(run, i, program)
            return
        if run.stopping:
            self._end(run, i, NOT_STARTED)
            return
        position = self._merge(run, program, run.program.rank[i])
        wanted = [position[j] for j in program.outputs]
        if self._needs(run, wanted, i):
            key = run.program.nodes[i].key
            self._fail(run, i, GraphError(f"a cycle: {key} returned a node that needs {key}"))
            return
        main = run.program
        for d in main.deps[i]:
            run.uses[d] -= 1
            if not run.uses[d]:
                self._release(run, d)
        main.nodes[i] = main.nodes[i].replace(op=_REPACK, args=(packed,), kwargs={})
        main.deps[i] = wanted
        run.emitters.add(i)
        run.state[i] = WAITING
        run.pending[i] = 0
        for d in wanted:
            run.uses[d] += 1
            if run.state[d] in (DONE, REPLAYED):
                continue
            main.consumers[d].append(i)
            run.pending[i] += 1
        failed = next((d for d in wanted if d in run.errors), None)
        if failed is not None:
            self._poison(run, failed, run.errors[failed])
        elif not run.pending[i]:
            self._repack(run, i)

    def _repack(self, run: Run, i: int) -> None:
        run.state[i] = READY
        self._push(run, "thread", run.program.rank[i], i)

    def _merge(self, run: Run, part: Program, rank: int) -> list[int]:
        """Append a program to a run's; return where each of its nodes is now."""
        main = run.program
        position: list[int] = []
        fresh: list[int] = []
        for j, node in enumerate(part.nodes):
            at = main.index.get(node.key)
            if at is None or self._is_gone(run, at):
                at = len(main.nodes)
                fresh.append(j)
                main.index[node.key] = at
                main.nodes.append(node)
                main.deps.append([])
                main.consumers.append([])
                main.rank.append(part.rank[j] + rank)
                main.keepers.append(part.keepers[j])
                run.state.append(WAITING)
                run.pending.append(0)
                run.uses.append(0)
                run.values.append(None)
                run.ready_at.append(0.0)
                run.open += 1
                run.calls += node.op.kind == "call"
            position.append(at)
        for j in fresh:
            self._connect(run, position[j], [position[d] for d in part.deps[j]])
        for members in part.batches:
            group = Group(position[m] for m in members)
            run.groups.update((position[m], group) for m in members)
        for j in fresh:
            i = position[j]
            failed = next((d for d in main.deps[i] if d in run.errors), None)
            if failed is not None and run.state[i] < OPEN:
                self._poison(run, failed, run.errors[failed])
            elif not run.pending[i] and run.state[i] == WAITING:
                self._ready(run, i)
        return position

    def _connect(self, run: Run, i: int, deps: list[int]) -> None:
        run.program.deps[i] = deps
        for d in deps:
            run.uses[d] += 1
            run.program.consumers[d].append(i)
            if run.state[d] not in (DONE, REPLAYED):
                run.pending[i] += 1

    def _is_gone(self, run: Run, i: int) -> bool:
        """Whether a node's value was let go because nothing seemed to need it any more."""
        return run.state[i] in (DONE, REPLAYED) and not run.uses[i]

    def _needs(self, run: Run, roots: list[int], target: int) -> bool:
        """Whether one of some unfinished nodes needs another."""
        seen: set[int] = set()
        stack = list(roots)
        while stack:
            i = stack.pop()
            if i == target:
                return True
            if i not in seen and run.state[i] < OPEN:
                seen.add(i)
                stack.extend(run.program.deps[i])
        return False

    # --- calls: prepare, group, queue, send -------------------------------------------------------

    def _prepare_done(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        i = task.index
        if not ok:
            self._fail(run, i, _cause(value))
            return
        if run.stopping:
            self._end(run, i, NOT_STARTED)
            return
        group = run.groups.get(i)
        if group is None:
            self._queue(run, [i], [value], value)
            return
        run.state[i] = GROUPED
        if group.arrive(i, value):
            self._flush(run, group)

    def _drop_from_group(self, run: Run, i: int) -> None:
        group = run.groups.get(i)
        if group is not None and group.drop(i) and not run.stopping:
            self._flush(run, group)

    def _flush(self, run: Run, group: Group) -> None:
        arrived = [(i, r) for i, r in group.flush() if run.state[i] == GROUPED]
        if not arrived:
            return
        members, requests = [i for i, _ in arrived], [r for _, r in arrived]
        first: Request = requests[0]
        if len(members) == 1 or (first.endpoint, first.model) in self.no_lists:
            for i, request in arrived:
                self._queue(run, [i], [request], request)
            return
        call = run.program.nodes[members[0]].op
        args = (call, members, requests)
        task = PyTask(run, members[0], "pack", packed, args, {}, [], f"{call.name}.pack")
        self._push(run, "thread", run.program.rank[members[0]] + _FINISHING, task)

    def _pack_done(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        if not ok:
            for i in task.args[1]:
                if run.state[i] < OPEN:
                    self._fail(run, i, _cause(value))
            return
        for members, requests, request in value:
            if run.state[members[0]] == GROUPED:
                self._queue(run, members, requests, request)

    def _queue(
        self, run: Run, members: list[int], requests: list[Request], request: Request
    ) -> None:
        call: Any = run.program.nodes[members[0]].op
        name = (request.endpoint, request.account, request.model)
        gate = self.gates.get(name)
        if gate is None:
            gate = self.gates[name] = Gate(call.client.limits)
        for i in members:
            run.state[i] = QUEUED
        parcel = Parcel(run, call, members, requests, request, gate, self.now)
        gate.push(parcel, max(run.program.rank[i] for i in members))

    def _admit(self) -> None:
        """Send what the gates let through."""
        for gate in self.gates.values():
            while (parcel := gate.pop(self.now)) is not None:
                handle = next(self._count)
                run = parcel.run
                parcel.sent = self.now
                parcel.attempt += 1
                self.parcels[handle] = parcel
                for i in parcel.members:
                    run.state[i] = SENT
                self._actions.append(("send", run.executor, handle, parcel.call, parcel.request))
            if len(gate) and gate.closed_until > self.now:
                self._later(gate.closed_until - self.now, lambda now: None)

    def _on_sent(
        self, executor: Executor, handle: int, ok: bool, value: Any, seconds: float
    ) -> None:
        parcel = self.parcels.pop(handle)
        run, gate = parcel.run, parcel.gate
        if ok:
            gate.left(parcel.sent, self.now)
        elif isinstance(value, RateLimited):
            gate.throttled(parcel.sent, self.now, value.retry_after)
        else:
            gate.lost()
        self._record(parcel, ok, value)
        if run.ended is not None:
            return
        if ok:
            self._answered(parcel, value)
        else:
            self._refused(parcel, value)

    def _record(self, parcel: Parcel, ok: bool, value: Any) -> None:
        run, request = parcel.run, parcel.request
        usage = value.usage if ok else None
        record = RequestFinished(
            run=run.name,
            at=self.now - run.started,
            backend=request.plugin,
            operation=parcel.call.name,
            model=request.model,
            items=request.items,
            attempt=parcel.attempt,
            ready=parcel.ready - run.started,
            sent=parcel.sent - run.started,
            input_tokens=usage.input if usage else None,
            output_tokens=usage.output if usage else None,
            status=None if ok else value.status,
            error="" if ok else type(value).__name__,
            request_id=value.request_id,
        )
        run.requests.append(record)
        if run.observed:
            self._actions.append(("notify", record))

    def _answered(self, parcel: Parcel, response: Response) -> None:
        run, members = parcel.run, parcel.members
        for i in members:
            run.state[i] = PARSING
        if len(members) == 1:
            self._parse(run, members[0], parcel.call, response)
            return
        args = (parcel.call, parcel.request, response, parcel)
        name = f"{parcel.call.name}.unpack"
        task = PyTask(run, members[0], "unpack", _unpacked, args, {}, [], name)
        self._push(run, "thread", run.program.rank[members[0]] + _FINISHING, task)

    def _parse(self, run: Run, i: int, call: Call[Any], response: Response) -> None:
        node = run.program.nodes[i]
        values = [run.values[d] for d in run.program.deps[i]]
        args = (call, response, node.args, values)
        task = PyTask(run, i, "parse", _parsed, args, {}, [], f"{call.name}.parse")
        self._push(run, "thread", run.program.rank[i] + _FINISHING, task)

    def _unpack_done(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        parcel: Parcel = task.args[3]
        if run.ended is not None:
            return
        if not ok:
            error = _cause(value)
            if isinstance(error, CountMismatch):
                self.no_lists.add((parcel.request.endpoint, parcel.request.model))
                self._one_by_one(parcel)
            else:
                self._fail_members(parcel, error)
            return
        for i, request, outcome in zip(parcel.members, parcel.requests, value, strict=True):
            if run.state[i] >= OPEN:
                continue
            if isinstance(outcome, Response):
                self._parse(run, i, parcel.call, outcome)
            else:
                alone = Parcel(
                    run, parcel.call, [i], [request], request, parcel.gate, self.now
                )
                alone.attempt, alone.since = parcel.attempt, parcel.since
                self._refused(alone, outcome)

    def _parse_done(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        if ok:
            self._done(run, task.index, value, DONE)
        else:
            self._fail(run, task.index, _cause(value, MalformedResponse))

    def _refused(self, parcel: Parcel, error: CallError) -> None:
        """A request failed: send it again, take it apart, or give up."""
        run = parcel.run
        if isinstance(error, InvalidRequest) and len(parcel.members) > 1:
            self._one_by_one(parcel)
            return
        parcel.ambiguous += isinstance(error, Ambiguous)
        wait = None
        if not run.stopping:
            wait = self.policy.delay(
                error,
                attempt=parcel.attempt,
                ambiguous=parcel.ambiguous,
                elapsed=self.now - parcel.since,
                rng=self.rng,
            )
        if wait is None:
            self._fail_members(parcel, error)
            return
        for i in parcel.members:
            run.state[i] = QUEUED
        self._later(wait, lambda now: self._again(parcel))

    def _again(self, parcel: Parcel) -> None:
        alive = [i for i in parcel.members if parcel.run.state[i] < OPEN]
        if alive and not parcel.dead:
            parcel.ready = self.now
            parcel.gate.push(parcel, max(parcel.run.program.rank[i] for i in alive))

    def _one_by_one(self, parcel: Parcel) -> None:
        """Send the calls of a batch singly: one of them is bad, or the server takes no lists."""
        for i, request in zip(parcel.members, parcel.requests, strict=True):
            if parcel.run.state[i] < OPEN:
                if parcel.run.stopping:
                    self._end(parcel.run, i, NOT_STARTED)
                else:
                    self._queue(parcel.run, [i], [request], request)

    def _fail_members(self, parcel: Parcel, error: FesteError) -> None:
        for i in parcel.members:
            if parcel.run.state[i] < OPEN:
                mine = error
                if len(parcel.members) > 1:  # each place gets an error of its own
                    mine = type(error)(str(error.args[0] if error.args else error))
                    mine.__dict__.update(error.__dict__)
                if isinstance(mine, CallError):
                    mine.attempts = parcel.attempt
                    mine.backend = parcel.request.plugin
                    mine.model = parcel.request.model
                self._fail(parcel.run, i, mine)


def _cause(error: FesteError, kind: type[FesteError] | None = None) -> FesteError:
    """The error itself, where a half of an operation raised one of Feste's."""
    cause = error.__cause__ if isinstance(error, NodeError) else error
    if isinstance(cause, FesteError):
        return cause
    if kind is not None:
        wrapped = kind(f"the answer could not be read: {error.args[0]}")
        wrapped.__cause__ = cause
        return wrapped
    return error


# --- what hands call for the halves of an operation: plugin code, so never on the brain's thread ----


def _prepared(call: Call[Any], draw: Draw, args: tuple[Any, ...], values: list[Any]) -> Request:
    request = call.prepare([fill(a, values) for a in args])
    return replace(request, draws=(draw,))


def _unpacked(call: Call[Any], request: Request, response: Response, parcel: Parcel) -> list[Any]:
    return unpacked(call, request, response)


def _parsed(
    call: Call[Any], response: Response, args: tuple[Any, ...], values: list[Any]
) -> Any:
    return call.parse(response, [fill(a, values) for a in args])
