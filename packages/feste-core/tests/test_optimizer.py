"""The optimizer: which passes run, in which order, and what it lets them do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

import feste
from feste import context
from feste.context import settings
from feste.errors import (
    BlockingCallError,
    PluginError,
    PluginWarning,
    RunFailed,
    UnknownName,
)
from feste.graph import FesteGraph
from feste.optimization import (
    BatchOptimization,
    CommonSubexpressionOptimization,
    CullOptimization,
    FoldOptimization,
    Level,
    Optimization,
    Optimizer,
    PassContext,
    Phase,
    Plan,
)
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws


@feste.task(pure=True)
def same(value: Any) -> Any:
    return value


class Pass:
    """A pass of a user: a name, an apply, and whatever else a test gives it."""

    def __init__(
        self, name: str = "mine", apply: Callable[..., Any] | None = None, **more: Any
    ) -> None:
        self.name = name
        self._apply = apply
        self.ran = 0
        vars(self).update(more)

    def apply(self, graph: FesteGraph, cx: PassContext) -> Any:
        self.ran += 1
        return graph if self._apply is None else self._apply(graph, cx)


def plan(passes: list[Any], *nodes: Any, **given: Any) -> Plan:
    """The plan of some nodes by these passes only."""
    return Optimizer(passes).run(FesteGraph.collect(*nodes)[0], settings(**given))


def names(passes: list[Any]) -> list[str]:
    return [p.name for p in Optimizer(passes).passes]


def remarks(made: Plan) -> list[str]:
    return [f"{r.kind}: {r.text}" for report in made.passes for r in report.remarks]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Add passes to those that plugins offer."""

    def add(*passes: Any) -> None:
        from feste import plugins

        offered = {**plugins.registry().optimizations, **{p.name: p for p in passes}}
        monkeypatch.setattr(plugins.registry(), "optimizations", offered)

    return add


# --- order ------------------------------------------------------------------------------------------


def test_own_passes_and_their_order() -> None:
    """Cull, fold, common sub-expressions, batch: what is left of a graph is cheapest to batch."""
    found = {p.name: type(p) for p in Optimizer().passes}

    assert [n for n in found if n in ("cull", "fold", "cse", "batch")] == [
        "cull",
        "fold",
        "cse",
        "batch",
    ]
    assert found["batch"] is BatchOptimization
    assert found["cse"] is CommonSubexpressionOptimization
    assert found["cull"] is CullOptimization
    assert found["fold"] is FoldOptimization


def test_phases_go_before_names() -> None:
    """NORMALIZE, SIMPLIFY, REWRITE, PHYSICAL, SCHEDULE; a pass that says nothing simplifies."""
    passes: list[Any] = [Pass(f"{9 - phase}", **of(phase)) for phase in Phase] + [Pass("0")]

    assert names(passes) == ["9", "0", "8", "7", "6", "5"]


def of(phase: Phase) -> dict[str, Any]:
    """What a pass says of itself to run in a phase."""
    return {"phase": phase, "level": Level.E2 if phase is Phase.REWRITE else Level.E0}


@pytest.mark.parametrize(
    ("level", "phase"), [(Level.E0, Phase.REWRITE), (Level.E2, Phase.SIMPLIFY), (Level.E2, 3)]
)
def test_what_changes_answers_has_a_phase_of_its_own(level: Level, phase: Phase) -> None:
    """REWRITE is for E2 only, and E2 for nothing else: a pass that says otherwise is named."""
    with pytest.raises(PluginError, match="'a'"):
        Optimizer([Pass("a", level=level, phase=phase)])
    assert Optimizer([Pass("a", level=Level.E2)]).passes


def test_a_pass_that_never_settles_is_told(install: Any) -> None:
    """After so many rounds it is left, and the remark says so."""
    made = plan([Pass("a", lambda g, cx: g.with_nodes([])), Pass("b")], same(1))

    assert [r.text for p in made.passes for r in p.remarks] == [
        "stopped after 8 rounds, each with another change"
    ]
    assert made.passes[0].remarks


@pytest.mark.parametrize("seed", range(8))
def test_the_order_does_not_depend_on_how_passes_came(seed: int) -> None:
    """Ties go by name, whatever the order of installation."""
    passes: list[Any] = [Pass(n) for n in "bdac"] + [Pass("e", before=("b",)), Pass("f", after="a")]
    random.Random(seed).shuffle(passes)

    assert names(passes) == ["a", "c", "d", "e", "b", "f"]


def test_before_and_after() -> None:
    """Both say the same from two sides; unknown names, and those of other phases, count for nothing."""
    passes: list[Any] = [
        Pass("a", after=("z", "nobody")),
        Pass("m", before=["a"], after={"z"}),
        Pass("z", before="physical"),
        Pass("physical", phase=Phase.PHYSICAL, before=("z",)),
    ]

    assert names(passes) == ["z", "m", "a", "physical"]


def test_a_contradiction_names_the_chain() -> None:
    """Passes that each want to go before the other are an error with the whole chain in it."""
    passes: list[Any] = [Pass("a", before=("b",)), Pass("b", before="c"), Pass("c", before=("a",))]
    with pytest.raises(PluginError) as caught:
        Optimizer(passes)
    said = str(caught.value)

    assert said.startswith("the order of passes contradicts itself: ")
    assert sorted(set(said.split(": ")[1].split(" -> "))) == ["a", "b", "c"]


def test_a_pass_before_itself_is_a_contradiction() -> None:
    """The shortest chain."""
    with pytest.raises(PluginError, match="a -> a"):
        Optimizer([Pass("a", after=("a",))])


def test_two_passes_of_one_name_are_refused() -> None:
    """A name must mean one pass: it is switched by it."""
    with pytest.raises(PluginError, match="two passes have the name 'a'"):
        Optimizer([Pass("a"), Pass("a", phase=Phase.PHYSICAL)])


@pytest.mark.parametrize("wrong", [{"phase": "PHYSICAL"}, {"phase": 3}, {"level": "E2"}])
def test_a_wrong_phase_or_level_names_the_pass(wrong: dict[str, Any]) -> None:
    """What a pass says of itself is checked, and the pass is named."""
    with pytest.raises(PluginError, match=r"pass 'a': (phase|level)=.* is no (Phase|Level)"):
        Optimizer([Pass("a", **wrong)]).run(FesteGraph({}, []))


def test_name_and_apply_are_enough() -> None:
    """A pass without level, phase and order is exact, and simplifies."""
    one = Pass()
    (report,) = plan([one], same(1)).passes

    assert isinstance(one, Optimization)
    assert (report.level, report.phase, one.ran) == (Level.E0, Phase.SIMPLIFY, 1)


# --- which run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimize", "run"),
    [
        (True, ["a", "b"]),
        (False, []),
        ({}, ["a", "b"]),
        ({"a": False}, ["b"]),
        ({"a": True}, ["a", "b"]),
        ({"route": True}, ["a", "route", "b"]),
        ({"route": True, "a": False, "b": False}, ["route"]),
        ({"route": False}, ["a", "b"]),
        ("route", ["a", "route", "b"]),
    ],
)
def test_optimize_switches_passes(optimize: Any, run: list[str]) -> None:
    """All but E2; none; or by name. A pass of level E2 runs only where the user names it."""
    passes: list[Any] = [
        Pass("a"),
        Pass("b", phase=Phase.PHYSICAL),
        Pass("route", level=Level.E2, phase=Phase.REWRITE),
    ]
    made = plan(passes, same(1), optimize=optimize)

    assert [r.name for r in made.passes] == run
    assert [p.name for p in passes if p.ran] == [p.name for p in passes if p.name in run]


def test_an_unknown_pass_is_refused_before_any_request() -> None:
    """A misspelt name is an error with the right one."""
    llm = FakeBackend()
    for run in (feste.compute, feste.explain):
        with pytest.raises(
            UnknownName, match=r"optimize: no pass 'bacth'\. Did you mean 'batch'\?"
        ):
            run(llm.chat("Hi"), optimize={"bacth": False})  # type: ignore[operator]

    assert llm.requests == []


def test_optimize_false_runs_the_graph_as_it_was_written() -> None:
    """Nothing is merged, nothing batched; the answers are the same."""
    llm, params = FakeBackend(), FakeParams(temperature=0)
    nodes = [llm.complete("Hi", params) for _ in range(4)]
    (plain,) = feste.compute(nodes, optimize=False)
    asked = len(llm.requests)
    (quick,) = feste.compute([llm.complete("Hi", params) for _ in range(4)])

    assert (asked, len(llm.requests)) == (4, 5)
    assert plain == quick


def test_one_pass_can_be_switched_off() -> None:
    """Without ``batch`` each call is a request; the rest of the optimizer goes on."""
    llm = FakeBackend()
    feste.compute([llm.embed(str(i % 3)) for i in range(6)], optimize={"batch": False})

    assert [r.items for r in llm.requests] == [1, 1, 1]


# --- to the fixpoint --------------------------------------------------------------------------------


def renamed(graph: FesteGraph, times: itertools.count[int], most: int) -> FesteGraph:
    """A new graph as long as there is something to do."""
    return graph.with_nodes([]) if next(times) < most else graph


def test_simplify_runs_until_nothing_changes() -> None:
    """A pass that still finds something gives all others another round."""
    times = itertools.count()
    one, other = Pass("a", lambda g, cx: renamed(g, times, 3)), Pass("b")
    made = plan([one, other], same(1))

    assert (one.ran, other.ran) == (4, 4)
    assert [r.changed for r in made.passes] == [3, 0]


def test_a_pass_that_never_ends_is_stopped() -> None:
    """A pass that always changes something ends after a few rounds."""
    one = Pass("a", lambda g, cx: g.with_nodes([]))
    plan([one], same(1))

    assert one.ran == 8


@pytest.mark.parametrize("phase", [p for p in Phase if p is not Phase.SIMPLIFY])
def test_other_phases_run_once(phase: Phase) -> None:
    """Only simplification is repeated."""
    one = Pass("a", lambda g, cx: g.with_nodes([]), **of(phase))
    plan([one], same(1), optimize={"a": True})

    assert one.ran == 1


# --- remarks ----------------------------------------------------------------------------------------


def test_remarks_are_kept_once_with_their_places() -> None:
    """What a pass says in every round is told once; each kind has its word."""

    def talk(graph: FesteGraph, cx: PassContext) -> FesteGraph:
        nodes = list(graph.nodes.values())
        cx.applied("did it", nodes)
        cx.missed("did not")
        cx.advice("you could")
        return renamed(graph, times, 2)

    times = itertools.count()
    node = same(1)
    made = plan([Pass("a", talk)], node)
    (report,) = made.passes

    assert remarks(made) == ["applied: did it", "missed: did not", "advice: you could"]
    assert report.remarks[0].origins == (node._node.where,)
    assert (report.remarks[0].count, report.remarks[1].origins) == (1, ())


def test_idle_passes_are_listed_too() -> None:
    """``explain`` names every pass that ran, also those that found nothing to do."""
    explained = feste.explain(same(1))
    shown = str(explained)

    assert [r.name for r in explained.plan.passes if r.changed] == []
    assert all(name in shown for name in ("cull", "fold", "cse", "batch"))
    assert "nothing to do" in shown


def test_settings_reach_the_pass() -> None:
    """A pass sees the settings of the run in its context."""
    seen: list[Any] = []
    plan([Pass("a", lambda g, cx: seen.append(cx.settings.keep) or g)], same(1), keep="all")

    assert seen == ["all"]


# --- what passes may not do -------------------------------------------------------------------------


def lose_calls(graph: FesteGraph, cx: PassContext) -> FesteGraph:
    calls = {n.key for n in graph.calls()}
    return FesteGraph({k: n for k, n in graph.nodes.items() if k not in calls}, graph.outputs)


def merge_silently(graph: FesteGraph, cx: PassContext) -> FesteGraph:
    first, *others = [n.key for n in graph.calls()]
    return graph.merged(dict.fromkeys(others, first))


def close_a_cycle(graph: FesteGraph, cx: PassContext) -> FesteGraph:
    nodes = list(graph.nodes.values())
    return graph.with_nodes([n.replace(deps=(nodes[-1],)) for n in nodes])


def want_less(graph: FesteGraph, cx: PassContext) -> FesteGraph:
    return FesteGraph(graph.nodes, graph.outputs[:1])


def drop_an_input(graph: FesteGraph, cx: PassContext) -> FesteGraph:
    prompts = {k: n for k, n in graph.nodes.items() if n.op.kind != "prompt"}
    return FesteGraph(prompts, graph.outputs)


def batch_what_depends(graph: FesteGraph, cx: PassContext) -> FesteGraph:
    return graph.replace(batches=[feste.graph.Batch(tuple(n.key for n in graph.calls()))])


def merge_in_circles(graph: FesteGraph, cx: PassContext) -> FesteGraph:
    one, two = [n.key for n in graph.calls()]
    cx.account([one, two], "merged")
    return graph.merged({one: two, two: one})


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (lambda g, cx: 1 / 0, "division by zero"),
    "returns nothing": (lambda g, cx: None, "returned a NoneType, not a FesteGraph"),
    "returns a dict": (lambda g, cx: dict(g.nodes), "returned a dict, not a FesteGraph"),
    "loses calls": (lose_calls, "2 calls are gone without an account"),
    "merges what differs": (merge_silently, "which is another call"),
    "closes a cycle": (close_a_cycle, "the graph has a cycle: "),
    "wants less": (want_less, "it changed which outputs are wanted"),
    "drops an input": (drop_an_input, "which is not in the graph"),
    "batches what depends": (batch_what_depends, "the graph has a cycle: "),
    "advises nothing": (lambda g, cx: cx.advice(None), " takes a text, not None"),
    "accounts for nothing": (
        lambda g, cx: cx.account(["a"], None),
        " takes a text that says how, not None",
    ),
    "ranks none": (
        lambda g, cx: g.replace(ranks=dict.fromkeys(g.nodes)),
        " is None, not an int",
    ),
    "ranks by text": (
        lambda g, cx: g.replace(ranks=dict.fromkeys(g.nodes, "high")),
        " is 'high', not an int",
    ),
    "merges in circles": (merge_in_circles, "cannot be merged into"),
    "blocks": (lambda g, cx: same(1).compute(), "a blocking call in an optimization pass"),
}
ask = Prompt("About {{ x }}")


def two_calls(llm: FakeBackend) -> tuple[Any, Any]:
    first = llm.complete(ask(x=1))
    return first, llm.complete(ask(x=first))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_skipped_with_a_remark(name: str, install: Any) -> None:
    """The graph before it is still valid: the run goes on with it, and explain says what was wrong."""
    apply, said = BROKEN[name]
    llm = FakeBackend()
    fresh_draws()
    wanted = feste.compute(*two_calls(llm), optimize=False)
    llm.requests.clear()
    fresh_draws()
    nodes = two_calls(llm)
    install(Pass("broken", apply))
    with pytest.warns(PluginWarning, match="'broken' was skipped"):
        explained = feste.explain(*nodes)
    skipped = [
        r.text for p in explained.plan.passes for r in p.remarks if r.text.startswith("skipped")
    ]
    before = len(llm.requests)
    with pytest.warns(PluginWarning, match="strict=True"):
        values = feste.compute(*nodes)

    assert len(skipped) == 1
    assert said in skipped[0]
    assert said in " ".join(str(explained).split())
    assert (before, len(llm.requests)) == (0, 2)
    assert values == wanted


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_raises_in_strict_mode_before_any_request(name: str, install: Any) -> None:
    """In strict mode a pass that raises or breaks the rules ends the run, and is named."""
    apply, said = BROKEN[name]
    llm = FakeBackend()
    nodes = two_calls(llm)
    install(Pass("broken", apply))
    with pytest.raises(Exception, match=said) as caught:
        feste.compute(*nodes, strict=True)

    assert llm.requests == []
    assert caught.value.__notes__ == ["raised by the optimization pass 'broken'"]
    if name not in (
        "raises",
        "blocks",
        "merges in circles",
        "advises nothing",
        "accounts for nothing",
    ):  # these are errors of their own kind
        assert type(caught.value) is PluginError
        assert str(caught.value).startswith("the pass 'broken' broke the rules: ")


def test_an_account_makes_a_loss_legal() -> None:
    """A pass may drop calls if it says what became of them; the plan keeps the account."""
    llm = FakeBackend()
    one, two = llm.chat("Hi"), llm.chat("Hi")

    def merge(graph: FesteGraph, cx: PassContext) -> FesteGraph:
        cx.account([two.key], f"merged into {one.key}")
        return graph.merged({two.key: one.key})

    once = itertools.count()
    lossy = Pass("a", lambda g, cx: g if next(once) else merge(g, cx), level=Level.E2)
    made = plan([lossy], one, two, optimize={"a": True})

    assert made.accounted == {two.key: f"merged into {one.key}"}
    assert made.graph.wanted() == [one.key, one.key]
    assert set(made.before.nodes) == {one.key, two.key}


def test_an_account_of_a_refused_pass_counts_for_nothing() -> None:
    """What a skipped pass said is forgotten with what it did."""

    def lose(graph: FesteGraph, cx: PassContext) -> FesteGraph:
        cx.account(["other"], "dropped")
        cx.applied("dropped it")
        return lose_calls(graph, cx)

    with pytest.warns(PluginWarning):
        made = plan([Pass("a", lose)], FakeBackend().chat("Hi"))

    assert made.accounted == {}
    assert len(remarks(made)) == 1
    assert remarks(made)[0].startswith("missed: skipped: PluginError: the pass 'a'")


def test_a_graph_cannot_be_changed_in_place(install: Any) -> None:
    """A pass that tries is skipped, and the graph before it is used."""

    def in_place(graph: FesteGraph, cx: PassContext) -> FesteGraph:
        graph.nodes.pop(next(iter(graph.nodes)))  # type: ignore[attr-defined]
        return graph

    llm = FakeBackend()
    nodes = two_calls(llm)
    install(Pass("careless", in_place, phase=Phase.SCHEDULE))
    with pytest.warns(PluginWarning, match="'careless' was skipped"):
        feste.compute(*nodes)

    assert len(llm.requests) == 2


def test_a_pass_cannot_wait_for_a_run() -> None:
    """A blocking call inside a pass names the way out."""
    with pytest.raises(BlockingCallError, match="acompute"):
        plan([Pass("a", lambda g, cx: same(1).compute())], same(1), strict=True)


def test_own_passes_keep_the_rules_in_strict_mode() -> None:
    """Feste's own passes pass their own checks."""
    llm = FakeBackend()
    params = FakeParams(temperature=0)
    nodes = [llm.complete(ask(x=i % 3), params) for i in range(9)]
    nodes += [llm.embed(n) for n in nodes]

    with context.set(strict=True):
        (values,) = feste.compute(nodes)
    assert values[0] == values[3] and values[9] == values[12]
    assert sum(r.items for r in llm.requests) == 6


def test_a_task_that_emits_is_optimized_with_the_settings_of_the_run(install: Any) -> None:
    """What a task returns goes through the same passes, switched the same way."""
    llm = FakeBackend()
    seen: list[int] = []
    install(Pass("spy", lambda g, cx: seen.append(len(g.calls())) or g, level=Level.E2))

    @feste.task(emits=True)
    def ask_all() -> Any:
        return [llm.embed(str(i)) for i in range(5)]

    feste.compute(ask_all(), optimize={"spy": True, "batch": False})

    assert 5 in seen
    assert [r.items for r in llm.requests] == [1] * 5


def test_a_strict_failure_inside_an_emission_fails_the_node(install: Any) -> None:
    """A pass that raises on what a task returned fails that task, not the scheduler."""

    @feste.task(emits=True)
    def emit() -> Any:
        return same("emitted")

    def picky(graph: FesteGraph, cx: PassContext) -> FesteGraph:
        if any("emitted" in n.args for n in graph.nodes.values()):
            raise ValueError("not this one")
        return graph

    install(Pass("picky", picky))
    with pytest.raises(RunFailed) as caught:
        feste.compute(emit(), strict=True)

    assert "not this one" in str(caught.value)


@pytest.mark.parametrize(("most", "requests"), [(0, 9), (1, 8), (4, 5), (100, 3)])
def test_the_limit_of_rewrites_is_one_for_the_run(most: int, requests: int) -> None:
    """What tasks return is optimized with what is left of it: so halving finds one rewrite."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def emit(before: Any) -> Any:
        return [llm.embed("same") for _ in range(3)]

    first = [llm.embed("same") for _ in range(3)]
    node: Any = emit(emit(first))
    feste.compute(first, node, max_rewrites=most, optimize={"batch": False}, keep="none")

    assert sum(r.items for r in llm.requests) == requests
