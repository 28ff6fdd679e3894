"""Explain: the plan in words and numbers, before anything is sent."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from typing import Any

import dask
import pytest

import feste
from feste import context
from feste.backend import Limits
from feste.errors import MissingKey, RunFailed
from feste.graph import FesteGraph
from feste.node import PENDING
from feste.optimization import Explanation, Optimizer, PassContext
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams


@feste.task(pure=True)
def told(value: Any) -> str:
    return repr(value)


ask = Prompt("About {{ x }}")


def test_nothing_is_sent_and_nothing_is_kept() -> None:
    """Explaining costs nothing, runs no task, and leaves every node as it was."""
    llm, ran = FakeBackend(), []

    @feste.task
    def effect(value: Any) -> None:
        ran.append(value)

    node = effect(llm.chat(ask(x=1)))
    before = feste.last_report()
    explained = feste.explain([node, {"a": node}])

    assert isinstance(explained, Explanation)
    assert (llm.requests, ran) == ([], [])
    assert node._node.value is PENDING
    assert feste.last_report() is before


def test_the_text_of_a_plan() -> None:
    """The first lines: nodes, calls, requests beside their lower bound, tokens; nouns in their number."""
    llm = FakeBackend("m-1")
    params = FakeParams(max_tokens=10)
    answers = [llm.complete(ask(x="a" * 14), params) for _ in range(40)]
    report = llm.chat(told(answers))
    lines = str(feste.explain(report)).splitlines()

    assert lines[:6] == [
        "PLAN  82 nodes -> 82   41 calls -> 2 requests (at least 2)",
        "  fake.complete m-1: 40 calls in 1 request (at least 1)",
        "    ~6 tokens in, <= 400 tokens out",
        "  fake.chat m-1: 1 call in 1 request (at least 1)",
        "    ~2 tokens in (+ 1 prompt made while it runs), no bound on tokens out",
        "PASSES",
    ]
    assert any("40 calls of complete share requests, up to 16 in each" in line for line in lines)


def test_no_line_is_wider_than_a_terminal() -> None:
    """Eighty columns hold every line, with long names and remarks and large numbers too."""

    class Wordy:
        name = "a-pass-with-a-long-name"

        def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
            cx.advice("much could be " + "said here, " * 20, list(graph.nodes.values()))
            return graph

    class Idle:
        name = "another-pass-with-a-long-name"

        def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
            return graph

    llm = FakeBackend("an-organisation/a-model-with-a-name-of-many-parts-and-a-date-2025-08-07")
    nodes = [llm.chat(ask(x=i)) for i in range(3000)]
    graph, _, _ = FesteGraph.collect(llm.chat(told(nodes)), [llm.complete(n) for n in nodes])
    explained = Explanation(
        Optimizer([*Optimizer().passes, Wordy(), Idle()]).run(graph), "a note " * 30
    )
    lines = str(explained).splitlines()
    passes = lines[lines.index("PASSES") + 1 :]
    headings = [line for line in passes if line.endswith("nothing to do")]

    assert max(map(len, lines)) <= 80
    assert len({line.index("nothing") for line in headings}) == 1
    assert any("test_explain.py:" in line for line in passes)


def test_tokens_are_those_that_the_requests_count() -> None:
    """The plan of calls whose prompts are known says what their requests say of themselves."""
    llm = FakeBackend()
    long = llm.chat("a question")
    long.compute()
    nodes = [llm.chat(ask(x="some words " * i)) for i in range(50)] + [llm.chat(long)]
    (before,) = feste.explain(nodes).rows
    feste.compute(nodes)
    report = feste.last_report()

    assert report is not None
    assert before.unknown == 0
    assert before.input_tokens == report.operations[0].input_tokens


def test_a_call_that_cannot_be_prepared_is_explained_too() -> None:
    """A plan can be looked at where a call is wrong: the run will say so, in its place."""
    wrong: Any = [{"role": "user", "content": float("nan")}]
    explained = feste.explain(FakeBackend().chat(wrong))

    assert explained.calls == 1
    assert explained.rows[0].input_tokens == 1  # of the text "user"


def test_numbers_and_text_agree() -> None:
    """The fields are the sums of the rows, and what compute then does."""
    llm = FakeBackend()
    nodes = [llm.embed(str(i)) for i in range(100)] + [llm.chat("Hi"), llm.chat("Hi")]
    explained = feste.explain(nodes)
    feste.compute(nodes)

    assert (explained.calls, explained.requests, explained.at_least) == (102, 3, 3)
    assert [(r.operation, r.model, r.calls, r.requests) for r in explained.rows] == [
        ("fake.embed", "fake-1", 100, 2),
        ("fake.chat", "fake-1", 2, 1),
    ]
    assert len(llm.requests) == explained.requests


def test_answered_calls_cost_nothing_any_more() -> None:
    """After a run the same program is explained as what is left to do."""
    llm = FakeBackend()
    first = llm.chat("Hi")
    second = llm.chat(first)
    before = feste.explain(second)
    first.compute()
    after = feste.explain(second)

    assert (before.calls, after.calls, feste.explain(first).calls) == (2, 1, 0)


def test_models_have_rows_of_their_own() -> None:
    """A model of the call goes before the client's; clients apart are apart."""
    one, two = FakeBackend("one"), FakeBackend("two")
    nodes = [one.chat("a"), one.chat("a", FakeParams(model="three")), two.chat("a")]

    assert [r.model for r in feste.explain(nodes).rows] == ["one", "three", "two"]


@pytest.mark.parametrize(("limit", "requests", "at_least"), [(16, 22, 3), (5, 24, 8), (1, 40, 40)])
def test_the_lower_bound_of_a_chain_of_maps(limit: int, requests: int, at_least: int) -> None:
    """Calls in a row cannot share a request, those side by side can, up to the limit."""
    llm = FakeBackend(limits=Limits(max_items=limit))
    nodes = [llm.complete(told(llm.complete(str(i)))) for i in range(20)]
    explained = feste.explain(nodes)

    assert (explained.calls, explained.requests, explained.at_least) == (40, requests, at_least)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_a_bound(seed: int) -> None:
    """No run of a random graph needs fewer requests than explain's lower bound, nor more than planned."""
    rng = random.Random(seed)
    llm = FakeBackend(limits=Limits(max_items=rng.choice([None, 2, 5])))
    nodes: list[Any] = ["start"]
    for _ in range(rng.randrange(1, 40)):
        text = rng.choice(nodes)
        step = rng.choice([llm.complete, llm.chat, llm.embed, told])
        made = step(text)
        nodes.append(told(made) if step == llm.embed else made)
    explained = feste.explain(nodes)
    feste.compute(nodes)

    assert explained.at_least <= len(llm.requests) <= explained.requests


def test_json_holds_it_all() -> None:
    """Rows, passes with remarks, accounts: plain JSON with the schema's version."""
    llm, greedy = FakeBackend(), FakeParams(temperature=0)
    nodes = [llm.complete(ask(x=1), greedy) for _ in range(3)]
    explained = feste.explain(nodes)
    data = json.loads(json.dumps(explained.to_json()))

    assert data["schema"] == 1
    assert (data["calls"], data["requests"], data["at_least"]) == (1, 1, 1)
    assert data["nodes"]["before"] == 6
    assert {n.key: f"merged into {nodes[0].key}" for n in nodes[1:]}.items() <= data[
        "accounted"
    ].items()
    assert {p["name"]: (p["phase"], p["level"]) for p in data["passes"]}["cse"] == (
        "SIMPLIFY",
        "E1G",
    )
    assert set(data["operations"][0]) >= {"operation", "model", "calls", "requests", "at_least"}
    assert [r["kind"] for p in data["passes"] for r in p["remarks"]].count("applied") >= 2


def test_html_is_escaped() -> None:
    """Names from outside cannot become markup in a notebook."""
    llm = FakeBackend("<b>bold</b>")
    shown = feste.explain(llm.chat("Hi"))._repr_html_()

    assert "<b>" not in shown
    assert "&lt;b&gt;bold" in shown


def test_remarks_name_the_lines() -> None:
    """A remark says where the calls were written."""
    llm = FakeBackend()
    nodes = [llm.chat("Hi") for _ in range(2)]

    assert nodes[0]._node.where in str(feste.explain(nodes))


def test_optimize_off_is_said() -> None:
    """Without passes there is nothing to list, and explain says why."""
    llm = FakeBackend()
    explained = feste.explain([llm.embed("a"), llm.embed("a")], optimize=False)

    assert (explained.calls, explained.requests, explained.at_least) == (2, 2, 1)
    assert str(explained).endswith("PASSES  none (optimize is off)")


def test_a_plain_get_is_noted() -> None:
    """While a plain ``get`` runs, nothing is batched by the scheduler: explain says so."""
    llm = FakeBackend()

    assert feste.explain(llm.chat("Hi")).note == ""
    assert "a plain get function" in str(feste.explain(llm.chat("Hi"), scheduler=dask.get))


def test_plain_values_are_explained_too() -> None:
    """A program with explain runs unchanged in eager mode, where there are only values."""
    llm = FakeBackend()
    with context.set(eager=True):
        explained = feste.explain(llm.chat("Hi"), [1])

    assert (explained.calls, explained.requests, len(llm.requests)) == (0, 0, 1)
    assert str(explained).startswith("PLAN  0 nodes -> 0   0 calls -> 0 requests")


def test_explaining_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan can be looked at where there is no key; computing it is refused, with the line."""
    from feste.backend import Backend, Secret, operation

    class Paid(Backend):
        def __init__(self, api_key: Secret) -> None:
            self.key = api_key

        @operation
        async def chat(self, prompt: str) -> str:
            raise NotImplementedError

    monkeypatch.delenv("A_KEY_THAT_IS_NOT_SET", raising=False)
    node = Paid(Secret("A_KEY_THAT_IS_NOT_SET")).chat("Hi")

    assert feste.explain(node).calls == 1
    with pytest.raises(MissingKey, match="A_KEY_THAT_IS_NOT_SET") as caught:
        node.compute()
    assert caught.value.origin == node._node.where


def test_draws_of_an_explained_program_are_those_of_its_run() -> None:
    """Looking at a plan first changes no answer."""
    from feste.testing import fresh_draws

    def program() -> list[Any]:
        llm = FakeBackend()
        return [llm.chat("Hi") for _ in range(3)]

    fresh_draws()
    (plain,) = feste.compute(program())
    fresh_draws()
    nodes = program()
    feste.explain(nodes)
    (explained,) = feste.compute(nodes)

    assert explained == plain


def test_explain_after_a_failure() -> None:
    """What failed is still to be done; what was answered is not."""
    llm = FakeBackend(fail={"bad": feste.errors.InvalidRequest("no")})
    nodes = [llm.chat("good"), llm.chat("bad")]
    with pytest.raises(RunFailed):
        feste.compute(nodes)

    assert feste.explain(nodes).calls == 1


@pytest.mark.parametrize(
    ("count", "told"), [(1, "rendered 1 prompt of constants"), (2000, "rendered 2,000 prompts of")]
)
def test_remarks_of_passes_count_as_the_plan_does(count: int, told: str) -> None:
    """A noun in its number, and large numbers with commas, in remarks too."""
    llm = FakeBackend()

    assert told in str(feste.explain([llm.chat(ask(x=i)) for i in range(count)]))


def test_a_batch_counts_as_many_requests_as_its_limits_make_of_it() -> None:
    """Limits of tokens split a batch as limits of items do, where the texts are known."""
    llm = FakeBackend()
    rule = dataclasses.replace(llm.complete.operation.rule, max_tokens=100)
    tight: Any = type("Tight", (FakeBackend,), {"complete": copy.copy(FakeBackend.complete)})
    tight.complete.rule = rule
    nodes = [tight().complete(f"{i}" + "word " * 40) for i in range(8)]  # 51 tokens each

    assert feste.explain(nodes).requests == 8


def test_tasks_that_may_add_calls_are_named() -> None:
    """A plan cannot count the calls that a task returns: it says how many such tasks there are."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def agent(i: int) -> Any:
        return [llm.chat(str(k)) for k in range(50)]

    explained = feste.explain(agent(1), agent(2), llm.chat("a"))

    assert explained.growing == explained.to_json()["growing"] == 2
    assert "2 tasks may add calls while the graph runs" in str(explained)
    assert "may add calls" not in str(feste.explain(llm.chat("a")))
