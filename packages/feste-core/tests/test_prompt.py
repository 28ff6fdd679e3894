"""Prompts: templates see plain data only, are rendered once, and fail at the user's own line."""

from __future__ import annotations

import array
import dataclasses
import datetime
import enum
import functools
import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import numpy
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import feste
from feste.backend.secret import Secret
from feste.delayed import FesteDelayed
from feste.draw import Determinism, assign
from feste.errors import (
    ConfigError,
    ExtraVariable,
    FesteError,
    LanguageMismatch,
    LazyValueError,
    PlainDataError,
    PromptError,
    UndefinedVariable,
)
from feste.plain import MAX_DEPTH, plain
from feste.prompt import ChatPrompt, FesteEnvironment, Prompt
from feste.prompt.limits import SOURCE_LIMIT, STEP_LIMIT, TEXT_LIMIT, extent
from feste.scheduler import QUICK
from feste.testing import FakeBackend, fresh_draws

HERE = os.path.basename(__file__)
MARKS = ["{{ x }}", "{% raw %}", "{# #}", "{", "}", "%}", "\r\n", "\r", "\n", '"', "'", "\\", "\\n"]
MARKS += [
    "{% endraw %}",
    "-%}",
    "{%- if",
    "\ud800",
    "\u2028",
    "\0",
    "</s>",
    "é",
    "🦜",
    " ",
    "{{",
    "#",
]
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=8).map("".join)
ordinary = texts.filter(lambda text: "FesteDelayed('" not in text)


def rendered(prompt: Prompt | ChatPrompt, **variables: Any) -> Any:
    """What the node of the prompt gives when it is run."""
    node = prompt(**variables)._node
    return node.op.fn(**node.kwargs)


@feste.task
def answer() -> str:
    return "an answer"


class Reply(str):
    """Stands for a model's answer: text with more on it, that prints itself otherwise."""

    def __str__(self) -> str:
        return "not the text"


# --- rendering ------------------------------------------------------------------------------------


def test_renders_lazily_and_eagerly() -> None:
    """A call is a node that renders when computed; in eager mode it is the text at once."""
    hello = Prompt("Hello {{ name }}!\n")
    node = hello(name="world")
    assert isinstance(node, FesteDelayed)
    assert node.compute() == "Hello world!\n"
    with feste.context.set(eager=True):
        assert hello(name="world") == "Hello world!\n"


def test_takes_computed_values_anywhere() -> None:
    """Lazy values may stand in variables and inside lists and dicts of them."""
    prompt = Prompt("{% for d in docs %}{{ d.text }};{% endfor %}")
    assert prompt(docs=[{"text": answer()}, {"text": "b"}]).compute() == "an answer;b;"


def test_op_is_a_pure_prompt() -> None:
    """The op of a prompt says what the graph needs to know of it."""
    op = Prompt("{{ a }}")(a=1)._node.op
    assert (op.name, op.kind, op.emits, op.is_async) == ("prompt", "prompt", False, False)
    assert op.executor == QUICK
    assert op.determinism((), {}) is Determinism.PURE


@given(ordinary)
@settings(max_examples=500)
def test_values_come_out_as_they_are(text: str) -> None:
    """What a variable holds is never read as template text, nor changed in any way."""
    assert rendered(Prompt("{{ x }}"), x=text) == text
    assert rendered(Prompt("<{{ a.b[0] }}>"), a={"b": [text]}) == f"<{text}>"


@given(ordinary, ordinary, ordinary)
@settings(max_examples=300)
def test_answers_stay_data_through_a_chain(first: str, second: str, third: str) -> None:
    """Three stages, each given the text of the one before: bytes are never reinterpreted."""
    stage = Prompt("{{ context }}|{{ answer }}")
    one = rendered(stage, context="c", answer=Reply(first))
    two = rendered(stage, context=one, answer=second)
    assert rendered(stage, context=two, answer=third) == f"c|{first}|{second}|{third}"


def test_output_is_an_exact_str() -> None:
    """A rendered text is a plain str, also where the template marks parts as safe."""
    assert type(rendered(Prompt("{{ x|safe }}"), x="<b>")) is str
    assert rendered(Prompt("{{ x }}"), x="<b>&") == "<b>&"


def test_json_is_not_escaped_for_html() -> None:
    """``tojson`` gives JSON as a model should read it."""
    assert rendered(Prompt("{{ x|tojson }}"), x={"b": "<é>", "a": [1]}) == '{"b": "<é>", "a": [1]}'


# --- what a prompt tells of itself ----------------------------------------------------------------


def test_variables() -> None:
    """``variables`` are the names that the template looks up, less globals and Jinja's own."""
    environment = FesteEnvironment()
    environment.globals["today"] = lambda: "monday"
    source = "{% for i in range(n) %}{{ i }}{{ today() }}{{ x|default('') }}{% endfor %}"
    assert Prompt(source, environment=environment).variables() == {"n", "x"}
    assert Prompt(source).variables() == {"n", "x", "today"}


def test_length_source_language_repr() -> None:
    """``len`` counts characters of the source; the rest is as it was given."""
    prompt = Prompt("Olá {{ name }}", language="pt-br")
    assert (len(prompt), prompt.source, prompt.language) == (14, "Olá {{ name }}", "pt-BR")
    assert repr(prompt) == "<Prompt 'Olá {{ name }}' pt-BR>"
    assert len(repr(Prompt("x" * 10_000))) < 80
    assert (len(Prompt("")), len(ChatPrompt("a", "b"))) == (0, 2)


@pytest.mark.parametrize(
    ("tag", "standard"),
    [("eng", "en"), ("EN", "en"), ("pt_BR", "pt-BR"), ("zh-hant-tw", "zh-Hant-TW")],
)
def test_language_is_standardized(tag: str, standard: str) -> None:
    """One language has one name."""
    assert Prompt("x", language=tag).language == standard
    assert ChatPrompt("x", language=tag).language == standard


@pytest.mark.parametrize("tag", ["english", "", "xx", "e", " en", None, 3])
def test_wrong_language(tag: Any) -> None:
    """What is no language tag is refused, with an example of one that is."""
    with pytest.raises(ConfigError, match="pt-BR") as caught:
        Prompt("x", language=tag)
    assert HERE in caught.value.origin


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (Prompt("{{ text }} {{ a|default(1) }}"), r"give them by name: \(a=\.\.\., text=\.\.\.\)"),
        (ChatPrompt("x", "{{ text }}"), r"give them by name: \(text=\.\.\.\)"),
        (Prompt("text"), "it has no variables"),
    ],
)
def test_a_value_without_a_name(prompt: Any, why: str) -> None:
    """Values are given by name; the error says by which, and where it was written."""
    with pytest.raises(PromptError, match=why) as caught:
        prompt("some text")
    assert HERE in caught.value.origin


def test_equality() -> None:
    """Prompts are equal by source, language and what their environments hold."""
    one, other = FesteEnvironment(), FesteEnvironment()
    assert Prompt("a") == Prompt("a", environment=one) != Prompt("b")
    assert Prompt("a") != Prompt("a", language="de")
    assert hash(Prompt("a")) == hash(Prompt("a", environment=other))
    one.globals["x"], other.globals["x"] = [1], [2]
    assert Prompt("a", environment=one) != Prompt("a", environment=other)
    other.globals["x"] = [1]
    assert Prompt("a", environment=one) == Prompt("a", environment=other)
    assert Prompt("a") != "a"
    assert Prompt("a") != ChatPrompt("a")
    assert ChatPrompt("a") == ChatPrompt(Prompt("a")) != ChatPrompt(user="a")


def test_identity_tells_functions_apart() -> None:
    """Two lambdas share their name but not their code; the same code has the same identity."""

    def made(text: str, start: int = 0) -> FesteEnvironment:
        environment = FesteEnvironment()
        environment.globals["f"] = lambda: text
        environment.filters["g"] = lambda value: value[start:]
        return environment

    assert made("a").identity == made("a").identity
    assert made("a").identity != made("b").identity
    assert made("a", 1).identity != made("a", 2).identity
    seen = set()
    for text, filter_ in [("a", str.upper), ("a", str.lower), ("b", str.upper)]:
        environment = made(text)
        environment.filters["upper"] = filter_
        environment.filters["twice"] = functools.partial(made(text).filters["g"], *text)
        seen.add(environment.identity)
    assert len(seen) == 3
    one, other = FesteEnvironment(), FesteEnvironment()
    one.globals["f"] = lambda: "a"
    other.globals["f"] = lambda: "b"
    assert one.identity != other.identity


def test_identity_is_the_same_in_every_run() -> None:
    """Hashes of another process, with another seed, are the same: the journal relies on it."""
    code = (
        "from feste.prompt import Prompt, FesteEnvironment as E\n"
        "e = E(); e.globals.update(f=lambda x: x in {'a', 'b', 'c'}, d={'z': 1, 'a': {2}})\n"
        "print(Prompt('{{ f(x) }}', environment=e)(x=1)._node.op.identity)"
    )
    seen = {run(code, PYTHONHASHSEED=seed) for seed in ("1", "2", "3")}
    assert len(seen) == 1


def test_constants_count_by_content() -> None:
    """Equal calls have equal draws; calls with other values, also of models, have others."""

    class Doc(pydantic.BaseModel):
        title: str

    prompt = Prompt("{{ d.title }}")
    nodes = [prompt(d=Doc(title=t))._node for t in ("a", "b", "a")]
    assign(nodes)
    draws = [str(node.draw) for node in nodes]
    assert draws[0] == draws[2] != draws[1]


def test_equal_prompts_share_a_template() -> None:
    """A source is compiled once for all equal prompts of a process."""
    environment = FesteEnvironment()
    one, other = Prompt("same {{ x }}"), Prompt("same {{ x }}", environment=environment)
    assert one._op.templates[0].compiled().template is other._op.templates[0].compiled().template
    environment.filters["f"] = str.upper
    assert (
        other._op.templates[0].compiled().template is not one._op.templates[0].compiled().template
    )


def test_from_file(tmp_path: Path) -> None:
    """A template can come from a file, whose name then stands in errors."""
    file = tmp_path / "greet.txt"
    file.write_bytes("Grüß {{ name }}\n".encode("latin-1"))
    prompt = Prompt.from_file(file, language="de", encoding="latin-1")
    assert (prompt.source, prompt.language) == ("Grüß {{ name }}\n", "de")
    assert prompt == Prompt("Grüß {{ name }}\n", language="de")
    with pytest.raises(UndefinedVariable, match=r"greet\.txt"):
        prompt()
    with pytest.raises(PromptError, match=r"greet\.txt.*encoding="):
        Prompt.from_file(file)
    with pytest.raises(OSError):
        Prompt.from_file(tmp_path / "missing.txt")
    for large in ("x" * (5 * SOURCE_LIMIT), "é" * (SOURCE_LIMIT // 2 + 1)):
        file.write_text(large, encoding="utf-8")
        with pytest.raises(PromptError, match=r"greet\.txt: larger"):
            Prompt.from_file(file)


# --- joining --------------------------------------------------------------------------------------


@given(ordinary, ordinary)
@settings(max_examples=120)
def test_joined_text_renders_as_itself(before: str, after: str) -> None:
    """A str joined to a prompt is data, on either side, whatever the prompt begins or ends with."""
    for source, value in [
        ("{{ x }}", "v"),
        ("a{", "a{"),
        ("{%- if x -%}v{%- endif -%}", "v"),
        ("{#- c -#}", ""),
        ("#", "#"),
        ("%}{{- x -}}", "%}v"),
    ]:
        prompt = Prompt(source)
        given = {"x": "v"} if "x" in source else {}
        assert rendered(before + prompt, **given) == before + value
        assert rendered(prompt + after, **given) == value + after
        assert rendered(before + prompt + after, **given) == before + value + after


def test_plain_joins_stay_readable() -> None:
    """A text without braces is joined as it is."""
    assert ("Q: " + Prompt("{{ q }}") + " please").source == "Q: {{ q }} please"


def test_joined_answer_is_data() -> None:
    """A model's answer, a str subclass, joined to a prompt is data too: its characters."""
    assert rendered(Prompt("a: ") + Reply("{{ 7*7 }}")) == "a: {{ 7*7 }}"


@pytest.mark.parametrize(
    ("left", "right"), [("a{", "{{ x }}"), ("a{", "%b"), ("a {", "# b #}"), ("{{ x }}", "{{ y }}")]
)
def test_prompts_join(left: str, right: str) -> None:
    """Joined prompts render as both, one after the other, also where braces meet."""
    values = {"x": "1", "y": "2"}
    joined = Prompt(left) + Prompt(right)
    parts = [
        rendered(p, **{n: values[n] for n in p.variables()}) for p in (Prompt(left), Prompt(right))
    ]
    assert rendered(joined, **{n: values[n] for n in joined.variables()}) == "".join(parts)


def test_joining_refuses_what_does_not_fit() -> None:
    """Prompts of other environments, lazy values and their text cannot be joined."""
    environment = FesteEnvironment()
    environment.globals["x"] = 1
    with pytest.raises(PromptError, match="environment") as caught:
        Prompt("a") + Prompt("b", environment=environment)
    assert HERE in caught.value.origin
    node = answer()
    for wrong in (node, str(node)):
        with pytest.raises(LazyValueError, match="variable"):
            Prompt("a") + wrong
    with pytest.raises(TypeError):
        Prompt("a") + 1  # type: ignore[operator]
    same = FesteEnvironment()
    assert (Prompt("a", environment=same) + Prompt("b")).environment is same


def test_joining_languages_warns() -> None:
    """Prompts of two languages can be joined; a warning names both, the left one is kept."""
    with pytest.warns(LanguageMismatch, match="'a' de.* 'b' fr") as caught:
        joined = Prompt("a", language="de") + Prompt("b", language="fr")
    assert joined.language == "de"
    assert caught[0].filename == __file__
    with pytest.warns(LanguageMismatch) as caught:
        ChatPrompt(Prompt("a", language="de"), Prompt("b", language="fr"))
    assert caught[0].filename == __file__


# --- wrong templates, wrong variables -------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a\n{% if %}", "line 2"),
        ("a\n\n{{ x", "line 3"),
        ("{{ x|nofilter }}", "nofilter"),
        ("{{ x is notest }}", "notest"),
        ("{{ x|random }}", "random"),
        ("{{ x|urlize }}", "urlize"),
        ("{% for x in y %}", "line 1"),
        ("a\n{% include 'x' %}", "line 2"),
        ("{% extends 'x' %}", "names no folder"),
        ("{% import 'x' as y %}", "names no folder"),
        ("{% from 'x' import y %}", "names no folder"),
        ("{% do x %}", "do"),
        ("(" * 10 + "{{" + "(" * 5_000 + "1" + ")" * 5_000 + "}}", "template"),
        ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "template"),
        ("x" * (SOURCE_LIMIT + 1), "larger"),
        ("é" * (SOURCE_LIMIT // 2 + 1), "larger"),
    ],
)
def test_wrong_template(source: str, said: str) -> None:
    """A template that cannot work is refused where it is written, with its line."""
    with pytest.raises(PromptError, match=said) as caught:
        Prompt(source)
    assert HERE in caught.value.origin
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("source", [Reply("{{ 7*7 }}"), b"x", None, 3, answer(), Prompt("x")])
def test_source_is_written_by_the_user(source: Any) -> None:
    """Only an exact str is a template: a model's answer is never one."""
    with pytest.raises(PromptError, match="written by you") as caught:
        Prompt(source)
    assert HERE in caught.value.origin
    with pytest.raises(PromptError):
        ChatPrompt(messages=[("user", source)]) if type(source) is not Prompt else Prompt(source)


def test_source_without_lazy_text() -> None:
    """A source that holds the name of a lazy value was glued together too early."""
    with pytest.raises(LazyValueError, match="variable") as caught:
        Prompt("Answer: " + str(answer()))
    assert HERE in caught.value.origin


def test_missing_variable() -> None:
    """A missing variable is named at the call, with the template and the fix."""
    with pytest.raises(UndefinedVariable) as caught:
        Prompt("Dear {{ name }}, {{ text }}")(text="x")
    assert "'name'" in str(caught.value)
    assert "name=..." in str(caught.value)
    assert "Dear" in str(caught.value)
    assert HERE in caught.value.origin


def test_extra_variable() -> None:
    """A variable that the template does not use is refused, with the nearest that it does."""
    with pytest.raises(ExtraVariable, match="mean 'text'") as caught:
        Prompt("{{ text }}")(text="a", txet="b")
    assert HERE in caught.value.origin
    with pytest.raises(ExtraVariable, match="none at all"):
        Prompt("no variables")(x=1)
    with pytest.raises(UndefinedVariable, match="mean 'text'"):
        Prompt("{{ text }}")(txet="b")


@pytest.mark.parametrize(
    "source",
    [
        "{{ x|default('d') }}",
        "{{ x|d('d') }}",
        "{% if x is defined %}{{ x }}{% else %}d{% endif %}",
        "{% if x is not defined %}d{% else %}{{ x }}{% endif %}",
        "{% if x is undefined %}d{% elif x %}{{ x }}{% endif %}",
        "{{ x if x is defined else 'd' }}",
        "{{ 'd' if x is undefined else x }}",
        "{% if x is defined and x.y %}{% else %}d{% endif %}",
        "{% if x is undefined or x.y %}d{% endif %}",
        "{% if not (x is undefined or x) %}{% else %}d{% endif %}",
        "{% if x is not defined %}{% set x = 'd' %}{% endif %}{{ x }}",
        "{% set x = x|default('d') %}{{ x }}",
        "{% for i in [1] if x is defined and x %}{{ x }}{% else %}d{% endfor %}",
        "{% with y = x|default('d') %}{{ y }}{% endwith %}",
        "{% macro m(x='d') %}{{ x }}{% endmacro %}{{ m() }}{% if x is defined %}{{ x }}{% endif %}",
        "{% if x is defined %}{% for i in x %}{{ i }}{{ x }}{% endfor %}{% else %}d{% endif %}",
        "{% set x %}d{% endset %}{{ x }}{% if 0 %}{{ x is defined }}{% endif %}",
        "d{{ 'x' if x is defined and (x is defined or y is defined) else '' }}",
    ],
)
def test_guarded_variables_may_be_missing(source: str) -> None:
    """Names that are only read where they are known to be defined need no value."""
    prompt = Prompt(source)
    variables = {"y": 1} if "y is" in source else {}
    assert rendered(prompt, **variables) == "d"
    for name in prompt.variables():
        rendered(prompt, **{"x": {"y": 1}, name: {"y": 1}})


@pytest.mark.parametrize(
    "source",
    [
        "{{ x }}",
        "{{ x|upper|default('d') }}",
        "{{ x.y|default('d') }}",
        "{% if x %}{% endif %}",
        "{{ x is none }}",
        "{% if 1 %}{% set x = 1 %}{% endif %}{{ x }}",
        "{% for x in x %}{% endfor %}",
        "{% for x in [1] %}{% endfor %}{{ x }}",
        "{% with x = x %}{% endwith %}",
        "{% macro m(a=x) %}{% endmacro %}",
        "{% macro m(x) %}{% endmacro %}{{ x }}",
        "{% set y = x %}",
        "{% set x = x %}",
        "{% filter replace('a', x) %}{% endfilter %}",
        "{% call m(x) %}{% endcall %}{% macro m(a) %}{% endmacro %}",
        "{% block b %}{{ x }}{% endblock %}",
        "{{ range(x) }}",
        "{{ dict(a=x) }}",
        "{{ [1][x:] }}",
    ],
)
def test_unguarded_variables_are_needed(source: str) -> None:
    """Any other use needs a value: it is asked for at the call, not found missing while running."""
    with pytest.raises(UndefinedVariable, match="'x'"):
        Prompt(source)()


def test_globals() -> None:
    """Globals need no value, variables go before them, changes count at the next rendering."""
    environment = FesteEnvironment()
    prompt = Prompt("{{ product }} {{ n }}", environment=environment)
    with pytest.raises(UndefinedVariable, match="product"):
        prompt(n=1)
    environment.globals["product"] = "A"
    node = prompt(n=1)
    assert node._node.op.fn(n=1) == "A 1"
    environment.globals["product"] = "B"
    assert rendered(prompt, n=1) == "B 1"
    assert rendered(prompt, n=1, product="C") == "C 1"
    assert prompt.variables() == {"n"}
    assert Prompt("{{ product }}").variables() == {"product"}


def test_names_of_jinja_can_be_variables() -> None:
    """A template may have a variable named like one of Jinja's functions, or like a keyword."""
    assert rendered(Prompt("{{ range }}{{ dict }}"), range="1-5", dict="d") == "1-5d"
    assert rendered(Prompt("{{ class }}{{ self_ }}"), **{"class": "c", "self_": "s"}) == "cs"
    assert rendered(Prompt("{% for i in range(2) %}{{ i }}{% endfor %}")) == "01"


def test_filters() -> None:
    """Own filters work, also ones added later, and go before Jinja's."""
    environment = FesteEnvironment()
    environment.filters["shout"] = lambda text: text.upper() + "!"
    prompt = Prompt("{{ x|shout }}", environment=environment)
    assert rendered(prompt, x="a") == "A!"
    environment.filters["shout"] = lambda text: text + "?"
    assert rendered(prompt, x="a") == "a?"
    environment.filters["join"] = lambda values: "own"
    assert rendered(Prompt("{{ [1]|join }}", environment=environment)) == "own"
    with pytest.raises(PromptError, match="shout"):
        Prompt("{{ x|shout }}")


def test_nothing_runs_before_the_rendering() -> None:
    """Own filters and globals are not called when a prompt is made, with constants neither."""
    called = []
    environment = FesteEnvironment()
    environment.filters["note"] = environment.globals["noted"] = lambda *v: called.append(v) or ""
    prompt = Prompt("{% set x = 'a'|note %}{{ 'a'|note }}{{ noted() }}", environment=environment)
    prompt()
    assert called == []
    rendered(prompt)
    assert called == [("a",), ("a",), ()]


def test_impure_names_make_a_prompt_a_sample() -> None:
    """What may give something else next time is used: as a global, a filter, or by ``map``."""
    made = FesteEnvironment()
    made.globals.update(now=str, pure=str)
    made.filters.update(shuffle=str, calm=str)
    made.impure.update(["now", "shuffle"])
    sample = [
        "{{ now() }}",
        "{% for i in [1] %}{% if i %}{{ now }}{% endif %}{% endfor %}",
        "{% call now() %}{% endcall %}",
        "{{ x|shuffle }}",
        "{% filter shuffle %}{% endfilter %}",
        "{{ [1]|map('shuffle')|list }}",
        "{{ [1]|map('shuf' ~ 'fle')|list }}",
        "{{ [1]|map(*x)|list }}",
    ]
    pure = [
        "{{ x }}",
        "{{ pure() }}",
        "{{ x|calm }}",
        "{{ [1]|map('calm')|list }}",
        "{{ [1]|map(attribute='now')|list }}",
        "{% for now in [1] %}{{ now }}{% endfor %}",
        "{% set now = 1 %}{{ now }}",
        "{{ x.now }}{{ 'now' }} now",
    ]
    for kind, sources in ((Determinism.SAMPLE, sample), (Determinism.PURE, pure)):
        for source in sources:
            prompt = Prompt(source, environment=made)
            node = prompt(**dict.fromkeys(prompt.variables(), "v"))._node
            assert node.determinism is kind, source
            chat = ChatPrompt("text", prompt)
            assert chat(**dict.fromkeys(chat.variables(), "v"))._node.determinism is kind
    assert (
        Prompt("{{ now }}", environment=made)(now="a value")._node.determinism is Determinism.PURE
    )
    assert Prompt("{{ now() }}")(now="a value")._node.determinism is Determinism.PURE


def test_impure_names_count_for_the_identity() -> None:
    """Environments that differ in them differ; one without any is what it was before."""
    one, other = FesteEnvironment(), FesteEnvironment()
    other.impure.add("now")
    assert (one.identity, Prompt("a", environment=one)) != (other.identity, Prompt("a"))
    assert one.identity == "" != other.identity
    assert Prompt("a", environment=one) != Prompt("a", environment=other)
    one.impure.add("now")
    assert one.identity == other.identity
    other.impure = {"then"}
    assert one.identity != other.identity


def test_impure_prompts_are_draws_of_their_own() -> None:
    """Equal ones have ordinals, which those that need them inherit; eager mode renders each."""
    made = FesteEnvironment()
    numbers = itertools.count()
    made.globals["number"] = lambda: next(numbers)
    made.impure.add("number")
    prompt = Prompt("{{ number() }}{{ x }}", environment=made)
    nodes = [prompt(x="x")._node for _ in range(2)]
    users = [Prompt("{{ a }}")(a=FesteDelayed(node))._node for node in nodes]
    assign(nodes + users)
    assert [node.draw.n for node in nodes] == [0, 1]
    assert users[0].draw.fingerprint != users[1].draw.fingerprint
    with feste.context.set(eager=True):
        assert [prompt(x="x"), prompt(x="x")] == ["0x", "1x"]
    assert sorted(feste.compute(prompt(x="x"), prompt(x="x"))) == ["2x", "3x"]


def test_impure_prompts_and_stores(tmp_path: Path) -> None:
    """Calls on them are stored by their requests: the same text finds its answer again."""
    made = FesteEnvironment()
    made.globals["day"] = lambda: today[-1]
    made.impure.add("day")
    ask = Prompt("{{ day() }}?", environment=made)
    today, sent, answers = ["monday"], [], []
    for day in ("monday", "monday", "tuesday"):
        today.append(day)
        fresh_draws()
        llm = FakeBackend()
        answers.append(llm.chat(ask()).compute(store=tmp_path / "runs.db"))
        sent.append(len(llm.requests))
    assert sent == [1, 0, 1]
    assert answers[0] == answers[1]


def test_environment_is_ours() -> None:
    """Another kind of environment would not be a sandbox."""
    import jinja2

    with pytest.raises(ConfigError, match="FesteEnvironment"):
        Prompt("x", environment=jinja2.Environment())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "line", "said"),
    [
        ("a\n{{ x.y }}", 2, "no attribute 'y'"),
        ("\n\n{{ 1 / x.n }}", 3, "ZeroDivisionError"),
        ("{% for i in x.list %}\n{{ i.z }}{% endfor %}", 2, "'z'"),
        ("\n{{ x.__class__ }}", 2, "unsafe"),
        ("\n{{ boom() }}", 2, "RuntimeError: wrong"),
        ("{{ x.keys }}", 1, r"x\['name'\]"),
        ("{{ x.list|map('upper') }}", 1, r"\|list"),
        ("{{ boom }}", 1, "call it"),
        ("\n{{ opaque }}", 2, "object"),
        ("{{ node }}", 1, "FesteDelayed"),
        ("{% macro m() %}\n{{ x.y }}{% endmacro %}\n{{ m() }}", 2, "'y'"),
        ("{{ 'a' ~ x.y }}", 1, "'y'"),
        ("{{ x.list|join(x.y) }}", 1, "'y'"),
    ],
)
def test_errors_while_rendering(source: str, line: int, said: str) -> None:
    """What goes wrong in a template names it, the line in it, and the cause; and pickles."""
    environment = FesteEnvironment()

    def boom() -> None:
        raise RuntimeError("wrong")

    environment.globals.update(boom=boom, opaque=object(), node=answer())
    prompt = Prompt(source, environment=environment)
    with pytest.raises(PromptError, match=said) as caught:
        rendered(prompt, **({"x": {"n": 0, "list": [1]}} if "x" in prompt.variables() else {}))
    assert f"line {line}:" in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (type(caught.value), str(caught.value))


def test_error_at_run_time_has_the_users_line() -> None:
    """A rendering that fails in a run still points at the call that made the node."""
    with pytest.raises(feste.errors.RunFailed) as caught:
        Prompt("{{ 1 / x }}")(x=0).compute()
    assert HERE in caught.value.errors[0].origin


# --- plain data -----------------------------------------------------------------------------------

data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda parts: (
        st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=4), parts, max_size=4)
    ),
    max_leaves=12,
)


@given(data)
@settings(max_examples=300)
def test_plain_data_stays_itself(value: Any) -> None:
    """Plain data comes back equal and copied; converting again changes nothing."""
    made = plain(value)
    assert made == value
    assert plain(made) == made
    assert plain(value, lazy=True) == value
    if isinstance(value, (list, dict)):
        assert made is not value


@dataclasses.dataclass
class Doc:
    title: str
    tags: tuple[str, ...] = ()


class Model(pydantic.BaseModel):
    name: str
    sub: list[Doc] = []


class Color(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


def test_plain_converts() -> None:
    """Subclasses become what they are; tuples lists; dataclasses and models dicts."""
    made = plain(
        [Reply("x"), Color.RED, Size.BIG, numpy.float64(0.5), (1, 2), Doc("t", ("a",))]
        + [Model(name="n", sub=[Doc("s")]), OrderedDict(b=1), defaultdict(int, c=2), {Color.RED: 1}]
    )
    assert made == ["x", "red", 3, 0.5, [1, 2], {"title": "t", "tags": ["a"]}] + [
        {"name": "n", "sub": [{"title": "s", "tags": []}]},
        {"b": 1},
        {"c": 2},
        {"red": 1},
    ]
    kinds = [type(part) for part in made]
    assert kinds == [str, str, int, float, list, dict, dict, dict, dict, dict]
    assert type(next(iter(made[-1]))) is str
    assert plain(namedtuple("P", "x y")(1, 2)) == [1, 2]  # type: ignore[call-arg]


@dataclasses.dataclass
class Account:
    name: str
    place: ClassVar[str] = "SECRET"
    opened: dataclasses.InitVar[str] = "SECRET"

    def __post_init__(self, opened: str) -> None:
        self._key = opened
        self.note = opened

    @property
    def key(self) -> str:
        return self._key

    @functools.cached_property
    def copy_of_key(self) -> str:
        return self._key


class Customer(pydantic.BaseModel):
    name: str
    _key: str = pydantic.PrivateAttr("SECRET")
    place: ClassVar[str] = "SECRET"

    @property
    def key(self) -> str:
        return self._key

    @functools.cached_property
    def copy_of_key(self) -> str:
        return self._key


@pytest.mark.parametrize("value", [Account("Ada"), Customer(name="Ada")], ids=repr)
def test_nothing_but_declared_fields_is_seen(value: Any) -> None:
    """Properties, private and class attributes, and what an object holds besides, stay outside."""
    assert value.key == value.copy_of_key == "SECRET"  # which is now in the object's `__dict__`

    assert (
        rendered(Prompt("{{ v }}|{{ v|tojson }}"), v=value)
        == "{'name': 'Ada'}|" + '{"name": "Ada"}'
    )
    assert rendered(Prompt("{{ v.items()|list }}"), v=[value][0]) == "[('name', 'Ada')]"
    for name in ("key", "_key", "place", "note", "opened", "copy_of_key", "model_dump", "__dict__"):
        for source in (
            f"{{{{ v.{name} }}}}",
            f"{{{{ v['{name}'] }}}}",
            f"{{{{ [v]|map(attribute='{name}')|first }}}}",
        ):
            with pytest.raises(PromptError) as caught:
                rendered(Prompt(source), v=value)
            assert "SECRET" not in str(caught.value)


def test_plain_copies_deeply() -> None:
    """Changing the value later does not change what the template sees."""
    value = {"a": [1]}
    node = Prompt("{{ v.a }}")(v=value)
    value["a"].append(2)
    assert node.compute() == "[1]"


class Proxy:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: {"stolen": 1}


class Fake:
    def model_dump(self) -> object:
        return self


REFUSED: list[tuple[Any, str]] = [
    ({1}, r"sorted\("),
    (frozenset("a"), r"sorted\("),
    (b"x", "not plain data"),
    (bytearray(b"x"), "not plain data"),
    (memoryview(b"x"), "not plain data"),
    (array.array("f", [1.0]), "not plain data"),
    (numpy.zeros(3), r"v is a numpy\.ndarray, which is not plain data: give its \.tolist\(\)"),
    (numpy.True_, r"v is a numpy\.bool_?, which is not plain data: give its \.item\(\)"),
    (numpy.int64(3), "int64"),
    ({1: "a"}, "key 1"),
    ({None: "a"}, "key None"),
    ({("a",): 1}, "keys must be text"),
    (lambda: 1, "function"),
    (len, "builtin"),
    (os, "module"),
    (object(), "object"),
    (Doc, "type"),
    (Model, "Metaclass"),
    (str, "type"),
    (Secret("KEY"), "Secret"),
    (Prompt("x"), "Prompt"),
    (ChatPrompt("x"), "ChatPrompt"),
    (FesteEnvironment(), "FesteEnvironment"),
    (Proxy(), "Proxy"),
    (Fake(), "Fake"),
    (datetime.date(2024, 1, 1), "date"),
    (1j, "complex"),
    (Path("x"), "Path"),
    (range(3), "range"),
    (iter([1]), "list_iterator"),
    ((i for i in [1]), "generator"),
    ({}.items(), "dict_items"),
    (Exception("x"), "Exception"),
    (answer, "Task"),
    (threading.Lock(), "lock"),
    (FakeBackend(), "FakeBackend"),
    (type("Html", (), {"__html__": lambda self: "<b>"})(), "Html"),
    (type("Lazy", (), {"__str__": lambda self: "text", "__len__": lambda self: 1})(), "Lazy"),
    (numpy.array(["a"]), "ndarray"),
    (rendered, "function"),
    ("".join, "builtin"),
    (Model(name="x", sub=[]).__class__.model_fields["name"], "FieldInfo"),
]


@pytest.mark.parametrize(("value", "said"), REFUSED, ids=lambda v: type(v).__name__)
def test_other_values_are_refused(value: Any, said: str) -> None:
    """Nothing but plain data gets in: at the call, at any depth, and again when rendering."""
    prompt = Prompt("Use {{ v }}")
    with pytest.raises(PlainDataError, match=said) as caught:
        prompt(v=value)
    assert "Use" in str(caught.value)
    assert HERE in caught.value.origin
    with pytest.raises(PlainDataError, match=r"v\[1\]\['a'\]\['b'\]"):
        prompt(v=[answer(), {"a": {"b": value}}])
    with pytest.raises(PlainDataError, match=r"v\.title"):
        prompt(v=Doc(value))
    with pytest.raises(PlainDataError, match=said):
        prompt._op.fn(v=value)


def test_refused_when_computed() -> None:
    """A computed value that is not plain data fails the rendering, not the template's secrets."""

    @feste.task
    def client() -> Any:
        return Proxy()

    with pytest.raises(feste.errors.RunFailed) as caught:
        Prompt("{{ c.api_key }}")(c=client()).compute()
    assert isinstance(caught.value.errors[0], PlainDataError)


def test_cycles_and_depth() -> None:
    """Data that contains itself or is nested too deeply is refused; shared parts are not."""
    loop: list[Any] = []
    loop.append({"x": loop})
    deep: Any = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    shared: Any = [1]
    for _ in range(16):
        shared = [shared, shared]
    endless = shared
    for _ in range(MAX_DEPTH - 18):  # would be 2**98 items if printed
        endless = [endless, endless]
    for value, said in ((loop, "itself"), (deep, "levels"), (endless, "repeats more than")):
        with pytest.raises(PlainDataError, match=said):
            plain(value)
    assert plain(deep[0]) == deep[0]
    copy = plain(shared)
    assert copy[0] is copy[1]


@pytest.mark.parametrize("number", [1 << 16_384, -(1 << 16_384)], ids=["positive", "negative"])
def test_numbers_that_nobody_can_print_are_refused(number: int) -> None:
    """Dividing them takes longer than any limit of steps counts; Python prints 4,300 digits."""
    for value in (number, [number], {"n": number}):
        with pytest.raises(PlainDataError, match="more than 16,384 bits"):
            plain(value)
        with pytest.raises(PlainDataError, match="16,384 bits"):
            Prompt("{{ x is divisibleby(3) }}")(x=value)
    assert plain([number // 2]) == [number // 2]


def test_lazy_text_is_refused() -> None:
    """Text that holds the name of a lazy value was made by accident."""
    node = answer()
    prompt = Prompt("{{ v }}")
    for value in (
        f"see {node!r}",
        [{"a": str(node)}],
        Doc(str(node)),
        Reply(str(node)),
    ):
        with pytest.raises(LazyValueError, match="variable v") as caught:
            prompt(v=value)
        assert HERE in caught.value.origin
    with pytest.raises(LazyValueError):
        prompt._op.fn(v=[node])


# --- chat -----------------------------------------------------------------------------------------


def test_chat() -> None:
    """A chat prompt gives messages; each takes the variables that it has."""
    chat = ChatPrompt("You are {{ who }}.", Prompt("{{ q }}"))
    assert chat.variables() == {"who", "q"}
    expected = [
        {"role": "system", "content": "You are me."},
        {"role": "user", "content": "Why?"},
    ]
    assert chat(who="me", q="Why?").compute() == expected
    with feste.context.set(eager=True):
        assert chat(who="me", q="Why?") == expected
    assert repr(chat) == "<ChatPrompt system, user en>"
    assert [role for role, _ in chat.messages] == ["system", "user"]
    assert chat.messages[1][1] == Prompt("{{ q }}")


def test_chat_of_many_messages() -> None:
    """Longer conversations are pairs of role and source."""
    roles = ["system", "user", "assistant", "user"]
    chat = ChatPrompt(messages=[(role, f"{i} {{{{ x }}}}") for i, role in enumerate(roles)])
    assert [m["role"] for m in rendered(chat, x=1)] == roles
    assert [m["content"] for m in rendered(chat, x=1)] == ["0 1", "1 1", "2 1", "3 1"]


def test_chat_checks() -> None:
    """Missing, unknown and wrong things are refused where they are written."""
    chat = ChatPrompt("{{ a }}", "{{ b }}")
    with pytest.raises(UndefinedVariable, match="'a', 'b'"):
        chat()
    with pytest.raises(ExtraVariable, match="'c'"):
        chat(a=1, b=2, c=3)
    with pytest.raises(PlainDataError):
        chat(a=1, b={2})
    with pytest.raises(PlainDataError):
        chat._op.fn(a=1, b=Proxy())
    for wrong in ({}, {"messages": []}, {"system": "a", "messages": [("user", "b")]}):
        with pytest.raises(PromptError):
            ChatPrompt(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'user'"):
        ChatPrompt(messages=[("usr", "x")])
    with pytest.raises(PromptError, match="line 2"):
        ChatPrompt("a", "\n{{")


def test_chat_language_and_environment() -> None:
    """The language is that of the first Prompt; sources take the environment given."""
    assert ChatPrompt(Prompt("a", language="de"), "b").language == "de"
    environment = FesteEnvironment()
    environment.globals["x"] = "global"
    chat = ChatPrompt("{{ x }}", Prompt("{{ x }}"), environment=environment)
    assert chat.variables() == {"x"}
    with pytest.raises(UndefinedVariable):
        chat()
    assert [m["content"] for m in rendered(chat, x="given")] == ["given", "given"]


ROLE_MARKS = [
    "\nsystem: ",
    "<|im_start|>system\n",
    "[INST]",
    "</s>",
    "\n\nHuman:",
    '"}, {"role": "',
] + [
    "{{ system }}",
    "<|endoftext|>",
    "### Instruction",
]


@given(st.lists(st.sampled_from(ROLE_MARKS) | ordinary, max_size=6).map("".join))
@settings(max_examples=200)
def test_values_add_no_messages(text: str) -> None:
    """Roles are structure: whatever a variable holds, messages and roles stay."""
    messages = rendered(ChatPrompt("be kind", "{{ q }}"), q=text)
    assert messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": text},
    ]


# --- the sandbox ----------------------------------------------------------------------------------

ESCAPES = """
{{ x.__class__ }}
{{ x['__class__'] }}
{{ x|attr('__class__') }}
{{ x|attr('__cla' ~ 'ss__') }}
{{ x|attr('\\x5f\\x5fclass\\x5f\\x5f') }}
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ ().__class__.__bases__[0].__subclasses__() }}
{{ [].__class__.__base__ }}
{{ {}.__class__.__base__ }}
{{ x.__init__.__globals__ }}
{{ range.__globals__ }}
{{ range.__globals__['os'] }}
{{ cycler.__init__.__globals__.os.popen('id').read() }}
{{ joiner.__init__.__globals__.os }}
{{ namespace.__init__.__globals__.os }}
{{ namespace.__class__ }}
{{ dict.__subclasses__() }}
{{ dict.mro() }}
{{ dict|attr('mro') }}
{{ lipsum.__globals__ }}
{{ self.__init__ }}
{{ self._TemplateReference__context }}
{{ self.__dict__ }}
{{ f.__code__ }}
{{ f.__globals__ }}
{{ f.__closure__ }}
{{ f.func_globals }}
{{ f.__self__ }}
{{ gen().gi_frame }}
{{ gen().gi_code }}
{{ '{0.__class__}'.format(x) }}
{{ '{0.__class__.__mro__}'.format(x) }}
{{ '{a.__class__}'.format(a=x) }}
{{ '{a.__class__}'.format_map({'a': x}) }}
{{ '{0[__class__]}'.format(x) }}
{{ ('{0.__cla' ~ 'ss__}').format(x) }}
{{ ['{0.__class__}']|map('format', x)|list }}
{{ (['{0.__class__}.{1}']|map(attribute='format')|first)(x, 1) }}
{{ ('{0.__class__}'|attr('format'))(x) }}
{{ '{0.__class__}'['format'](x) }}
{% set m = '{0.__class__}'.format %}{{ m(x) }}
{% set ns = namespace(m='{0.__class__}'.format) %}{{ ns.m(x) }}
{{ [x]|map(attribute='__class__')|list }}
{{ [x]|map(attribute='__class__.__mro__')|list }}
{{ [x]|map('attr', '__class__')|list }}
{{ [x]|selectattr('__class__')|list }}
{{ [x]|rejectattr('__class__')|list }}
{{ [x]|groupby('__class__') }}
{{ [x]|sum(attribute='__class__') }}
{{ [x, x]|sort(attribute='__class__') }}
{{ [x]|unique(attribute='__class__')|list }}
{{ [x]|join(',', attribute='__class__') }}
{{ [x]|min(attribute='__class__') }}
{{ [x]|map('f')|list }}
{{ x.list.append(1) }}
{{ x.list.extend([1]) }}
{{ x.list.pop() }}
{{ x.list.sort() }}
{{ x.clear() }}
{{ x.update(a=1) }}
{{ x.setdefault('new', 1) }}
{{ x.pop('n') }}
{% set x.n = 2 %}
{{ __import__('os') }}
{{ __builtins__ }}
{{ open('/etc/passwd').read() }}
{{ eval('1') }}
{{ getattr(x, '__class__') }}
{{ config }}
{{ request.application }}
{% import 'os' as os %}
{% include '/etc/passwd' %}
{% extends '/etc/passwd' %}
{{ x.n.real.__class__ }}
{{ (1).__class__ }}
{{ 'a'.encode().__class__ }}
{{ 'a'.encode() }}
{{ (5).to_bytes(10, 'big') }}
{{ x|string|attr('encode') }}
{{ loop.__class__ }}
{% for i in [1] %}{{ loop._LoopContext__iterable }}{{ loop.__init__ }}{% endfor %}
{% macro m() %}{% endmacro %}{{ m._func }}
{% macro m() %}{% endmacro %}{{ m.__init__ }}
{% macro m() %}{% endmacro %}{{ m._environment }}
{{ cycler(1)._x }}
{% set c = cycler %}{{ c.__init__ }}
{{ (x|e).__class__ }}
{{ (x|e).__html__ }}
{{ (x|string|safe).format.__globals__ }}
{{ ('{0.__class__}'|safe).format(x) }}
{{ ('{0.__class__}'|e).format(x) }}
{{ x|pprint|attr('__class__') }}
{% call(a) f() %}{{ a.__class__ }}{% endcall %}{{ caller.__class__ }}
{{ x.items.__self__ }}
{{ x.items.__objclass__ }}
{{ [].__reduce_ex__(2) }}
{{ ''.__doc__ }}
{{ gen().gi_frame.f_back.f_globals }}
{{ gen()|attr('gi_frame') }}
{{ gen()|attr('gi_yieldfrom') }}
{{ coro.cr_frame }}
{{ agen|attr('ag_frame') }}
{{ f|attr('__wrapped__') }}
{{ x['_' ~ '_class_' ~ '_'] }}
{{ x[['__cl', 'ass__']|join] }}
{{ x|attr(['__cl', 'ass__']|join) }}
{{ x|attr('__CLASS__'|lower) }}
{{ x|attr('__ssalc__'|reverse) }}
{{ x|attr('%c%cclass%c%c'|format(95, 95, 95, 95)) }}
{{ ''['\\x5f\\x5fmro\\x5f\\x5f'] }}
{{ [''|attr('\\u005f\\u005fmro\\u005f\\u005f')]|list }}
{% set a = '__class__' %}{{ x[a] }}{{ x|attr(a) }}
{% with a = '{0.__class__}'.format %}{{ a(x) }}{% endwith %}
{% macro m(a) %}{{ a(x) }}{% endmacro %}{{ m('{0.__class__}'.format) }}
{% for a in ['{0.__class__}'.format] %}{{ a(x) }}{% endfor %}
{{ dict(a='{0.__class__}'.format).a(x) }}
{{ [x]|map(**{'attribute': '__class__'})|list }}
{{ [x]|selectattr('__class__.__name__', 'eq', 'dict')|map(attribute='__class__')|list }}
{{ {x.n: x}|xmlattr }}{{ {'a': x.__class__}|xmlattr }}
{{ self._TemplateReference__context.environment }}
{% block b %}{{ self.b.__globals__ }}{{ self.b._context }}{% endblock %}
{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}
{% macro m() %}{{ varargs.__class__ }}{{ kwargs.__class__ }}{% endmacro %}{{ m(1, a=1) }}
{% from 'os' import popen %}
{% include ['/etc/passwd', 'x'] ignore missing %}
{{ [1]|map('module!')|map(attribute='__class__')|list }}
{{ ''|attr('format')|attr('__wrapped__') }}
{{ dict.update(x, n=2) }}
{{ dict.update(g, n=2) }}
{{ dict.pop(g, 'n') }}
{{ dict.clear(g) }}
{{ dict.setdefault(g, 'new', 1) }}
{{ dict['update'](g, n=2) }}
{{ (dict|attr('update'))(g, n=2) }}
{{ ([dict]|map('attr', 'update')|first)(g, n=2) }}
{{ ([dict]|map(attribute='update')|first)(g, n=2) }}
{{ {}.items.__self__.__class__.update(g, n=2) }}
{% set d = dict %}{{ d.update(g, n=2) }}
{{ namespace(u=dict.update).u(g, n=2) }}
{{ cycler.reset(o) }}
{{ cycler.next(o) }}
{{ joiner.__init__(o) }}
{{ list.append(g.list, 3) }}
{{ list.sort(x.list) }}
{{ str.format('{0.__class__}', x) }}
{{ s.intersection_update([]) }}
{{ s.add(2) }}
{{ ordered.move_to_end('a') }}
{{ counter.subtract(['a']) }}
{{ queue.rotate(1) }}
{{ queue.insert(0, 1) }}
{{ queue.reverse() }}
{{ [g]|map('update', n=2)|list }}
{% set g.n = 2 %}
{{ '{0.update}'.format(g) and g.update(n=2) }}
{{ ''.format.__wrapped__.__self__.__class__ }}
""".strip().splitlines()


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    """Each known way to reach Python is refused, or gives nothing."""
    environment = FesteEnvironment()
    environment.globals["f"] = lambda *args, **kwargs: "called"
    environment.globals["gen"] = lambda: (i for i in [1])
    environment.globals["coro"] = environment.globals["agen"] = (i for i in [1])
    environment.globals |= {"list": list, "str": str, "g": {"n": 1, "list": [2, 1]}, "s": {1}}
    environment.globals |= {"ordered": OrderedDict(a=1, b=2), "counter": Counter("a")}
    environment.globals |= {"queue": deque([1, 2]), "o": Holder()}
    before = repr(environment.globals)
    value = {"n": 1, "list": [2, 1]}
    try:
        prompt = Prompt(source, environment=environment)
        text = prompt._op.fn(x=value, config={}, request={})
    except PromptError:
        text = ""
    for leak in ("class", "object", "function", "module", "built", "mro", "os", "b'", "x00"):
        assert leak not in text.lower()
    assert value == {"n": 1, "list": [2, 1]}
    assert repr(environment.globals) == before


class Holder:
    """An object that a cycler could be mistaken for."""

    def __init__(self) -> None:
        self.items, self.pos = [1], 1

    def __repr__(self) -> str:
        return repr(vars(self))


class Shade(enum.Enum):
    """What globals may well be."""

    RED = "red"

    @staticmethod
    def known() -> int:
        return 1

    @classmethod
    def first(cls) -> str:
        return cls.RED.value


def test_classes_among_globals() -> None:
    """Members, static methods and class methods of a class are in reach, and classes are called."""
    environment = FesteEnvironment()
    environment.globals["Shade"] = Shade
    source = "{{ Shade.RED.value }}{{ Shade.known() }}{{ Shade.first() }}{{ dict(a=1).a }}"
    assert rendered(Prompt(source, environment=environment)) == "red1red1"
    assert rendered(Prompt("{{ {}.fromkeys(['a'])|list }}")) == "['a']"


def test_what_a_message_sees_no_other_can_change() -> None:
    """The messages of a chat are rendered from one set of variables."""
    chat = ChatPrompt("{{ dict.update(d, a='evil') or '' }}sys", "{{ d.a }}")
    with pytest.raises(PromptError, match="unsafe"):
        chat._op.fn(d={"a": 1})


def test_big_and_busy_templates_work() -> None:
    """Ordinary work stays far from the limits."""
    docs = ["x" * 10_000] * 90
    joined = rendered(Prompt("{% for d in docs %}{{ d|trim }}\n{% endfor %}"), docs=docs)
    assert len(joined) == 90 * 10_001
    assert rendered(Prompt("{{ docs|join('\n') }}"), docs=docs) == "\n".join(docs)
    assert rendered(Prompt("{{ '{:,.2f}|{}'.format(x, 'a') }}"), x=1234.5) == "1,234.50|a"
    assert rendered(Prompt("{{ '%.1f|%s' % (x, 'a') }}{{ '%d' % 3 }}"), x=0.25) == "0.2|a3"
    assert rendered(Prompt("{{ '%s-%s'|format(x, 'b') }}"), x="a") == "a-b"
    assert rendered(Prompt("{{ ', '.join(x|map('upper')) }}"), x=["a", "b"]) == "A, B"
    assert rendered(Prompt("{{ x|indent(2) }}{{ x|wordwrap(3) }}"), x="a b\nc") == "a b\n  ca b\nc"
    assert rendered(Prompt("{{ 7 * 6 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 1 + 1.5 }}")) == "42102432.5"
    assert rendered(Prompt("{{ x|replace('a', 'b') }}{{ x.replace('a', 'c') }}"), x="aa") == "bbcc"
    assert (
        rendered(Prompt("{{ x|batch(2)|list }}{{ 2.456|round(1) }}"), x=[1, 2, 3])
        == "[[1, 2], [3]]2.5"
    )
    many = Prompt("{% for i in xs %}{{ i ~ ';' if loop.last else '' }}{% endfor %}")
    assert rendered(many, xs=list(range(50_000))) == "49999;"
    tree = {"c": [{"c": []}, {"c": [{"c": []}]}]}
    nested = Prompt("{% for t in [x] recursive %}({{ loop(t.c) }}){% endfor %}")
    assert rendered(nested, x=tree) == "(()(()))"
    assert (
        rendered(Prompt("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(1) ~ m('b') }}")) == "<1><b>"
    )
    assert (
        rendered(Prompt("{% filter upper %}{% set x %}b{% endset %}a{{ x }}{% endfilter %}"))
        == "AB"
    )
    assert (
        rendered(Prompt("{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}b{% endcall %}"))
        == "b"
    )


TEXT = "word and " * 1600
LARGE = "x" * 400_000
MANY = ["x" * 10_000] * 300


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        ("{{ t|wordwrap(80)|length }}", {"t": TEXT}),
        ("{{ 'Revenue 12000000 EUR: %s'|format(x)|length }}", {"x": "y"}),
        ("{{ '%s %s %s'|format(x, y, y)|length }}", {"x": LARGE, "y": "y"}),
        ("{{ 'at 12000000: {0} {b:>5} {b}'.format(x, b=y)|length }}", {"x": LARGE, "y": "y"}),
        ("{{ ('12000000 %(a)5s 100%%' % {'a': x})|length }}", {"x": LARGE}),
        ("{{ t.find('a', 2000000) }}{{ t.replace('b', 'c', 2000000)|length }}", {"t": TEXT}),
        (
            "{% for n, ds in [('a', docs), ('b', docs)] %}{{ ds|length }}{% endfor %}",
            {"docs": MANY},
        ),
        ("{{ docs|batch(7)|list|length }}{{ docs == [] }}{{ docs|first in docs }}", {"docs": MANY}),
        ("{{ dict(docs=docs).items()|length }}", {"docs": MANY}),
        (
            "{% set ns = namespace(a=[]) %}{% for d in docs %}{% set ns.a = ns.a + [d] %}"
            "{% endfor %}{{ ns.a|length }}",
            {"docs": MANY},
        ),
        (
            "{% set a, b = docs, 1 %}{% for d in [docs, docs] recursive %}{{ loop([]) }}{% endfor %}"
            "{% macro m(p=[docs]) %}{{ p|length }}{% endmacro %}{{ m() }}{{ {'k': a}.k|length }}"
            "{% if a is eq(docs) and docs[0] not in (a, b) and 1 < b + 1 <= 2 %}{{ b }}{% endif %}",
            {"docs": MANY},
        ),
        ("{{ x|default('none') }}{% for a, b in [(1, 2)] %}{{ [a, b][0:1] }}{% endfor %}", {}),
    ],
)
def test_large_values_and_numbers_are_no_bombs(source: str, variables: dict[str, Any]) -> None:
    """Only what is really made counts: no number in a text, no list of what was given."""
    assert len(rendered(Prompt(source), **variables)) < 30


def test_output_limit_counts_bytes() -> None:
    """A text of up to 1 MiB is rendered, a larger one is not."""
    prompt = Prompt("{{ x }}")
    assert len(rendered(prompt, x="x" * TEXT_LIMIT)) == TEXT_LIMIT
    for text in ("x" * (TEXT_LIMIT + 1), "é" * (TEXT_LIMIT // 2 + 1)):
        with pytest.raises(PromptError, match="larger"):
            rendered(prompt, x=text)


def test_step_limit_is_exact() -> None:
    """Loops may turn 100,000 times in one rendering, not once more; each rendering starts anew."""
    prompt = Prompt("{% for i in xs %}{% endfor %}")
    for _ in range(2):
        rendered(prompt, xs=[0] * STEP_LIMIT)
    with pytest.raises(PromptError, match="steps"):
        rendered(prompt, xs=[0] * (STEP_LIMIT + 1))


def test_extent_stops_counting() -> None:
    """Measuring a value is bounded too: shared parts count each time they would be printed."""
    value: Any = ["x"]
    for _ in range(200):
        value = [value, value]
    assert TEXT_LIMIT < extent(value) < 2 * TEXT_LIMIT


# --- processes and threads ------------------------------------------------------------------------


def run(code: str, **environ: str) -> str:
    """What a fresh Python prints."""
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shout(text: str) -> str:
    return text.upper()


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_pickles(dumps: Any, tmp_path: Path) -> None:
    """Prompts, ops and nodes travel to other processes: source and environment, no templates."""
    environment = FesteEnvironment()
    environment.globals["g"] = "global"
    prompt = Prompt("{{ g }} {{ x|upper }}", language="de", environment=environment)
    chat = ChatPrompt(prompt, "{{ y }}")
    rendered(prompt, x="a")  # compiled: that must not be in the way
    plain_one = Prompt("{{ x }}")
    node = prompt(x="a")
    file = tmp_path / "prompts.pickle"
    file.write_bytes(dumps([prompt, chat, prompt._op, chat._op, plain_one, node]))
    out = run(
        "import pickle, sys\n"
        f"things = pickle.load(open({str(file)!r}, 'rb'))\n"
        "assert 'jinja2' not in sys.modules\n"
        "prompt, chat, op, chat_op, plain_one, node = things\n"
        "print(op.fn(x='b'), chat_op.fn(x='b', y='c'), prompt.language, sorted(chat.variables()))\n"
        "print(prompt == type(prompt)(prompt.source, language='de', environment=prompt.environment))\n"
        "print(op.identity, chat_op.identity, node._node.op.fn(**node._node.kwargs))\n"
    )
    expected = [{"role": "system", "content": "global B"}, {"role": "user", "content": "c"}]
    assert out.splitlines() == [
        f"global B {expected} de ['x', 'y']",
        "True",
        f"{prompt._op.identity} {chat._op.identity} global A",
    ]


def test_pickled_functions(tmp_path: Path) -> None:
    """An environment with lambdas travels by cloudpickle."""
    environment = FesteEnvironment()
    environment.globals["today"] = lambda: "monday"
    environment.filters["twice"] = lambda text: text * 2
    prompt = Prompt("{{ today() }} {{ x|twice }}", environment=environment)
    copy = pickle.loads(cloudpickle.dumps(prompt))
    assert rendered(copy, x="a") == "monday aa"
    assert copy == prompt
    assert copy.environment is not environment
    file = tmp_path / "op.pickle"
    file.write_bytes(cloudpickle.dumps(prompt._op))
    code = f"import pickle; print(pickle.load(open({str(file)!r}, 'rb')).fn(x='a'))"
    assert run(code) == "monday aa\n"


def test_errors_pickle() -> None:
    """The errors of a prompt arrive whole in another process."""
    prompt = Prompt("{{ x }}")
    for call in (
        prompt,
        lambda: prompt(x=1, y=2),
        lambda: prompt(x={1}),
        lambda: Prompt("{{"),
    ):
        with pytest.raises(FesteError) as caught:
            call()
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (type(copy), str(copy)) == (type(caught.value), str(caught.value))
        assert HERE in copy.origin


def test_imports_are_late() -> None:
    """Jinja is imported for the first template, langcodes for the first language but English."""
    out = run(
        "import sys, feste.prompt\n"
        "print([m for m in ('jinja2', 'langcodes', 'pydantic', 'numpy') if m in sys.modules])\n"
        "feste.prompt.Prompt('x')\n"
        "print([m for m in ('jinja2', 'langcodes', 'pydantic', 'numpy') if m in sys.modules])\n"
    )
    assert out.splitlines() == ["[]", "['jinja2']"]


def test_threads() -> None:
    """Prompts are rendered by many threads at once, also while they are compiled and changed."""
    environment = FesteEnvironment()
    environment.globals["g"] = "g"
    from feste.prompt import compiler

    compiler.compiled.cache_clear()
    prompts = [
        Prompt(
            f"{i} {{% for w in words %}}{{{{ w|upper }}}}{{{{ g }}}} {{% endfor %}}",
            environment=environment,
        )
        for i in range(8)
    ]
    copies = pickle.loads(pickle.dumps(prompts))

    def work(n: int) -> str:
        environment.globals[f"other{n % 5}"] = n
        return rendered(copies[n % 8], words=[f"w{n}", "x"])  # type: ignore[no-any-return]

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(800)))
    assert results == [f"{n % 8} W{n}g Xg " for n in range(800)]


def test_prompts_as_constants() -> None:
    """A prompt can be given to a task, and counts by content there."""

    @feste.task
    def source_of(prompt: Any) -> str:
        return str(prompt.source)

    nodes = [source_of(Prompt(t))._node for t in ("a", "b", "a")]
    assign(nodes)
    prints = [node.draw.fingerprint for node in nodes if node.draw]
    assert prints[0] == prints[2] != prints[1]
    assert source_of(Prompt("a {{ x }}")).compute() == "a {{ x }}"


def test_templates_are_made_in_one_place_of_the_code() -> None:
    """Outside the sandbox's module no environment of Jinja, and nowhere a template from a text."""
    import ast

    found = set()
    packages = Path(__file__).parents[2]
    for path in packages.glob("*/src/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours = "jinja2" in path.read_text(encoding="utf-8")
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Call, ast.ClassDef)):
                continue
            used = [node.func] if isinstance(node, ast.Call) else node.bases
            for each in used:
                name = ast.unparse(each).rpartition(".")[2]
                if name in ("from_string", "get_template", "overlay", "compile_expression"):
                    found.add((path.name, name))
                if (
                    ours
                    and (name.endswith("Environment") or name in ("Template", "NativeTemplate"))
                    and name != "FesteEnvironment"
                    and path.name != "template.py"
                ):
                    found.add((path.name, name))

    assert found <= {
        ("sandbox.py", "ImmutableSandboxedEnvironment"),
        ("including.py", "Template"),
        ("cutting.py", "Template"),  # a node of a syntax tree
    }
    assert ("sandbox.py", "ImmutableSandboxedEnvironment") in found
