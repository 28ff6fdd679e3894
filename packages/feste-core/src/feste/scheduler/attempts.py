"""Send requests, and decide what becomes of those that failed: another attempt, parts, or an error."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from feste.backend import Response, rate_limits
from feste.errors import (
    CallError,
    CallTimeout,
    CountMismatch,
    FesteError,
    Interrupted,
    InvalidRequest,
    NotStarted,
    RateLimited,
    Unreachable,
    Unusable,
    WorkerLost,
)
from feste.scheduler.admission.retry import REFUSED_ALL, RetryPolicy, is_ambiguous, is_unreadable
from feste.scheduler.executor import Executor
from feste.scheduler.parcel import Parcel
from feste.scheduler.states import OPEN, QUEUED, SENT
from feste.scheduler.waits import RETRY
from feste.scheduler.work import cause_of

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Attempts"]

#: What is added to a timeout where the caller's event loop stands still.
_BLOCKED = (
    ". compute() blocks the event loop that it was called on: if the server runs on that loop, it "
    "cannot answer; use `await feste.acompute(...)`"
)


class Attempts:
    """The requests in flight, and those between two attempts.

    :param brain: the brain that this belongs to.
    :param policy: decides whether and when a failed request is sent again.
    :param rng: the source of the jitter.
    """

    def __init__(self, brain: Brain, policy: RetryPolicy, rng: random.Random) -> None:
        self.brain = brain
        self.policy = policy
        self.rng = rng
        #: Requests in flight by handle, and requests that wait for their next attempt by id.
        self.parcels: dict[int, Parcel] = {}
        self.retrying: dict[int, Parcel] = {}

    def launch(self, parcel: Parcel) -> None:
        """Send a request.

        :param parcel: the request, counted as in flight by its gate.
        """
        handle = self.brain.number()
        run = parcel.run
        parcel.sent = self.brain.now
        self.parcels[handle] = parcel
        self.brain.accounts.launched(parcel, handle)
        for i in parcel.members:
            if run.state[i] < OPEN:
                run.state[i] = SENT
        if run.feeders is not None:
            ends = self.brain.now + self.brain.latencies.of(parcel.call).seconds(parcel.items)
            run.expected.update(dict.fromkeys(parcel.members, ends))
        pieces = run.pieces if parcel.members == run.outputs else None
        self.brain.act("send", run, handle, parcel.call, parcel.request, pieces)

    def on_sent(
        self,
        executor: Executor,
        handle: int,
        ok: bool,
        value: Any,
        seconds: float,
        worker: str = "",
    ) -> None:
        parcel = self.parcels.pop(handle, None)
        if parcel is None:
            return  # sent by an earlier brain that broke
        run, gate = parcel.run, parcel.gate
        self.brain.windows.gave_back(parcel)
        self.brain.spending.settle(parcel, value)
        now = self.brain.now
        if ok:
            said = rate_limits(value.headers, parcel.call.spellings)
            gate.left(parcel, now, value.usage, said)
            self.brain.latencies.note(parcel.call, parcel.request, parcel.items, seconds)
            self.brain.prefixes.answered(parcel)
        elif isinstance(value, RateLimited):
            gate.throttled(parcel, now, value.retry_after, value.rate_limits)
            for each in self.brain.runs:
                if each is run or gate.queues(each.name):
                    each.resumes_at = max(each.resumes_at, gate.closed_until)
            self.brain.accounts.closed(parcel, "rate_limit", gate.closed_until)
        elif isinstance(value, Unreachable):
            gate.unsent(parcel)
        else:
            gate.lost(parcel, now, value.rate_limits)
        if run.ended is not None or parcel.is_over:
            self.brain.outages.unsent(parcel)
            self.brain.prefixes.failed(parcel, counts=False)
            if ok:  # given up, and answered all the same
                self.brain.journaling.keep_late(parcel, value)
                if len(parcel.members) == 1:
                    self.brain.lifecycle.keep_paid(run, parcel.members[0], value)
            return  # give_up has recorded it
        self.brain.outages.landed(parcel, None if ok else value)
        self.brain.accounts.record(parcel, ok, value, worker)
        if ok:
            self.brain.deadlines.met(parcel)
            self.brain.calls.answered(parcel, value)
        else:
            raw = value.raw if isinstance(value, Unusable) else None
            self.brain.journaling.ended(parcel, value, None if raw is None else Response(raw))
            self.refused(parcel, value)
            self.brain.outages.watch(parcel.request.scope[:2])

    def give_up(self, parcel: Parcel) -> None:
        """Record a request whose response will be ignored, so that the report counts it.

        :param parcel: the request; its run is ending.
        """
        if not parcel.handle:
            return  # it was given up before, and has not ended yet
        error = Interrupted("the run was stopped")
        self.brain.deadlines.met(parcel)
        self.brain.prefixes.failed(parcel, counts=False)
        self.brain.accounts.record(parcel, False, error)
        self.brain.journaling.ended(parcel, error)

    def refused(self, parcel: Parcel, error: CallError) -> None:
        """Handle a failed request: send it again, split it, or fail its calls.

        :param parcel: the request.
        :param error: why it failed.
        """
        run = parcel.run
        if isinstance(error, REFUSED_ALL) and self.brain.outages.refused(parcel, error):
            self.fail_members(parcel, error)
            return
        if isinstance(error, (InvalidRequest, CountMismatch)) and len(parcel.members) > 1:
            self.brain.deadlines.met(parcel)  # each part has its own alarm
            self.brain.prefixes.failed(parcel, counts=False)
            lists = self.brain.lists
            (lists.refused if isinstance(error, InvalidRequest) else lists.miscounted)(parcel)
            return
        parcel.lost += isinstance(error, WorkerLost)
        parcel.ambiguous += is_ambiguous(error)
        parcel.unreadable += is_unreadable(error)
        wait = self.policy.delay(
            error,
            attempt=parcel.attempt,
            throttled=parcel.throttled,
            ambiguous=parcel.ambiguous,
            lost=parcel.lost,
            unreadable=parcel.unreadable,
            elapsed=self.brain.now - parcel.since,
            patience=run.patience,
            rng=self.rng,
        )
        # pieces of a broken answer cannot be taken back, so no other answer may follow them
        shut = self.brain.outages.refusal(parcel) is not None
        if wait is None or shut or run.has_shown(parcel.members):
            self.fail_members(parcel, error)
            return
        if run.stopping:
            self.fail_early(parcel, error)
            return
        wait = self.brain.outages.wait(parcel, error, wait)
        parcel.throttled += isinstance(error, RateLimited)
        parcel.error = error
        if not isinstance(error, RateLimited):  # which closes the gate for all anyway
            self.brain.prefixes.failed(parcel)
        for i in parcel.members:
            run.state[i] = QUEUED
        self.brain.deadlines.watch(parcel)
        self.retrying[id(parcel)] = parcel
        run.retrying += 1
        self.brain.later(wait, lambda now: self._again(parcel))

    def unreadable(self, parcel: Parcel, error: CallError) -> None:
        """Buy the answer to a list once more if it cannot be read, or fail the calls of the list.

        :param parcel: the request.
        :param error: what is wrong with the answer.
        """
        if is_unreadable(error):
            self.refused(parcel, error)
        else:
            self.fail_members(parcel, error)

    def _again(self, parcel: Parcel) -> None:
        if self.retrying.pop(id(parcel), None) is None:
            return  # withdrawn in the meantime
        parcel.run.retrying -= 1
        alive = [i for i in parcel.members if parcel.run.state[i] < OPEN]
        if not alive:
            self.brain.prefixes.failed(parcel, counts=False)
        else:
            parcel.ready = self.brain.now
            self.brain.waits.waited(parcel, RETRY)
            self.brain.waits.entered(parcel)
            rank = max(parcel.run.program.rank[i] for i in alive)
            self.brain.windows.entered(parcel)
            parcel.gate.push(parcel, rank, parcel.run.name, parcel.request)
            self.brain.outages.entered(parcel)

    def fail_early(self, parcel: Parcel, error: CallError) -> None:
        """Fail the calls of a request that would be sent again, had its run not been stopped.

        :param parcel: the request.
        :param error: why its last attempt failed.
        """
        told = error.copy()
        why = parcel.run.series.why or "the run was stopped"
        told.args = (f"{told.message.rstrip('.')}; not tried again: {why}",)
        self.fail_members(parcel, told)

    def fail_members(self, parcel: Parcel, raised: FesteError, *, final: bool = False) -> None:
        """Fail all unfinished calls of a request.

        :param parcel: the request.
        :param raised: the error.
        :param final: whether no other backend may be asked.
        """
        error = cause_of(raised)
        self.brain.deadlines.met(parcel)
        self.brain.prefixes.failed(parcel)
        self.brain.lists.settled(parcel, taken=False)
        for i in parcel.members:
            if parcel.run.state[i] < OPEN:
                mine = error
                if len(parcel.members) > 1:  # each call gets its own error object
                    mine = error.copy()
                if isinstance(mine, CallError):
                    mine.attempts = parcel.attempt
                    mine.backend = parcel.request.plugin
                    mine.model = parcel.request.model
                if isinstance(mine, CallTimeout) and parcel.run.blocks_loop:
                    mine.args = (f"{mine.message}{_BLOCKED}",)
                self.brain.lifecycle.fail(parcel.run, i, mine, final=final)

    def leave_members(self, parcel: Parcel, told: NotStarted, cause: CallError) -> None:
        """End all unfinished calls of a request that was never sent, or ask their next backend.

        :param parcel: the request.
        :param told: why it is not sent.
        :param cause: the refusal of other calls that it is not sent for.
        """
        self.brain.deadlines.met(parcel)
        self.brain.prefixes.failed(parcel, counts=False)
        self.brain.lists.settled(parcel, taken=False)
        for i in parcel.members:
            if parcel.run.state[i] >= OPEN:
                continue
            if not self.brain.fallbacks.pass_on(parcel.run, i, cause.copy()):
                self.brain.lifecycle.leave(parcel.run, i, told.copy())
