"""A request on its way, and what a refused list of calls teaches."""

from __future__ import annotations

from typing import Any

from feste.backend import Call, Request
from feste.scheduler.gate import Gate
from feste.scheduler.run import Run

__all__ = ["ListTrial", "Parcel"]


class ListTrial:
    """Calls sent singly after a server refused them as a list: if it takes each, it takes no lists.

    :param calls: how many there are.

    >>> trial = ListTrial(2)
    >>> trial.ended(taken=True), trial.ended(taken=True)
    (False, True)
    """

    __slots__ = ("left", "refused")

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.refused = False

    def ended(self, *, taken: bool) -> bool:
        """Hear how one of them ended; return whether all are through and none was refused.

        :param taken: whether the server answered it.
        """
        self.left -= 1
        self.refused = self.refused or not taken
        return not self.left and not self.refused


class Parcel:
    """One request on its way: queued, sent, or waiting to be sent again."""

    __slots__ = (
        "ambiguous",
        "attempt",
        "call",
        "gate",
        "members",
        "ready",
        "request",
        "requests",
        "run",
        "sent",
        "since",
        "throttled",
        "trial",
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
        trial: ListTrial | None = None,
    ) -> None:
        self.run = run
        self.call = call
        self.members = members
        self.requests = requests
        self.request = request
        self.gate = gate
        self.ready = now
        self.since = now
        self.sent = now
        self.attempt = 0
        self.throttled = 0
        self.ambiguous = 0
        self.trial = trial
