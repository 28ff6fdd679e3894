"""End the calls whose deadline has passed, wherever they are: at a gate, on the way, or between attempts.

The brain keeps this time itself, so no server that drips bytes and no backend that hangs can escape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from feste.errors import CallTimeout
from feste.scheduler.parcel import Parcel
from feste.wording import counted

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Deadlines"]


class Deadlines:
    """The alarms of requests whose runs have a deadline for each call.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def begin(self, parcel: Parcel) -> None:
        """Set the alarm of a request with its first attempt.

        :param parcel: the request, which leaves its gate.
        """
        run = parcel.run
        if run.deadline is not None:
            for i in parcel.members:
                run.begun.setdefault(i, self.brain.now)
            self.watch(parcel)

    def is_over(self, parcel: Parcel) -> bool:
        """Return whether it is too late for an attempt of a request.

        :param parcel: the request, which may leave its gate.
        """
        return self.watch(parcel) <= 0

    def watch(self, parcel: Parcel) -> float:
        """Set the alarm of a request if one of its calls has been sent before; return what time is left.

        :param parcel: the request.
        :returns: seconds; infinity if nothing was sent so far, or there is no deadline.
        """
        run = parcel.run
        begun = [run.begun[i] for i in parcel.members if i in run.begun]
        if run.deadline is None or not begun:
            return math.inf
        left = min(begun) + run.deadline - self.brain.now
        if parcel.timer is None:
            parcel.timer = self.brain.later(max(0.0, left), lambda now: self.missed(parcel))
        return left

    def met(self, parcel: Parcel) -> None:
        """Take back the alarm of a request that has ended.

        :param parcel: the request.
        """
        if parcel.timer is not None:
            self.brain.drop_timer(parcel.timer)
            parcel.timer = None

    def missed(self, parcel: Parcel) -> None:
        """Fail the calls of a request whose deadline has passed, and cancel it if it is under way.

        :param parcel: the request.
        """
        run, parcel.timer = parcel.run, None
        if parcel.is_over:
            return
        last = parcel.error
        told = f"; the last one: {type(last).__name__}: {last.message}" if last is not None else ""
        error = CallTimeout(
            f"deadline={run.deadline:g} seconds passed without an answer, after "
            f"{counted(parcel.attempt, 'attempt')}{told}"
        )
        if not parcel.handle and not parcel.ambiguous:
            error.billed = "yes" if parcel.unreadable else "no"
        if handle := parcel.handle:
            self.brain.outages.landed(parcel, error)
            self.brain.accounts.record(parcel, False, error)
            self.brain.journaling.ended(parcel, error)
            self.brain.act("cancel", run.executor, handle)
        self.brain.gates.pull(parcel)
        self.brain.attempts.fail_members(parcel, error, final=True)
        self.brain.outages.watch(parcel.request.scope[:2])
