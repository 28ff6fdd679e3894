"""Whatever a template says and its variables hold: a text, the same each time, or a PromptError."""

from __future__ import annotations

import pickle
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import feste
from feste.errors import PromptError, RunFailed
from feste.prompt import FesteEnvironment, Prompt
from feste.prompt.limits import TEXT_LIMIT, size
from tests.fuzz.sizes import cases

NAMES = ["x", "y", "loop", "ns", "m", "range", "dict", "self", "super", "caller", "_z", "class"]
FILTERS = (
    "upper lower list join('-') tojson length default('d') first last sort unique e safe trim title "
    "map('upper') select batch(2) slice(2) replace('a','b') indent(2) wordwrap(3) center(9) int float "
    "abs sum min max reverse groupby('a') dictsort attr('x') striptags urlencode xmlattr pprint round "
    "format(1) string wordcount truncate(3) filesizeformat items rejectattr('a') nofilter "
    "round(-9999999) round(-2) center(-1) batch(-1) slice(-1) wordwrap(-1) indent(-1) truncate(-1) "
    "map(attribute='a') map(attribute='0.0.0') map(attribute=-1) selectattr('a.b') sum(start=[]) "
    "sum(start=-1) sum('a',()) map('attr','update') map('round',-9999999) sort(attribute='0.a')"
).split()
TESTS = (
    "defined undefined none string number mapping iterable odd in([1]) eq(1) upper notest "
    "divisibleby(-7) in(x) sameas(x) lower".split()
)
ATTRIBUTES = (
    "a b __class__ __init__ _x format keys items append 0 1:2 ::-1 -1 update pop clear fromkeys copy "
    "values union isdisjoint maketrans split"
).split()
#: Calls of methods of a class, and of methods with one argument.
CALLS = (
    "dict.update(@,a=x) dict.pop(@,'a') dict.fromkeys(@) dict.items(@) {}.fromkeys(@) dict(@) "
    "cycler.reset(@) x.update(@) x.get(@) x.count(@) ''.join(@) 'a'.startswith(@) namespace(@) "
    "x.keys().isdisjoint(@)"
).split()

atoms = st.one_of(
    st.sampled_from(NAMES),
    st.integers(-3, 1 << 70).map(str),
    st.text(max_size=4).map(repr),
    st.sampled_from(
        ["[]", "{}", "()", "none", "true", "1.5", "'{0}'", "'%s'", "[1, 'a']", "{'a': x}"]
    ),
)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    both = st.tuples(inner, inner)
    operators = st.sampled_from("+ - * ** / // % ~ == < in and or".split())
    return st.one_of(
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda p: f"({p[0]})|{p[1]}"),
        st.tuples(inner, st.sampled_from(TESTS)).map(lambda p: f"({p[0]}) is {p[1]}"),
        st.tuples(inner, st.sampled_from(ATTRIBUTES)).map(lambda p: f"({p[0]})[{p[1]!r}]"),
        st.tuples(inner, st.sampled_from(ATTRIBUTES)).map(lambda p: f"({p[0]}).{p[1]}"),
        st.tuples(inner, operators, inner).map(" ".join),
        st.tuples(inner, inner).map(lambda p: f"({p[0]})({p[1]})"),
        both.map(lambda p: f"[{p[0]}, {p[1]}]"),
        both.map(lambda p: f"({p[0]} if {p[1]} else 1)"),
        inner.map(lambda one: f"range({one})"),
        st.tuples(st.sampled_from(CALLS), inner).map(lambda p: p[0].replace("@", p[1])),
    )


expressions = st.recursive(atoms, larger, max_leaves=6)
noise = st.text(max_size=8) | st.sampled_from(
    ["{{", "}}", "{%", "%}", "{#", "#}", "{", "-", "\0", "\ud800"]
)


def statements(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    part = st.tuples(expressions, inner)
    return st.one_of(
        part.map(lambda p: "{% if " + p[0] + " %}" + p[1] + "{% else %}-{% endif %}"),
        part.map(lambda p: "{% for x in " + p[0] + " %}" + p[1] + "{% endfor %}"),
        part.map(lambda p: "{% for x in " + p[0] + " recursive %}{{ loop(x) }}" + p[1] + "{% endfor %}"),
        part.map(lambda p: "{% macro m(x) %}" + p[1] + "{% endmacro %}{{ m(" + p[0] + ") }}"),
        part.map(lambda p: "{% call(y) m(" + p[0] + ") %}" + p[1] + "{% endcall %}"),
        part.map(lambda p: "{% with y = " + p[0] + " %}" + p[1] + "{% endwith %}"),
        part.map(lambda p: "{% filter upper %}" + p[1] + "{% endfilter %}"),
        part.map(lambda p: "{% block b %}" + p[1] + "{% endblock %}"),
        inner.map(lambda one: "{% set y %}" + one + "{% endset %}"),
        expressions.map(lambda one: "{% set y = " + one + " %}"),
        expressions.map(lambda one: "{% set ns = namespace(a=" + one + ") %}{% set ns.b = ns %}"),
        expressions.map(lambda one: "{% include " + one + " %}"),
        expressions.map(lambda one: "{% import " + one + " as m %}"),
        expressions.map(lambda one: "{% extends " + one + " %}"),
        st.tuples(inner, inner).map("".join),
    )  # fmt: skip


texts = st.recursive(
    expressions.map(lambda one: "{{ " + one + " }}") | st.text(max_size=6) | noise,
    statements,
    max_leaves=6,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def doubled(value: Any, times: int) -> Any:
    """A list that holds the same list twice, again and again."""
    for _ in range(times):
        value = [value, value]
    return value


shared = st.builds(doubled, plain, st.sampled_from([1, 3, 30, 60]))


def outcome(prompt: Prompt, values: dict[str, Any], eager: bool) -> str:
    """The text, or what the error says up to its place in this file."""
    try:
        if eager:
            with feste.context.set(eager=True):
                return str(prompt(**values))
        return prompt(**values).compute()
    except PromptError as error:
        return f"refused: {error}".split(" (at ")[0]
    except RunFailed as failed:
        (error,) = failed.errors
        assert isinstance(error, PromptError), error
        return f"refused: {error}".split(" (at ")[0]


def check(source: str, values: list[Any]) -> None:
    try:
        prompt = Prompt(source, environment=FesteEnvironment())
    except PromptError:
        return
    given = {name: values[i % len(values)] for i, name in enumerate(sorted(prompt.variables()))}
    before = pickle.dumps(given)
    made = outcome(prompt, given, eager=False)

    assert outcome(prompt, given, eager=False) == made
    assert outcome(prompt, given, eager=True) == made
    assert size(made) <= TEXT_LIMIT
    assert pickle.dumps(given) == before


@cases(35)
@given(texts, st.lists(plain | shared, min_size=1, max_size=4))
def test_templates_give_a_text_or_an_error_of_prompts(source: str, values: list[Any]) -> None:
    """Sentences of Jinja's grammar: refused, or the same text lazily, eagerly and again."""
    check(source, values)


@cases(35)
@given(st.lists(texts | noise, max_size=5).map("".join), st.lists(plain, min_size=1, max_size=2))
def test_noise_gives_a_text_or_an_error_of_prompts(source: str, values: list[Any]) -> None:
    """Pieces of sentences, braces and any characters."""
    check(source, values)


@cases(25)
@given(plain | shared)
def test_variables_of_any_shape_are_rendered_or_refused(value: Any) -> None:
    """Plain data of any shape is printed, counted and looped over."""
    for source in (
        "{{ x }}",
        "{{ x|tojson }}",
        "{{ x|pprint }}",
        "{{ x|string|length }}",
        "{% for i in x %}{{ i }}{{ loop.index }}{% endfor %}",
        "{{ x.a }}{{ x['b'] }}{{ x[0] }}",
    ):
        check(source, [value])
