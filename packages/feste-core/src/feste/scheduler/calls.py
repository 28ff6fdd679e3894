"""The way of a call: its request is prepared, grouped, queued at the gate, sent, parsed."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request, Response
from feste.draw import Draw
from feste.errors import (
    Ambiguous,
    CallError,
    CountMismatch,
    FesteError,
    Interrupted,
    InvalidRequest,
    MalformedResponse,
    NodeError,
    RateLimited,
)
from feste.events import RequestFinished
from feste.packing import fill
from feste.scheduler.batcher import Group, packed, unpacked
from feste.scheduler.executor import Executor, PyTask
from feste.scheduler.gate import Gate
from feste.scheduler.parcel import ListTrial, Parcel
from feste.scheduler.retry import RetryPolicy
from feste.scheduler.run import (
    DONE,
    FINISHING,
    GROUPED,
    NOT_STARTED,
    OPEN,
    PARSING,
    QUEUED,
    SENT,
    Run,
)

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Calls", "prepare_request"]


class Calls:
    """Brings calls through the gates.

    :param brain: the brain it is part of.
    :param policy: when failed requests are sent again.
    :param rng: the source of jitter.
    """

    def __init__(self, brain: Brain, policy: RetryPolicy, rng: random.Random) -> None:
        self.brain = brain
        self.policy = policy
        self.rng = rng
        self.gates: dict[tuple[Hashable, ...], Gate[Parcel]] = {}
        self.parcels: dict[int, Parcel] = {}
        self.no_lists: set[tuple[str, str, str]] = set()

    def prepared(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        i = task.index
        if not ok:
            self.brain.lifecycle.fail(run, i, _cause(value))
            return
        if run.stopping:
            self.brain.lifecycle.end(run, i, NOT_STARTED)
            return
        group = run.groups.get(i)
        if group is None:
            self._queue(run, [i], [value], value)
            return
        run.state[i] = GROUPED
        if group.arrive(i, value):
            self._flush(run, group)

    def forget(self, run: Run) -> None:
        """Take what a run has queued out of the gates.

        :param run: the run.
        """
        for gate in self.gates.values():
            gate.drop(lambda parcel: parcel.run is run)

    def drop_from_group(self, run: Run, i: int) -> None:
        group = run.groups.get(i)
        if group is not None and group.drop(i) and not run.stopping:
            self._flush(run, group)

    def _flush(self, run: Run, group: Group) -> None:
        arrived = [(i, r) for i, r in group.flush() if run.state[i] == GROUPED]
        if not arrived:
            return
        members, requests = [i for i, _ in arrived], [r for _, r in arrived]
        first: Request = requests[0]
        if len(members) == 1 or self._lists_of(run, members[0], first) in self.no_lists:
            for i, request in arrived:
                self._queue(run, [i], [request], request)
            return
        call = run.program.nodes[members[0]].op
        args = (call, members, requests)
        task = PyTask(run, members[0], "pack", packed, args, {}, [], f"{call.name}.pack")
        self.brain.dispatcher.push(run, "thread", run.program.rank[members[0]] + FINISHING, task)

    def packed(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        if not ok:
            for i in task.args[1]:
                if run.state[i] < OPEN:
                    self.brain.lifecycle.fail(run, i, _cause(value))
            return
        for members, requests, request in value:
            if run.state[members[0]] == GROUPED:
                self._queue(run, members, requests, request)

    def _queue(
        self,
        run: Run,
        members: list[int],
        requests: list[Request],
        request: Request,
        trial: ListTrial | None = None,
    ) -> None:
        call: Any = run.program.nodes[members[0]].op
        name = (request.endpoint, request.account, request.model)
        gate = self.gates.get(name)
        if gate is None:
            gate = self.gates[name] = Gate()
        gate.heed(call.client, call.client.limits)
        for i in members:
            run.state[i] = QUEUED
        parcel = Parcel(run, call, members, requests, request, gate, self.brain.now, trial)
        gate.push(parcel, max(run.program.rank[i] for i in members))

    def admit(self) -> None:
        """Send what the gates let through."""
        for gate in self.gates.values():
            while (parcel := gate.pop(self.brain.now)) is not None:
                handle = self.brain.number()
                run = parcel.run
                parcel.sent = self.brain.now
                parcel.attempt += 1
                self.parcels[handle] = parcel
                for i in parcel.members:
                    run.state[i] = SENT
                self.brain.act("send", run.executor, handle, parcel.call, parcel.request)
            if len(gate) and gate.closed_until > max(self.brain.now, gate.wakes_at):
                gate.wakes_at = gate.closed_until
                self.brain.later(gate.closed_until - self.brain.now, lambda now: None)

    def sent(self, executor: Executor, handle: int, ok: bool, value: Any, seconds: float) -> None:
        parcel = self.parcels.pop(handle, None)
        if parcel is None:
            return  # of a brain that broke
        run, gate = parcel.run, parcel.gate
        if ok:
            gate.left(parcel.sent, self.brain.now)
        elif isinstance(value, RateLimited):
            gate.throttled(parcel.sent, self.brain.now, value.retry_after)
        else:
            gate.lost()
        if run.ended is not None:  # recorded when it was given up
            return
        self._record(parcel, ok, value)
        if ok:
            self._answered(parcel, value)
        else:
            self._refused(parcel, value)

    def give_up(self, parcel: Parcel) -> None:
        """Record a request whose answer nobody will hear: the report counts it.

        :param parcel: the request; its run ends now.
        """
        self._record(parcel, False, Interrupted("the run was stopped"))

    def _record(self, parcel: Parcel, ok: bool, value: Any) -> None:
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
            status=None if ok else value.status,
            error="" if ok else type(value).__name__,
            request_id=value.request_id,
        )
        run.requests.append(record)
        if run.observed:
            self.brain.act("notify", record)

    def _answered(self, parcel: Parcel, response: Response) -> None:
        run, members = parcel.run, parcel.members
        for i in members:
            run.state[i] = PARSING
        if len(members) == 1:
            if parcel.trial is not None and parcel.trial.ended(taken=True):
                self._no_lists(parcel)
            self._parse(run, members[0], parcel.call, response)
            return
        args = (parcel.call, parcel.request, response, parcel)
        name = f"{parcel.call.name}.unpack"
        task = PyTask(run, members[0], "unpack", _unpacked, args, {}, [], name)
        self.brain.dispatcher.push(run, "thread", run.program.rank[members[0]] + FINISHING, task)

    def _parse(self, run: Run, i: int, call: Call[Any], response: Response) -> None:
        node = run.program.nodes[i]
        values = [run.values[d] for d in run.program.deps[i]]
        args = (call, response, node.args, values)
        task = PyTask(run, i, "parse", _parsed, args, {}, [], f"{call.name}.parse")
        self.brain.dispatcher.push(run, "thread", run.program.rank[i] + FINISHING, task)

    def unpacked(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        parcel: Parcel = task.args[3]
        if run.ended is not None:
            return
        if not ok:
            error = _cause(value)
            if isinstance(error, CountMismatch):
                self._no_lists(parcel)
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
                    run, parcel.call, [i], [request], request, parcel.gate, self.brain.now
                )
                alone.attempt, alone.since = parcel.attempt, parcel.since
                self._refused(alone, outcome)

    def parsed(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        if ok:
            self.brain.lifecycle.done(run, task.index, value, DONE)
        else:
            self.brain.lifecycle.fail(run, task.index, _cause(value, MalformedResponse))

    def _refused(self, parcel: Parcel, error: CallError) -> None:
        """A request failed: send it again, take it apart, or give up."""
        run = parcel.run
        if isinstance(error, InvalidRequest) and len(parcel.members) > 1:
            self._one_by_one(parcel, ListTrial(len(parcel.members)))
            return
        parcel.ambiguous += isinstance(error, Ambiguous)
        wait = None
        if not run.stopping:
            wait = self.policy.delay(
                error,
                attempt=parcel.attempt,
                throttled=parcel.throttled,
                ambiguous=parcel.ambiguous,
                elapsed=self.brain.now - parcel.since,
                rng=self.rng,
            )
        if wait is None:
            self._fail_members(parcel, error)
            return
        parcel.throttled += isinstance(error, RateLimited)
        for i in parcel.members:
            run.state[i] = QUEUED
        self.brain.later(wait, lambda now: self._again(parcel))

    def _again(self, parcel: Parcel) -> None:
        alive = [i for i in parcel.members if parcel.run.state[i] < OPEN]
        if alive:
            parcel.ready = self.brain.now
            parcel.gate.push(parcel, max(parcel.run.program.rank[i] for i in alive))

    def _lists_of(self, run: Run, i: int, request: Request) -> tuple[str, str, str]:
        """What a server takes lists for, or does not."""
        return (request.endpoint, request.model, run.program.nodes[i].op.name)

    def _no_lists(self, parcel: Parcel) -> None:
        """Remember that this server takes no lists for this model."""
        self.no_lists.add(self._lists_of(parcel.run, parcel.members[0], parcel.request))

    def _one_by_one(self, parcel: Parcel, trial: ListTrial | None = None) -> None:
        """Send the calls of a batch singly: one of them is bad, or the server takes no lists."""
        for i, request in zip(parcel.members, parcel.requests, strict=True):
            if parcel.run.state[i] < OPEN:
                if parcel.run.stopping:
                    self.brain.lifecycle.end(parcel.run, i, NOT_STARTED)
                else:
                    self._queue(parcel.run, [i], [request], request, trial)

    def _fail_members(self, parcel: Parcel, error: FesteError) -> None:
        if parcel.trial is not None:
            parcel.trial.ended(taken=False)
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
                self.brain.lifecycle.fail(parcel.run, i, mine)


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


def prepare_request(
    call: Call[Any], draw: Draw, args: tuple[Any, ...], values: list[Any]
) -> Request:
    """Return the request of a call, with its draw.

    :param call: the operation.
    :param draw: the node's draw.
    :param args: its packed arguments.
    :param values: what goes into the slots.
    """
    request = call.prepare([fill(a, values) for a in args])
    return replace(request, draws=(draw,))


def _unpacked(call: Call[Any], request: Request, response: Response, parcel: Parcel) -> list[Any]:
    return unpacked(call, request, response)


def _parsed(call: Call[Any], response: Response, args: tuple[Any, ...], values: list[Any]) -> Any:
    return call.parse(response, [fill(a, values) for a in args])
