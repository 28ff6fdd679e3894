"""Run a program on a virtual clock, and record what it asked for, when, and what it got."""

from __future__ import annotations

import array
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from feste import context
from feste.backend import Request, Response
from feste.draw import MAIN, Draw
from feste.errors import FesteError, InvalidRequest, UpstreamFailed
from feste.graph import FesteGraph
from feste.optimization import Optimization, Optimizer, Plan
from feste.packing import fill
from feste.scheduler.program import Program
from feste.scheduler.run import Run
from feste.scheduler.states import SHARED
from feste.testing.fake_backend import FakeBackend
from feste.testing.fresh import fresh_draws
from feste.testing.virtual_clock import VirtualClock

__all__ = [
    "POISON",
    "Asked",
    "Effects",
    "Example",
    "Label",
    "Logical",
    "Trace",
    "logical_calls",
    "traced",
]

POISON = "poison"
"""A text that a simulated provider refuses; a list that holds it is refused as a whole."""
Label = tuple[str, int]
"""Identifies a node in all runs of a program: its scope, and its place there in creation order."""
Logical = tuple[str, str, Draw]
"""One call as it would be sent alone: the request's key, the account, the draw."""

_KEY = re.compile(r"\b([\w.]+)-[0-9a-f]{8}-\d+")
_FAKE = FakeBackend()


class Effects:
    """What tasks did: pairs of a task's mark and what it saw. Tasks get it by reference."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, str]] = []


@dataclass
class Example:
    """A program to run with and without optimizations.

    :param wanted: what is computed: nodes, and containers of them.
    :param unneeded: nodes that are in the graph, though nothing wanted needs them.
    :param effects: what its tasks did so far.
    """

    wanted: Any
    unneeded: Any = ()
    effects: Effects = field(default_factory=Effects)


class Asked(NamedTuple):
    """A call that came to its request.

    :param at: when, in virtual seconds.
    :param request: the request, as it would be sent alone.
    :param others: the operation, its client, and all arguments but the item of a list, as text.
    """

    at: float
    request: Request
    others: str


@dataclass
class Trace:
    """One run, and all that is compared of it.

    :param plan: its plan.
    :param values: the value or the error of each output, as text.
    :param roots: all errors of nodes that ran.
    :param named: those that outputs name as the reason why they did not run.
    :param effects: what each task did, by its mark.
    :param labels: the label of each node of the program, by key.
    :param kept: the nodes that stand for themselves.
    :param merged: the nodes that another one stands for, or whose answer they took.
    :param alone: the request of each call that came to it.
    :param taken: the requests that were answered.
    :param sent: when each call was sent, by the identity of its draw.
    :param requests: how many requests were sent.
    :param refused: how many of them were refused.
    """

    plan: Plan
    values: list[str] = field(default_factory=list)
    roots: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    effects: dict[Any, list[str]] = field(default_factory=dict)
    labels: dict[str, Label] = field(default_factory=dict)
    kept: set[Label] = field(default_factory=set)
    merged: set[Label] = field(default_factory=set)
    alone: dict[Label, Asked] = field(default_factory=dict)
    taken: list[Request] = field(default_factory=list)
    sent: dict[int, list[float]] = field(default_factory=dict)
    requests: int = 0
    refused: int = 0

    @property
    def logical(self) -> Counter[Logical]:
        """The calls in all requests that were answered."""
        return Counter(call for request in self.taken for call in logical_calls(request))


def traced(
    build: Callable[[], Any], passes: Iterable[Optimization] | None = None, **settings: Any
) -> Trace:
    """Run a program on a virtual clock, and record all that is compared.

    :param build: makes the program.
    :param passes: the passes; None uses all registered ones.
    :param settings: the settings of the run.
    """
    fresh_draws()
    built = build()
    example = built if isinstance(built, Example) else Example(built)
    everything = FesteGraph.collect(example.wanted, example.unneeded)[0]
    wanted = FesteGraph.collect(example.wanted)[0].outputs
    chosen = context.settings(on_error="return", **settings)
    plan = Optimizer(passes).run(FesteGraph(everything.nodes, wanted), chosen)
    trace = Trace(plan)
    clock = VirtualClock(_FAKE.answer, request_seconds=_seconds)
    prepared: list[tuple[float, Any]] = []

    def task_seconds(task: Any) -> float:
        if task.stage == "prepare":
            prepared.append((clock.now, task))
        return _task_seconds(task)

    def answer(request: Request) -> Response:
        trace.requests += 1
        for draw in request.draws:  # the draw of each node is an object of its own
            trace.sent.setdefault(id(draw), []).append(clock.now)
        if POISON in str(request.body):
            trace.refused += 1
            raise InvalidRequest("refused")
        trace.taken.append(request)
        return _FAKE.answer(request)

    clock.answer, clock.task_seconds = answer, task_seconds
    run = Run(Program(plan.graph, plan.before.nodes, plan.rewrites), chosen, clock.hands)
    clock.tell(0.0, ("submit", run))
    clock.drive()
    if run.failure is not None:
        raise run.failure
    trace.values = [_shown(value) for value in run.results()]
    skipped = [error for error in run.results() if isinstance(error, UpstreamFailed)]
    trace.named = {_shown(root) for error in skipped for root in error.roots}
    trace.roots = {_shown(e) for e in run.errors.values() if not isinstance(e, UpstreamFailed)}
    for mark, text in example.effects.entries:
        trace.effects.setdefault(mark, []).append(text)
    _name(trace, run)
    for now, task in prepared:
        if task.ok:
            label = trace.labels[run.program.nodes[task.index].key]
            trace.alone[label] = Asked(now, task.result, _others(*task.args))
    return trace


def _name(trace: Trace, run: Run) -> None:
    """Label the nodes, and tell which were merged into others."""
    nodes = {node.key: node for node in trace.plan.before.nodes.values()}
    merged: set[str] = set()
    for keepers in run.program.keepers:
        nodes.update((node.key, node) for node in keepers)
        merged.update(node.key for node in keepers[1:])
    states = zip(run.program.nodes, run.state, strict=True)
    merged.update(node.key for node, state in states if state == SHARED)
    scopes = defaultdict(list)
    for node in sorted(nodes.values(), key=lambda node: node.seq):
        assert node.draw is not None, "it was collected"
        scopes[MAIN if node.key in trace.plan.before.nodes else node.draw.scope].append(node)
    for scope, some in scopes.items():
        trace.labels.update((node.key, (scope, i)) for i, node in enumerate(some))
    trace.merged = {trace.labels[key] for key in merged}
    trace.kept = {trace.labels[node.key] for node in run.program.nodes} - trace.merged


def _others(call: Any, draw: Draw, args: tuple[Any, ...], values: list[Any], *more: Any) -> str:
    """All that calls of one list have in common, as text."""
    item = call.rule.item if call.rule is not None else None
    named = zip(call.operation.names, (fill(argument, values) for argument in args))
    return f"{call.identity} {[argument for name, argument in named if name != item]}"


def _seconds(request: Request) -> float:
    """The duration of a request: any, but the same for the same one."""
    return 1.0 + random.Random(f"{request.key} {request.draws}").random()


def _task_seconds(task: Any) -> float:
    """The duration of a piece of Python: that of tasks is random, halves and prompts take none."""
    if task.stage != "run" or task.node.op.kind != "task":
        return 0.0
    return float(random.Random(str(task.node.draw)).choice([0.0, 0.25, 1.5]))


def logical_calls(request: Request) -> Iterator[Logical]:
    """Yield the calls in a request, each as it would be sent alone."""
    name = "input" if "input" in request.body else "prompt"
    given = request.body.get(name)
    body = dict(request.body)
    if request.samples > 1 or body.get("n") == 1:
        del body["n"]
    for i, draw in enumerate(request.draws):
        if request.packed:
            body[name] = given[i // request.samples]  # type: ignore[index]
        yield replace(request, body=dict(body)).key, request.account, draw


def _shown(value: Any) -> str:
    """All of a value as text; keys, which are new in each run, left out."""
    if isinstance(value, UpstreamFailed):  # of several errors it names the one that came first
        return _KEY.sub(r"\1", f"UpstreamFailed {value.message.partition(':')[0]}")
    if isinstance(value, FesteError):
        cause = value.__cause__
        told = f"{type(value).__name__}{value.args}" + (f" from {cause!r}" if cause else "")
        return _KEY.sub(r"\1", told)
    if isinstance(value, array.array):
        return value.tobytes().hex()
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_shown, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key!r}: {_shown(v)}' for key, v in value.items())})"
    return f"{type(value).__name__} {value!r} {getattr(value, 'finish_reason', '')}"
