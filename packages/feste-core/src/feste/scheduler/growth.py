"""Add the nodes that a task returned to its run, so that the graph grows while it runs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from feste import draw
from feste.context import Settings
from feste.draw import Determinism
from feste.errors import FesteError, GraphError
from feste.fused import tasks_of
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization import BatchOptimization, Optimizer, rules
from feste.optimization.optimizer import is_enabled
from feste.optimization.passes.batch import sharing_key
from feste.scheduler.batching.batcher import Gathering
from feste.scheduler.checks import check_nodes
from feste.scheduler.emission import REPACK, Emission
from feste.scheduler.executor import QUICK
from feste.scheduler.program import Program
from feste.scheduler.run import Run
from feste.scheduler.states import NOT_STARTED, OPEN, READY, VALUED, WAITING

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Growth", "compile_emission", "join_groups", "unfused"]


def compile_emission(run: Run, i: int, emission: Emission) -> Program | FesteError:
    """Optimize and compile the nodes that a task returned; never called on the brain's thread.

    :param run: the run.
    :param i: the position of the node whose task returned them.
    :param emission: the task's result.
    :returns: the program, or the error that prevented it.
    """
    drawn = tasks_of(run.program.nodes[i])[emission.at].draw
    assert drawn is not None, "every node of a run was collected"
    scope = drawn.inner
    if scope not in run.scopes:  # else the task itself computed nodes, and their counts go on
        run.scopes.add(scope)
        draw.forget(scope)
    try:
        graph = FesteGraph.of(emission.nodes, scope=scope)
        plan = run.context.copy().run(
            Optimizer().run, graph, unfused(run.settings, run.program.rewrites)
        )
        run.program.rewrites += plan.rewrites
        check_nodes(plan.graph.nodes.values(), run.settings, run.executor)
        program = Program(plan.graph, graph.nodes)
        join_groups(program, run.settings)
        return program
    except FesteError as error:
        return error


def join_groups(program: Program, settings: Settings) -> None:
    """Let calls share requests with those that the run has, or will have, if calls do so at all.

    :param program: what is added to a run.
    :param settings: the settings of the run.
    """
    unlimited = settings["max_rewrites"] is None
    if unlimited and is_enabled(BatchOptimization.name, settings["optimize"]):
        program.groups = _groups(program.nodes)


def _groups(nodes: Sequence[Node]) -> list[tuple[Hashable, list[int]]]:
    """Return the groups of all calls that may share requests: those of one may be in the run already."""
    groups: dict[Hashable, list[int]] = {}
    for i, node in enumerate(nodes):
        if node.call is not None and rules.takes_lists(node.call):
            key = sharing_key(node)
            if key is not None:
                groups.setdefault(key, []).append(i)
    return list(groups.items())


def unfused(settings: Settings, rewrites: int) -> Settings:
    """Return a run's settings as they are for nodes that are added to it.

    Nothing is fused, since other nodes of the run may need any value; ``max_rewrites`` is what is
    left of it.

    :param settings: the settings of the run.
    :param rewrites: how many rewrites were made for the run.
    """
    optimize, most = settings["optimize"], settings["max_rewrites"]
    if optimize is not False:
        optimize = {**({} if optimize is True else optimize), "fuse": False}
    left = None if most is None else max(0, most - rewrites)
    return settings.replace(optimize=optimize, max_rewrites=left)


class Growth:
    """Merge emitted nodes into a run.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: How many results of tasks are being compiled.
        self.coming = 0

    def compile(self, run: Run, i: int, emission: Emission) -> None:
        """Have the nodes that a task returned compiled.

        :param run: the run.
        :param i: the position of the node whose task returned them.
        :param emission: the task's result.
        """
        self.coming += 1
        self.brain.act("grow", run, i, emission)

    def on_grown(self, run: Run, i: int, program: Any, emission: Emission) -> None:
        """Merge the nodes that a task returned; its value is built from theirs."""
        self.coming -= 1
        if run.state[i] >= OPEN:
            return
        i = self.brain.lifecycle.take_apart(run, i, emission.at)
        emission.at = -1  # from here on it is the result of that step alone
        if isinstance(program, FesteError):
            self.brain.lifecycle.fail(run, i, program)
            return
        if run.stopping:
            self.brain.lifecycle.keep_paid(run, i, emission)
            self.brain.lifecycle.end(run, i, NOT_STARTED)
            return
        self._take_apart(run, program)
        needed = self.needed(run, program)
        lost = self._lost(run, program, needed)
        if lost is not None:
            self.brain.lifecycle.fail(run, i, lost)
            return
        position, fresh = self.merge(run, program, needed, run.program.rank[i])
        wanted = [position[j] for j in program.outputs]
        if self._needs(run, wanted, i):
            key = run.program.nodes[i].key
            for j in fresh:  # nobody can use them
                if run.state[j] < OPEN:
                    self.brain.lifecycle.end(run, j, NOT_STARTED)
            self.brain.lifecycle.fail(
                run, i, GraphError(f"a cycle: {key} returned a node that needs {key}")
            )
            return
        main = run.program
        self.brain.lifecycle.let_go(run, main.deps[i])
        main.nodes[i] = main.nodes[i].replace(op=REPACK, args=(emission.packed,), kwargs={})
        self.brain.lifecycle.keep_paid(run, i, emission)
        run.emitters.add(i)
        run.state[i] = WAITING
        run.pending[i] = 0
        run.connect(i, wanted)
        if run.feeders is not None and run.feeders.emitted(i):
            self.brain.groups.changed(run)
        # only now: a node whose value is known ends at once, and would not be held for this one
        self.start(run, fresh)
        failed = next((d for d in wanted if d in run.errors), None)
        if run.state[i] != WAITING:
            return
        if failed is not None:
            self.brain.lifecycle.poison(run, failed, run.errors[failed])
        elif not run.pending[i]:
            self._repack(run, i)

    def _take_apart(self, run: Run, part: Program) -> None:
        """Take those fused nodes apart that wait, and whose steps are needed by themselves now."""
        for node in part.nodes:
            i = run.program.inner.get(node.key, -1)
            if i >= 0 and node.key not in run.program.index and run.state[i] == WAITING:
                self.brain.lifecycle.take_apart(run, i, 0)

    def _repack(self, run: Run, i: int) -> None:
        run.state[i] = READY
        self.brain.dispatcher.push(run, QUICK, run.program.rank[i], i)

    def merge(
        self, run: Run, part: Program, needed: set[int], rank: int
    ) -> tuple[list[int], list[int]]:
        """Append a program to the run's.

        :param run: the run.
        :param part: the program.
        :param needed: the positions of its nodes that are needed.
        :param rank: is added to their priorities.
        :returns: the position of each of its nodes there, and the positions of those that are new.
        """
        main = run.program
        position: list[int] = []
        fresh: list[int] = []
        group_of = {j: key for key, members in part.groups for j in members}
        for j, node in enumerate(part.nodes):
            at = main.index.get(node.key)
            if j in needed and (at is None or self._is_gone(run, at)):
                at = run.append(node, part.rank[j] + rank, part.keepers[j])
                run.since[at] = self.brain.now
                fresh.append(j)
                if j in group_of:
                    self.brain.groups.join(run, at, group_of[j])
            position.append(-1 if at is None else at)
        for key, j in part.index.items():  # includes nodes that were merged into others
            if position[j] >= 0:
                main.index.setdefault(key, position[j])
        for j in fresh:
            run.connect(position[j], [position[d] for d in part.deps[j]])
        joining = set(fresh)
        for members, several in part.batches:  # nodes already in the run have been started there
            new = [position[m] for m in members if m in joining]
            gathering = Gathering(new, several)
            run.gatherings.update((i, gathering) for i in new)
        for j in joining & part.prefixes.keys():
            run.prefixes[position[j]] = part.prefixes[j]
        return position, [position[j] for j in fresh]

    def start(self, run: Run, fresh: Sequence[int]) -> None:
        """Start those new nodes that wait for nothing, and end those that need a failed one.

        :param run: the run.
        :param fresh: the positions of the new nodes.
        """
        for i in fresh:
            failed = next((d for d in run.program.deps[i] if d in run.errors), None)
            if failed is not None and run.state[i] < OPEN:
                self.brain.lifecycle.poison(run, failed, run.errors[failed])
            elif not run.pending[i] and run.state[i] == WAITING:
                self.brain.lifecycle.ready(run, i)

    def needed(self, run: Run, part: Program) -> set[int]:
        """Return the nodes that the outputs need, without the inputs of nodes the run still has.

        :param run: the run.
        :param part: the program of the outputs.
        """
        needed: set[int] = set()
        stack = list(part.outputs)
        while stack:
            j = stack.pop()
            if j not in needed:
                needed.add(j)
                at = run.program.index.get(part.nodes[j].key)
                if at is None or self._is_gone(run, at):
                    stack.extend(part.deps[j])
        return needed

    def _is_gone(self, run: Run, i: int) -> bool:
        """Whether a node's value was released because nothing seemed to need it any more."""
        return run.state[i] in VALUED and bool(run.gone[i])

    def _lost(self, run: Run, part: Program, needed: set[int]) -> GraphError | None:
        """Return an error if a needed value was released and its node must not run again."""
        for j in needed:
            node = part.nodes[j]
            at = run.program.index.get(node.key)
            gone = node.key in run.program.inner if at is None else self._is_gone(run, at)
            if not gone:
                continue
            if node.value is PENDING and node.determinism is not Determinism.PURE:
                return GraphError(
                    f"a task returned a node that needs {node.key}, which has run and is no longer "
                    "held: declare the task @feste.task(emits=True)"
                )
        return None

    def _needs(self, run: Run, roots: list[int], target: int) -> bool:
        """Whether any of the given unfinished nodes depends on the target."""
        seen: set[int] = set()
        stack = list(roots)
        while stack:
            i = stack.pop()
            if i == target:
                return True
            if i not in seen and run.state[i] < OPEN:
                seen.add(i)
                stack.extend(run.program.deps[i])
        return False
