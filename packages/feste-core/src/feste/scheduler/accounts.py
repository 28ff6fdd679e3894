"""Account for the requests of runs, and tell observers of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feste.events import CAUSES, GateClosed, RequestFinished, RequestStarted, RunFinished
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run
from feste.scheduler.totals import IN_FLIGHT
from feste.scheduler.waits import STORE

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Accounts"]


class Accounts:
    """The accounts of all runs.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def closed(self, parcel: Parcel, reason: str, until: float, *, again: bool = False) -> None:
        """Note that nothing is sent to a provider for a while, and tell it once.

        :param parcel: the request that caused it.
        :param reason: as in :class:`~feste.events.GateClosed`.
        :param until: the time of the end, on the brain's clock.
        :param again: whether a breaker stays open that has opened before.
        """
        run, request, now = parcel.run, parcel.request, self.brain.now
        held = self.brain.waits.gate(parcel.gate)
        start = max(now, held.closed_until)
        if until <= start:
            return  # known already
        held.closed_until = until
        run.openings += reason == "breaker" and not again
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
        self.brain.waits.waited(parcel, STORE)
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

    def record(self, parcel: Parcel, ok: bool, value: Any, worker: str = "") -> None:
        """Record a request that ended.

        :param parcel: the request.
        :param ok: whether a response came.
        :param value: the response, or the error.
        :param worker: the worker that sent it; empty for this process.
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
            worker=worker,
        )
        self.brain.waits.waited(parcel, IN_FLIGHT)
        parcel.waits = [0.0] * len(CAUSES)
        parcel.handle = 0
        run.in_flight -= 1
        run.requests.append(record)
        if worker:
            run.workers.sent(parcel.members, record.at - record.sent, worker)
        run.sizes[record.items] += 1
        uncounted = record.input_tokens is None and record.billed != "no"
        totals = self.brain.waits.row(run, parcel.call, request.plugin, request.model)
        totals.add(record, request.size if uncounted else 0, request.max_output)
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
