"""Let equal calls in flight share one answer, in whichever runs and threads they are.

This holds for PURE and GREEDY calls alone: a SAMPLE is a draw of its own. It does while the graph runs
what common subexpressions do before, and is switched off with that pass (``optimize={"cse": False}``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

from feste.backend import Request, Response
from feste.draw import Determinism
from feste.errors import CallError, FesteError, Rejected
from feste.scheduler.run import Run
from feste.scheduler.states import JOINED, NOT_STARTED, OPEN
from feste.scheduler.waits import EQUAL_CALL

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["SHAREABLE", "Flights"]

#: Determinism classes whose calls take any answer to the same request.
SHAREABLE = (Determinism.PURE, Determinism.GREEDY)

Name = tuple[Hashable, str, str]
"""What equal calls have in common: the operation of an equal backend, the account, and the request's key."""


class Flights:
    """The calls under way that others may share, each with those that wait for its answer.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: For each call under way its run, and the others: positions in their runs.
        self._runs: dict[Name, Run] = {}
        self._waiting: dict[Name, list[tuple[Run, int, Request]]] = {}
        self._led: dict[tuple[Run, int], Name] = {}

    def joins(self, run: Run, i: int, request: Request) -> bool:
        """Let a call wait for an equal one that is under way; return False if there is none.

        :param run: the run.
        :param i: the position of its node.
        :param request: its request.
        """
        node = run.program.nodes[i]
        if not run.shares or node.call is None or node.determinism not in SHAREABLE:
            return False
        name = (node.call.token, request.account, request.key)
        first = self._runs.get(name)
        if first is None:
            self._runs[name], self._waiting[name] = run, []
            self._led[run, i] = name
            return False
        if (run.deadline or math.inf) < (first.deadline or math.inf):
            return False  # it might have to wait for too long
        self._waiting[name].append((run, i, request))
        self.brain.joins.wait(run, i)
        return True

    def answered(self, run: Run, i: int, response: Response) -> None:
        """Give a call's answer to all that wait for it.

        :param run: the run.
        :param i: the position of its node.
        :param response: its response.
        """
        for other, j, request in self._land(run, i):
            self.brain.journaling.keep_shared(other, j, request, response, of=run)

    def ended(self, run: Run, i: int, error: FesteError | None = None) -> None:
        """Let those that wait for a call go on by themselves, if it has ended without an answer.

        :param run: the run.
        :param i: the position of its node.
        :param error: why it failed, if another backend is asked now; None is the node's own error.
        """
        if (run, i) not in self._led:
            return
        error = error or run.errors.get(i)
        for other, j, request in self._land(run, i):
            if other.state[j] != JOINED:  # what became of one before stopped its run
                continue
            if other.stopping:
                self.brain.lifecycle.end(other, j, NOT_STARTED)
            elif error is not None and _holds_for(error, run, other):
                self.brain.lifecycle.fail(other, j, error.copy())
            else:
                self.brain.calls.buy(other, j, request)

    def _land(self, run: Run, i: int) -> list[tuple[Run, int, Request]]:
        name = self._led.pop((run, i), None)
        if name is None:
            return []
        del self._runs[name]
        landed = [one for one in self._waiting.pop(name) if one[0].state[one[1]] == JOINED]
        for other, j, _ in landed:
            self.brain.waits.spend(other, j, EQUAL_CALL)
        return landed

    def awaited(self, run: Run) -> set[int]:
        """Return the positions of a run's unfinished calls whose answers other runs wait for.

        :param run: the run.
        """
        return {
            i
            for (first, i), name in self._led.items()
            if first is run
            and run.state[i] < OPEN
            and any(o is not run and o.state[j] == JOINED for o, j, _ in self._waiting[name])
        }


def _holds_for(error: FesteError, run: Run, other: Run) -> bool:
    """Whether a call's failure is also that of an equal call, in another run."""
    if isinstance(error, Rejected):
        return True
    return isinstance(error, CallError) and other is run and not run.stopping
