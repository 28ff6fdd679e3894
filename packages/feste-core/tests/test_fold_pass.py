"""Prompts are rendered as far as their variables are known, once for equal parts."""

from __future__ import annotations

import threading
from typing import Any

import cloudpickle
import pytest
from dask.threaded import get

import feste
from feste.context import settings
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization import (
    CommonSubexpressionOptimization,
    FoldOptimization,
    Optimizer,
    PassContext,
    Plan,
)
from feste.prompt import ChatPrompt, FesteEnvironment, Prompt
from feste.prompt.segments import PartialPromptOp
from feste.testing import FakeBackend, FakeParams


@feste.task(pure=True)
def later(value: str) -> str:
    return value


def folded(*nodes: Any, passes: Any = None) -> Plan:
    """The plan of the pass alone, in rounds until nothing changes."""
    graph = FesteGraph.collect(*nodes)[0]
    return Optimizer(passes or [FoldOptimization()]).run(graph, settings(strict=True))


def remarks(plan: Plan) -> list[tuple[str, int]]:
    return [(remark.text, remark.count) for remark in plan.passes[0].remarks]


def partial(plan: Plan, node: Any) -> Node:
    made = plan.graph.nodes[node.key]
    assert isinstance(made.op, PartialPromptOp)
    return made


class Counting(FesteEnvironment):
    """An environment with a function that counts its calls; it is pure all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.globals["note"] = self._note

    def _note(self, value: Any) -> str:
        self.calls.append(value)
        return str(value)


def test_a_prompt_keeps_all_but_its_constant_work() -> None:
    """Same key, draw, inputs, place and value; only what is pending stays a variable."""
    prompt = Prompt("{{ a }} {{ p }} {% if p %}{{ b }}{% endif %}")
    node = prompt(a="A", b=["b"], p=later("P"))
    plan = folded(node)
    made, own = partial(plan, node), node._node

    assert (made.key, made.draw, made.deps, made.where) == (own.key, own.draw, own.deps, own.where)
    assert (list(made.kwargs), made.value, own.value) == (["p"], PENDING, PENDING)
    assert (own.op, list(own.kwargs)) == (prompt._op, ["a", "b", "p"])
    assert made.op.kind == "prompt" and made.determinism is own.determinism
    assert remarks(plan) == [("rendered the constant parts of 1 prompt", 1)]
    assert plan.passes[0].changed == 1
    assert node.compute() == node.compute(optimize=False) == "A P ['b']"


@pytest.mark.parametrize(
    "node",
    [
        Prompt("Text {{ p }}")(p=later("P")),
        Prompt("{{ a if p else a }}")(a="A", p=later("P")),
        Prompt("{{ a }}{{ p }}")(a="", p=later("P")),
        Prompt("{{ 1 / a }}{{ p }}")(a=0, p=later("P")),
        Prompt("{% set b = p %}{{ a }}")(a=1, p=later("P")),
    ],
)
def test_without_constant_text_worth_keeping_nothing_changes(node: Any) -> None:
    """What the template says by itself is no work saved."""
    plan = folded(node)

    assert plan.graph is plan.before
    assert remarks(plan) == []


def compute(*nodes: Any) -> Any:
    """Compute without advice, for which templates are looked at again."""
    return feste.compute(*nodes, optimize={"lint": False})


def test_globals_are_constants() -> None:
    """A prompt without any constant of its own may still repeat a loop over a global."""
    made = Counting()
    prompt = Prompt("{% for i in range(2) %}{{ note(i) }}{% endfor %}{{ p }}", environment=made)
    nodes = [prompt(p=later(str(i))) for i in range(5)]

    assert compute(nodes) == (["010", "011", "012", "013", "014"],)
    assert made.calls == [0, 1]


def test_equal_parts_are_rendered_once() -> None:
    """By template, environment and content, also where other constants differ, or nothing is late."""
    made, other = Counting(), Counting()
    source = "{% for e in examples %}{{ note(e.q) }}{% endfor %}{{ n }}{{ p }}"
    prompts = [Prompt(source, environment=made), Prompt(source, environment=made)]
    nodes = [
        prompt(examples=[{"q": "x"}, {"q": "y"}], n=n, p=p)
        for prompt in prompts
        for n in range(3)
        for p in (later("P"), "p")
    ]
    foreign = Prompt(source, environment=other)(
        examples=[{"q": "x"}, {"q": "y"}], n=0, p=later("P")
    )
    values = compute(nodes, foreign)

    assert values == ([f"xy{n}{p}" for _ in prompts for n in range(3) for p in "Pp"], "xy0P")
    assert sorted(made.calls) == ["x", "x", "y", "y"]  # once with `p` late, once with it known
    assert other.calls == ["x", "y"]


@pytest.mark.parametrize(
    ("one", "two"), [(1, True), (1, 1.0), ("1", 1), ([1], ["1"]), (0.0, -0.0), (None, "None")]
)
def test_values_of_other_types_are_other_values(one: Any, two: Any) -> None:
    """A text may tell 1 from true: equal in Python is not equal here."""
    prompt = Prompt("{{ a|tojson }}{{ p }}")
    nodes = [prompt(a=value, p=later("")) for value in (one, two)]

    assert feste.compute(nodes) == feste.compute(nodes, optimize=False)


def test_nodes_of_equal_constants_share_an_op_and_merge() -> None:
    """So equal prompts are still seen to be equal, and different ones to be different."""
    prompt, late = Prompt("{{ a }}{{ p }}"), later("P")
    nodes = [
        prompt(a=a, p=p) for a, p in (("A", late), ("A", late), ("B", late), ("A", later("Q")))
    ]
    plan = folded(*nodes, passes=[FoldOptimization(), CommonSubexpressionOptimization()])
    other = Prompt("{{ p }}{{ a }}")(a="A", p=late)

    assert len(set(plan.graph.wanted())) == 3
    assert feste.compute(nodes[0], other) == ("AP", "PA")
    assert partial(plan, nodes[0]).op is partial(plan, nodes[3]).op
    assert feste.compute(*nodes) == ("AP", "AP", "BP", "AQ")


def test_whole_and_partial_prompts_are_remarked_apart() -> None:
    """Each with its number; what fails is left for the run, as are prompts that fail in part."""
    prompt = Prompt("{{ 6 / a }} {{ p }}")
    plan = folded(
        [prompt(a=1, p=1), prompt(a=2, p=2), prompt(a=0, p=1)],
        [prompt(a=1, p=later("P")), prompt(a=0, p=later("P"))],
    )

    assert remarks(plan) == [
        ("1 prompt cannot be rendered and will fail in the run", 1),
        ("rendered 2 prompts of constants", 2),
        ("rendered the constant parts of 1 prompt", 1),
    ]


@pytest.mark.parametrize("left", range(5))
def test_each_prompt_is_one_rewrite(left: int) -> None:
    """The pass asks before each of them, so that it can be cut off anywhere."""
    prompt = Prompt("{{ a }}{{ p }}")
    nodes = [prompt(a=a, p=p) for a in "xy" for p in ("p", later("p"))]
    cx = PassContext(settings(), left=left)
    graph = FoldOptimization().apply(FesteGraph.collect(nodes)[0], cx)
    made = [graph.nodes[node.key] for node in nodes]

    assert sum(n.value is not PENDING or isinstance(n.op, PartialPromptOp) for n in made) == min(
        left, 4
    )


def test_errors_of_the_run_are_the_same() -> None:
    """Of a constant and of a pending part: kind, text, line and place."""
    prompt = Prompt("{{ a }}\n{{ 1 / b }}\n{{ 1 / p|int }}")
    nodes = [prompt(a="A", b=b, p=later(p)) for b, p in ((1, "0"), (0, "1"), (0, "0"), (1, "1"))]
    optimized, plain = (
        feste.compute(nodes, on_error="return", optimize=how)[0] for how in (True, False)
    )

    assert list(map(repr, optimized)) == list(map(repr, plain))
    assert [str(value) for value in optimized] == [str(value) for value in plain]
    assert "line 3" in str(optimized[0]) and "line 2" in str(optimized[1])
    assert optimized[3] == "A\n1.0\n1.0"


def test_calls_get_the_same_requests() -> None:
    """Messages in two steps are those in one; so are the answers of draws."""
    chat = ChatPrompt("{{ who|upper }}", "{{ who }} {{ p }}")
    texts = []
    for how in (True, False):
        feste.testing.fresh_draws()
        llm = FakeBackend()
        first = llm.chat("Hi")
        feste.compute([llm.chat(chat(who=who, p=first)) for who in "xyz"], optimize=how)
        texts.append(sorted(str(request.body["messages"]) for request in llm.requests))

    assert len(texts[0]) == 4
    assert texts[0] == texts[1]


def test_a_folded_graph_runs_on_dask() -> None:
    """A plain get runs it, also after it was sent to another process."""
    node = ChatPrompt("{{ a }}", "{% for i in b %}{{ i }}{{ p }}{% endfor %}")(
        a="A", b=[1, 2], p=later("P")
    )
    plan = folded(node)
    copy = cloudpickle.loads(cloudpickle.dumps(plan.graph))
    expected = [{"role": "system", "content": "A"}, {"role": "user", "content": "1P2P"}]

    assert get(dict(plan.graph), node.key) == expected
    assert get(copy, node.key) == expected
    assert partial(plan, node).op.fn(p="P") == expected  # type: ignore[attr-defined]


def test_a_folded_op_renders_in_many_threads() -> None:
    """Its holes are compiled at the first rendering, whoever comes first."""
    prompt = Prompt("{{ a }}{% for i in p %}{{ loop.index }}{% endfor %}, a hole of this test")
    node = prompt(a="A", p=later("P"))
    op: Any = partial(folded(node), node).op
    start, texts = threading.Barrier(4), []

    def render() -> None:
        start.wait()
        texts.append(op.fn(p="xyz"))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert texts == ["A123, a hole of this test"] * 4


# --- impure names -----------------------------------------------------------------------------------


def test_impure_prompts_are_left_for_the_run() -> None:
    """Never rendered early, never merged: each is rendered in the run, by itself."""
    made = Counting()
    made.impure.add("note")
    prompt = Prompt("{{ a }}{{ note(a) }}{{ p }}", environment=made)
    nodes = [prompt(a="A", p=p) for p in ("p", "p", later("p"), later("p"))]
    plan = folded(*nodes, passes=[FoldOptimization(), CommonSubexpressionOptimization()])

    assert made.calls == []
    assert len(set(plan.graph.wanted())) == 4
    assert feste.compute(*nodes) == ("AAp",) * 4
    assert made.calls == ["A"] * 4


def test_greedy_calls_on_impure_prompts_are_two() -> None:
    """Two prompts that may differ make two calls of the plan, however equal they look."""
    made = Counting()
    made.impure.add("note")
    for environment, sent in ((made, 2), (Counting(), 1)):
        llm = FakeBackend()
        ask = Prompt("{{ note(1) }}", environment=environment)
        nodes = [llm.chat(ask(), FakeParams(temperature=0)) for _ in range(2)]
        assert feste.explain(nodes).calls == sent
