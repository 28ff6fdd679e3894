"""Compare a program's run with and without optimizations: answers, effects, requests, waiting.

What is compared comes from the two runs alone; no rule of the optimizer is asked.
"""

from __future__ import annotations

import array
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from feste import context
from feste.backend import Request, Response
from feste.draw import MAIN, Determinism, Draw
from feste.errors import FesteError, InvalidRequest, UpstreamFailed
from feste.graph import Batch, FesteGraph
from feste.node import Node
from feste.optimization import Optimization, Optimizer, Phase, Plan
from feste.optimization.base import level_of, phase_of
from feste.packing import fill
from feste.plugins import registry
from feste.scheduler.program import Program
from feste.scheduler.run import Run
from feste.testing.fake_backend import FakeBackend
from feste.testing.fresh import fresh_draws
from feste.testing.random_graphs import POISON, Example
from feste.testing.virtual_clock import VirtualClock

__all__ = ["differences", "shuffled"]

Label = tuple[str, int]
"""Identifies a node in all runs of a program: its scope, and its place there in creation order."""
Logical = tuple[str, str, Draw]
"""One call as it would be sent alone: the request's key, the account, the draw."""

_KEY = re.compile(r"\b([\w.]+)-[0-9a-f]{8}-\d+")
_FAKE = FakeBackend()


class _Asked(NamedTuple):
    """A call that came to its request.

    :param at: when, in virtual seconds.
    :param request: the request, as it would be sent alone.
    :param others: the operation, its client, and all arguments but the item of a list, as text.
    """

    at: float
    request: Request
    others: str


@dataclass
class _Trace:
    """One run, and all that is compared of it.

    :param plan: its plan.
    :param values: the value or the error of each output, as text.
    :param roots: all errors of nodes that ran.
    :param named: those that outputs name as the reason why they did not run.
    :param effects: what each task did, by its mark.
    :param labels: the label of each node of the program, by key.
    :param kept: the nodes that stand for themselves.
    :param merged: the nodes that another one stands for.
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
    alone: dict[Label, _Asked] = field(default_factory=dict)
    taken: list[Request] = field(default_factory=list)
    sent: dict[int, list[float]] = field(default_factory=dict)
    requests: int = 0
    refused: int = 0

    @property
    def logical(self) -> Counter[Logical]:
        """The calls in all requests that were answered."""
        return Counter(call for request in self.taken for call in _logical(request))


def differences(
    build: Callable[[], Any],
    passes: Iterable[Optimization] | None = None,
    *,
    optimize: bool | Mapping[str, bool] = True,
    strict: bool = True,
) -> list[str]:
    """Run a program with and without optimizations; return what is not as it must be.

    Equal are, bit for bit: values; errors, by type and text; what each task did. Equal is also the
    multiset of calls that were answered, however they shared requests, apart from those that the
    plan accounts as merged or dropped. There are no more requests. A planned batch saves a request,
    holds calls that differ in the item alone, and lets none of them wait.

    :param build: makes the program: nodes and containers of them, or an :class:`Example`. It is
        called twice and must make the same program each time.
    :param passes: the passes; None uses all registered ones. What tasks return is optimized by the
        registered ones.
    :param optimize: as the setting.
    :param strict: as the setting: whether the graph is checked after each pass.
    :returns: one sentence for each difference; none if the optimization was sound.

    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> differences(lambda: [llm.embed("a"), llm.embed("a"), llm.chat("b"), llm.chat("b")])
    []
    """
    plain = _run(build, None, optimize=False, strict=False)
    try:
        other = _run(build, passes, optimize=optimize, strict=strict)
    except Exception as error:
        return [f"the optimized program does not run: {type(error).__name__}: {error}"]
    return [
        *_other_values(plain, other),
        *_other_effects(plain, other),
        *_other_requests(plain, other),
        *_wrong_batches(plain, other),
    ]


def shuffled(rng: random.Random, passes: Iterable[Optimization] | None = None) -> list[Any]:
    """Return the passes in another order that is legal too: a pass may come at any time.

    Those of level E2 are left out.

    :param rng: the source of the order.
    :param passes: the passes; None uses all registered ones.
    """
    given = registry().optimizations.values() if passes is None else passes
    left: list[Any] = [one for one in given if phase_of(one) is not Phase.REWRITE]
    rng.shuffle(left)
    later = [phase for phase in Phase if phase is not Phase.REWRITE]
    moved: list[_Moved] = []
    for one in left:
        phase = phase_of(one)
        if phase is Phase.SIMPLIFY and rng.random() < 0.3:
            phase = rng.choice(later)
        moved.append(_Moved(one, phase, tuple(m.name for m in moved)))
    return moved


class _Moved:
    """A pass at another place."""

    def __init__(self, one: Optimization, phase: Phase, after: tuple[str, ...]) -> None:
        self.one = one
        self.name, self.level = one.name, level_of(one)
        self.phase, self.after = phase, after

    def apply(self, graph: FesteGraph, cx: Any) -> FesteGraph:
        return self.one.apply(graph, cx)


# --- a run ----------------------------------------------------------------------------------------


def _run(
    build: Callable[[], Any], passes: Iterable[Optimization] | None, *, optimize: Any, strict: bool
) -> _Trace:
    fresh_draws()
    built = build()
    example = built if isinstance(built, Example) else Example(built)
    everything = FesteGraph.collect(example.wanted, example.unneeded)[0]
    wanted = FesteGraph.collect(example.wanted)[0].outputs
    chosen = context.settings(optimize=optimize, strict=strict, on_error="return")
    plan = Optimizer(passes).run(FesteGraph(everything.nodes, wanted), chosen)
    trace = _Trace(plan)
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
    run = Run(Program(plan.graph, plan.before.nodes), chosen, clock.hands)
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
            trace.alone[label] = _Asked(now, task.result, _others(*task.args))
    return trace


def _name(trace: _Trace, run: Run) -> None:
    """Label the nodes, and tell which were merged into others."""
    nodes = {node.key: node for node in trace.plan.before.nodes.values()}
    merged: set[str] = set()
    for keepers in run.program.keepers:
        nodes.update((node.key, node) for node in keepers)
        merged.update(node.key for node in keepers[1:])
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


def _logical(request: Request) -> Iterator[Logical]:
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


# --- what is compared -----------------------------------------------------------------------------


def _other_values(plain: _Trace, other: _Trace) -> Iterator[str]:
    for i, (one, two) in enumerate(zip(plain.values, other.values, strict=True)):
        if one != two:
            yield f"output {i} is {two}, not {one}"
    for root in other.named - plain.roots:
        yield f"an output names an error that there is not: {root}"


def _other_effects(plain: _Trace, other: _Trace) -> Iterator[str]:
    lost = plain.effects.keys() - other.effects.keys()
    dropped = set(plain.labels.values()) - other.kept - other.merged
    if lost and not dropped:
        yield f"tasks with effects did not run: {sorted(map(str, lost))}"
    for mark, texts in other.effects.items():
        if texts != plain.effects.get(mark):
            yield f"task {mark} did {texts}, not {plain.effects.get(mark)}"


def _other_requests(plain: _Trace, other: _Trace) -> Iterator[str]:
    """The multiset of calls is equal apart from those that the plan accounts for."""
    accounted = {other.labels[key] for key in other.plan.accounted if key in other.labels}
    scopes = {scope for scope, _ in other.labels.values()}
    gone = [label for label in plain.alone if label not in other.kept]
    expected = plain.logical
    for label in gone:
        if label not in accounted | other.merged and label[0] in scopes:
            yield f"the call {label} is gone without an account"
        for call in _logical(plain.alone[label].request):
            if expected[call]:
                expected[call] -= 1
    found = other.logical
    for call in expected.keys() | found.keys():
        if found[call] != expected[call]:
            yield f"{call} was answered {found[call]} times, not {expected[call]}"
    if not plain.refused and not other.refused:
        if other.requests > plain.requests:
            yield f"{other.requests} requests were sent instead of {plain.requests}"
        if found.total() > plain.logical.total():
            yield f"{found.total()} calls were answered instead of {plain.logical.total()}"


def _wrong_batches(plain: _Trace, other: _Trace) -> Iterator[str]:
    for batch in other.plan.graph.batches:
        nodes = [other.plan.graph.nodes[key] for key in batch.members]
        labels = [other.labels[node.key] for node in nodes]
        if any(node.determinism is Determinism.EFFECT for node in nodes):
            yield f"calls with effects are in a batch: {labels}"
        alone = {label: plain.alone[label] for label in labels if label in plain.alone}
        if len({asked.others for asked in alone.values()}) > 1:
            yield f"calls that differ in more than the item are in a batch: {labels}"
        yield from _unequal_draws(other, batch, alone)
        yield from _too_long(other, nodes)
        if not other.refused:
            yield from _waiting(other, labels)


def _unequal_draws(other: _Trace, batch: Batch, alone: Mapping[Label, _Asked]) -> Iterator[str]:
    for equal in batch.draws:
        nodes = [other.plan.graph.nodes[key] for key in equal]
        labels = [other.labels[key] for key in equal]
        keys = {alone[label].request.key for label in labels if label in alone}
        if len(keys) > 1 or any(node.determinism is not Determinism.SAMPLE for node in nodes):
            yield f"calls that are no equal draws ask for several answers: {equal}"


def _too_long(other: _Trace, nodes: list[Node]) -> Iterator[str]:
    """No request asks for more than the client of any of its calls allows."""
    calls = {id(node.draw): (node.call, node.args) for node in nodes if node.call is not None}
    for request in other.taken:
        own = [calls[id(draw)] for draw in request.draws if id(draw) in calls]
        items = len(request.draws) // request.samples
        if items > min((call.max_items for call, _ in own), default=items):
            yield f"a request holds {items} prompts, more than a client allows"
        draws = request.samples
        if draws > min((call.max_draws(call.model(args)) for call, args in own), default=draws):
            yield f"a request asks for {draws} answers to a prompt, more than a client allows"


def _waiting(other: _Trace, labels: list[Label]) -> Iterator[str]:
    """The calls of a batch are sent when they are ready, in fewer requests than there are calls."""
    ready = {label: other.alone[label] for label in labels if label in other.alone}
    for label, asked in ready.items():
        times = other.sent.get(id(asked.request.draws[0]), [])
        if asked.at not in times:
            yield f"the call {label} was ready at {asked.at}, and sent at {times}"
    draws = {id(asked.request.draws[0]) for asked in ready.values()}
    shared = [r for r in other.taken if not draws.isdisjoint(map(id, r.draws))]
    bodies = {frozenset(asked.request.body) for asked in ready.values()}  # a client may add fields
    if len(ready) > len(bodies) == 1 and len(shared) >= len(ready):
        yield f"a batch of {len(ready)} calls took {len(shared)} requests"


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
