"""Let requests queue at the gates of their accounts, and go when all that limits them allows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request
from feste.errors import ConfigError
from feste.scheduler.admission.gate import Gate
from feste.scheduler.parcel import Parcel, Split
from feste.scheduler.run import Run, Scope
from feste.scheduler.states import QUEUED
from feste.scheduler.waits import BUDGET, PREFIX

if TYPE_CHECKING:
    from feste.scheduler.batching.batcher import Packed
    from feste.scheduler.brain import Brain

__all__ = ["Gates"]

#: Seconds by which a gate may be looked at too late, rather than set another alarm.
_SOON = 0.001


class Gates:
    """The gates of all accounts.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self.by_scope: dict[Scope, Gate[Parcel]] = {}
        #: Requests that have left their gates and wait until a budget has room for them: one for each
        #: gate and run, whose others wait in the queue.
        self.short: dict[tuple[Scope, str], Parcel] = {}

    def gate_of(self, call: Call[Any], request: Request) -> Gate[Parcel]:
        """Return the gate of a request.

        :param call: its operation.
        :param request: the request.
        """
        gate = self.by_scope.get(request.scope)
        if gate is None:
            gate = self.by_scope[request.scope] = Gate()
        gate.heed(call.client, call.limits, self.brain.now)
        return gate

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
        self.brain.deadlines.watch(parcel)
        self.enter(parcel)

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
            self.brain.windows.entered(parcel)
            parcel.gate.push(parcel, parcel.rank, parcel.run.name, parcel.request)
            self.brain.outages.entered(parcel)

    def admit(self) -> None:
        """Send the requests that the gates admit."""
        for scope, gate in list(self.by_scope.items()):
            while (parcel := self._next(scope, gate)) is not None:
                self.brain.windows.took(parcel)
                self.brain.outages.left(parcel)
                self.brain.waits.admitted(parcel)
                parcel.attempt += 1
                if parcel.attempt == 1:
                    parcel.since = self.brain.now
                    self.brain.deadlines.begin(parcel)
                if parcel.run.store is not None:
                    self.brain.journaling.intend(parcel)
                else:
                    self.brain.attempts.launch(parcel)
            if len(gate) or self._is_short(scope) or self.brain.groups.wait_for(gate):
                self.watch(gate, self.brain.outages.resumes_at(scope))
            gate.parked = gate.held_by
            if not self.brain.outages.admits(scope):
                gate.parked = "outage"
            self.brain.waits.held(gate)

    def watch(self, gate: Gate[Parcel], resumes_at: float = 0.0) -> None:
        """Look at a gate again when it will admit a request by itself.

        :param gate: the gate; one that admits one now, or waits for a slot, is ignored.
        :param resumes_at: when its backend may be asked again whether it is up.
        """
        now = self.brain.now
        wakes = max(gate.wakes(now), resumes_at)
        if now < wakes < math.inf and not now < gate.alarm <= wakes + _SOON:
            gate.alarm = wakes
            self.brain.at(wakes, lambda now: None)

    def _next(self, scope: Scope, gate: Gate[Parcel]) -> Parcel | None:
        """Return the next request that may be sent: its backend is up, and it is paid for."""
        while self.brain.now >= gate.closed_until and self.brain.outages.admits(scope):
            parcel = self._afforded(scope) or gate.pop(self.brain.now)
            if parcel is None:
                return None
            if parcel.is_over:
                self.unsent(parcel)
            elif self.brain.deadlines.is_over(parcel):
                self.unsent(parcel)
                self.brain.deadlines.missed(parcel)
            elif parcel.reserved or self._is_paid(scope, parcel):
                return parcel
        return None

    def is_short(self, parcel: Parcel) -> bool:
        """Return whether a request waits until a budget has room for it.

        :param parcel: the request.
        """
        waits = self.short.get((parcel.request.scope, parcel.run.name)) is parcel
        return waits and not parcel.is_over

    def _is_short(self, scope: Scope) -> bool:
        return any(short == scope for short, _ in self.short)

    def _afforded(self, scope: Scope) -> Parcel | None:
        """Return a request for which there is room under the budgets now, or which is over."""
        for short, parcel in list(self.short.items()):
            if short[0] != scope:
                continue
            over = parcel.is_over or self.brain.deadlines.is_over(parcel)
            room = self.brain.windows.room(parcel.run.executor)
            if over or (room and self.brain.spending.has_room(parcel)):
                del self.short[short]
                parcel.gate.let_go(parcel.run.name, "budget")
                self.brain.waits.waited(parcel, BUDGET)
                self.brain.waits.entered(parcel)
                if over or self._is_paid(scope, parcel):
                    return parcel
        return None

    def _is_paid(self, scope: Scope, parcel: Parcel) -> bool:
        """Whether the budgets of a run have room for a request; if not, it waits or ends."""
        if not parcel.run.caps:
            return True
        try:
            verdict = self.brain.spending.reserve(parcel)
        except ConfigError as error:
            self.unsent(parcel)
            self.brain.attempts.fail_members(parcel, error)
            return False
        if verdict in ("wait", "shorten"):
            self.brain.waits.admitted(parcel)
            self.short[scope, parcel.run.name] = parcel
            parcel.gate.hold(parcel.run.name, "budget")
            if verdict == "shorten":
                self.brain.lists.shorten(parcel, self.brain.spending.set_aside(parcel))
        elif verdict == "stop":
            self.unsent(parcel)
            if parcel.error is not None:
                self.brain.attempts.fail_early(parcel, parcel.error)
            self.brain.stop(parcel.run)
        return verdict == "go"

    def shortened(self, parcel: Parcel, parts: Sequence[Packed]) -> None:
        """Let a request that waits for a budget go as its first part; the others queue.

        :param parcel: the request.
        :param parts: the requests that take its place.
        """
        self.brain.waits.waited(parcel, BUDGET)
        first, *others = parts
        rest = [parcel.part(*other) for other in others]
        parcel.members, parcel.requests, parcel.request = first
        parcel.gate.shrunk(parcel, parcel.request)
        if self.brain.spending.has_room(parcel):
            self.brain.spending.reserve(parcel)
        else:  # it is looked at again
            self.brain.spending.settle(parcel, None)
        for other in rest:
            self.brain.deadlines.watch(other)
            self.enter(other)

    def unsent(self, parcel: Parcel) -> None:
        """Give back the place, the money and the lead of a request that left its gate and was not sent.

        :param parcel: the request.
        """
        parcel.gate.unsent(parcel)
        self.brain.windows.gave_back(parcel)
        self.brain.deadlines.met(parcel)
        self.brain.outages.unsent(parcel)
        self.brain.prefixes.failed(parcel, counts=False)
        self.brain.spending.settle(parcel, None)
        self.brain.later(0.0, lambda now: None)  # others may have waited for the place

    def withdraw(self, run: Run) -> None:
        """Remove a stopping run's requests from the gates; those sent before fail with their error.

        :param run: the run.
        """
        self.brain.prefixes.drop(run)
        waiting = self._unsent(lambda parcel: parcel.run is run)
        for gate in self.by_scope.values():
            waiting += gate.drop(run.name)
        for parcel in waiting:
            self.brain.prefixes.failed(parcel, counts=False)
            if parcel.error is not None:
                self.brain.attempts.fail_early(parcel, parcel.error)

    def take_back(self, unwanted: Callable[[Parcel], bool]) -> list[Parcel]:
        """Return the requests that are not sent yet and unwanted; they wait for nothing any more.

        :param unwanted: decides whether a request is unwanted.
        """
        found = self._unsent(unwanted)
        for gate in self.by_scope.values():
            mine = [parcel for parcel in gate.waiting() if unwanted(parcel)]
            found += filter(gate.remove, mine)
        return found

    def pull(self, parcel: Parcel) -> None:
        """Let a request wait no more: at its gate, or for its next attempt.

        :param parcel: the request.
        """
        parcel.gate.remove(parcel)
        if self.is_short(parcel):
            self.brain.spending.settle(parcel, None)  # its gate may stay closed for long
        if self.brain.attempts.retrying.pop(id(parcel), None) is not None:
            parcel.run.retrying -= 1

    def _unsent(self, unwanted: Callable[[Parcel], bool]) -> list[Parcel]:
        """Return unwanted requests that are between attempts, or have left their gate.

        Those that wait for a store or a budget are found to be over when they may go.
        """
        retrying = list(filter(unwanted, self.brain.attempts.retrying.values()))
        for parcel in retrying:
            del self.brain.attempts.retrying[id(parcel)]
            parcel.run.retrying -= 1
        on_the_way = [
            parcel
            for parcel in chain(self.brain.journaling.intending.values(), self.short.values())
            if not parcel.taken_back and unwanted(parcel)
        ]
        for parcel in on_the_way:
            parcel.taken_back = True
            self.brain.spending.settle(parcel, None)
        return [*retrying, *on_the_way]
