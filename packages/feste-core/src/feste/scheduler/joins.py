"""Nodes that several runs hold: one run does each, and the others wait for its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feste.draw import Determinism
from feste.errors import BackendUnavailable, CacheMiss, CallTimeout, ConfigError, GraphError
from feste.fused import tasks_of
from feste.node import Node
from feste.scheduler.run import Run
from feste.scheduler.states import FAILED, JOINED, SHARED, VALUED, WAITING

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Joins"]


class Joins:
    """The nodes under way that other runs may wait for.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: For each the run that does it and its position there, then those that wait.
        self.under_way: dict[Any, list[tuple[Run, int]]] = {}

    def begins(self, run: Run, i: int, node: Node) -> bool:
        """Return whether a run does a node itself; else it waits for another run, or has failed.

        :param run: the run.
        :param i: the node's position.
        :param node: the node, which is ready.
        """
        if not self._is_joined(node):
            return True
        around = self._surrounding(run, node)
        if around is not None:
            told = f"{around.key} waits for itself: its own task computes it"
            self.brain.lifecycle.fail(run, i, GraphError(told, origin=around.where))
            return False
        others = self.under_way.setdefault(self._shared_name(run, node), [(run, i)])
        if others[0] == (run, i):
            return True
        others.append((run, i))
        self.wait(run, i)
        return False

    def wait(self, run: Run, i: int) -> None:
        """Let a node wait for the result of an equal one elsewhere.

        :param run: the run.
        :param i: its position.
        """
        run.state[i] = JOINED
        self.brain.lists.drop(run, i)
        if run.feeders is not None:
            run.feeders.hold(i)
            run.feeders.emitted(i)  # what it returns goes to the other run
            self.brain.groups.changed(run)

    def _surrounding(self, run: Run, node: Node) -> Node | None:
        """Return the task of a node, or of a step of it, that started this run, or None."""
        if run.around is not None:
            for task in tasks_of(node):
                others = self.under_way.get(self._shared_name(run, task))
                if task.key in run.steps_around or (others and run.is_inside(*others[0])):
                    return task
        return None

    def _is_joined(self, node: Node) -> bool:
        """Whether other runs wait for a node in flight; pure Python is cheaper to run again."""
        return node.op.kind == "call" or node.determinism is not Determinism.PURE

    def _shared_name(self, run: Run, node: Node) -> Any:
        """Return the name under which runs that hold the same node find each other."""
        alone = node.op.kind == "call" or getattr(node.op, "once", False)
        return node.key if alone else (node.key, id(run.executor))

    def awaited(self, run: Run) -> set[int]:
        """Return the positions of a run's unfinished nodes that other runs wait for.

        :param run: the run.
        """
        return self.brain.flights.awaited(run) | {
            i
            for (first, i), *others in self.under_way.values()
            if first is run and any(other.state[j] == JOINED for other, j in others)
        }

    def claim(self, run: Run, i: int, node: Node) -> bool:
        """Claim a node for this run; return False if another run is already running it or a part of it."""
        if self._surrounding(run, node) is not None:
            return False
        others = self.under_way.setdefault(self._shared_name(run, node), [(run, i)])
        return others[0] == (run, i)

    def ended(self, run: Run, i: int, node: Node, state: int) -> None:
        """Give a node's result to the runs that wait for it; without one they go on by themselves.

        :param run: the run.
        :param i: the node's position.
        :param node: the node.
        :param state: its final state.
        """
        shared = self._shared_name(run, node)
        others = self.under_way.get(shared)
        if not others or others[0] != (run, i):
            if others and (run, i) in others:
                others.remove((run, i))
            return
        del self.under_way[shared]
        for other, j in others[1:]:
            if other.state[j] != JOINED:
                continue
            if state in VALUED:
                self.brain.lifecycle.done(other, j, run.values[i], SHARED)
            elif state == FAILED and not _may_ask_again(run, i, other):
                self.brain.lifecycle.fail(other, j, run.errors[i], final=True)
            else:
                other.state[j] = WAITING
                self.brain.lifecycle.ready(other, j)


def _may_ask_again(run: Run, i: int, other: Run) -> bool:
    """Whether a node failed for a reason that does not hold in another run, which waited for it.

    Either the first run stops, or has shown pieces of an answer, or its settings are others.
    """
    if run.stopping or run.has_shown([i]):
        return True
    error = run.errors[i]
    if isinstance(error, CacheMiss):
        return other.answers is None or not other.answers.replay_only
    if isinstance(error, CallTimeout):
        return run.deadline != other.deadline
    if isinstance(error, BackendUnavailable):
        return run.patience != other.patience
    return isinstance(error, ConfigError) and run.caps != other.caps
