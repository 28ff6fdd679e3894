"""Runs inside tasks: they are stopped with the run of their task, whose thread cannot be stopped.

What they have sent is counted for it, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from feste.errors import NotStarted
from feste.scheduler.run import Run
from feste.scheduler.states import VALUED
from feste.scheduler.totals import Totals

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Nesting"]


class Nesting:
    """Stop what a stopped run's tasks compute, unless other runs wait for these tasks.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: Runs inside tasks that were stopped and have not ended.
        self._stopped: set[Run] = set()

    def stop(self, run: Run, grace: float) -> None:
        """Stop the runs inside the tasks of a run that is being stopped.

        :param run: the run around them.
        :param grace: seconds that requests in flight may still take.
        """
        inside = [r for r in self.brain.runs if r.around is not None and r.around[0] == run.name]
        if inside:
            awaited = self.brain.joins.awaited(run)
            for each in inside:
                assert each.around is not None
                if each.around[1] not in awaited:
                    self.end(each, grace)

    def end(self, run: Run, grace: float) -> None:
        """Stop a run inside a task.

        :param run: the run.
        :param grace: seconds that requests in flight may still take.
        """
        self._stopped.add(run)
        self.brain.cancel(run, grace)

    def ended(self, run: Run) -> None:
        """Count a run inside a task for the run around it, and see whether it was complete.

        If it was stopped before, it gets an error for its caller.

        :param run: the run.
        """
        if run.around is not None:
            self._count(run, run.around[0])
        if run in self._stopped:
            self._stopped.discard(run)
            if run.outlet is not None or not all(state in VALUED for state in run.state):
                told = "stopped, since it was begun in a task of a run that was stopped"
                run.failure = run.failure or NotStarted(told)

    def _count(self, run: Run, around: str) -> None:
        """Add what a run has sent to the run around it, if that has not ended."""
        for outer in (r for r in self.brain.runs if r.name == around):
            outer.inner_runs += 1 + run.inner_runs
            for name, totals in [*run.rows.items(), *run.inner.items()]:
                if name not in outer.inner:
                    outer.inner[name] = Totals(totals.client, totals.operation, totals.model)
                outer.inner[name].merge(totals)

    def is_orphan(self, run: Run) -> bool:
        """Return whether a run is begun in a task that nobody waits for any more.

        :param run: the run.
        """
        if run.around is None:
            return False
        name, i, _ = run.around
        tasks = (task for chunk in self.brain.dispatcher.chunks.values() for task in chunk)
        of = next((t.run for t in tasks if t.run.name == name and t.index == i), None)
        return of is not None and of.cancelled and i not in self.brain.joins.awaited(of)
