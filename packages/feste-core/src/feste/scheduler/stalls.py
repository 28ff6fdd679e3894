"""Notice a run that cannot go on: nothing is under way, nothing is ready, and yet nodes are open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feste.errors import StalledError
from feste.scheduler.run import Run
from feste.scheduler.states import INTERRUPTED, OPEN
from feste.wording import counted

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Stalls"]

#: Seconds after which a stall is one: an executor may report the end of a chunk before its tasks'.
PATIENCE = 5.0
_SHOWN = 5


class Stalls:
    """End the runs that would hang, whose work an executor lost or the brain forgot.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self._suspected = False

    def watch(self) -> None:
        """Look again later if nothing can happen any more; called after every batch of events."""
        if not self._suspected and not self.brain.timers and self._is_stalled():
            self._suspected = True
            self.brain.later(PATIENCE, self._confirm)

    def _confirm(self, now: float) -> None:
        self._suspected = False
        if not self.brain.timers and self._is_stalled():
            for run in [r for r in self.brain.runs if r.open]:
                self._end(run)

    def _is_stalled(self) -> bool:
        brain = self.brain
        return not (
            brain.attempts.parcels
            or brain.dispatcher.chunks
            or brain.journaling.is_waiting
            or brain.growth.coming
            or brain.windows.full  # an executor may get workers
            or brain.fetches
            or brain.handing.fetching
            or any(any(run.ready.values()) for run in brain.runs)  # an executor may get places
        ) and any(run.open for run in brain.runs)

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
        for i in stuck:
            run.errors[i] = run.failure
            self.brain.lifecycle.end(run, i, INTERRUPTED)
