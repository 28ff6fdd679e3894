"""The steps of a call: its request is prepared, bought or found, and its response parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request, Response
from feste.errors import CallError, CountMismatch, FesteError, MalformedResponse
from feste.scheduler.admission.retry import is_unreadable
from feste.scheduler.executor import QUICK, PyTask
from feste.scheduler.halves import parse_response
from feste.scheduler.journaling import replayed_in_vain
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run
from feste.scheduler.states import (
    FINISHING,
    GATHERED,
    NOT_STARTED,
    OPEN,
    PARSING,
    PREPARING,
    REPLAYED,
)
from feste.scheduler.waits import STORE
from feste.scheduler.work import cause_of

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Calls"]


class Calls:
    """Move calls from step to step.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def on_prepared(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        i = task.index
        if run.state[i] != PREPARING:  # it was reported before
            return
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
            self.brain.gates.queue(run, [i], [request], request)

    def answered(self, parcel: Parcel, response: Response) -> None:
        """Have the response to a request parsed, as soon as it is kept.

        :param parcel: the request.
        :param response: its response.
        """
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
                self.brain.attempts.refused(parcel.alone(position, self.brain.now), outcome)

    def on_parsed(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        bought = run.fresh.pop(task.index, None)
        told = None if ok else cause_of(value)
        if bought is not None and told is not None and is_unreadable(told):
            assert isinstance(told, CallError)
            parcel, position = bought
            self.brain.lifecycle.keep_paid(run, task.index, None)  # a later run may buy another
            self.brain.attempts.refused(parcel.alone(position, self.brain.now), told)
            return  # it is the provider's fault, and no user's
        self.brain.flights.answered(run, task.index, task.args[1])
        if ok:
            self.brain.journaling.remember(run, task.index, task.args[1], value)
            return
        error = replayed_in_vain(run, task.index, cause_of(value, MalformedResponse))
        asked = run.asked.get(task.index)
        if (
            asked is not None
            and run.sources.get(task.index) == REPLAYED
            and self.brain.fallbacks.look_ahead(run, task.index, asked, error)
        ):
            return  # another backend may have answered after this one
        self.brain.lifecycle.fail(run, task.index, error)

    def fail(self, run: Run, i: int, error: FesteError) -> None:
        """Fail a call because one half of its operation raised.

        :param run: the run.
        :param i: the node's position.
        :param error: the error, as described by the executor.
        """
        self.brain.lifecycle.fail(run, i, cause_of(error))
