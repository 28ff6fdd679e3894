"""Account for what calls wait for, and for what requests use.

A call's time, from the start of its run or from when its node was made, is cut where its state
changes, and each piece goes to one cause: so the pieces add up to the whole. Nothing is searched:
each change costs the calls that it concerns, and a request at a gate reads two sums of the gate's as
it comes and as it goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from feste.backend import Request
from feste.events import CAUSES, GateClosed, RequestFinished, RequestStarted, RunFinished
from feste.scheduler.admission.gate import Gate
from feste.scheduler.executor import PyTask
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import GATHERED, JOINED, OPEN, PARSING, PREPARING, QUEUED, SENT, Run
from feste.scheduler.totals import IN_FLIGHT, PYTHON, Totals

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = [
    "BATCH",
    "DEPENDENCY",
    "PREFIX",
    "RATE_LIMIT",
    "RETRY",
    "SHARED",
    "SLOT",
    "STORE",
    "WORKER",
    "Accounts",
]

DEPENDENCY, WORKER, STORE, BATCH, PREFIX, SLOT, RATE_LIMIT, RETRY, SHARED = range(len(CAUSES))
#: What a call waits for until its request is complete.
_BATCHED = (BATCH, SLOT, RATE_LIMIT)
#: What a call was waiting for that ends in such a state without having got on.
_LAST = {
    PREPARING: PYTHON,
    GATHERED: BATCH,
    QUEUED: SLOT,
    SENT: IN_FLIGHT,
    PARSING: STORE,
    JOINED: SHARED,
}


def cause_at(gate: Gate[Any], now: float) -> int | None:
    """Return why a gate lets no further request through, or None if it would.

    :param gate: the gate.
    :param now: the time in seconds on the brain's clock.
    """
    if now < gate.closed_until:
        return RATE_LIMIT
    return None if gate.room(now) else SLOT


class _Queueing:
    """How long a gate has let nobody through, by cause."""

    __slots__ = ("cause", "closed_until", "noted", "sums")

    def __init__(self, now: float) -> None:
        self.cause: int | None = None
        self.noted = now
        #: The seconds so far for want of a slot, and for the provider's limit.
        self.sums = (0.0, 0.0)
        #: Until when it was closed when that was last told.
        self.closed_until = 0.0

    def until(self, now: float) -> tuple[float, float]:
        """Return the sums; those who ask at one moment share a tuple."""
        elapsed, self.noted = now - self.noted, now
        if elapsed and self.cause is not None:
            slot, rate_limit = self.sums
            if self.cause == SLOT:
                self.sums = (slot + elapsed, rate_limit)
            else:
                self.sums = (slot, rate_limit + elapsed)
        return self.sums


def _since(before: tuple[float, float], now: tuple[float, float]) -> tuple[float, float]:
    return now[0] - before[0], now[1] - before[1]


class Accounts:
    """The accounts of all runs.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self._queueing: WeakKeyDictionary[Gate[Parcel], _Queueing] = WeakKeyDictionary()

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
            call = node.op
            operation = f"{request.plugin if request else call.client.plugin}.{call.name}"
            model = request.model if request else call.model(node.args)
            name = (id(call.client), operation, model)
            totals = run.rows.get(name)
            if totals is None:
                totals = run.rows[name] = Totals(call.client, operation, model)
            run.totals[i] = totals
            totals.begun += 1
            made = max(run.started, run.since[i])
            run.since[i] = run.ready_at[i]
            totals.times[DEPENDENCY] += run.since[i] - made
        return totals

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
        run.arrived[i] = self._gate(gate), self._gate(gate).until(self.brain.now)

    def batched(self, run: Run, i: int) -> None:
        """Account for the time that a call waited for others of its request, or for room at their gate.

        :param run: the run.
        :param i: the position of the call's node.
        """
        arrived, waited = run.arrived.pop(i, None), self.brain.now - run.since[i]
        if not waited:
            return
        slot = rate_limit = 0.0
        if arrived is not None:
            queueing, before = arrived
            slot, rate_limit = _since(before, queueing.until(self.brain.now))
        times = self.totals(run, i).times
        pieces = (waited - slot - rate_limit, slot, rate_limit)
        for cause, seconds in zip(_BATCHED, pieces):
            times[cause] += seconds
        run.since[i] = self.brain.now
        earlier = run.batched.get(i, (0.0, 0.0, 0.0))
        run.batched[i] = tuple(a + b for a, b in zip(earlier, pieces))

    def gathered(self, parcel: Parcel) -> None:
        """Account for what the calls of a new request waited for each other.

        :param parcel: the request.
        """
        run = parcel.run
        longest: tuple[float, ...] = ()
        for i in parcel.members:
            self.batched(run, i)
            longest = max(longest, run.batched.pop(i, ()), key=sum)
        for cause, seconds in zip(_BATCHED, longest):
            parcel.waits[cause] += seconds

    def _gate(self, gate: Gate[Parcel]) -> _Queueing:
        queueing = self._queueing.get(gate)
        if queueing is None:
            queueing = self._queueing[gate] = _Queueing(self.brain.now)
            queueing.cause = cause_at(gate, self.brain.now)
        return queueing

    def entered(self, parcel: Parcel) -> None:
        """Note that a request begins to queue at its gate.

        :param parcel: the request.
        """
        parcel.queued = self._gate(parcel.gate).until(self.brain.now)

    def admitted(self, parcel: Parcel) -> None:
        """Account for a request's time at its gate.

        :param parcel: the request.
        """
        run, now = parcel.run, self.brain.now
        _, rate_limit = _since(parcel.queued, self._gate(parcel.gate).until(now))
        slot = now - parcel.noted - rate_limit
        parcel.waits[SLOT] += slot
        parcel.waits[RATE_LIMIT] += rate_limit
        parcel.noted = now
        for i in parcel.members:
            if run.state[i] < OPEN:
                times = self.totals(run, i).times
                times[SLOT] += slot
                times[RATE_LIMIT] += rate_limit
                run.since[i] = now

    def held(self, gate: Gate[Parcel]) -> None:
        """Note whether a gate lets nobody through from now on, and why.

        :param gate: the gate.
        """
        queueing = self._gate(gate)
        queueing.until(self.brain.now)
        queueing.cause = cause_at(gate, self.brain.now)

    def throttled(self, parcel: Parcel) -> None:
        """Tell that a provider asked everyone to wait, once for each such time.

        :param parcel: the request that it refused.
        """
        self.closed(parcel, "rate_limit", parcel.gate.closed_until)

    def closed(self, parcel: Parcel, reason: str, until: float) -> None:
        """Note that nothing is sent to a provider for a while, and tell it once.

        :param parcel: the request that caused it.
        :param reason: as in :class:`~feste.events.GateClosed`.
        :param until: the time of the end, on the brain's clock.
        """
        run, request, now = parcel.run, parcel.request, self.brain.now
        queueing = self._gate(parcel.gate)
        start = max(now, queueing.closed_until)
        if until <= start:
            return  # known already
        queueing.closed_until = until
        run.breaker_openings += reason == "breaker"
        for each in self.brain.runs:  # others may wait at that gate, too
            times = start - each.started, until - each.started
            each.closings.append((request.plugin, request.model, reason, *times))
        if start == now and GateClosed.name in run.heard:
            at = now - run.started
            event = GateClosed(run.name, at, request.plugin, request.model, reason, until - now)
            self.brain.act("notify", run, event)

    def launched(self, parcel: Parcel, number: int) -> None:
        """Note that a request is sent.

        :param parcel: the request.
        :param number: its number.
        """
        run, request = parcel.run, parcel.request
        self.waited(parcel, STORE)
        parcel.handle = number
        run.in_flight += 1
        run.peak = max(run.peak, run.in_flight)
        if parcel.error is not None:
            run.retries[type(parcel.error).__name__] += 1
        if RequestStarted.name in run.heard:
            event = RequestStarted(
                run=run.name,
                at=self.brain.now - run.started,
                number=number,
                backend=request.plugin,
                operation=parcel.call.name,
                model=request.model,
                items=request.items,
                attempt=parcel.attempt,
            )
            self.brain.act("notify", run, event)

    def record(self, parcel: Parcel, ok: bool, value: Any) -> None:
        """Record a request that ended.

        :param parcel: the request.
        :param ok: whether a response came.
        :param value: the response, or the error.
        """
        run, request = parcel.run, parcel.request
        usage = value.usage if ok else None
        record = RequestFinished(
            run=run.name,
            at=self.brain.now - run.started,
            backend=request.plugin,
            operation=parcel.call.name,
            model=request.model,
            items=request.items,
            attempt=parcel.attempt,
            ready=parcel.ready - run.started,
            sent=parcel.sent - run.started,
            input_tokens=usage.input if usage else None,
            output_tokens=usage.output if usage else None,
            cached_tokens=usage.cached if usage else None,
            written_tokens=usage.written if usage else None,
            status=None if ok else value.status,
            error="" if ok else type(value).__name__,
            request_id=value.request_id,
            billed="yes" if ok else value.billed,
            number=parcel.handle,
            waits={cause: wait for cause, wait in zip(CAUSES, parcel.waits) if wait},
        )
        self.waited(parcel, IN_FLIGHT)
        parcel.waits = [0.0] * len(CAUSES)
        parcel.handle = 0
        run.in_flight -= 1
        run.requests.append(record)
        run.sizes[record.items] += 1
        unknown = record.billed == "unknown"
        totals = self.totals(run, parcel.members[0], request)
        totals.add(record, request.size if unknown else 0, request.max_output)
        run.input_tokens += record.input_tokens or 0
        run.output_tokens += record.output_tokens or 0
        if RequestFinished.name in run.heard:
            self.brain.act("notify", run, record)

    # --- runs -------------------------------------------------------------------------------------

    def closing(self, run: Run) -> RunFinished:
        """Return the event of a run's end.

        :param run: the run.
        """
        return RunFinished(
            run=run.name,
            at=self.brain.now - run.started,
            states=run.count_states(),
            requests=len(run.requests),
            input_tokens=run.input_tokens,
            output_tokens=run.output_tokens,
            cancelled=run.cancelled,
            failures=run.count_failures(),
            retries=dict(run.retries),
            waits=run.sum_waits(),
            peak=run.peak,
            damaged=run.damaged,
        )
