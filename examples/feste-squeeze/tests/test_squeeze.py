"""The passes as a user meets them: named or not, explained, cut off; and what they never change."""

from __future__ import annotations

from typing import Any

import pytest
from feste_squeeze.text import squeezed
from hypothesis import given, settings
from hypothesis import strategies as st

import feste
from feste.graph import FesteGraph
from feste.optimization import Plan
from feste.prompt import ChatPrompt, Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws

settings.register_profile("busy", deadline=None)  # a busy machine fails no test
settings.load_profile("busy")

GREEDY = FakeParams(temperature=0)
ON = {"squeeze": True}

texts = st.text(st.sampled_from("ab \t\n\r"), min_size=1, max_size=30)
#: Programs: each step has a text, whether it is greedy, and maybe an earlier step whose answer it reads.
programs = st.lists(
    st.tuples(texts, st.booleans(), st.none() | st.integers(0, 9)), min_size=1, max_size=8
)


def built(llm: FakeBackend, program: list[tuple[str, bool, int | None]]) -> list[Any]:
    calls: list[Any] = []
    about = Prompt("{{ text }}\n{{ answer }}")
    for text, greedy, earlier in program:
        read = (
            about(text=text, answer=calls[earlier % len(calls)])
            if calls and earlier is not None
            else text
        )
        calls.append(llm.complete(read, GREEDY if greedy else FakeParams()))
    return calls


def said(plan: Plan, name: str) -> list[str]:
    [report] = [report for report in plan.passes if report.name == name]
    return [f"{remark.kind}: {remark.text}" for remark in report.remarks]


def asked(llm: FakeBackend) -> list[Any]:
    """The prompts that were sent, sorted, from whatever requests they shared."""
    bodies = [request.body for request in llm.requests]
    found = [body["messages"] if "messages" in body else body["prompt"] for body in bodies]
    parts = [p for one in found for p in (one if isinstance(one, list) else [one])]
    return sorted(part["content"] if isinstance(part, dict) else part for part in parts)


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a  \nb", "a\nb"),
        ("a\r\n\r\n\r\n\r\nb", "a\n\nb"),
        ("\n\na\n\n", "a"),
        ("def f():\n    return  1", "def f():\n    return  1"),
        ("  \n", "  \n"),
        ([{"role": "user", "content": [{"type": "text", "text": "a "}]}], None),
        ({"role": "user ", "content": "a"}, {"role": "user ", "content": "a"}),
        (7, 7),
    ],
)
def test_what_is_spare(given: Any, wanted: Any) -> None:
    """Ends of lines, both ends, blank lines beyond one; never indentation, nor all of a text."""
    wanted = (
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}] if wanted is None else wanted
    )

    assert squeezed(given) == wanted


@given(texts)
def test_twice_is_once_and_no_word_is_lost(text: str) -> None:
    """What is squeezed has nothing more to spare, and says the same."""
    once = squeezed(text)

    assert squeezed(once) is once
    assert once.split() == text.split()


# --- squeeze, of level E2 -------------------------------------------------------------------------


def test_it_runs_only_where_it_is_named() -> None:
    """Texts, messages and rendered prompts change; not what is made while the graph runs."""
    rendered = Prompt("Hi {{ x }}  ")
    chat = ChatPrompt("Be {{ x }}  ", "b ")
    sent = []
    for optimize in (True, ON):
        llm = FakeBackend()
        first = llm.complete("Ho  ")
        late = Prompt("Late {{ x }}  ")(x=first)
        feste.compute(
            first,
            llm.chat(rendered(x=1)),
            llm.chat(chat(x="brief")),
            llm.chat(late),
            optimize=optimize,
        )
        sent.append([text.replace(first.compute(), "ho") for text in asked(llm)])

    assert sent == [
        ["Be brief  ", "Hi 1  ", "Ho  ", "Late ho  ", "b "],
        ["Be brief", "Hi 1", "Ho", "Late ho  ", "b"],
    ]


@given(programs)
def test_the_answers_are_those_of_the_program_with_squeezed_texts(program: Any) -> None:
    """E2 promises no equal answers; so it is compared with the program that it stands for."""
    known = [(text, True, None) for text, _, _ in program]
    by_hand = [(squeezed(text), True, None) for text, _, _ in program]
    values = feste.compute(built(FakeBackend(), known), optimize=ON, strict=True)

    assert values == feste.compute(built(FakeBackend(), by_hand), optimize=False)


def test_the_users_own_prompt_stays() -> None:
    """A prompt that is asked for itself has the value that its author wrote, also after the run."""
    llm, prompt = FakeBackend(), Prompt("Hi {{ x }}  ")(x=1)
    text, _ = feste.compute(prompt, llm.chat(prompt), optimize=ON, keep="all")

    assert (text, prompt.compute()) == ("Hi 1  ", "Hi 1  ")
    assert asked(llm) == ["Hi 1"]


def test_equal_calls_are_found_afterwards() -> None:
    """What a rewrite makes equal is merged, since passes of SIMPLIFY run once more."""
    llm = FakeBackend()
    feste.compute([llm.complete(f"Hi{' ' * i}", GREEDY) for i in range(4)], optimize=ON)

    assert asked(llm) == ["Hi"]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_it_can_be_cut_off(most: int) -> None:
    """``max_rewrites`` counts calls."""
    llm = FakeBackend()
    calls = [llm.chat(f"{i} ") for i in range(3)]
    feste.compute(calls, optimize=ON, max_rewrites=most)

    assert [text.endswith(" ") for text in asked(llm)] == [False] * most + [True] * (3 - most)


def test_it_says_what_it_did_and_what_it_could_not() -> None:
    """One remark each."""
    llm = FakeBackend()
    first = llm.chat("Hi ")
    plan = feste.explain(llm.chat(Prompt("{{ x }}  ")(x=first)), optimize=ON).plan

    assert said(plan, "squeeze") == [
        "missed: texts that are made while it runs stay as they are",
        "applied: squeezed the prompts of 1 calls",
    ]


# --- blanks, of level E0 --------------------------------------------------------------------------


@given(programs)
def test_a_graph_and_its_answers_stay(program: Any) -> None:
    """E0: with the pass and without, each program has the same answers, draw by draw."""
    found = []
    for optimize in ({"blanks": True}, {"blanks": False}, False):
        fresh_draws()
        calls = built(FakeBackend(), program)
        found.append(feste.compute(calls, optimize=optimize, strict=True))

    assert found[0] == found[1] == found[2]


def test_it_advises_what_squeeze_would_save() -> None:
    """The tokens of the requests with and without; those of equal draws are counted once."""
    llm = FakeBackend()
    calls = [llm.chat("word" + " " * 396) for _ in range(8)]
    advice = said(feste.explain(calls).plan, "blanks")
    alone = feste.explain(calls, optimize={"sample_fusion": False})

    assert advice == [
        "advice: ~99 of ~102 tokens are spare white space: optimize={'squeeze': True} leaves it out"
    ]
    assert "~792 of ~816 tokens" in " ".join(said(alone.plan, "blanks"))
    assert said(feste.explain(calls, optimize=ON).plan, "blanks") == []


@pytest.mark.parametrize(("worth", "count"), [(0.2, 1), (0.5, 0)])
def test_it_is_silent_about_little(worth: float, count: int) -> None:
    """The plugin's setting says how much is worth a remark."""
    call = FakeBackend().complete("a" * 300 + " " * 100)
    with feste.context.set(squeeze_worth=worth):
        plan = feste.explain(call).plan

    assert len(said(plan, "blanks")) == count


def test_a_graph_is_not_changed_in_place() -> None:
    """The graph that was given to the optimizer is the one that it was."""
    llm = FakeBackend()
    call = llm.chat(Prompt("Hi {{ x }}  ")(x=1))
    graph, _, _ = FesteGraph.collect(call)
    nodes = dict(graph.nodes)
    feste.optimization.Optimizer().run(graph, feste.context.settings(optimize=ON))

    assert graph.nodes == nodes
