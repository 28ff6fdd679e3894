"""The steps of a call: prepare its request, queue it at the gate, send it, parse the response."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request, Response, rate_limits
from feste.errors import (
    Ambiguous,
    CallError,
    CallTimeout,
    ConfigError,
    CountMismatch,
    FesteError,
    Interrupted,
    InvalidRequest,
    MalformedResponse,
    NotStarted,
    RateLimited,
    Unreachable,
    Unusable,
)
from feste.scheduler.admission.gate import Gate
from feste.scheduler.admission.retry import REFUSED_ALL, RetryPolicy, is_unreadable
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
    Scope,
)
from feste.scheduler.waits import PREFIX, RETRY, STORE
from feste.scheduler.work import cause_of

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Calls"]

#: What is added to a timeout where the caller's event loop stands still.
_BLOCKED = (
    ". compute() blocks the event loop that it was called on: if the server runs on that loop, it "
    "cannot answer; use `await feste.acompute(...)`"
)

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
        self.gates: dict[Scope, Gate[Parcel]] = {}
        #: The request of each gate that has a place, and waits until a budget has room for it.
        self.short: dict[Scope, Parcel] = {}
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
        waiting = self._unsent(lambda parcel: parcel.run is run)
        for gate in self.gates.values():
            waiting += gate.drop(run.name)
        for parcel in waiting:
            self.brain.prefixes.failed(parcel, counts=False)
            if parcel.error is not None:
                self.fail_members(parcel, parcel.error)

    def take_back(self, unwanted: Callable[[Parcel], bool]) -> list[Parcel]:
        """Return the requests that are not sent yet and unwanted; they wait for nothing any more.

        :param unwanted: decides whether a request is unwanted.
        """
        found = self._unsent(unwanted)
        for gate in self.gates.values():
            mine = [parcel for parcel in gate.waiting() if unwanted(parcel)]
            found += filter(gate.remove, mine)
        return found

    def pull(self, parcel: Parcel) -> None:
        """Let a request wait no more: at its gate, or for its next attempt.

        :param parcel: the request.
        """
        parcel.gate.remove(parcel)
        if self.retrying.pop(id(parcel), None) is not None:
            parcel.run.retrying -= 1

    def _unsent(self, unwanted: Callable[[Parcel], bool]) -> list[Parcel]:
        """Return unwanted requests that are between attempts, or have left their gate.

        Those that wait for a store or a budget are found to be over when they may go.
        """
        retrying = list(filter(unwanted, self.retrying.values()))
        for parcel in retrying:
            del self.retrying[id(parcel)]
            parcel.run.retrying -= 1
        on_the_way = chain(self.brain.journaling.intending.values(), self.short.values())
        found = [parcel for parcel in on_the_way if not parcel.gone and unwanted(parcel)]
        for parcel in found:
            parcel.gone = True
        return [*retrying, *found]

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
        refusal = self.brain.outages.refusal(parcel)
        if refusal is not None:
            self.brain.outages.shut(parcel, refusal)
        elif self.brain.outages.is_passed_by(parcel.call, parcel.request):
            self.brain.outages.give_up(parcel)
        elif not self.brain.prefixes.holds(parcel):
            self.brain.waits.entered(parcel)
            parcel.gate.push(parcel, parcel.rank, parcel.run.name, parcel.request)

    def admit(self) -> None:
        """Send the requests that the gates admit."""
        for scope, gate in list(self.gates.items()):
            while (parcel := self._next(scope, gate)) is not None:
                self.brain.outages.left(parcel)
                self.brain.waits.admitted(parcel)
                parcel.attempt += 1
                if parcel.attempt == 1:
                    parcel.since = self.brain.now
                if parcel.run.store is not None:
                    self.brain.journaling.intend(parcel)
                else:
                    self.launch(parcel)
            if len(gate) or scope in self.short or self.brain.groups.wait_for(gate):
                self.watch(gate, self.brain.outages.resumes_at(scope))
            self.brain.waits.held(gate)

    def watch(self, gate: Gate[Parcel], resumes_at: float = 0.0) -> None:
        """Look at a gate again when it will admit a request by itself.

        :param gate: the gate; one that admits one now, or waits for a slot, is ignored.
        :param resumes_at: when its backend may be asked again whether it is up.
        """
        now = self.brain.now
        wakes = max(gate.wakes(now), resumes_at)
        if now < wakes < math.inf and not now < gate.alarm <= wakes + _SOON:
            gate.alarm = now + (wakes - now)  # as the timer rounds it, which may be just too early
            self.brain.later(wakes - now, lambda now: None)

    def _next(self, scope: Scope, gate: Gate[Parcel]) -> Parcel | None:
        """Return the next request that may be sent: its backend is up, and it is paid for."""
        while self.brain.now >= gate.closed_until and self.brain.outages.admits(scope):
            parcel = self.short.pop(scope, None) or gate.pop(self.brain.now)
            if parcel is None:
                return None
            if parcel.is_over:
                self.unsent(parcel)
            elif self.brain.deadlines.is_over(parcel):
                self.unsent(parcel)
                self.brain.deadlines.missed(parcel)
            elif self._is_paid(scope, parcel):
                return parcel
            elif scope in self.short:
                return None
        return None

    def _is_paid(self, scope: Scope, parcel: Parcel) -> bool:
        """Whether the budgets of a run have room for a request; if not, it waits or ends."""
        if not parcel.run.caps:
            return True
        try:
            verdict = self.brain.spending.reserve(parcel)
        except ConfigError as error:
            self.unsent(parcel)
            self.fail_members(parcel, error)
            return False
        if verdict == "wait":
            self.short[scope] = parcel
        elif verdict == "stop":
            self.unsent(parcel)
            if parcel.error is not None:
                self.fail_members(parcel, parcel.error)
            self.brain.halt(parcel.run)
        return verdict == "go"

    def unsent(self, parcel: Parcel) -> None:
        """Give back the place and the money of a request that left its gate and was not sent.

        :param parcel: the request.
        """
        parcel.gate.unsent(parcel)
        self.brain.deadlines.met(parcel)
        self.brain.outages.unsent(parcel)
        self.brain.spending.settle(parcel, None)
        self.brain.later(0.0, lambda now: None)  # others may have waited for the place

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
        self.brain.spending.settle(parcel, value)
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
        if run.ended is not None or parcel.is_over:
            self.brain.outages.unsent(parcel)
            self.brain.prefixes.failed(parcel, counts=False)
            if ok:  # given up, and answered all the same
                self.brain.journaling.keep_late(parcel, value)
                if len(parcel.members) == 1:
                    self.brain.lifecycle.keep_paid(run, parcel.members[0], value)
            return  # give_up has recorded it
        self.brain.outages.landed(parcel, None if ok else value)
        self.brain.accounts.record(parcel, ok, value)
        if ok:
            self.brain.deadlines.met(parcel)
            self._answered(parcel, value)
        else:
            raw = value.raw if isinstance(value, Unusable) else None
            self.brain.journaling.ended(parcel, value, None if raw is None else Response(raw))
            self._refused(parcel, value)
            self.brain.outages.watch((parcel.request.endpoint, parcel.request.account))

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

    def _answered(self, parcel: Parcel, response: Response) -> None:
        run, members = parcel.run, parcel.members
        for i in members:
            run.state[i] = PARSING
        if len(members) > 1:
            self.brain.lists.answered(parcel, response)
            return
        self.brain.lists.settled(parcel, taken=True)
        i = members[0]
        run.fresh[i] = parcel, 0
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
        for position, outcome in enumerate(outcomes):
            i = parcel.members[position]
            if run.state[i] >= OPEN or isinstance(outcome, CountMismatch):
                continue
            if isinstance(outcome, Response):
                run.fresh[i] = parcel, position
                self._parse(run, i, parcel.call, outcome)
            else:
                self._refused(parcel.alone(position, self.brain.now), outcome)

    def on_parsed(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        bought = run.fresh.pop(task.index, None)
        told = None if ok else cause_of(value)
        if bought is not None and told is not None and is_unreadable(told):
            assert isinstance(told, CallError)
            parcel, position = bought
            self.brain.lifecycle.keep_paid(run, task.index, None)  # a later run may buy another
            self._refused(parcel.alone(position, self.brain.now), told)
            return  # it is the provider's fault, and no user's
        self.brain.flights.answered(run, task.index, task.args[1])
        if ok:
            self.brain.journaling.remember(run, task.index, task.args[1], value)
            return
        error = cause_of(value, MalformedResponse)
        self.brain.lifecycle.fail(run, task.index, replayed_in_vain(run, task.index, error))

    def unreadable(self, parcel: Parcel, error: CallError) -> None:
        """Buy the answer to a list once more if it cannot be read, or fail the calls of the list.

        :param parcel: the request.
        :param error: what is wrong with the answer.
        """
        if is_unreadable(error):
            self._refused(parcel, error)
        else:
            self.fail_members(parcel, error)

    def _refused(self, parcel: Parcel, error: CallError) -> None:
        """Handle a failed request: send it again, split it, or fail its calls."""
        run = parcel.run
        if isinstance(error, REFUSED_ALL) and self.brain.outages.refused(parcel, error):
            self.fail_members(parcel, error)
            return
        if isinstance(error, InvalidRequest) and len(parcel.members) > 1:
            self.brain.deadlines.met(parcel)  # each part has an alarm of its own
            self.brain.prefixes.failed(parcel, counts=False)
            self.brain.lists.refused(parcel)
            return
        parcel.ambiguous += isinstance(error, Ambiguous)
        parcel.unreadable += is_unreadable(error)
        wait = None
        # pieces of a broken answer cannot be taken back, so no other answer may follow them
        begun = run.pieces is not None and run.pieces.begun and parcel.members == run.outputs
        if not (run.stopping or begun or self.brain.outages.refusal(parcel)):
            wait = self.policy.delay(
                error,
                attempt=parcel.attempt,
                throttled=parcel.throttled,
                ambiguous=parcel.ambiguous,
                unreadable=parcel.unreadable,
                elapsed=self.brain.now - parcel.since,
                rng=self.rng,
            )
        if wait is None:
            self.fail_members(parcel, error)
            return
        wait = self.brain.outages.wait(parcel, error, wait)
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
