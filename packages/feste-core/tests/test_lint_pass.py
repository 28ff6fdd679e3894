"""Advice on programs: what could be changed to gain more, and where it stands."""

from __future__ import annotations

from typing import Any

import pytest

import feste
from feste.backend import Limits, Profile, PromptCache
from feste.context import settings
from feste.graph import FesteGraph
from feste.optimization import Optimizer, Remark
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams


@feste.task
def strip(text: str) -> str:
    return text.strip()


def advice(*nodes: Any) -> list[Remark]:
    """What the pass says of some nodes, behind the passes that run before it."""
    graph = FesteGraph.collect(*nodes)[0]
    plan = Optimizer().run(graph, settings(strict=True))
    (report,) = (p for p in plan.passes if p.name == "lint")
    assert not report.changed
    assert all(r.kind == "advice" for r in report.remarks)
    return report.remarks


def line(remark: Remark) -> list[int]:
    return [int(origin.rpartition(":")[2]) for origin in remark.origins]


def here() -> int:
    import sys

    return sys._getframe(1).f_lineno


llm = FakeBackend()


# --- constants behind what changes ----------------------------------------------------------------------

EXAMPLES = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}"} for i in range(300)]
late = Prompt(
    "Today is {{ today }}.{% for e in examples %}\nQ: {{ e.question }} A: {{ e.answer }}{% endfor %}\n"
    "Q: {{ question }}"
)


def test_a_changing_part_before_a_long_constant_one() -> None:
    """The advice names the variable, how much it keeps from the cache, and where."""
    nodes = [
        llm.chat(late(today=str(day), examples=EXAMPLES, question=f"{day}?")) for day in range(9)
    ]
    (remark,) = advice(nodes)

    assert remark.text == (
        "'today' changes from prompt to prompt and stands before ~2,107 tokens that 9 prompts share: "
        "with these first, a prompt cache could serve them"
    )
    assert line(remark) == [here() - 8]


def test_a_changing_part_that_is_not_known_yet() -> None:
    """An answer that is still to come changes, too."""
    days = [llm.chat(f"day {i}?") for i in range(3)]
    (remark,) = advice([llm.chat(late(today=d, examples=EXAMPLES, question="q")) for d in days])

    assert remark.text.startswith("'today' changes from prompt to prompt")


def test_prompts_that_begin_alike_need_no_advice() -> None:
    """One day for all, one prompt only, or few examples: nothing to gain."""
    same = [late(today="Monday", examples=EXAMPLES, question=f"{i}?") for i in range(5)]
    once = Prompt("Now {{ now }}." + "long " * 5000)(now="a")
    few = [late(today=str(i), examples=EXAMPLES[:3], question="q") for i in range(5)]

    assert advice([llm.chat(prompt) for prompt in (*same, once, *few)]) == []


def test_only_what_a_prompt_cache_could_read() -> None:
    """Completions and tools read no prompt cache; a cache that takes only longer ones does not help."""
    prompts = [late(today=str(i), examples=EXAMPLES, question="q") for i in range(5)]
    narrow = FakeBackend(profile=Profile(prompt_cache=PromptCache(minimum=4096)))
    wide = FakeBackend(profile=Profile(prompt_cache=PromptCache(minimum=2048)))

    assert advice([llm.complete(p) for p in prompts], [strip(p) for p in prompts]) == []
    assert advice([narrow.chat(p) for p in prompts]) == []
    assert len(advice([wide.chat(p) for p in prompts])) == 1


def test_one_template_written_many_times() -> None:
    """A prompt made anew in each turn of a loop is the same template."""
    source = "{{ day }}" + "long " * 2000
    (remark,) = advice([llm.chat(Prompt(source)(day=str(i))) for i in range(3)])

    assert "~2,500 tokens that 3 prompts share" in remark.text


# --- equal draws --------------------------------------------------------------------------------------


def test_equal_calls_on_two_lines_look_meant_to_be_one() -> None:
    """The advice names both lines, and the two ways out."""
    one = llm.chat("Hi")
    two = llm.chat("Hi")
    (remark,) = advice(one, two)

    assert remark.text == (
        "equal calls of chat on different lines are 2 answers: if one is meant, use the same node "
        "twice (temperature=0 makes equal calls one, too)"
    )
    assert line(remark) == [here() - 8, here() - 7]


def test_equal_calls_of_one_line_are_draws_on_purpose() -> None:
    """A loop asks for several draws; other calls are equal for good, or not equal at all."""
    greedy = FakeParams(temperature=0)
    draws = [llm.chat("Hi") for _ in range(5)]
    same = [llm.chat("Ho", greedy), llm.chat("Ho", greedy)]
    others = [llm.chat("Hu"), llm.chat("Hu", FakeParams(max_tokens=3))]

    assert advice(draws, same, others) == []


# --- parameters that differ ---------------------------------------------------------------------------


def test_one_parameter_keeps_calls_apart() -> None:
    """It is named with its values, and one line for each value."""
    short = [llm.complete(f"{i}", FakeParams(max_tokens=10)) for i in range(3)]
    long = [llm.complete(f"{i}", FakeParams(max_tokens=20)) for i in range(3, 5)]
    (remark,) = advice(short, long)

    assert remark.text == (
        "5 calls of complete could share requests if max_tokens were equal (it is 10, 20)"
    )
    assert line(remark) == [here() - 7, here() - 6]


def test_a_parameter_that_some_calls_do_not_set() -> None:
    """Leaving it out is a value, too."""
    (remark,) = advice(llm.complete("a", FakeParams(temperature=1.0)), llm.complete("b"))

    assert remark.text.endswith("if temperature were equal (it is 1.0, None)")


@pytest.mark.parametrize(
    "pair",
    [
        lambda: (llm.complete("a"), llm.complete("b")),  # they share requests
        lambda: (
            llm.complete("a", FakeParams(max_tokens=1, temperature=1.0)),
            llm.complete("b", FakeParams(max_tokens=2, temperature=0.5)),
        ),
        lambda: (llm.chat("a", FakeParams(max_tokens=1)), llm.chat("b", FakeParams(max_tokens=2))),
        lambda: (
            llm.complete("a", FakeParams(max_tokens=1)),
            llm.complete(llm.chat("b"), FakeParams(max_tokens=2)),
        ),
        lambda: tuple(llm.complete("a", FakeParams(seed=i)) for i in range(3)),
        lambda: (
            llm.complete("a", FakeParams(max_tokens=1)),
            llm.complete("b", FakeParams(max_tokens=strip("2"))),  # type: ignore[arg-type]
        ),
        lambda: tuple(
            FakeBackend(limits=Limits(max_items=1)).complete("a", FakeParams(max_tokens=i + 1))
            for i in range(2)
        ),
    ],
    ids=["equal", "two differ", "no lists", "other times", "seeds", "unknown", "one item"],
)
def test_where_one_parameter_is_not_the_reason(pair: Any) -> None:
    """No advice where it would not help."""
    assert advice(*pair()) == []


def test_many_values_are_one_piece_of_advice() -> None:
    """A parameter with a value for each call is told once."""
    (remark,) = advice([llm.complete("x" * i, FakeParams(max_tokens=i)) for i in range(1, 500)])

    assert "499 calls of complete" in remark.text
    assert remark.text.endswith("(it is 1, 2, 3, ...)")


# --- languages ----------------------------------------------------------------------------------------

english = Prompt("Summarize: {{ text }}")
german = Prompt("Fasse zusammen: {{ text }}", language="de")


def test_answers_in_another_language() -> None:
    """A German prompt that is given an English answer, directly or through a tool."""
    first = llm.chat(english(text="..."))
    (remark,) = advice([llm.chat(german(text=given)) for given in (first, strip(first)[:3])])

    assert remark.text == "2 prompts in 'de' are given answers to prompts in 'en'"
    assert line(remark) == [here() - 3]


def test_one_language_is_no_mixture() -> None:
    """Chains in one language, and prompts side by side, are as they should be."""
    deutsch = llm.chat(german(text=llm.chat(german(text="..."))))
    inglese = llm.chat(english(text=llm.chat(english(text="..."))))

    assert advice(deutsch, inglese, llm.chat(german(text=llm.chat("no prompt")))) == []
