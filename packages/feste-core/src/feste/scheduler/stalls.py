"""Notice a run that cannot go on: nothing is under way, nothing is ready, and yet nodes are open.

What an executor was given is under way until it reports, or says that it has lost it, or is far
behind the time limit of the request that it promised to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from feste.errors import Interrupted, StalledError
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run
from feste.scheduler.states import INTERRUPTED, OPEN
from feste.wording import counted

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Stalls"]

#: Seconds after which a stall is one: an executor may report the end of a chunk before its tasks'.
PATIENCE = 5.0
#: Seconds after the time limit of a request at which its executor should have reported long ago;
#: Dask's gives a silent worker 30, and then the call a second attempt.
OVERDUE = 45.0
_SHOWN = 5


class Stalls:
    """End the runs that would hang, whose work an executor lost or the brain forgot.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: The timer of a stall that is suspected.
        self._alarm: int | None = None

    def watch(self) -> None:
        """Suspect a stall if nothing can happen any more, and forget it if something did.

        Called after every batch of events, and every few seconds without any.
        """
        if not self._is_stalled():
            if self._alarm is not None:
                self.brain.drop_timer(self._alarm)
                self._alarm = None
        elif self._alarm is None:
            self._alarm = self.brain.later(PATIENCE, self._confirm)

    def _confirm(self, now: float) -> None:
        self._alarm = None
        if self._is_stalled():
            for run in [r for r in self.brain.runs if r.open]:
                self._end(run)

    def _is_stalled(self) -> bool:
        brain = self.brain
        return not (
            any(self._is_under_way(*one) for one in brain.attempts.parcels.items())
            or any(not c[0].run.executor.has_lost(c) for c in brain.dispatcher.chunks.values())
            or brain.has_timers(besides=self._alarm)
            or brain.journaling.is_waiting
            or brain.growth.coming
            or brain.windows.full  # an executor may get workers
            or brain.fetches
            or brain.handing.fetching
            or any(any(run.ready.values()) for run in brain.runs)  # an executor may get places
        ) and any(run.open for run in brain.runs)

    def _is_under_way(self, handle: int, parcel: Parcel) -> bool:
        limit = parcel.request.timeout
        if limit is not None and self.brain.now > parcel.sent + limit + OVERDUE:
            return False
        return not parcel.run.executor.has_lost(handle)

    def _end(self, run: Run) -> None:
        stuck = [i for i, state in enumerate(run.state) if state < OPEN]
        names = ", ".join(run.program.nodes[i].key for i in stuck[:_SHOWN])
        more = f" and {len(stuck) - _SHOWN:,} more" if len(stuck) > _SHOWN else ""
        run.failure = StalledError(
            f"{run.name} can make no progress: nothing is under way, and {counted(len(stuck), 'node')} "
            f"did not end: {names}{more}. The executor {type(run.executor).__name__} lost work, or "
            "Feste has a bug: run the program again, and report this if it stays",
            origin=run.program.nodes[stuck[0]].where,
        )
        run.stopping = True
        if run.outlet is not None:
            run.outlet.is_open = False
        lost = {h: p for h, p in self.brain.attempts.parcels.items() if p.run is run}
        for parcel in lost.values():
            self.brain.attempts.give_up(parcel)
        for i in stuck:
            run.errors[i] = run.failure
            self.brain.lifecycle.end(run, i, INTERRUPTED)
        for handle in lost:  # so that later runs get their places at the gate
            self.brain.act("cancel", run.executor, handle)
            self.brain.attempts.on_sent(run.executor, handle, False, Interrupted("lost"), 0.0)
