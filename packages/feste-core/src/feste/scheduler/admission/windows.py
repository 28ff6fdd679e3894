"""How many requests an executor takes at once: the runs on one that is full wait at their gates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from feste.scheduler.admission.gate import Gate
from feste.scheduler.executor import Executor
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Windows"]


class Windows:
    """The windows of all executors that have one; see :attr:`feste.scheduler.Executor.window`.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: The requests that have left their gates and not ended, by id.
        self._out: dict[Executor, set[int]] = {}
        #: The executors that take no more, each with the names of the runs that wait for it.
        self.full: dict[Executor, set[str]] = {}

    def room(self, executor: Executor) -> float:
        """Return how many more requests an executor takes.

        :param executor: the executor.
        """
        window = self.brain.questions.window(executor)
        return math.inf if window is None else max(0, window - len(self._out.get(executor, ())))

    def took(self, parcel: Parcel) -> None:
        """Count a request that has left its gate.

        :param parcel: the request.
        """
        executor = parcel.run.executor
        if self.brain.questions.window(executor) is not None:
            self._out.setdefault(executor, set()).add(id(parcel))
            self.look(executor)
            # the other gates go first now: else one account would take each place that comes free
            gates, scope = self.brain.gates.by_scope, parcel.request.scope
            gates[scope] = gates.pop(scope)

    def gave_back(self, parcel: Parcel) -> None:
        """Forget a request that has ended, or was not sent after all.

        :param parcel: the request.
        """
        executor = parcel.run.executor
        out = self._out.get(executor)
        if out is not None:
            out.discard(id(parcel))
            if not out:
                del self._out[executor]
            self.look(executor)

    def entered(self, parcel: Parcel) -> None:
        """Let a run wait whose request comes to a gate, if its executor is full.

        :param parcel: the request.
        """
        executor = parcel.run.executor
        if self.brain.questions.window(executor) is not None:
            self.look(executor)
            if executor in self.full:
                self._hold(parcel.run, parcel.gate)

    def look(self, executor: Executor) -> None:
        """Hold the runs of an executor if it is full; let them go when it has room, or none is left.

        :param executor: the executor.
        """
        runs = () if self.room(executor) else [r for r in self.brain.runs if r.executor is executor]
        if not runs:
            for name in self.full.pop(executor, ()):
                for gate in self.brain.gates.by_scope.values():
                    gate.let_go(name, "worker")
        elif executor not in self.full:
            self.full[executor] = set()
            for run in runs:
                for gate in self.brain.gates.by_scope.values():
                    if gate.queues(run.name):
                        self._hold(run, gate)

    def _hold(self, run: Run, gate: Gate[Parcel]) -> None:
        self.full[run.executor].add(run.name)
        gate.hold(run.name, "worker")
