"""The steps of a call: prepare its request, queue it at the gate, send it, parse the response."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request, Response, rate_limits
from feste.errors import (
    Ambiguous,
    CallError,
    CountMismatch,
    FesteError,
    Interrupted,
    InvalidRequest,
    MalformedResponse,
    RateLimited,
    Unreachable,
)
from feste.scheduler.admission.gate import Gate
from feste.scheduler.admission.retry import RetryPolicy
from feste.scheduler.executor import QUICK, Executor, PyTask
from feste.scheduler.halves import parse_response
from feste.scheduler.journaling import replayed_in_vain
from feste.scheduler.parcel import Parcel, Split
from feste.scheduler.run import (
    FINISHING,
    GATHERED,
    NOT_STARTED,
    OPEN,
    PARSING,
    QUEUED,
    SENT,
    Run,
)
from feste.scheduler.waits import PREFIX, RETRY, STORE
from feste.scheduler.work import cause_of

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Calls"]

#: Seconds by which a gate may be looked at too late, rather than set another alarm.
_SOON = 0.001


class Calls:
    """Move calls through the gates.

    :param brain: the brain that this belongs to.
    :param policy: decides whether and when a failed request is sent again.
    :param rng: the source of the jitter.
    """

    def __init__(self, brain: Brain, policy: RetryPolicy, rng: random.Random) -> None:
        self.brain = brain
        self.policy = policy
        self.rng = rng
        self.gates: dict[tuple[Hashable, ...], Gate[Parcel]] = {}
        #: Requests in flight by handle, and requests that wait for their next attempt by id.
        self.parcels: dict[int, Parcel] = {}
        self.retrying: dict[int, Parcel] = {}

    def on_prepared(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        i = task.index
        if not ok:
            self.fail(run, i, value)
            return
        if run.stopping:
            self.brain.lifecycle.end(run, i, NOT_STARTED)
            return
        if run.answers is None:
            self.buy(run, i, value)
        else:
            self.brain.journaling.look_up(run, i, value)

    def buy(self, run: Run, i: int, request: Request) -> None:
        """Send a call's request, alone or with its batch.

        :param run: the run.
        :param i: the node's position.
        :param request: its request.
        """
        self.brain.waits.spend(run, i, STORE)
        if self.brain.flights.joins(run, i, request):
            return
        gathering = run.gatherings.get(i)
        before, run.state[i] = run.state[i], GATHERED
        if gathering is not None:
            if gathering.arrive(i, request):
                self.brain.lists.flush(run, gathering)
        elif not self.brain.groups.arrive(run, [(i, request)]):
            run.state[i] = before
            self.queue(run, [i], [request], request)

    def withdraw(self, run: Run) -> None:
        """Remove a stopping run's requests from the gates; those sent before fail with their error.

        :param run: the run.
        """
        self.brain.prefixes.drop(run)
        waiting = [p for p in self.retrying.values() if p.run is run]
        waiting += [p for p in self.brain.journaling.intending.values() if p.run is run]
        for gate in self.gates.values():
            waiting += gate.drop(run.name)
        for parcel in waiting:
            self.brain.prefixes.failed(parcel, counts=False)
            if self.retrying.pop(id(parcel), None) is not None:
                run.retrying -= 1
            if parcel.error is not None:
                self.fail_members(parcel, parcel.error)

    def queue(
        self,
        run: Run,
        members: list[int],
        requests: list[Request],
        request: Request,
        split: Split | None = None,
    ) -> None:
        """Put a request into the queue of its gate.

        :param run: the run.
        :param members: the positions of the nodes that it answers.
        :param requests: the single request of each member.
        :param request: the request to send.
        :param split: the refused list that it is a part of, or None.
        """
        call: Any = run.program.nodes[members[0]].op
        gate = self.gate_of(call, request)
        for i in members:
            run.state[i] = QUEUED
        run.resumes_at = max(run.resumes_at, gate.closed_until)
        parcel = Parcel(run, call, members, requests, request, gate, self.brain.now, split)
        self.brain.waits.gathered(parcel)
        self.enter(parcel)

    def gate_of(self, call: Call[Any], request: Request) -> Gate[Parcel]:
        """Return the gate of a request.

        :param call: its operation.
        :param request: the request.
        """
        name = (request.endpoint, request.account, request.model)
        gate = self.gates.get(name)
        if gate is None:
            gate = self.gates[name] = Gate()
        gate.heed(call.client, call.client.limits, self.brain.now)
        return gate

    def enter(self, parcel: Parcel) -> None:
        """Let a request queue at its gate, unless it has to wait until its prefix is cached.

        :param parcel: the request.
        """
        self.brain.waits.waited(parcel, PREFIX)
        if not self.brain.prefixes.holds(parcel):
            self.brain.waits.entered(parcel)
            run, rank = parcel.run, parcel.run.program.rank
            highest = max(rank[i] for i in parcel.members)
            parcel.gate.push(parcel, highest, run.name, parcel.request)

    def admit(self) -> None:
        """Send the requests that the gates admit."""
        for gate in self.gates.values():
            while (parcel := gate.pop(self.brain.now)) is not None:
                self.brain.waits.admitted(parcel)
                parcel.attempt += 1
                if parcel.attempt == 1:
                    parcel.since = self.brain.now
                if parcel.run.store is not None:
                    self.brain.journaling.intend(parcel)
                else:
                    self.launch(parcel)
            if len(gate) or self.brain.groups.wait_for(gate):
                self.watch(gate)
            self.brain.waits.held(gate)

    def watch(self, gate: Gate[Parcel]) -> None:
        """Look at a gate again when it will admit a request by itself.

        :param gate: the gate; one that admits one now, or waits for a slot, is ignored.
        """
        now, wakes = self.brain.now, gate.wakes(self.brain.now)
        if now < wakes < math.inf and not now < gate.alarm <= wakes + _SOON:
            gate.alarm = wakes
            self.brain.later(wakes - now, lambda now: None)

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
        self.brain.act("send", run.executor, handle, parcel.call, parcel.request, pieces)

    def on_sent(
        self, executor: Executor, handle: int, ok: bool, value: Any, seconds: float
    ) -> None:
        parcel = self.parcels.pop(handle, None)
        if parcel is None:
            return  # sent by an earlier brain that broke
        run, gate = parcel.run, parcel.gate
        now = self.brain.now
        if ok:
            spellings = parcel.call.client.rate_limit_headers
            gate.left(parcel, now, value.usage, rate_limits(value.headers, spellings))
            self.brain.latencies.note(parcel.call, parcel.request, parcel.items, seconds)
        elif isinstance(value, RateLimited):
            gate.throttled(parcel, now, value.retry_after, value.rate_limits)
            for each in self.brain.runs:
                if each is run or gate.queues(each.name):
                    each.resumes_at = max(each.resumes_at, gate.closed_until)
            self.brain.accounts.throttled(parcel)
        elif isinstance(value, Unreachable):
            gate.unsent(parcel)
        else:
            gate.lost(parcel, now, value.rate_limits)
        if ok:
            self.brain.prefixes.answered(parcel)
        if run.ended is not None or all(run.state[i] >= OPEN for i in parcel.members):
            self.brain.prefixes.failed(parcel, counts=False)
            if ok:  # given up, and answered all the same
                self.brain.journaling.keep_late(parcel, value)
                if len(parcel.members) == 1:
                    self.brain.lifecycle.keep_paid(run, parcel.members[0], value)
            return  # give_up has recorded it
        self.brain.accounts.record(parcel, ok, value)
        if ok:
            self._answered(parcel, value)
        else:
            self.brain.journaling.ended(parcel, value)
            self._refused(parcel, value)

    def give_up(self, parcel: Parcel) -> None:
        """Record a request whose response will be ignored, so that the report counts it.

        :param parcel: the request; its run is ending.
        """
        if not parcel.handle:
            return  # it was given up before, and has not ended yet
        error = Interrupted("the run was stopped")
        self.brain.prefixes.failed(parcel, counts=False)
        self.brain.accounts.record(parcel, False, error)
        self.brain.journaling.ended(parcel, error)

    def _answered(self, parcel: Parcel, response: Response) -> None:
        run, members = parcel.run, parcel.members
        for i in members:
            run.state[i] = PARSING
        if len(members) > 1:
            self.brain.lists.answered(parcel, response)
            return
        self.brain.lists.settled(parcel, taken=True)
        i = members[0]
        self.brain.journaling.keep(
            parcel,
            [(parcel.requests[0], response)],
            response,
            lambda: self._parse(run, i, parcel.call, response),
        )

    def parse_again(self, run: Run, i: int, response: Response) -> None:
        """Parse a response that was paid for before: by an earlier run, or found in a store.

        :param run: the run.
        :param i: the node's position.
        :param response: the response.
        """
        run.state[i] = PARSING
        self.brain.lists.drop(run, i)
        call: Any = run.program.nodes[i].op
        self._parse(run, i, call, response)

    def _parse(self, run: Run, i: int, call: Call[Any], response: Response) -> None:
        self.brain.flights.answered(run, i, response)
        self.brain.lifecycle.keep_paid(run, i, response)
        if run.state[i] >= OPEN:  # given up while its answer was written
            return
        self.brain.waits.spend(run, i, STORE)
        node = run.program.nodes[i]
        values = [run.values[d] for d in run.program.deps[i]]
        args = (call, response, node.args, values)
        task = PyTask(run, i, "parse", parse_response, args, {}, [], f"{call.name}.parse")
        self.brain.dispatcher.push(run, QUICK, run.program.rank[i] + FINISHING, task)

    def deliver(self, parcel: Parcel, outcomes: Sequence[Response | CallError]) -> None:
        """Give each call of a packed request its own outcome.

        :param parcel: the request.
        :param outcomes: one for each of its members; :class:`~feste.errors.CountMismatch` for one
            without an answer, which is left alone.
        """
        run = parcel.run
        self.brain.waits.waited(parcel, STORE)
        for i, request, outcome in zip(parcel.members, parcel.requests, outcomes, strict=True):
            if run.state[i] >= OPEN or isinstance(outcome, CountMismatch):
                continue
            if isinstance(outcome, Response):
                self._parse(run, i, parcel.call, outcome)
            else:
                alone = Parcel(
                    run, parcel.call, [i], [request], request, parcel.gate, self.brain.now
                )
                alone.attempt, alone.since = parcel.attempt, parcel.since
                alone.throttled = parcel.throttled
                self._refused(alone, outcome)

    def on_parsed(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        if ok:
            self.brain.journaling.remember(run, task.index, task.args[1], value)
        else:
            error = cause_of(value, MalformedResponse)
            self.brain.lifecycle.fail(run, task.index, replayed_in_vain(run, task.index, error))

    def _refused(self, parcel: Parcel, error: CallError) -> None:
        """Handle a failed request: send it again, split it, or fail its calls."""
        run = parcel.run
        if isinstance(error, InvalidRequest) and len(parcel.members) > 1:
            self.brain.prefixes.failed(parcel, counts=False)
            self.brain.lists.refused(parcel)
            return
        parcel.ambiguous += isinstance(error, Ambiguous)
        wait = None
        # pieces of a broken answer cannot be taken back, so no other answer may follow them
        begun = run.pieces is not None and run.pieces.begun and parcel.members == run.outputs
        if not run.stopping and not begun:
            wait = self.policy.delay(
                error,
                attempt=parcel.attempt,
                throttled=parcel.throttled,
                ambiguous=parcel.ambiguous,
                elapsed=self.brain.now - parcel.since,
                rng=self.rng,
            )
        if wait is None:
            self.fail_members(parcel, error)
            return
        parcel.throttled += isinstance(error, RateLimited)
        parcel.error = error
        if not isinstance(error, RateLimited):  # which closes the gate for all anyway
            self.brain.prefixes.failed(parcel)
        for i in parcel.members:
            run.state[i] = QUEUED
        self.retrying[id(parcel)] = parcel
        run.retrying += 1
        self.brain.later(wait, lambda now: self._again(parcel))

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
            parcel.gate.push(parcel, rank, parcel.run.name, parcel.request)

    def fail(self, run: Run, i: int, error: FesteError) -> None:
        """Fail a call because one half of its operation raised.

        :param run: the run.
        :param i: the node's position.
        :param error: the error, as described by the executor.
        """
        self.brain.lifecycle.fail(run, i, cause_of(error))

    def fail_members(self, parcel: Parcel, raised: FesteError) -> None:
        """Fail all unfinished calls of a request.

        :param parcel: the request.
        :param raised: the error.
        """
        error = cause_of(raised)
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
                self.brain.lifecycle.fail(parcel.run, i, mine)
