"""Explain: the plan in words and numbers, before anything is sent."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dask
import pytest

import feste
from feste import context
from feste.backend import Latency, Limits, Price, Profile, PromptCache
from feste.errors import ConfigError, MissingKey, RunFailed
from feste.graph import FesteGraph
from feste.node import PENDING
from feste.optimization import Optimizer, PassContext
from feste.prompt import FesteEnvironment, Prompt
from feste.report import Explanation, Range, RunReport
from feste.testing import FakeBackend, FakeParams, fresh_draws, random_graph


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


def lines_of(explained: Explanation) -> list[str]:
    """The lines of the text, with the lines of this file as ``here``, without numbers of rewrites."""
    text = re.sub(r" \(rewrites? [^)]*\) +", "  ", str(explained))
    text = re.sub(r"(test_explain\.py:\d+) +(?=[^\s-])", r"\1  ", text)  # digits make no difference
    return re.sub(r"[^\s(]*test_explain\.py:\d+", "here", text).splitlines()


class Known(FakeBackend):
    """A backend whose latency and prices are known."""

    def profile(self, model: str) -> Profile:
        return KNOWN


KNOWN = Profile(latency=Latency(base=0.5), price=Price(input=1.0, output=10.0))


def test_the_text_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten nodes each thing that the program does is a line, and nothing is left out."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(Path(__file__).parent)
    llm = Known("m-1")
    params = FakeParams(max_tokens=10)
    answers = [llm.complete(ask(x=str(i) * 14), params) for i in range(3)]
    report = llm.chat(Prompt("{{ x }}")(x=told(answers)))
    lines = lines_of(feste.explain(report, llm.chat("Hi"), FakeBackend("m-2").chat("Hi")))

    assert lines[-1].startswith("  nothing to do: cull, ")
    at = lines.index("PASSES")
    assert lines[:at] == [
        "PLAN  11 nodes -> 11   6 calls -> 4 requests (at least 4)   2 requests deep",
        "      at least $0.0053 (low $0.000072, worst unknown: chat has no bound), 1 call of unknown price",
        "  1 of 6 prompts is made while it runs: its tokens are estimates",
        "  operation       model  calls  requests  tokens in      tokens out   dollars",
        "  known.complete  m-1        3         1        ~18       ~15 <= 30  $0.00017",
        "  known.chat      m-1        2         2        ~19  ~512, no bound   $0.0051",
        "  fake.chat       m-2        1         1         ~2  ~256, no bound   unknown",
        "GRAPH",
        "  chat m-1                            1  here",
        "  └─ prompt '{{ x }}'                 1  here",
        "     └─ told                          1  here",
        "        └─ complete m-1               3  here  in 1 request",
        "           └─ prompt 'About {{ x }}'  3  here  rendered before the run",
        "  chat m-1                            1  here",
        "  chat m-2                            1  here",
        "CRITICAL PATH  2 requests deep: complete (here) -> chat (here)",
    ]
    assert " ".join(" ".join(lines[at:-1]).split()) == (
        "PASSES fold rendered 3 prompts of constants here "
        "batch 3 calls of complete share requests, up to 16 in each here "
        "critical_path ranked by the latency of 5 calls"
    )


def test_the_text_of_a_large_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty thousand nodes are a screenful, with the same figures."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(Path(__file__).parent)
    llm = Known("m-1")
    nodes = [llm.chat(ask(x=told(llm.chat(ask(x=i))))) for i in range(6_000)]
    explained = feste.explain(nodes)
    lines = lines_of(explained)

    assert len(lines) < 25
    assert (
        lines[0]
        == "PLAN  30,000 nodes -> 30,000   12,000 calls -> 12,000 requests (at least 12,000)   ~14.1 s"
    )
    assert lines[lines.index("GRAPH") + 1 :][:5] == [
        "  chat m-1                            6,000  here",
        "  └─ prompt 'About {{ x }}'           6,000  here",
        "     └─ told                          6,000  here",
        "        └─ chat m-1                   6,000  here",
        "           └─ prompt 'About {{ x }}'  6,000  here  rendered before the run",
    ]


def test_a_loop_is_a_few_rows() -> None:
    """A chain of a thousand calls, written as a loop, is explained by its lines."""
    llm = FakeBackend()
    node = llm.chat("start")
    for _ in range(1_000):
        node = llm.chat(ask(x=node))
    explained = feste.explain(node)
    lines = lines_of(explained)

    assert explained.depth == 1_001
    assert sum("see (" in line for line in lines) == 1
    assert "1,001 requests deep: chat (here) -> chat (here) x 1,000" in " ".join(
        "\n".join(lines).split()
    )
    assert len(lines) < 20
    assert explained.to_mermaid().count("-->") == 3  # the loop itself is not drawn


def test_shared_parts_are_printed_once() -> None:
    """What two results need stands under the first, and the second refers to it."""
    llm = FakeBackend()
    shared = llm.chat("a")
    lines = lines_of(feste.explain(told(shared), llm.complete(shared)))
    graph = lines[lines.index("GRAPH") + 1 : lines.index("GRAPH") + 5]

    assert [re.sub("  +", "  ", line) for line in graph] == [
        "  told  1  here",
        "  └─ (2) chat fake-1  1  here",
        "  complete fake-1  1  here",
        "  └─ see (2): chat",
    ]


def test_the_same_line_in_two_roles_is_two_rows() -> None:
    """A helper that is called twice: what feeds what can be seen."""
    llm = FakeBackend()

    def helper(text: Any) -> Any:
        return llm.chat(ask(x=text))

    tree = feste.explain(told(helper([helper(told(i)) for i in range(5)]))).tree

    assert [(row.name, row.nodes) for row in tree.rows] == [
        ("told", 1),
        ("chat", 1),
        ("prompt", 1),
        ("chat", 5),
        ("prompt", 5),
        ("told", 5),
    ]


def test_a_long_program_stays_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty calls in a row, each with a line of its own: all are named, none is out of sight."""
    monkeypatch.setenv("COLUMNS", "100")
    made: dict[str, Any] = {"llm": FakeBackend(), "x0": "a"}
    lines = "\n".join(f"x{i + 1} = llm.chat(x{i})" for i in range(30))
    exec(compile(lines, "made.py", "exec"), made)
    explained = feste.explain(made["x30"], made["x20"])
    graph = [line for line in lines_of(explained) if "made.py:" in line and "chat fake-1" in line]

    assert [line.split()[-1] for line in graph] == [f"made.py:{i}" for i in range(30, 0, -1)]
    assert "+" not in graph[9]
    assert [re.search(r"\+\S+ levels?: .*chat", line) is not None for line in graph[10:]] == [
        True
    ] * 20
    assert "─ +20 levels: chat" in graph[29]
    assert "+20 levels: <b>chat</b>" in explained._repr_html_()
    assert max(map(len, lines_of(explained))) <= 100
    ElementTree.fromstring(explained._repr_html_())


def test_a_tree_of_many_rows_is_cut() -> None:
    """Sixty lines at most; how many rows are left out is said."""
    llm = FakeBackend()
    nodes = [llm.chat(Prompt(f"{i} {{{{ x }}}}")(x=llm.chat(str(i)))) for i in range(200)]
    for i in range(100):  # lines of their own
        made: dict[str, Any] = {"llm": llm}
        exec(compile("\n" * i + "node = llm.chat('x')", "made.py", "exec"), made)
        nodes.append(made["node"])
    lines = lines_of(feste.explain(nodes))
    graph = lines[lines.index("GRAPH") + 1 : lines.index("PASSES")]

    assert sum("made.py" in line for line in graph) == 57
    assert "  ... and 43 rows more" in graph


def test_batches_of_remarks_are_summarized() -> None:
    """Remarks that differ in numbers only are one line; many kinds of them are cut."""

    class Talkative:
        name = "talkative"

        def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
            for i in range(50):
                cx.applied(f"{i} is a number", list(graph.nodes.values())[:2])
            for letter in "abcdefghij":
                cx.missed(f"{letter} is a letter")
            return graph

    graph, _, _ = FesteGraph.collect([FakeBackend().chat(str(i)) for i in range(2)])
    lines = lines_of(Explanation(Optimizer([Talkative()]).run(graph)))

    assert lines[-8:] == [
        "PASSES",
        "  talkative  0 is a number (and 49 alike, 100 nodes)  here",
        *(f"             missed: {letter} is a letter" for letter in "abcde"),
        "             ... and 5 further remarks",
    ]


def test_rewrites_are_numbered_as_max_rewrites_counts_them() -> None:
    """Each pass names its rewrites, so that one that does harm can be found by halving."""
    llm, greedy = FakeBackend(), FakeParams(temperature=0)
    nodes = [llm.complete(ask(x=i // 2), greedy) for i in range(8)]
    explained = feste.explain(nodes)
    passes = {row.name: row for row in explained.passes}
    numbers = [n for row in explained.passes for a, b in row.numbers for n in range(a, b + 1)]

    assert sorted(numbers) == list(range(1, explained.plan.rewrites + 1))
    ((first, last),) = passes["cse"].numbers
    assert f"(rewrites {first}-{last})" in " ".join(str(explained).split())
    assert last - first == 3
    for most, merged in [(first - 1, 0), (first, 1), (last - 1, 3), (last, 4)]:
        assert len(feste.explain(nodes, max_rewrites=most).plan.accounted) == merged


def test_advice_stands_by_itself() -> None:
    """With the lines that it is about, and the pass that gave it."""

    class Adviser:
        name = "adviser"

        def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
            cx.advice("put the date last", graph.calls())
            return graph

    graph, _, _ = FesteGraph.collect(FakeBackend().chat("Hi"))
    lines = lines_of(Explanation(Optimizer([Adviser()]).run(graph)))

    assert lines[-4:] == [
        "PASSES",
        "  adviser  1 remark under ADVICE",
        "ADVICE",
        "  here  put the date last (adviser)",
    ]


def test_what_the_text_escapes() -> None:
    """A name cannot move the cursor of a terminal."""
    assert "\x1b" not in str(feste.explain(FakeBackend("m\x1b[2J").chat("Hi")))


def test_a_line_end_in_the_name_of_a_model_moves_no_column() -> None:
    """It is escaped before the columns are set."""
    lines = str(feste.explain(FakeBackend("a\nb").chat("Hi"))).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  operation"))

    assert lines[at].index("calls") + 4 == lines[at + 1].index("1  ")
    lines = str(feste.explain(FakeBackend("a\nb").chat("Hi"), FakeBackend("abcd").chat("Ho")))
    at = [x.index("  1  ") for x in lines.splitlines() if x.startswith("  chat a")]
    assert len(at) == 2 and at[0] == at[1]


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

    assert max(map(len, lines)) <= 80
    assert any("test_explain.py:" in line for line in lines[lines.index("ADVICE") :])
    assert any("nothing to do: another-pass-with-a-long-name" in line for line in lines)


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
    assert before.input_tokens[:2] == (report.operations[0].input_tokens,) * 2


def test_a_call_that_cannot_be_prepared_is_explained_too() -> None:
    """A plan can be looked at where a call is wrong: the run will say so, in its place."""
    wrong: Any = [{"role": "user", "content": float("nan")}]
    explained = feste.explain(FakeBackend().chat(wrong))

    assert (explained.calls, explained.failing) == (1, 1)
    assert explained.input_tokens == explained.output_tokens == Range.of(None)
    told = " ".join(str(explained).split())
    assert (
        "1 call cannot be prepared and will fail: messages[0]['content'] is nan, which JSON" in told
    )
    assert re.search(r"fake\.chat fake-1 1 1 unknown unknown GRAPH", told)
    assert any(line.endswith("here  will fail") for line in lines_of(explained))


def test_figures_are_those_of_the_calls_that_can_be_prepared() -> None:
    """One that fails reads and generates nothing; JSON says how many they are, and why."""
    llm, params = Known("m"), FakeParams(max_tokens=8)
    wrong: Any = [{"role": "user", "content": float("nan")}]
    sound = feste.explain(llm.chat("some words", params))
    mixed = feste.explain(llm.chat("some words", params), llm.chat(wrong, params))

    for figure in ("input_tokens", "output_tokens", "dollars"):
        assert getattr(mixed, figure) == getattr(sound, figure)
    (row,) = mixed.to_json()["operations"]
    assert (row["failing"], mixed.to_json()["failing"], mixed.calls) == (1, 1, 2)
    assert (
        row["error"].startswith("messages[0]['content'] is nan")
        and "test_explain.py:" in row["error"]
    )
    both = feste.explain(llm.complete(wrong), llm.chat("some words", params))
    assert (len(both.rows), both.input_tokens) == (2, sound.input_tokens)


@pytest.mark.parametrize("optimize", [True, False])
def test_a_prompt_that_cannot_be_rendered_is_not_made_while_it_runs(optimize: bool) -> None:
    """It fails, as does one that is made of it; one that waits for an answer may be right."""
    llm, share = FakeBackend(), Prompt("{{ 6 / x }}")
    wrong = [share(x=0), ask(x=share(x=0)), share(x=told("0"))]
    explained = feste.explain([llm.chat(prompt) for prompt in wrong], optimize=optimize)

    assert explained.failing == 2
    assert "2 calls cannot be prepared and will fail, the first: template" in str(explained)
    assert "1 of 3 prompts is made while it runs" in str(explained)


def test_explaining_calls_no_impure_function() -> None:
    """Whether a prompt that uses one can be rendered is known in the run only."""
    made, noted = FesteEnvironment(), []
    made.globals["note"] = lambda: noted.append(1) or 1 / 0
    made.impure.add("note")
    explained = feste.explain(FakeBackend().chat(Prompt("{{ note() }}", environment=made)()))

    assert (noted, explained.failing) == ([], 0)


def test_what_a_pass_says_in_each_round_is_told_once() -> None:
    """Merging equal nodes leaves fewer prompts that fail: those are the ones that count."""
    llm, share = FakeBackend(), Prompt("{{ 6 / x }}")
    nodes = [llm.complete(share(x=0)) for _ in range(3)]
    explained = feste.explain(nodes, llm.complete(ask(x=ask(x=1))))
    (fold,) = (row for row in explained.passes if row.name == "fold")

    assert str(explained).count("cannot be rendered") == 1
    assert sorted((r.kind, r.alike) for r in fold.remarks) == [("applied", 0), ("missed", 0)]


def test_what_a_pass_does_in_each_round_is_told() -> None:
    """What it did adds up; what it did not do is what is left at last."""

    class Stepwise:
        name = "stepwise"
        left = 3

        def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
            cx.missed(f"{self.left} steps are left")
            if not self.left:
                return graph
            cx.applied(f"made step {self.left}")
            self.left -= 1
            return graph.replace()

    graph, _, _ = FesteGraph.collect(FakeBackend().chat("Hi"))
    (row,) = Explanation(Optimizer([Stepwise()]).run(graph)).passes

    assert [(r.text, r.alike) for r in row.remarks] == [
        ("made step 3", 2),
        ("0 steps are left", 0),
    ]


def test_what_has_no_bound_is_named() -> None:
    """An operation without a bound of its answers, or a task whose text may be any."""
    llm, bound = Known("m"), FakeParams(max_tokens=8)

    for node, names in [
        (llm.chat("a"), ["chat"]),
        (llm.chat(ask(x=told(1)), bound), ["told"]),
        (llm.chat(ask(x=llm.complete("a", bound)), bound), []),
        (FakeBackend().chat("a"), []),
        (llm.chat(ask(x=FakeBackend().complete("a")), bound), ["complete"]),
        (llm.chat(ask(x=[told(1), llm.complete("a", bound)]), bound), ["told"]),
    ]:
        explained = feste.explain(node)
        assert explained.unbounded == explained.to_json()["unbounded"] == names
        assert ("worst unknown" in str(explained)) is bool(names)
    some = feste.explain(llm.chat("a"), llm.complete("a"), llm.chat(ask(x=told(1)), bound))
    assert "worst unknown: chat, complete and 1 more have no bound" in " ".join(str(some).split())


def test_an_unknown_price_has_a_remedy() -> None:
    """Where no price at all is known."""
    assert 'pip install "feste-core[prices]"' in str(feste.explain(FakeBackend().chat("a")))
    assert "pip install" not in str(feste.explain(Known("m").chat("a"), FakeBackend().chat("a")))
    assert "pip install" not in str(feste.explain(told(1)))


@pytest.mark.parametrize(
    ("texts", "remark"),
    [
        ([told("a")], "the prompt is made while it runs: its tokens are estimates"),
        ([told("a"), "b"], "1 of 2 prompts is made while it runs: its tokens are estimates"),
        ([told("a"), told("b")], "2 of 2 prompts are made while it runs: their tokens are"),
    ],
)
def test_what_is_made_while_it_runs_is_counted(texts: list[Any], remark: str) -> None:
    """In the right number; what is embedded is an input, and no prompt."""
    llm = FakeBackend()

    assert remark in str(feste.explain([llm.chat(text) for text in texts]))
    embedded = str(feste.explain([llm.embed(text) for text in texts]))
    assert remark.replace("prompt", "input") in embedded


def test_waiting_for_a_prefix_takes_time() -> None:
    """The objective decides between money and time, and the plan shows both."""
    cache = PromptCache(minimum=1, lag=1.5)
    about = Profile(latency=Latency(base=1.0), price=Price(input=1.0), prompt_cache=cache)
    llm = FakeBackend("m", profile=about)
    nodes = [llm.chat("word " * 400 + str(i)) for i in range(8)]
    balanced, hasty = (feste.explain(nodes, objective=o) for o in ("balanced", "latency"))
    text = " ".join(str(balanced).split())

    assert (balanced.path_seconds.likely, hasty.path_seconds.likely) == (3.5, 1.0)
    assert balanced.dollars.likely < hasty.dollars.likely  # type: ignore[operator]
    assert "~3.5 s" in str(balanced).splitlines()[0] and "~1 s" in str(hasty).splitlines()[0]
    assert (
        "the others wait ~2.5 s for it" in text and "wait" not in str(hasty).partition("do not")[0]
    )
    assert re.search(
        r"PATH 2 requests deep, ~3\.5 s: chat \S+ -> wait for the prompt cache -> chat", text
    )
    assert [hop["seconds"] for hop in balanced.to_json()["critical_path"]["hops"]] == [1, 1.5, 1]


def test_calls_that_can_wait_are_told() -> None:
    """Beside the row, where the times are known: what may be late without delaying the run."""
    llm = Known("m-1")
    chain = llm.chat(told(llm.chat(told(llm.chat("a")))))
    side = llm.complete(ask(x=told("b")))

    assert any(
        "complete m-1" in x and "can wait 1 s" in x for x in lines_of(feste.explain(chain, side))
    )
    assert str(feste.explain(chain, side)).count("can wait") == 1
    assert "can wait" not in str(feste.explain(chain, side, FakeBackend().chat("c")))


def test_rewrites_stand_by_the_name_of_their_pass() -> None:
    """Its remarks come after."""
    nodes = [FakeBackend().complete(ask(x=i)) for i in range(3)]
    text = str(feste.explain(nodes))

    assert re.search(r"^  fold \(rewrites 1-3\)  rendered 3 prompts", text, re.MULTILINE)
    assert re.search(r"^  batch \(rewrite 4\)    3 calls of complete", text, re.MULTILINE)


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


def numbers_in(data: Any) -> set[float]:
    """All numbers of plain JSON, those inside its texts too, rounded as the text rounds them."""
    if isinstance(data, dict):
        return set().union(*(numbers_in(part) for part in (*data, *data.values())))
    if isinstance(data, list):
        return set().union(*map(numbers_in, data))
    if isinstance(data, str):
        return numbers_of(data)
    return set() if data is None or isinstance(data, bool) else {float(data)}


def numbers_of(text: str) -> set[float]:
    return {float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


def test_json_holds_it_all() -> None:
    """Every number of the text, rows, passes with remarks, accounts: plain JSON with its version."""
    llm, greedy = Known("m"), FakeParams(temperature=0)
    nodes = [llm.complete(ask(x=1), greedy) for _ in range(3)]
    more = [llm.complete(ask(x=told(n)), FakeParams(max_tokens=7)) for n in nodes]
    explained = feste.explain(nodes, more, FakeBackend().chat("Hi"), [told(n) for n in more])
    data = json.loads(json.dumps(explained.to_json()))

    assert data["schema"] == 2
    assert (data["calls"], data["requests"], data["at_least"]) == (5, 3, 3)
    assert data["nodes"] == {"before": 19, "after": len(explained.plan.graph.nodes)}
    assert {n.key: f"merged into {nodes[0].key}" for n in nodes[1:]}.items() <= data[
        "accounted"
    ].items()
    assert {p["name"]: (p["phase"], p["level"]) for p in data["passes"]}["cse"] == (
        "SIMPLIFY",
        "E1G",
    )
    assert [r["kind"] for p in data["passes"] for r in p["remarks"]].count("applied") >= 2
    known = numbers_in(data)
    later = sum(row["unknown"] for row in data["operations"])
    for number in numbers_of(str(explained)) - {float(later)}:
        digits = [float(f"{n:.2g}") for n in known] + [round(n) for n in known]
        assert number in known or number in digits, number


def test_html_is_whole_and_escaped() -> None:
    """Well-formed, without scripts or anything from outside; names cannot become markup."""
    llm = FakeBackend("<b>bold</b>")
    node = llm.chat(Prompt("<i>{{ x }}</i>")(x=told([llm.chat("Hi"), llm.chat("Ho")])))
    explained = feste.explain(node, told(node))
    shown = explained._repr_html_()
    parsed = ElementTree.fromstring(shown)

    assert parsed.find(".//b/b") is None and parsed.find(".//i") is None
    assert "<b>bold</b>" in "".join(parsed.itertext())
    assert len(parsed.findall(".//details")) > 3
    assert not re.search(r"<script|src=|href=|url\(|#[0-9a-f]{3}", shown)
    assert [e.text for e in parsed.findall(".//th")][:3] == ["operation", "model", "calls"]


@pytest.mark.parametrize(
    ("ending", "start"),
    [(".txt", "PLAN  "), (".json", "{"), (".html", "<!doctype html>"), (".mmd", "flowchart")],
)
def test_it_is_saved_by_its_ending(tmp_path: Path, ending: str, start: str) -> None:
    """As text, JSON, a page or a chart; another ending is refused."""
    explained = feste.explain(FakeBackend().chat("Hi"))
    explained.save(tmp_path / f"plan{ending}")

    assert (tmp_path / f"plan{ending}").read_text().startswith(start)
    with pytest.raises(ConfigError, match=r"use \.txt, \.json, \.html or \.mmd"):
        explained.save(tmp_path / "plan.png")


def test_the_chart_has_the_rows_with_their_counts() -> None:
    """As many boxes as rows, whatever the size."""
    llm = FakeBackend()
    chart = feste.explain(llm.chat(told([llm.chat(str(i)) for i in range(1_000)]))).to_mermaid()

    assert chart.count(":::") == 3
    assert "chat × 1#44;000" in chart or "chat × 1,000" in chart
    assert chart.count("-->") == 2


def test_remarks_name_the_lines() -> None:
    """A remark says where the calls were written."""
    llm = FakeBackend()
    nodes = [llm.chat("Hi") for _ in range(2)]

    line = nodes[0]._node.where.rpartition(":")[2]
    assert f"test_explain.py:{line}" in str(feste.explain(nodes))


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


# --- what happened ----------------------------------------------------------------------------------


def report_of(*args: Any, **settings: Any) -> RunReport:
    with contextlib.suppress(RunFailed):
        feste.compute(*args, **settings)
    report = feste.last_report()
    assert report is not None
    return report


def test_a_run_is_explained_beside_its_plan() -> None:
    """The plan is the one of before the run, and each figure has what happened beside it."""
    llm = Known("m-1")
    answers = [llm.complete(ask(x=i), FakeParams(max_tokens=8)) for i in range(20)]
    node = llm.chat(told(answers), FakeParams(max_tokens=8))
    before = feste.explain(node)
    report = report_of(node)
    after = feste.explain(node, analyze=report)

    assert feste.explain(node).calls == 0
    assert [row.to_json() for row in after.rows] == [row.to_json() for row in before.rows]
    actual = after.actual
    assert actual is not None
    assert (actual.calls, actual.requests, actual.sizes) == (21, 3, {10: 2, 1: 1})
    assert actual.dollars == report.dollars == pytest.approx(dollars_of(llm))
    rows = [line.split() for line in lines_of(after)]
    ran = [row for row in rows if row[:2] == ["it", "ran"]]
    assert [row[2:4] for row in ran] == [["20", "2"], ["1", "1"]]
    assert json.loads(json.dumps(after.to_json()))["run"]["sizes"] == {"10": 2, "1": 1}
    known = numbers_in(json.loads(json.dumps(after.to_json())))
    for number in numbers_of("\n".join(line for line in lines_of(after) if "it ran" in line)):
        assert number in known or number in [float(f"{n:.2g}") for n in known], number
    ElementTree.fromstring(after._repr_html_())
    assert "it ran" in after._repr_html_()


def dollars_of(llm: FakeBackend) -> float:
    assert KNOWN.price is not None
    answers = [llm.answer(request) for request in llm.requests]
    return sum(KNOWN.price.dollars(a.usage.input, a.usage.output) for a in answers if a.usage)


def test_only_what_the_run_did_is_analyzed() -> None:
    """An answer that was there before the run is none of its work."""
    llm = FakeBackend()
    first = llm.chat("a")
    first.compute()
    report = report_of(node := llm.chat(first))

    assert feste.explain(node, analyze=report).calls == 1


def test_failures_and_further_attempts_are_told() -> None:
    """A request that failed and was sent again is two requests, and the plan had one."""
    llm = FakeBackend(fail={"bad": feste.errors.InvalidRequest("no")})
    nodes = [llm.complete(x) for x in ("good", "bad", "also good")]
    explained = feste.explain(nodes, analyze=report_of(nodes))
    text = " ".join(str(explained).split())

    assert explained.actual is not None and explained.actual.failed > 1
    assert "requests failed" in text
    assert f"off: fake.complete fake-1: {len(llm.requests)} requests, 1 planned" in text
    assert "nodes besides those done: 1 failed" in text


def test_answers_from_a_store_are_told(tmp_path: Path) -> None:
    """What was replayed was not bought: the plan counts it, the run does not."""

    def program() -> Any:
        fresh_draws()
        return [FakeBackend().chat(str(i)) for i in range(4)]

    report_of(program()[:3], store=str(tmp_path / "runs.db"))
    nodes = program()
    explained = feste.explain(nodes, analyze=report_of(nodes, store=str(tmp_path / "runs.db")))

    assert (explained.calls, explained.actual.requests if explained.actual else 0) == (4, 1)
    assert "nodes besides those done: 3 replayed" in str(explained)


def test_estimates_that_were_off_are_named() -> None:
    """What was far from likely, or not possible at all."""
    llm = FakeBackend("m", profile=Profile(latency=Latency(base=100.0)))
    node = llm.chat("Hi")
    explained = feste.explain(node, analyze=report_of(node))

    assert explained.actual is not None
    assert explained.actual.off[0] == "fake.chat m: tokens out: 4, 256 estimated"
    assert explained.actual.off[1].startswith("seconds: ")


def test_calls_that_a_task_returned_were_not_planned() -> None:
    """They have a row of their own, and the run says so."""
    llm = FakeBackend("m")

    @feste.task(emits=True)
    def agent() -> Any:
        return [llm.chat(str(k)) for k in range(3)]

    node = agent()
    explained = feste.explain(node, analyze=report_of(node))

    assert explained.calls == 0
    assert "off: fake.chat m: 3 requests, none planned" in str(explained)


@pytest.mark.parametrize("wrong", ["a report", True, {}, 0])
def test_only_a_report_can_be_analyzed(wrong: Any) -> None:
    """Anything else is refused, with what to give."""
    with pytest.raises(ConfigError, match=r"feste\.last_report\(\)"):
        feste.explain(FakeBackend().chat("Hi"), analyze=wrong)


def test_a_report_of_other_nodes_is_refused() -> None:
    """A program that was built anew has other nodes than the one that ran."""
    report = report_of(FakeBackend().chat("Hi"))

    with pytest.raises(ConfigError, match="a run of other nodes"):
        feste.explain(FakeBackend().chat("Hi"), analyze=report)
    with pytest.raises(ConfigError, match="a run of other nodes"):
        feste.explain(analyze=report)


def test_tokens_are_off_by_more_than_a_quarter() -> None:
    """They are counted by a rule of thumb: a text of other words has more or fewer."""

    class Counting(FakeBackend):
        def answer(self, request: Any) -> Any:
            answer = super().answer(request)
            usage = dataclasses.replace(answer.usage, input=self.read, output=8)
            return dataclasses.replace(answer, usage=usage)

    for read, is_off in [(102, False), (77, False), (76, True), (127, False), (128, True)]:
        llm = Counting("m")
        llm.read = read
        node = llm.chat("four" * 100, FakeParams(max_tokens=8))
        actual = feste.explain(node, analyze=report_of(node)).actual
        assert actual is not None
        assert (actual.off != []) is is_off, (read, actual.off)
    late = llm.chat(ask(x=llm.complete("a", FakeParams(max_tokens=1_000))))
    after = feste.explain(late, analyze=report_of(late))
    assert after.rows[1].input_tokens.likely == pytest.approx(503, abs=2)  # four times as many
    assert "chat m: tokens in" not in str(after)


def test_values_of_eager_mode_can_be_analyzed() -> None:
    """A program with analyze runs unchanged where there are only values."""
    report = report_of(FakeBackend().chat("Hi"))

    assert feste.explain("a value", analyze=report).calls == 0


def test_a_plan_stays_as_it_was_made() -> None:
    """Printed after the run, it tells the same as before."""
    llm = FakeBackend()
    node = llm.chat(ask(x=llm.chat("Hi")))
    early, late = feste.explain(node), feste.explain(node)
    before = str(early)
    node.compute()

    assert str(late) == before
    assert "CRITICAL PATH  2 requests deep" in before


def test_a_bound_that_is_not_known_yet() -> None:
    """A limit of tokens that another node gives is no bound before the run."""

    @feste.task(pure=True)
    def most() -> int:
        return 5

    explained = feste.explain(FakeBackend().complete("a", FakeParams(max_tokens=most())))

    assert explained.output_tokens.worst is None
    assert "tokens out" in str(explained)


@pytest.mark.parametrize("seed", range(60))
def test_any_program_can_be_explained(seed: int) -> None:
    """Whatever a program is made of, its plan has words, numbers and pictures."""
    explained = feste.explain(random_graph(seed).wanted)

    assert str(explained) and explained.to_json() and explained.to_mermaid()
    assert explained.requests >= explained.at_least
