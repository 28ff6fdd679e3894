"""Batches are proven legal, and optimizing changes no answer: shown on random graphs."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Backend, BatchRule, Determinism, Limits, Params, operation
from feste.context import settings
from feste.errors import InvalidRequest, PluginError
from feste.graph import Batch, FesteGraph
from feste.node import PENDING
from feste.optimization import BatchOptimization, Optimizer, PassContext, Phase, Plan, rules
from feste.prompt import ChatPrompt, Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws


@feste.task(pure=True)
def same(value: Any) -> Any:
    return value


@feste.task
def effect(*values: Any) -> Any:
    return values


def batched(*nodes: Any, **given: Any) -> Plan:
    """The plan of the pass alone."""
    graph = FesteGraph.collect(*nodes)[0]
    return Optimizer([BatchOptimization()]).run(graph, settings(strict=True, **given))


def batches(*nodes: Any) -> list[set[str]]:
    return [set(b.members) for b in batched(*nodes).graph.batches]


def together(one: Any, two: Any) -> bool:
    """Whether two nodes are put into one batch."""
    return batches(one, two) == [{one.key, two.key}]


llm = FakeBackend()


# --- who may be together ----------------------------------------------------------------------------


def test_calls_that_are_ready_at_once_share_requests() -> None:
    """All calls of one operation with known prompts are one batch, however many."""
    nodes = [llm.embed(str(i)) for i in range(1000)]
    plan = batched(nodes)
    (batch,) = plan.graph.batches

    assert batch.members == tuple(n.key for n in nodes)
    assert plan.passes[0].remarks[0].text == "1,000 calls of embed share requests, up to 96 in each"


class Seeded(Params):
    temperature: float | None = None
    seed: int | None = None
    extra: dict[str, Any] | None = None


class Lists(Backend):
    """A backend whose operations take lists; one of them has effects."""

    def __init__(self, account: str = "a", limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    @operation
    async def complete(self, prompt: str, params: Seeded = Seeded(), tone: Any = "dry") -> str:
        return prompt

    @complete.batch(max_items=10)
    async def complete_many(self, prompts: list[str], params: Seeded, tone: Any) -> list[str]:
        return prompts

    @operation(determinism=Determinism.EFFECT)
    async def publish(self, text: str) -> str:
        return text

    @publish.batch(max_items=10)
    async def publish_many(self, texts: list[str]) -> list[str]:
        return texts

    @operation
    async def alone(self, prompt: str) -> str:
        return prompt


lists = Lists()
TOGETHER: dict[str, tuple[Any, Any, bool]] = {
    "equal parameters": (lambda: llm.complete("a"), lambda: llm.complete("b"), True),
    "equal text": (lambda: llm.complete("a"), lambda: llm.complete("a"), True),
    "equal clients": (lambda: llm.embed("a"), lambda: FakeBackend().embed("b"), True),
    "same greedy parameters": (
        lambda: llm.complete("a", FakeParams(temperature=0)),
        lambda: llm.complete("b", FakeParams(temperature=0)),
        True,
    ),
    "greedy and sample": (
        lambda: llm.complete("a", FakeParams(temperature=0)),
        lambda: llm.complete("b"),
        False,
    ),
    "maximum": (
        lambda: llm.complete("a", FakeParams(max_tokens=1)),
        lambda: llm.complete("b", FakeParams(max_tokens=2)),
        False,
    ),
    "temperature 0 and 0.0": (
        lambda: llm.complete("a", FakeParams(temperature=0)),
        lambda: llm.complete("b", FakeParams(temperature=0.0)),
        False,
    ),
    "model of the client": (
        lambda: llm.embed("a"),
        lambda: FakeBackend("fake-2").embed("b"),
        False,
    ),
    "model of the call": (
        lambda: llm.complete("a", FakeParams(model="x")),
        lambda: llm.complete("b", FakeParams(model="y")),
        False,
    ),
    "operation": (lambda: llm.complete("a"), lambda: llm.embed("b"), False),
    "no rule": (lambda: llm.chat("a"), lambda: llm.chat("b"), False),
    "a seed for each request": (
        lambda: llm.complete("a", FakeParams(seed=1)),
        lambda: llm.complete("b", FakeParams(seed=1)),
        False,
    ),
    "a seed in extra": (
        lambda: lists.complete("a", Seeded(extra={"seed": 1})),
        lambda: lists.complete("b", Seeded(extra={"seed": 1})),
        False,
    ),
    "a parameter that is not known yet": (
        lambda: llm.complete("a", FakeParams(max_tokens=same(1))),
        lambda: llm.complete("b", FakeParams(max_tokens=same(1))),
        False,
    ),
    "another argument": (
        lambda: lists.complete("a", tone="dry"),
        lambda: lists.complete("b", tone="wet"),
        False,
    ),
    "an argument that is an object": (
        lambda: lists.complete("a", tone=_OBJECT),
        lambda: lists.complete("b", tone=_OBJECT),
        False,
    ),
    "an argument that is a class": (
        lambda: lists.complete("a", tone=Lists),
        lambda: lists.complete("b", tone=Lists),
        True,
    ),
    "effects": (lambda: lists.publish("a"), lambda: lists.publish("b"), False),
    "account": (lambda: Lists("a").complete("a"), lambda: Lists("b").complete("b"), False),
    "one item a request": (
        lambda: FakeBackend(limits=Limits(max_items=1)).embed("a"),
        lambda: FakeBackend(limits=Limits(max_items=1)).embed("b"),
        False,
    ),
}
_OBJECT = object()


@pytest.mark.parametrize("name", TOGETHER)
def test_members_of_a_batch_are_alike(name: str) -> None:
    """Operation, client and every parameter but the item are equal, or there is no batch."""
    one, two, yes = TOGETHER[name]

    assert together(one(), two()) is yes


def test_what_a_call_waits_for_decides() -> None:
    """Calls with the same unfinished inputs are ready at once; others are left for the run."""
    a, b = llm.chat("a"), llm.chat("b")

    assert together(llm.complete(a), llm.complete(a))
    assert not together(llm.complete(a), llm.complete(b))
    assert not together(llm.complete(a), llm.complete("now"))
    assert together(llm.complete(Prompt("x")()), llm.complete("now")) is False
    assert (
        len(Optimizer().run(_graph(llm.complete(Prompt("x")()), llm.complete("n"))).graph.batches)
        == 1
    )


def _graph(*nodes: Any) -> FesteGraph:
    return FesteGraph.collect(*nodes)[0]


def test_known_answers_are_no_inputs_to_wait_for() -> None:
    """A call on an answered node is ready at once."""
    known = llm.chat("a")
    known.compute()

    assert together(llm.complete(known), llm.complete("now"))
    assert batches([known, llm.complete("x")]) == []


def test_calls_that_come_at_different_times_are_remarked() -> None:
    """What may share a request but is not ready together is told."""
    nodes = [llm.complete(llm.chat(t)) for t in "abc"]
    plan = batched(nodes)

    assert plan.graph.batches == ()
    assert [(r.kind, r.count) for r in plan.passes[0].remarks] == [("applied", 3)]
    assert "become ready at different times" in plan.passes[0].remarks[0].text


def test_a_plan_that_has_these_batches_already_is_not_changed() -> None:
    """The pass is idempotent: the same batches are no change."""
    nodes = [llm.embed(t) for t in "ab"]
    graph = batched(nodes).graph
    one = BatchOptimization()

    assert one.apply(graph, PassContext(settings())) is graph


def test_ready_events() -> None:
    """The event of a call is the set of what it still waits for."""
    a = llm.chat("a")
    one, two = llm.complete([a, a, "x"]), llm.complete("x")
    graph = _graph(one, two)

    assert rules.ready_event(graph, one._node) == frozenset([a.key])
    assert rules.ready_event(graph, two._node) == frozenset()


# --- never a cycle ----------------------------------------------------------------------------------


def test_dependent_calls_are_never_in_one_batch() -> None:
    """A chain of equal calls is asked one after the other."""
    backend = FakeBackend()
    node: Any = backend.complete("a")
    for _ in range(5):
        node = backend.complete(node)
    plan = batched(node)
    node.compute()

    assert plan.graph.batches == ()
    assert [r.items for r in backend.requests] == [1] * 6


def test_crossing_chains_run() -> None:
    """A -> B and B -> A: fusing both pairs would wait for ever; both are answered."""
    backend, other = FakeBackend(), FakeBackend("fake-2")
    starts = [backend.complete("x"), other.complete("x")]
    nodes = [other.complete(starts[0]), backend.complete(starts[1])]
    (values,) = feste.compute(nodes)

    assert len(set(values)) == 2
    assert sum(r.items for r in backend.requests + other.requests) == 4


def test_many_crossing_chains_run() -> None:
    """The same in a crowd: three operations in every order, each chain with its own."""
    backend = FakeBackend()
    steps = [
        backend.complete,
        lambda x: joined(backend.embed(x)),
        lambda x: backend.complete(x, FakeParams(max_tokens=9)),
    ]
    ends = []
    for i, order in zip(range(24), itertools.cycle(itertools.permutations(steps)), strict=False):
        node: Any = f"start {i}"
        for step in order:
            node = step(node)
        ends.append(node)
    (values,) = feste.compute(ends)

    assert len(set(values)) == 24
    assert sum(r.items for r in backend.requests) == 72


def test_a_deadly_set_of_batches_is_refused() -> None:
    """Batches that are each legal but not together are an error of the pass that made them."""
    a1, b2 = llm.complete("a1"), llm.embed("b2")
    b1, a2 = llm.embed(a1), llm.complete(joined(b2))
    one, two = Batch((a1.key, a2.key)), Batch((b1.key, b2.key))

    class Levels:
        name = "levels"
        phase = Phase.PHYSICAL

        def __init__(self, *made: Batch) -> None:
            self.made = made

        def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
            return graph.replace(batches=self.made)

    for some in ([one], [two]):
        Optimizer([Levels(*some)]).run(_graph(b1, a2), settings(strict=True))
    with pytest.raises(PluginError, match="'levels' broke the rules: the graph has a cycle"):
        Optimizer([Levels(one, two)]).run(_graph(b1, a2), settings(strict=True))


def test_the_whole_optimizer_keeps_crossing_chains_acyclic() -> None:
    """Contracting all batches of a plan at once leaves it acyclic."""
    rng = random.Random(3)
    for _ in range(50):
        plan = Optimizer().run(_graph(*Program(rng.randrange(10_000)).build(FakeBackend())))
        plan.graph.check()


# --- requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "limits", "requests"),
    [
        (200, Limits(), [16] * 11 + [12, 12]),
        (64, Limits(), [16] * 4),
        (17, Limits(), [9, 8]),
        (10, Limits(max_items=4), [4, 3, 3]),
        (3, Limits(max_items=1), [1, 1, 1]),
        (1, Limits(), [1]),
    ],
)
def test_requests_are_as_few_as_the_limits_allow(
    calls: int, limits: Limits, requests: list[int]
) -> None:
    """k calls go in ceil(k / limit) requests; explain says so before."""
    backend = FakeBackend(limits=limits)
    nodes = [backend.complete(str(i)) for i in range(calls)]
    explained = feste.explain(nodes)
    feste.compute(nodes)

    assert sorted((r.items for r in backend.requests), reverse=True) == requests
    assert (explained.calls, explained.requests, explained.at_least) == (
        calls,
        len(requests),
        len(requests),
    )


def test_a_bad_item_costs_itself_only() -> None:
    """One call that the server refuses fails alone; its batch is asked again in halves."""
    backend = FakeBackend(fail={"bad": InvalidRequest("no")})
    nodes = [backend.complete("bad" if i == 3 else str(i)) for i in range(8)]
    (values,) = feste.compute(nodes, on_error="return")

    assert [type(v) is InvalidRequest for v in values] == [i == 3 for i in range(8)]
    assert [r.items for r in backend.requests] == [8, 4, 2, 2, 1, 1, 4]


def test_a_member_whose_input_fails_leaves_its_batch() -> None:
    """Calls that wait for a failed node are dropped from the batch; the others are sent."""
    backend = FakeBackend()

    @feste.task
    def first(values: Any) -> Any:
        return values

    @feste.task
    def broken(values: Any) -> Any:
        raise ValueError("it broke")

    start = first(["a", "b"])
    nodes = [
        backend.complete(start[0]),
        backend.complete(start[1]),
        backend.complete(broken(start)),
    ]
    (values,) = feste.compute(nodes, on_error="return")

    assert [isinstance(v, Exception) for v in values] == [False, False, True]


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([], []),
        ([(1, 1)], [1]),
        ([(1, 1)] * 4, [4]),
        ([(1, 1)] * 5, [3, 2]),
        ([(1, 1)] * 9, [4, 3, 2]),
        ([(30, 1)] * 4, [2, 2]),
        ([(1, 1), (1, 1), (90, 1), (90, 1)], [3, 1]),
        ([(1, 1), (1, 1), (1, 800), (1, 800)], [3, 1]),
        ([(200, 1), (1, 1)], [1, 1]),
        ([(1, 600), (1, 600), (1, 600)], [1, 1, 1]),
    ],
)
def test_chunks_keep_every_limit(sizes: list[tuple[int, int]], counts: list[int]) -> None:
    """Items, tokens and bytes; an item over a limit goes alone; the last two are balanced."""
    rule = BatchRule("p", "p", 4, pack=None, unpack=None, max_tokens=100, max_bytes=1000)  # type: ignore[arg-type]
    found = rule.chunks(sizes)

    assert sum(found) == len(sizes)
    assert found == counts


@pytest.mark.parametrize("seed", range(30))
def test_chunks_of_random_sizes(seed: int) -> None:
    """No request is over a limit unless one item alone is; nothing is lost."""
    rng = random.Random(
        seed
    )  # a few large ones among many small: the balance must not break limits
    rule = BatchRule("p", "p", 7, pack=None, unpack=None, max_tokens=100, max_bytes=900)  # type: ignore[arg-type]
    sizes = [
        (rng.choice([1, 2, 30, 90]), rng.choice([1, 5, 300, 800])) for _ in range(rng.randrange(40))
    ]
    begin = 0
    for count in rule.chunks(sizes, max_items=rng.choice([None, 3])):
        part = sizes[begin : begin + count]
        begin += count

        assert count == 1 or sum(t for t, _ in part) <= 95
        assert count == 1 or sum(b for _, b in part) <= 855
        assert 1 <= count <= 7
    assert begin == len(sizes)


# --- optimized and plain, lazy and eager ------------------------------------------------------------


@dataclasses.dataclass
class Note:
    """A dataclass, as users have them between calls."""

    text: Any
    more: Any = None


class Program:
    """A random program of calls, prompts, operators and tasks; built anew as often as needed.

    Every step is injective, so equal expressions are those that were written equally.
    """

    words = ("a", "b", "c")
    template = Prompt("{{ x }} and {{ y }}")
    talk = ChatPrompt(system="Be {{ x }}.", user="{{ y }}")

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.steps: list[tuple[str, list[int], int]] = []
        kinds = ["chat", "complete", "embed", "prompt", "talk", "join", "task", "twice", "note"]
        for i in range(rng.randrange(2, 14)):
            inputs = [rng.randrange(i + 3) for _ in range(2)]
            self.steps.append((rng.choice(kinds), inputs, rng.randrange(4)))

    def build(self, backend: FakeBackend) -> list[Any]:
        """The nodes, or in eager mode the values, of a run of the program."""
        texts: list[Any] = list(self.words)
        ends: list[Any] = []
        for kind, (i, j), choice in self.steps:
            params = (
                FakeParams(),
                FakeParams(temperature=0),
                FakeParams(temperature=0.0, max_tokens=5),
                FakeParams(seed=1, temperature=1.0),
            )[choice]
            x, y = texts[i], texts[j]
            match kind:
                case "chat":
                    made = backend.chat(x, params)
                case "complete":
                    made = backend.complete(x, params)
                case "embed":
                    ends.append(backend.embed(x))
                    made = x
                case "prompt":
                    made = self.template(x=x, y=y)
                case "talk":
                    made = backend.chat(self.talk(x=x, y=y), params)
                case "join":
                    made = "(" + (x + ("|" + y)) + ")"
                case "task":
                    made = joined({"x": [x], "y": (y,)})
                case "twice":
                    made = joined(
                        Note([backend.complete(x, params)] * 2, backend.complete(x, params))
                    )
                case _:
                    made = joined(Note(x, {"y": y}))
            texts.append(made)
        return [*texts, *ends]


@feste.task(pure=True)
def joined(value: Any) -> str:
    return repr(value)


def run(seed: int, **given: Any) -> tuple[tuple[Any, ...], FakeBackend]:
    """The values of a fresh run of a program, and the backend that answered."""
    fresh_draws()
    backend = FakeBackend()
    return feste.compute(*Program(seed).build(backend), **given), backend


@pytest.mark.parametrize("block", range(10))
def test_optimizing_changes_no_answer(block: int) -> None:
    """On random graphs: optimized, unoptimized and eager runs give the same answers, bit for bit."""
    saved = 0
    for seed in range(block * 25, block * 25 + 25):
        plain, one_by_one = run(seed, optimize=False)
        optimized, backend = run(seed, strict=True)
        with context.set(eager=True):
            eager, _ = run(seed)

        assert optimized == plain, seed
        assert eager == plain, seed
        assert len(backend.requests) <= len(one_by_one.requests)
        saved += len(one_by_one.requests) - len(backend.requests)
    assert saved > 0


@pytest.mark.parametrize("seed", range(0, 250, 10))
def test_optimizing_keeps_every_draw(seed: int) -> None:
    """The same SAMPLE draws reach the backend with and without the optimizer; no other ones."""

    def drawn(backend: FakeBackend) -> list[str]:
        sample = [r for r in backend.requests if r.operation != "embed" and not _greedy(r.body)]
        return sorted(str(d) for r in sample for d in r.draws)

    _, plain = run(seed, optimize=False)
    _, optimized = run(seed)

    assert drawn(optimized) == drawn(plain)


def _greedy(body: Any) -> bool:
    return body.get("temperature") == 0 or body.get("seed") is not None


@pytest.mark.parametrize("seed", range(0, 250, 25))
def test_computing_in_parts_changes_no_answer(seed: int) -> None:
    """One compute of everything, and one compute for each node, in creation order, agree."""
    whole, backend = run(seed)
    fresh_draws()
    parts_backend = FakeBackend()
    nodes = Program(seed).build(parts_backend)
    FesteGraph.collect(*nodes)
    parts = tuple(feste.compute(n)[0] for n in nodes)

    assert parts == whole
    assert sum(r.items for r in parts_backend.requests) >= sum(r.items for r in backend.requests)


def test_parameters_are_compared_without_the_item() -> None:
    """Calls without a rule have none to compare; those of alike calls are equal."""
    one, two, other = llm.embed("a"), llm.embed("b"), llm.chat("a")

    assert rules.parameters(other._node) is None
    assert rules.parameters(one._node) == rules.parameters(two._node)
    assert one._node.value is PENDING


@pytest.mark.parametrize("seed", range(20))
def test_levels_count_the_members_on_the_longest_path(seed: int) -> None:
    """The level table of a group, against a count of all paths."""
    rng = random.Random(seed)
    nodes: list[Any] = [llm.complete(f"start {seed}")]
    for _ in range(30):
        below = rng.sample(nodes, min(len(nodes), rng.randint(1, 3)))
        maker = rng.choice(
            [llm.complete, lambda x: llm.complete(x, FakeParams(max_tokens=2)), same]
        )
        nodes.append(maker(below[0] if len(below) == 1 else joined(below)))
    graph = batched(nodes).graph

    def level(key: str, members: tuple[str, ...]) -> int:
        below = max((level(need, members) for need in graph.dependencies(key)), default=0)
        return below + (key in members)

    assert graph.groups
    for group in graph.groups:
        assert group.levels == tuple(level(m, group.members) for m in group.members)
        assert sum(group.table) == len(group.members)
