"""A request in flight or in a queue, and the state of a refused list that is resent in parts."""

from __future__ import annotations

from typing import Any

from feste.backend import Call, Request
from feste.budget import Budget
from feste.errors import CallError
from feste.events import CAUSES
from feste.scheduler.admission.gate import Gate
from feste.scheduler.run import Run
from feste.scheduler.states import OPEN

__all__ = ["Parcel", "Split"]

#: What counts the attempts of a request.
_HISTORY = ("attempt", "since", "throttled", "ambiguous", "lost", "unreadable")


class Split:
    """A refused list that is being resent in two parts, one after the other.

    :param parcel: the request that was refused.
    :param rest: the calls of the second part, with their requests.
    """

    __slots__ = ("bad", "largest", "longest", "open", "parcel", "refusals", "rest", "root")

    def __init__(self, parcel: Parcel, rest: list[tuple[int, Request]]) -> None:
        self.parcel = parcel
        self.rest = rest
        #: The split of the whole list, which counts the refusals of all its parts.
        self.root: Split = self if parcel.split is None else parcel.split.root
        self.refusals = 0
        #: Requests of the current part that have not ended.
        self.open = 1
        #: The number of prompts in the longest request that was accepted.
        self.longest = 0
        #: The bytes of the largest request that was accepted.
        self.largest = 0
        #: Whether a call failed on its own, so that the length may not have been the problem.
        self.bad = False


class Parcel:
    """One request on its way: queued, sent, or waiting for its next attempt.

    :param run: the run.
    :param call: the operation.
    :param members: the positions of the nodes that it answers.
    :param requests: the single request of each member.
    :param request: the request to send: the only member's, or all of them packed into one.
    :param gate: the gate where it queues.
    :param now: the time in seconds on the brain's clock.
    :param split: the refused list that it is a part of, or None.
    """

    __slots__ = (
        "ambiguous",
        "attempt",
        "call",
        "error",
        "gate",
        "handle",
        "lost",
        "members",
        "noted",
        "number",
        "queued",
        "ready",
        "request",
        "requests",
        "reserved",
        "run",
        "sent",
        "since",
        "split",
        "taken_back",
        "throttled",
        "timer",
        "unreadable",
        "waits",
    )

    def __init__(
        self,
        run: Run,
        call: Call[Any],
        members: list[int],
        requests: list[Request],
        request: Request,
        gate: Gate[Parcel],
        now: float,
        split: Split | None = None,
    ) -> None:
        self.run = run
        self.call = call
        self.members = members
        self.requests = requests
        self.request = request
        self.gate = gate
        self.ready = now
        #: When its first attempt was admitted.
        self.since = now
        self.sent = now
        self.attempt = 0
        #: The number of its last attempt in the store; 0 without a store.
        self.number = 0
        #: What is set aside for it of each budget, and the timer of its deadline.
        self.reserved: list[tuple[Budget, float]] = []
        self.timer: Any = None
        #: Whether it must not be sent any more, though its calls may go on elsewhere.
        self.taken_back = False
        #: Why the last attempt failed, or None.
        self.error: CallError | None = None
        self.throttled = 0
        self.ambiguous = 0
        self.lost = 0
        self.unreadable = 0
        self.split = split
        #: What its next attempt has waited for, by position in CAUSES; since when it waits for
        #: something else; and its gate's sums as it began to queue.
        self.waits = [0.0] * len(CAUSES)
        self.noted = now
        self.queued: tuple[float, ...] = ()
        #: The brain's number of the attempt that is under way, or 0.
        self.handle = 0

    def alone(self, position: int, now: float) -> Parcel:
        """Return a request for one of its calls, to send again what this one did not answer.

        :param position: which of its members.
        :param now: the time in seconds on the brain's clock.
        """
        request = self.requests[position]
        member = self.members[position]
        other = Parcel(self.run, self.call, [member], [request], request, self.gate, now)
        for name in _HISTORY:
            setattr(other, name, getattr(self, name))
        return other

    def part(self, members: list[int], requests: list[Request], request: Request) -> Parcel:
        """Return a request for some of its calls, which has come as far as this one.

        :param members: the positions of their nodes.
        :param requests: their single requests.
        :param request: the request to send.
        """
        other = Parcel(
            self.run, self.call, members, requests, request, self.gate, self.noted, self.split
        )
        for name in (*_HISTORY, "error", "ready", "sent"):
            setattr(other, name, getattr(self, name))
        other.waits = list(self.waits)
        return other

    @property
    def is_over(self) -> bool:
        """Whether it is wanted no more: all of its calls have ended, or it was taken back."""
        return self.taken_back or all(self.run.state[i] >= OPEN for i in self.members)

    @property
    def rank(self) -> int:
        """Its priority at a gate: the highest goes first."""
        return max(self.run.program.rank[i] for i in self.members)

    @property
    def items(self) -> int:
        """The number of prompts in it: several answers to one prompt are one item."""
        return max(1, len(self.members) // self.request.samples)

    @property
    def size(self) -> int:
        """The bytes of the requests of its prompts, as each would be sent alone."""
        return sum(request.size for request in self.requests[:: self.request.samples])
