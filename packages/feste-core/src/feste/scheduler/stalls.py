"""Notice a run that cannot go on: nothing is under way, nothing is ready, and yet nodes are open.

What an executor was given is under way until it reports, or says that it has lost it, or is far
behind the time limit of the request that it promised to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        #: When to look for lost work although other work goes on, and what was missing at the last look.
        self._next = 0.0
        self._missing: set[int] = set()

    def watch(self) -> None:
        """Suspect a stall if nothing can happen any more, and forget it if something did.

        Called after every batch of events, and every few seconds without any.
        """
        if self.brain.now >= self._next:
            self._look()
        if not self._is_stalled():
            if self._alarm is not None:
                self.brain.drop_timer(self._alarm)
                self._alarm = None
        elif self._alarm is None:
            self._alarm = self.brain.later(PATIENCE, self._confirm)

    def _confirm(self, now: float) -> None:
        self._alarm = None
        if not self._is_stalled() or self._give_back({number for number, *_ in self._given()}):
            return
        for run in [r for r in self.brain.runs if r.open]:
            self._end(run)

    def _look(self) -> None:
        """Find what was lost while other work goes on: what was missing before, and still is."""
        self._next = self.brain.now + PATIENCE
        given = list(self._given())
        missing = {number: run for number, run, is_under_way in given if not is_under_way}
        lost, self._missing = self._missing & missing.keys(), set(missing)
        self._give_back(lost)
        busy = {run.name for _, run, is_under_way in given if is_under_way}
        idle = {missing[n].name: missing[n] for n in lost if missing[n].name not in busy}
        for run in idle.values():
            if run.open:
                self._end(run)

    def _give_back(self, lost: set[int]) -> bool:
        """Give back the places of lost requests that nobody waits for; return if there were any."""
        parcels = self.brain.attempts.parcels
        over = {n: parcels[n] for n in lost & parcels.keys() if _is_unwanted(parcels[n])}
        for handle, parcel in over.items():
            self._drop(handle, parcel)
        return bool(over)

    def _drop(self, handle: int, parcel: Parcel) -> None:
        executor = parcel.run.executor
        self.brain.act("cancel", executor, handle)
        self.brain.attempts.on_sent(executor, handle, False, Interrupted("lost"), 0.0)
        self.brain.later(0.0, lambda now: None)  # others may have waited for the place

    def _is_stalled(self) -> bool:
        brain = self.brain
        return not (
            any(is_under_way for *_, is_under_way in self._given())
            or brain.has_timers(besides=self._alarm)
            or brain.journaling.is_waiting
            or brain.growth.coming
            or brain.windows.full  # an executor may get workers
            or brain.fetches
            or brain.handing.fetching
            or any(any(run.ready.values()) for run in brain.runs)  # an executor may get places
        ) and any(run.open for run in brain.runs)

    def _given(self) -> Iterator[tuple[int, Run, bool]]:
        """Yield what executors have: its number, its run, and whether it is under way."""
        for handle, parcel in self.brain.attempts.parcels.items():
            yield handle, parcel.run, self._is_under_way(handle, parcel)
        for number, chunk in self.brain.dispatcher.chunks.items():
            run = chunk[0].run
            yield number, run, not self.brain.questions.has_lost(run.executor, chunk)

    def _is_under_way(self, handle: int, parcel: Parcel) -> bool:
        limit = parcel.request.timeout
        if limit is not None and self.brain.now > parcel.sent + limit + OVERDUE:
            return False
        return not self.brain.questions.has_lost(parcel.run.executor, handle)

    def _end(self, run: Run) -> None:
        stuck = [i for i, state in enumerate(run.state) if state < OPEN]
        names = ", ".join(run.program.nodes[i].key for i in stuck[:_SHOWN])
        more = f" and {len(stuck) - _SHOWN:,} more" if len(stuck) > _SHOWN else ""
        run.failure = told = StalledError(
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
            run.errors[i] = told.copy()
            self.brain.lifecycle.end(run, i, INTERRUPTED)
        for handle, parcel in lost.items():  # so that later runs get their places at the gate
            self._drop(handle, parcel)


def _is_unwanted(parcel: Parcel) -> bool:
    return parcel.run.ended is not None or parcel.is_over
