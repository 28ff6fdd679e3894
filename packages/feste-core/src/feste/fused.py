"""Several Python tasks in a row as one node, so that the scheduler handles one task.

Each step runs as it would run alone: with arguments of its own, in its own draw. If the steps do not
get to their end, because one of them raises or returns nodes or the run stops, the scheduler takes
the node apart: each step becomes a node of its own.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, ContextVar
from typing import Any, NamedTuple, Protocol

from feste import draw
from feste.draw import Determinism
from feste.errors import FesteError
from feste.node import Node
from feste.packing import Slot, fresh, holds_nodes

__all__ = [
    "PREVIOUS",
    "Fused",
    "Halted",
    "Step",
    "StepFailed",
    "around",
    "fuse",
    "tasks_of",
    "watched",
]

#: In the sources of a step: the value of the step before.
PREVIOUS = -1
#: Names of more steps than this are shortened.
_NAMED = 4
_STRENGTH = (Determinism.EFFECT, Determinism.SAMPLE, Determinism.GREEDY, Determinism.PURE)


class _Stops(Protocol):
    @property
    def stopping(self) -> bool: ...


#: The run of the current task: between two steps it is asked whether it starts nothing new.
watched: ContextVar[_Stops | None] = ContextVar("feste_watched", default=None)

#: The keys of the steps, before the last of their node, that the current code runs inside.
around: ContextVar[tuple[str, ...]] = ContextVar("feste_steps", default=())


class Step(NamedTuple):
    """One task of a fused node.

    :param node: the task's own node; in another process it has no inputs.
    :param sources: for each input its position among the inputs of the fused node, or ``PREVIOUS``.
    """

    node: Node
    sources: tuple[int, ...]

    def run(self, values: Sequence[Any]) -> Any:
        """Call the function with arguments that it may change.

        :param values: the values of the task's inputs.
        """
        node = self.node
        op: Any = node.op
        given = [fresh(a, values) for a in node.args]
        return op.fn(*given, **{k: fresh(v, values) for k, v in node.kwargs.items()})

    def run_inside(self, values: Sequence[Any]) -> Any:
        """Run it where calls that it makes get the draws that they have in the task alone.

        :param values: the values of the task's inputs.
        """
        around.set((*around.get(), self.node.key))
        if self.node.draw is not None:
            draw.enter(self.node.draw)
        return self.run(values)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Step, (self.node.replace(deps=()), self.sources))


class Halted:
    """What a fused node returns if it stopped behind a step that is not its last.

    :param at: the position of the step.
    :param value: what the step returned: it holds nodes, or the run was stopping.
    :param context: the context of the step, where calls continue the count of its draws.
    """

    __slots__ = ("at", "context", "value")

    def __init__(self, at: int, value: Any, context: Context) -> None:
        self.at = at
        self.value = value
        self.context = context


class StepFailed(FesteError):
    """A step of a fused node raised; the scheduler reports the step's own error instead.

    :param at: the position of the step.
    :param error: the error of the step, whose cause is this one's too; None while the
        ``__cause__`` is what the step raised.
    """

    def __init__(self, message: str = "", *, at: int = 0, error: FesteError | None = None) -> None:
        super().__init__(message)
        self.at = at
        self.error = error

    @property
    def traceback(self) -> str:
        """The formatted traceback of the step's error."""
        return str(getattr(self.error, "traceback", ""))


class Fused:
    """The op of a fused node.

    Its determinism class is that of the step that promises least.

    :param steps: the tasks in order; all run in the same place.
    """

    kind = "task"
    emits = False
    once = False
    is_async = False

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        last: Any = self.steps[-1].node.op
        self.executor: str = last.executor
        self.resources: Mapping[str, float] = last.resources
        found = {step.node.determinism for step in self.steps}
        self._class = next(one for one in _STRENGTH if one in found)

    @property
    def name(self) -> str:
        """The names of the steps; of many steps only of some."""
        names = [step.node.op.name for step in self.steps]
        if len(names) > _NAMED:
            return f"{names[0]}+{names[1]}+\N{HORIZONTAL ELLIPSIS}+{names[-1]} ({len(names)})"
        return "+".join(names)

    @property
    def identity(self) -> str:
        """The identities of the steps."""
        return f"fused({'+'.join(step.node.op.identity for step in self.steps)})"

    def determinism(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Determinism:
        """Return its class, whatever the arguments."""
        return self._class

    def fn(self, *values: Any) -> Any:
        """Run the steps; return the last one's value, or what stopped them.

        :param values: the values of the inputs.
        :raises StepFailed: if a step raised; the cause is its exception.
        """
        return self.go_on(0, None, values)

    def go_on(self, at: int, value: Any, values: Sequence[Any]) -> Any:
        """Run the steps from one of them on.

        :param at: the position of the step.
        :param value: the value of the step before.
        :param values: the values of the inputs.
        :raises StepFailed: if a step raised; the cause is its exception.
        """
        run, last = watched.get(), len(self.steps) - 1
        try:
            while at < last:
                step = self.steps[at]
                context = contextvars.copy_context()
                value = context.run(step.run_inside, _inputs(step, value, values))
                if holds_nodes(value) or (run is not None and run.stopping):
                    return Halted(at, value, context)
                at += 1
            step = self.steps[last]
            # in the context and the draw of the fused node, which are its own
            return step.run(_inputs(step, value, values))
        except BaseException as error:  # a task may raise anything, even SystemExit
            raise StepFailed(at=at) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return (Fused, (self.steps,))

    def __repr__(self) -> str:
        return f"<task {self.identity}>"


def _inputs(step: Step, value: Any, values: Sequence[Any]) -> list[Any]:
    return [value if s == PREVIOUS else values[s] for s in step.sources]


def tasks_of(node: Node) -> list[Node]:
    """Return the tasks that a node runs: the steps of a fused one, or itself.

    :param node: the node.
    """
    op: Any = node.op
    return [step.node for step in op.steps] if type(op) is Fused else [node]


def fuse(chain: Sequence[Node], resolve: Callable[[str], str]) -> Node:
    """Return one node for a chain of tasks, with the key and the draw of the last.

    :param chain: the nodes; each needs the one before. One that is fused already is extended.
    :param resolve: returns the key that replaces a key after merges.
    """
    inputs: dict[str, int] = {}
    nodes: list[Node] = []
    steps: list[Step] = []
    previous = ""
    for node in chain:
        places = []
        for dep in node.deps:
            key = resolve(dep.key)
            if key == previous:
                places.append(PREVIOUS)
                continue
            if key not in inputs:
                inputs[key] = len(nodes)
                nodes.append(dep)
            places.append(inputs[key])
        op: Any = node.op
        if type(op) is Fused:
            for step in op.steps:
                own = (s if s == PREVIOUS else places[s] for s in step.sources)
                steps.append(Step(step.node, tuple(own)))
        else:
            steps.append(Step(node, tuple(places)))
        previous = node.key
    slots = tuple(Slot(i) for i in range(len(nodes)))
    return chain[-1].replace(op=Fused(steps), args=slots, kwargs={}, deps=tuple(nodes))
