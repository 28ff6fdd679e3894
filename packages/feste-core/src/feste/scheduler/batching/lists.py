"""Send calls that share a request: pack them, unpack the response, and split a refused list.

A server may accept shorter lists than documented, no lists at all, or reject a whole list for one
bad item. The three look alike, so a refused list is resent in halves, one after the other, until
the cause is clear: one bad item of k costs 1 + 2 * ceil(log2 k) requests. A limit found in this way
holds for the whole process.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, compress
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request, Response
from feste.errors import CallError, CountMismatch, MalformedResponse
from feste.scheduler.batching.batcher import (
    Gathering,
    Packed,
    Taken,
    pack_requests,
    unpack_response,
)
from feste.scheduler.executor import QUICK, PyTask
from feste.scheduler.parcel import Parcel, Split
from feste.scheduler.run import Run
from feste.scheduler.states import FINISHING, GATHERED, NOT_STARTED, OPEN
from feste.scheduler.work import cause_of

if TYPE_CHECKING:
    from feste.scheduler.admission.gate import Gate
    from feste.scheduler.brain import Brain

__all__ = ["Lists"]

Server = tuple[str, str, str]
"""Identifies what a limit of items applies to: endpoint, model, operation."""

_NOTHING = Taken(0, 0)


class Lists:
    """Send batches of calls to the gate, and give each call its own outcome.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: What servers are known to take, where they have refused a list for its length.
        self.limits: dict[Server, Taken] = {}
        #: What is being packed, where it will queue, and as how many requests at least.
        self._packing: dict[PyTask, tuple[Gate[Any], int]] = {}
        #: What is being unpacked before a store has it, and where it came from.
        self._unpacking: dict[PyTask, Gate[Any]] = {}

    def taken(self, call: Call[Any], request: Request) -> Taken:
        """Return the largest request that a server is known to take.

        :param call: the operation.
        :param request: a request to the server.
        """
        return self.limits.get(_server(call, request), Taken())

    # --- on the way out ---------------------------------------------------------------------------

    def flush(self, run: Run, gathering: Gathering) -> None:
        """Send the requests of a batch that have arrived.

        :param run: the run.
        :param gathering: the calls of the batch.
        """
        arrived = [(i, r) for i, r in gathering.flush() if run.state[i] == GATHERED]
        if arrived and not self.brain.groups.arrive(run, arrived):
            self.send(run, arrived)

    def drop(self, run: Run, i: int) -> None:
        """Remove a call from its batch, so that the others do not wait for it.

        :param run: the run.
        :param i: the node's position.
        """
        self.brain.groups.leave(run, i)
        gathering = run.gatherings.get(i)
        if gathering is not None and gathering.drop(i) and not run.stopping:
            self.flush(run, gathering)

    def send(
        self, run: Run, calls: Sequence[tuple[int, Request]], split: Split | None = None
    ) -> None:
        """Send calls with as few requests as the limits allow.

        :param run: the run.
        :param calls: their positions and requests.
        :param split: the refused list that they are a part of, or None.
        """
        for i, _ in calls:
            self.brain.waits.batched(run, i)
        if len(calls) == 1:
            self._send_singly(run, calls, split)
            return
        call = _call_of(run, calls[0][0])
        members, requests = [i for i, _ in calls], [r for _, r in calls]
        task = self._pack(run, call, members, requests, [len(calls)], split)
        gate = self.brain.gates.gate_of(call, requests[0])
        self._packing[task] = gate, -(-len(calls) // call.max_items)
        gate.coming += self._packing[task][1]

    def shorten(self, parcel: Parcel, calls: int) -> None:
        """Pack a request anew, since no budget has room for all of it: its first calls go ahead.

        :param parcel: the request.
        :param calls: how many of its calls there is room for.
        """
        counts = [calls, len(parcel.members) - calls]
        self._pack(parcel.run, parcel.call, parcel.members, parcel.requests, counts, parcel)

    def _pack(
        self,
        run: Run,
        call: Call[Any],
        members: list[int],
        requests: list[Request],
        counts: list[int],
        origin: Split | Parcel | None,
    ) -> PyTask:
        """Have calls packed, so many of them and then so many; return the task that does."""
        taken = self.taken(call, requests[0])
        several = any(g is not None and g.several for g in map(run.gatherings.get, members))
        stage = "shorten" if isinstance(origin, Parcel) else "pack"
        args = (call, members, requests, counts, taken, several, origin)
        task = PyTask(run, members[0], stage, _pack, args, {}, [], f"{call.name}.pack", members)
        self.brain.dispatcher.push(run, QUICK, run.program.rank[members[0]] + FINISHING, task)
        return task

    def _send_singly(
        self, run: Run, calls: Sequence[tuple[int, Request]], split: Split | None = None
    ) -> None:
        if split is not None:
            split.open += len(calls) - 1
        for i, request in calls:
            self.brain.gates.queue(run, [i], [request], request, split)

    def on_packed(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        split: Split | None = task.args[-1]
        self._packed(task)
        if not ok:
            for i in task.members:
                if run.state[i] < OPEN:
                    self.brain.calls.fail(run, i, value.copy())
            self._part_ended(split, _NOTHING, bad=True)
            return
        parts = [part for part in value if run.state[part.members[0]] == GATHERED]
        if split is not None:
            split.open += len(parts) - 1
        for members, requests, request in parts:
            self.brain.gates.queue(run, members, requests, request, split)

    def on_shortened(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        parcel: Parcel = task.args[-1]
        if not self.brain.gates.is_short(parcel) or task.members != parcel.members:
            return  # it went after all, or is wanted no more
        if not ok:
            parcel.taken_back = True
            self.settled(parcel, taken=False)
            for i in parcel.members:
                if run.state[i] < OPEN:
                    self.brain.calls.fail(run, i, value.copy())
            return
        if parcel.split is not None:
            parcel.split.open += len(value) - 1
        self.brain.gates.shortened(parcel, value)

    def _packed(self, task: PyTask) -> None:
        if task in self._packing:  # else its run has ended
            gate, coming = self._packing.pop(task)
            gate.coming -= coming

    def forget(self, run: Run) -> None:
        """Let gates no longer expect anything from a run that has ended.

        :param run: the run.
        """
        for task in [task for task in self._packing if task.run is run]:
            self._packed(task)
        for task in [task for task in self._unpacking if task.run is run]:
            self._unpacked(task)

    # --- on the way back --------------------------------------------------------------------------

    def answered(self, parcel: Parcel, response: Response) -> None:
        """Schedule the unpacking of the response to a packed request.

        :param parcel: the request.
        :param response: its response.
        """
        run, first = parcel.run, parcel.members[0]
        args = (parcel.call, parcel.request, response, parcel)
        name = f"{parcel.call.name}.unpack"
        task = PyTask(run, first, "unpack", _unpack, args, {}, [], name, parcel.members)
        if run.store is not None:
            self._unpacking[task] = parcel.gate
            parcel.gate.unkept += 1
        self.brain.dispatcher.push(run, QUICK, run.program.rank[first] + FINISHING, task)

    def on_unpacked(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        self._unpacked(task)
        parcel: Parcel = task.args[3]
        if ok:
            self.settled(parcel, taken=True)
            answered = [
                (request, outcome)
                for request, outcome in zip(parcel.requests, value, strict=True)
                if isinstance(outcome, Response)
            ]
            self.brain.journaling.keep(
                parcel,
                answered,
                task.args[2],
                lambda: self._deliver(parcel, value),
            )
            return
        error = cause_of(value, MalformedResponse)
        self.brain.journaling.ended(parcel, error, task.args[2])
        if not self._waiting(parcel):
            return  # its run is over
        if isinstance(error, CountMismatch):
            self.miscounted(parcel)
        elif isinstance(error, CallError):
            self.brain.attempts.unreadable(parcel, error)
        else:
            self.brain.attempts.fail_members(parcel, error)

    def miscounted(self, parcel: Parcel) -> None:
        """Send the calls of a list one by one, since its answers cannot be matched to them.

        The server counts as one that takes no lists, or none with several answers to each prompt.

        :param parcel: the list.
        """
        several = parcel.request.samples > 1
        self._learn(parcel, Taken(draws=1) if several else Taken(items=1, size=0))
        self.settled(parcel, taken=False)
        self._send_singly(parcel.run, self._waiting(parcel))

    def _unpacked(self, task: PyTask) -> None:
        if (gate := self._unpacking.pop(task, None)) is not None:
            gate.unkept -= 1

    def _deliver(self, parcel: Parcel, outcomes: Sequence[Response | CallError]) -> None:
        """Give each call its outcome; answers to one prompt that did not come are asked for singly."""
        missing = [isinstance(outcome, CountMismatch) for outcome in outcomes]
        self.brain.calls.deliver(parcel, outcomes)
        if any(missing):
            answers = sum(isinstance(outcome, Response) for outcome in outcomes)
            if answers <= parcel.items:  # at most one for each prompt: it does not know `n`
                self._learn(parcel, Taken(draws=1))
            self._send_singly(parcel.run, self._waiting(parcel, missing))

    # --- refused lists ----------------------------------------------------------------------------

    def refused(self, parcel: Parcel) -> None:
        """Resend a refused list in halves; singly if it has one prompt only, or many bad ones.

        :param parcel: the request.
        """
        waiting = self._waiting(parcel)
        if not waiting:
            return
        half = (len(waiting) + 1) // 2
        split = Split(parcel, waiting[half:])
        split.root.refusals += 1
        if parcel.items == 1 or split.root.refusals > _most_refusals(split.root.parcel.items):
            split.rest = []
            self._send_singly(parcel.run, waiting, split)
        else:
            self.send(parcel.run, waiting[:half], split)

    def settled(self, parcel: Parcel, *, taken: bool) -> None:
        """Record the outcome of a request that may be part of a refused list.

        :param parcel: the request.
        :param taken: whether the server accepted it.
        """
        if parcel.split is not None:
            size = Taken(parcel.items, parcel.size) if taken else _NOTHING
            self._part_ended(parcel.split, size, bad=not taken)

    def _part_ended(self, split: Split | None, taken: Taken, *, bad: bool) -> None:
        """Handle the end of a part of a refused list: send the rest, or conclude what was wrong."""
        while split is not None:
            split.open -= 1
            split.longest = max(split.longest, taken.items)
            split.largest = max(split.largest, taken.size)
            split.bad = split.bad or bad
            run = split.parcel.run
            if split.open > 0 or run.stopping:  # a run that stops sends nothing and proves nothing
                return
            rest = [(i, r) for i, r in split.rest if run.state[i] == GATHERED]
            split.rest = []
            split.open = 1
            if rest and split.longest:
                self.send(run, rest, split)
                return
            if rest:  # nothing was accepted so far, so a list of the rest would be refused too
                self._send_singly(run, rest, split)
                return
            if not split.bad:  # every call succeeded in the end, so the list was too long
                self._learn(split.parcel, self._cause(split))
            taken, bad = Taken(split.longest, split.largest), split.bad
            split = split.parcel.split

    def _cause(self, split: Split) -> Taken:
        """Return what a server takes that refused a list but took all of its parts."""
        parcel = split.parcel
        known = self.taken(parcel.call, parcel.request)
        if parcel.items == 1 or known.draws < parcel.request.samples:
            return Taken(draws=1)
        return Taken(split.longest, split.largest)

    def _learn(self, parcel: Parcel, taken: Taken) -> None:
        known = self.taken(parcel.call, parcel.request)
        self.limits[_server(parcel.call, parcel.request)] = known.least(taken)

    def _waiting(
        self, parcel: Parcel, chosen: Sequence[bool] | None = None
    ) -> list[tuple[int, Request]]:
        """Return the calls of a request, or the chosen ones, to send again; none if it is stopping."""
        run = parcel.run
        waiting = []
        calls = zip(parcel.members, parcel.requests, strict=True)
        for i, request in calls if chosen is None else compress(calls, chosen):
            if run.state[i] < OPEN and run.stopping:
                self.brain.lifecycle.end(run, i, NOT_STARTED)
            elif run.state[i] < OPEN:
                run.state[i] = GATHERED
                waiting.append((i, request))
        return waiting


def _call_of(run: Run, i: int) -> Call[Any]:
    call = run.program.nodes[i].call
    assert call is not None, "only calls are sent"
    return call


def _server(call: Call[Any], request: Request) -> Server:
    return (request.endpoint, request.model, call.name)


def _most_refusals(items: int) -> int:
    """Return how many refusals a list may meet before halving it costs more than single calls.

    One bad item causes log2(items) + 1; this allows for two of them.
    """
    return 2 * (items.bit_length() + 1)


# --- plugin code: the executor runs it, never the brain's thread ---------------------------------


def _pack(
    call: Call[Any],
    members: list[int],
    requests: list[Request],
    counts: list[int],
    taken: Taken,
    several: bool,
    origin: Split | Parcel | None,
) -> list[Packed]:
    packed, begin = [], 0
    for end in accumulate(counts):
        some = members[begin:end], requests[begin:end]
        packed += pack_requests(call, *some, taken, several=several)
        begin = end
    return packed


def _unpack(call: Call[Any], request: Request, response: Response, parcel: Parcel) -> list[Any]:
    return unpack_response(call, request, response)
