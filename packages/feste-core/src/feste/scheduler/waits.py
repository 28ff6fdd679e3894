"""Account for what calls wait for.

A call's time, from the start of its run or from when its node was made, is cut where its state
changes, and each piece goes to one cause: so the pieces add up to the whole. Nothing is searched:
each change costs the calls that it concerns, and a request at a gate reads two sums of the gate's as
it comes and as it goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from feste.backend import Call, Request
from feste.events import CAUSES
from feste.scheduler.admission.gate import Gate
from feste.scheduler.admission.held import AT_GATE, SLOT, Held, cause_at
from feste.scheduler.executor import PyTask
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run
from feste.scheduler.states import GATHERED, JOINED, OPEN, PARSING, PREPARING, QUEUED, SENT
from feste.scheduler.totals import IN_FLIGHT, PYTHON, Totals

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = [
    "BATCH",
    "BUDGET",
    "DEPENDENCY",
    "EQUAL_CALL",
    "PREFIX",
    "RETRY",
    "STORE",
    "WORKER",
    "Waits",
]

DEPENDENCY, WORKER, STORE, BATCH, PREFIX, _, _, _, BUDGET, RETRY, EQUAL_CALL = range(len(CAUSES))
#: What a call waits for until its request is complete.
_BATCHED = (BATCH, *AT_GATE)
#: What a call was waiting for that ends in such a state without having got on.
_LAST = {
    PREPARING: PYTHON,
    GATHERED: BATCH,
    QUEUED: SLOT,
    SENT: IN_FLIGHT,
    PARSING: STORE,
    JOINED: EQUAL_CALL,
}


def _since(before: tuple[float, ...], now: tuple[float, ...]) -> list[float]:
    return [b - a for a, b in zip(before, now, strict=True)]


class Waits:
    """What the calls of all runs wait for.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self._gates: WeakKeyDictionary[Gate[Parcel], Held] = WeakKeyDictionary()

    # --- calls ------------------------------------------------------------------------------------

    def totals(self, run: Run, i: int, request: Request | None = None) -> Totals:
        """Return what a call is accounted for in; the first time, its wait for its inputs is noted.

        :param run: the run.
        :param i: the position of the call's node, which is ready.
        :param request: its request, if that is known.
        """
        totals = run.totals[i]
        if totals is None:
            node: Any = run.program.nodes[i]
            model = request.model if request else node.op.model(node.args)
            plugin = request.plugin if request else node.op.client.plugin
            totals = run.totals[i] = self.row(run, node.op, plugin, model)
            totals.begun += 1
            made = max(run.started, run.since[i])
            run.since[i] = run.ready_at[i]
            totals.times[DEPENDENCY] += run.since[i] - made
        return totals

    def row(self, run: Run, call: Call[Any], plugin: str, model: str) -> Totals:
        """Return the account of an operation and model.

        :param run: the run.
        :param call: the operation.
        :param plugin: the backend's plugin name.
        :param model: the model.
        """
        name = (id(call.client), f"{plugin}.{call.name}", model)
        row = run.rows.get(name)
        if row is None:
            row = run.rows[name] = Totals(call.client, *name[1:])
        return row

    def spend(self, run: Run, i: int, cause: int) -> None:
        """Account for a call's time since its last change.

        :param run: the run.
        :param i: the position of the call's node.
        :param cause: what it waited for, or IN_FLIGHT or PYTHON.
        """
        times, now = self.totals(run, i).times, self.brain.now
        times[cause] += now - run.since[i]
        run.since[i] = now

    def ran(self, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        """Account for a piece of Python of calls: it waited for a worker, then ran.

        :param task: the piece.
        :param ok: whether it ended well.
        :param value: its result.
        :param seconds: how long it ran.
        """
        if task.stage == "run":
            return
        run, now = task.run, self.brain.now
        for i in task.members:
            if run.state[i] < OPEN:
                request = value if ok and task.stage == "prepare" else None
                times = self.totals(run, i, request).times
                took = min(seconds, now - run.since[i])
                times[WORKER] += now - run.since[i] - took
                times[PYTHON] += took
                run.since[i] = now

    def ended(self, run: Run, i: int, before: int) -> None:
        """Account for the rest of a call's time.

        :param run: the run.
        :param i: the position of a node.
        :param before: the state that it was in.
        """
        if before in _LAST and run.program.nodes[i].op.kind == "call":
            self.spend(run, i, _LAST[before])

    # --- requests ---------------------------------------------------------------------------------

    def waited(self, parcel: Parcel, cause: int) -> None:
        """Account for a request's time since its last change, and for that of its calls.

        :param parcel: the request.
        :param cause: what it waited for, or IN_FLIGHT.
        """
        now, run = self.brain.now, parcel.run
        if cause < len(CAUSES):
            parcel.waits[cause] += now - parcel.noted
        parcel.noted = now
        for i in parcel.members:
            if run.state[i] < OPEN:
                self.spend(run, i, cause)

    def arrived(self, run: Run, i: int, gate: Gate[Parcel]) -> None:
        """Note that a call begins to wait for others of its group, or until their gate has room.

        :param run: the run.
        :param i: the position of the call's node.
        :param gate: the gate.
        """
        self.batched(run, i)
        run.arrived[i] = self.gate(gate), self.gate(gate).until(self.brain.now)

    def batched(self, run: Run, i: int) -> None:
        """Account for the time that a call waited for others of its request, or for room at their gate.

        :param run: the run.
        :param i: the position of the call's node.
        """
        arrived, waited = run.arrived.pop(i, None), self.brain.now - run.since[i]
        if not waited:
            return
        at_gate = [0.0] * len(AT_GATE)
        if arrived is not None:
            held, before = arrived
            at_gate = _since(before, held.until(self.brain.now))
        times = self.totals(run, i).times
        pieces = (waited - sum(at_gate), *at_gate)
        for cause, seconds in zip(_BATCHED, pieces, strict=True):
            times[cause] += seconds
        run.since[i] = self.brain.now
        earlier = run.batched.get(i, (0.0,) * len(_BATCHED))
        run.batched[i] = tuple(a + b for a, b in zip(earlier, pieces, strict=True))

    def gathered(self, parcel: Parcel) -> None:
        """Account for what the calls of a new request waited for each other.

        :param parcel: the request.
        """
        run = parcel.run
        longest: tuple[float, ...] = ()
        row = self.row(run, parcel.call, parcel.request.plugin, parcel.request.model)
        for i in parcel.members:
            self.batched(run, i)
            longest = max(longest, run.batched.pop(i, ()), key=sum)
            before = self.totals(run, i)
            if before is not row:  # it was passed on to another backend
                before.begun, row.begun, run.totals[i] = before.begun - 1, row.begun + 1, row
        for cause, seconds in zip(_BATCHED, longest):
            parcel.waits[cause] += seconds

    def gate(self, gate: Gate[Parcel]) -> Held:
        held = self._gates.get(gate)
        if held is None:
            held = self._gates[gate] = Held(self.brain.now)
            held.cause = cause_at(gate, self.brain.now)
        return held

    def entered(self, parcel: Parcel) -> None:
        """Note that a request begins to queue at its gate.

        :param parcel: the request.
        """
        parcel.queued = self.gate(parcel.gate).until(self.brain.now)

    def admitted(self, parcel: Parcel) -> None:
        """Account for a request's time at its gate.

        :param parcel: the request.
        """
        run, now = parcel.run, self.brain.now
        _, *others = _since(parcel.queued, self.gate(parcel.gate).until(now))
        slot = now - parcel.noted - sum(others)  # its turn has not come
        pieces = [p for p in zip(AT_GATE, (slot, *others), strict=True) if p[1]]
        for cause, seconds in pieces:
            parcel.waits[cause] += seconds
        parcel.noted = now
        for i in parcel.members:
            if run.state[i] < OPEN:
                times = self.totals(run, i).times
                for cause, seconds in pieces:
                    times[cause] += seconds
                run.since[i] = now

    def held(self, gate: Gate[Parcel]) -> None:
        """Note whether a gate lets nobody through from now on, and why.

        :param gate: the gate.
        """
        held = self.gate(gate)
        held.until(self.brain.now)
        held.cause = cause_at(gate, self.brain.now)
        for run in self.brain.runs:
            if gate.queues(run.name):
                run.lacks = held.cause
