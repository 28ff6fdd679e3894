"""Compare a program's run with and without optimizations: answers, effects, requests, waiting.

What is compared comes from the two runs alone; no rule of the optimizer is asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from feste.draw import Determinism
from feste.graph import Batch, FesteGraph
from feste.node import Node
from feste.optimization import Optimization, Phase
from feste.optimization.base import level_of, phase_of
from feste.plugins import registry
from feste.testing.traces import Asked, Label, Trace, logical_calls, traced

__all__ = ["any_optimizer", "differences"]


def differences(
    build: Callable[[], Any],
    passes: Iterable[Optimization] | None = None,
    **settings: Any,
) -> list[str]:
    """Run a program with and without optimizations; return what is not as it must be.

    Equal are, bit for bit: values; errors, by type and text; what each task did. Equal is also the
    multiset of calls that were answered, however they shared requests, apart from those that the
    plan accounts as merged or dropped. There are no more requests. A planned batch saves a request,
    holds calls that differ in the item alone, and lets none of them wait.

    :param build: makes the program: nodes and containers of them, or an :class:`Example`. Its calls
        are of :class:`FakeBackend`. It is called twice and must make the same program each time.
    :param passes: the passes; None uses all registered ones. What tasks return is optimized by the
        registered ones.
    :param settings: those of the optimized run. By default it is strict: a pass that breaks a rule is
        a difference too.
    :returns: one sentence for each difference; none if the optimization was sound.

    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> differences(lambda: [llm.embed("a"), llm.embed("a"), llm.chat("b"), llm.chat("b")])
    []
    """
    plain = traced(build, optimize=False)
    try:
        other = traced(build, passes, **{"strict": True, **settings})
    except Exception as error:
        return [f"the optimized program does not run: {type(error).__name__}: {error}"]
    return [
        *_other_values(plain, other),
        *_other_effects(plain, other),
        *_other_requests(plain, other),
        *_wrong_batches(plain, other),
    ]


def any_optimizer(seed: int) -> tuple[list[Optimization], dict[str, Any]]:
    """Return the registered passes in a random order, and random settings for them.

    The order is legal too: a pass that simplifies may come at any time. Those of level E2 are left
    out.

    :param seed: the seed of the choice.
    :returns: the passes and the settings, both for :func:`differences`.
    """
    rng = random.Random(seed)
    left = [p for p in registry().optimizations.values() if phase_of(p) is not Phase.REWRITE]
    rng.shuffle(left)
    phases = [phase for phase in Phase if phase is not Phase.REWRITE]
    moved: list[Optimization] = []
    for one in left:
        phase = phase_of(one)
        if phase is Phase.SIMPLIFY and rng.random() < 0.3:
            phase = rng.choice(phases)
        moved.append(_Moved(one, phase, tuple(m.name for m in moved)))
    settings = {
        "optimize": {one.name: rng.random() < 0.7 for one in moved},
        "max_rewrites": rng.choice([None, None, None, rng.randrange(12)]),
        "objective": rng.choice(["balanced", "cost", "latency"]),
    }
    return moved, settings


class _Moved:
    """A pass at another place."""

    def __init__(self, one: Optimization, phase: Phase, after: tuple[str, ...]) -> None:
        self.one = one
        self.name, self.level = one.name, level_of(one)
        self.phase, self.after = phase, after

    def apply(self, graph: FesteGraph, cx: Any) -> FesteGraph:
        return self.one.apply(graph, cx)


# --- what is compared -----------------------------------------------------------------------------


def _other_values(plain: Trace, other: Trace) -> Iterator[str]:
    for i, (one, two) in enumerate(zip(plain.values, other.values, strict=True)):
        if one != two:
            yield f"output {i} is {two}, not {one}"
    for root in other.named - plain.roots:
        yield f"an output names an error that there is not: {root}"


def _other_effects(plain: Trace, other: Trace) -> Iterator[str]:
    lost = plain.effects.keys() - other.effects.keys()
    dropped = any(how.startswith("dropped") for how in other.plan.accounted.values())
    if lost and not dropped:
        yield f"tasks with effects did not run: {sorted(map(str, lost))}"
    for mark, texts in other.effects.items():
        if texts != plain.effects.get(mark):
            yield f"task {mark} did {texts}, not {plain.effects.get(mark)}"


def _other_requests(plain: Trace, other: Trace) -> Iterator[str]:
    """The multiset of calls is equal apart from those that the plan accounts for."""
    accounted = {other.labels[key] for key in other.plan.accounted if key in other.labels}
    scopes = {scope for scope, _ in other.labels.values()}
    gone = [label for label in plain.alone if label not in other.kept]
    expected = plain.logical
    for label in gone:
        if label not in accounted | other.merged and label[0] in scopes:
            yield f"the call {label} is gone without an account"
        for call in logical_calls(plain.alone[label].request):
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


def _wrong_batches(plain: Trace, other: Trace) -> Iterator[str]:
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


def _unequal_draws(other: Trace, batch: Batch, alone: Mapping[Label, Asked]) -> Iterator[str]:
    for equal in batch.draws:
        nodes = [other.plan.graph.nodes[key] for key in equal]
        labels = [other.labels[key] for key in equal]
        keys = {alone[label].request.key for label in labels if label in alone}
        if len(keys) > 1 or any(node.determinism is not Determinism.SAMPLE for node in nodes):
            yield f"calls that are no equal draws ask for several answers: {equal}"


def _too_long(other: Trace, nodes: list[Node]) -> Iterator[str]:
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


def _waiting(other: Trace, labels: list[Label]) -> Iterator[str]:
    """The calls of a batch are sent when they are ready, in fewer requests than there are calls.

    Those that have a group may wait for other calls of it, and share requests with them instead.
    """
    own = [label for label in labels if label not in other.merged]
    ready = {label: other.alone[label] for label in own if label in other.alone}
    if any(other.labels[key] in ready for g in other.plan.graph.groups for key in g.members):
        return
    for label, asked in ready.items():
        times = other.sent.get(id(asked.request.draws[0]), [])
        if asked.at not in times:
            yield f"the call {label} was ready at {asked.at}, and sent at {times}"
    draws = {id(asked.request.draws[0]) for asked in ready.values()}
    shared = [r for r in other.taken if not draws.isdisjoint(map(id, r.draws))]
    bodies = {frozenset(asked.request.body) for asked in ready.values()}  # a client may add fields
    if len(ready) > len(bodies) == 1 and len(shared) >= len(ready):
        yield f"a batch of {len(ready)} calls took {len(shared)} requests"
