"""A prompt rendered in two steps is exactly the prompt rendered in one, errors included."""

from __future__ import annotations

from typing import Any

import cloudpickle
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from jinja2 import pass_context
from jinja2.utils import Namespace

import feste
from feste import context
from feste.errors import FesteError, PlainDataError, PromptError
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization import FoldOptimization, PassContext
from feste.prompt import ChatPrompt, FesteEnvironment, Prompt
from feste.prompt.limits import STEP_LIMIT, TEXT_LIMIT
from feste.prompt.segments import PartialPromptOp, segments_of


@feste.task
def later(value: Any = None) -> Any:
    return value


def shout(value: Any) -> str:
    return str(value).upper() + "!"


def bracketed(value: Any = "", caller: Any = None) -> str:
    return f"<{caller() if caller else value}>"


def environment(**functions: Any) -> FesteEnvironment:
    """Globals and filters without context, and a namespace that a template can write to."""
    made = FesteEnvironment()
    made.filters["shout"] = shout
    made.globals.update(g=["x", "y"], ns=Namespace(n="old"), f=bracketed)
    made.globals.update(functions)
    return made


@pass_context
def seen(context: Any, value: Any = "") -> str:
    """Tell what is in Jinja's context: a global or a filter."""
    return f"{value}{sorted(name for name in context.get_all() if name in 'abcd')}"


def fold(node: Node) -> Node:
    """The node after the pass."""
    graph = FoldOptimization().apply(FesteGraph.of([node]), PassContext(context.settings()))
    return graph.nodes[node.key]


def outcome(op: Any, values: dict[str, Any]) -> Any:
    """What an op gives, or the error that it raises."""
    try:
        return op.fn(**values)
    except FesteError as error:
        return type(error), str(error)


def both(prompt: Prompt | ChatPrompt, known: dict[str, Any], pending: dict[str, Any]) -> Node:
    """Check that two steps give what one gives, and return the node after the first step."""
    node = prompt(**known, **{name: later(value) for name, value in pending.items()})._node
    made = fold(node)
    values = {name: pending.get(name, value) for name, value in made.kwargs.items()}
    got = made.value if made.value is not PENDING else outcome(made.op, values)

    assert got == outcome(node.op, known | pending)
    return made


def shape(prompt: Prompt | ChatPrompt, **known: Any) -> list[list[Any]]:
    """The segments of each message: texts, and the names of holes; other variables are pending."""
    waiting = {name: later() for name in prompt.variables() - known.keys()}
    found = segments_of(prompt(**known, **waiting)._node)
    return [[p if isinstance(p, str) else set(p.names) for p in parts] for parts in found]


# --- templates at random -----------------------------------------------------------------------------

safe = (
    "a b c d i k a b c d g a|length d|upper|string a|shout b|default('-') k|default('-') b|join('+') "
    "f(c) f() a|map('shout')|list 1 'text' range(3)|list a~b a==b c|list i|default('-')"
).split()
risky = "a.x b[0] 1/a|length seen() loop.index c|sum".split()
atoms = st.sampled_from(safe * 3 + risky)
conditions = st.sampled_from(
    "a|not b|c is defined|k is defined|i is undefined|d is none|a == b|m is defined".split("|")
)
BLOCKS = {
    "if": "{% if CONDITION %}BODY{% elif CONDITION %}BODY{% else %}BODY{% endif %}",
    "for": "{% for NAME in ATOM %}BODY{% else %}none{% endfor %}",
    "with": "{% with NAME = ATOM %}BODY{% endwith %}",
    "filter": "{% filter upper %}BODY{% endfilter %}",
    "own": "{% with ns = namespace(n='old') %}{% for i in ATOM %}{% set ns.n = i %}{% endfor %}BODY{{ ns.n }}{% endwith %}",
    "set": "{% set NAME = ATOM %}",
    "capture": "{% set k %}BODY{% endset %}",
    "autoescape": "{% autoescape true %}BODY{% endautoescape %}",
    "macro": "{% macro m(i=1) %}BODY{% endmacro %}{{ m() }}",
    "call": "{% call f() %}BODY{% endcall %}",
    "start": "{% set ns = namespace(n='old') %}",
}
INSIDE = ["print"] * 5 + ["text"] * 3 + list(BLOCKS)
#: At the top statements that end the cutting are rarer, so that most templates are cut.
AT_TOP = ["print"] * 14 + ["text"] * 7 + ["if", "for", "with", "filter", "own"] * 2 + list(BLOCKS)


@st.composite
def templates(draw: st.DrawFn, kinds: list[str] = AT_TOP, depth: int = 0) -> str:
    """The source of a template, or of a part of one."""
    made = []
    for _ in range(draw(st.integers(1, 3 if depth else 7))):
        kind = draw(st.sampled_from(kinds))
        if kind == "text" or (depth == 3 and kind in BLOCKS):
            made.append(draw(st.sampled_from(["text ", "\n", "é", "{ ", "Q: "])))
        elif kind == "print":
            made.append("{{ " + draw(atoms) + " }}")
        else:
            source = BLOCKS[kind]
            for word, drawn in (
                ("CONDITION", conditions),
                ("NAME", st.sampled_from("ikab")),
                ("ATOM", atoms),
                ("BODY", templates(INSIDE, depth + 1)),
            ):
                while word in source:
                    source = source.replace(word, draw(drawn), 1)
            made.append(source)
    return "".join(made)


plain_values = st.sampled_from(
    ["word", "", "<&>", ["p", "q"], [], {"x": "in"}, {"x": ["p"]}, [1, [2]], [None, True], 1, None]
)
late_places = st.sets(st.integers(0, 5), min_size=1, max_size=2)


@given(
    templates(),
    st.fixed_dictionaries(dict.fromkeys("abcdik", plain_values)),
    late_places,
    st.integers(0, 9),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_two_steps_are_one(source: str, values: dict[str, Any], late: set[int], odds: int) -> None:
    """Whatever the template and whichever variables are known first: same text or same error."""
    made = environment(seen=seen)
    del made.globals["ns"]  # a namespace of all renderings would be an effect
    made.filters["seen" if odds == 0 else "other"] = seen if odds == 0 else shout
    try:
        prompt = Prompt(source, environment=made)
    except PromptError:
        assume(False)
    template = prompt._op.templates[0].compiled()
    optional = template.allowed - template.required if odds < 5 else frozenset()
    values = {name: values.get(name, "v") for name in prompt.variables() - optional}
    names = sorted(values)
    chosen = {names[place % len(names)] for place in late if names}
    pending = {name: value for name, value in values.items() if name in chosen}
    known = {name: value for name, value in values.items() if name not in chosen}

    node = prompt(**known, **{name: later(value) for name, value in pending.items()})._node
    folded = fold(node)
    given = {name: pending.get(name, value) for name, value in folded.kwargs.items()}
    got = folded.value if folded.value is not PENDING else outcome(folded.op, given)

    assert got == outcome(node.op, values)
    event(f"{type(folded.op).__name__}, {type(got).__name__}")
    if isinstance(got, str):
        texts = [part for part in segments_of(folded)[0] if isinstance(part, str)]
        place = 0
        for text in texts:
            assert text in got[place:]
            place = got.index(text, place) + len(text)


# --- where a template may be cut ---------------------------------------------------------------------


def test_texts_and_known_expressions_are_joined() -> None:
    """A text before the first hole is the whole constant beginning."""
    prompt = Prompt(
        "Dear {{ a }},\n{{ b|upper }} and {{ c }}, {{ 1 + 1 }}{{ g[0] }}.",
        environment=environment(),
    )

    assert shape(prompt, a="A", b="b") == [["Dear A,\nB and ", {"c"}, ", 2x."]]
    assert shape(prompt, a="A", c="C") == [["Dear A,\n", {"b"}, " and C, 2x."]]
    assert shape(prompt) == [["Dear ", {"a"}, ",\n", {"b"}, " and ", {"c"}, ", 2x."]]
    assert shape(prompt, a=1, b="", c=[]) == [["Dear 1,\n and [], 2x."]]
    assert shape(Prompt("{{ a }}{{ a }}{{ p }}"), a="A") == [["AA", {"p"}]]
    assert shape(Prompt("")) == shape(Prompt("{{ a }}"), a="") == [[]]


def test_statements_in_a_scope_of_their_own_are_pieces() -> None:
    """Loops, conditions, filters and with blocks are cut off, also with names bound inside."""
    source = (
        "{% for i in a %}{% set k = i %}{{ k }};{% endfor %}"
        "{% if b %}{{ b }}{% endif %}"
        "{% with k = a %}{% set j = k %}{{ j|length }}{% endwith %}"
        "{% filter upper %}{% set k %}x{% endset %}{{ k }}{% endfilter %}"
        "{% for i in c %}{{ i }}{{ a }}{% endfor %}{{ a|first }}"
    )

    assert shape(Prompt(source), a=[1, 2], b="yes") == [["1;2;yes2X", {"c"}, "1"]]
    assert shape(Prompt(source), a=[1, 2]) == [["1;2;", {"b"}, "2X", {"c"}, "1"]]


@pytest.mark.parametrize(
    "statement",
    [
        "{% set k = a %}",
        "{% set k %}{{ a }}{% endset %}",
        "{% if a %}{% set k = a %}{% endif %}",
        "{% macro m() %}{{ a }}{% endmacro %}",
        "{% block b %}{{ a }}{% endblock %}",
        "{% call f() %}{{ a }}{% endcall %}",
        "{% autoescape true %}{{ a }}{% endautoescape %}",
        "{% for i in a %}{% set ns.n = i %}{% endfor %}",
        "{% if a %}{% autoescape true %}{{ a }}{% endautoescape %}{% endif %}",
    ],
)
def test_what_may_leave_something_behind_is_not_cut_off(statement: str) -> None:
    """From the first such statement on the template is one piece: what stands before is not."""
    prompt = Prompt(
        f"{{{{ a }}}}{statement}{{{{ a }}}}{{{{ p }}}}{{{{ a }}}}", environment=environment()
    )

    known = dict.fromkeys(prompt.variables() - {"p"}, "A")

    assert shape(prompt, **known) == [["A", {"p"}]]
    both(prompt, known, {"p": "P"})


@pytest.mark.parametrize(
    "source",
    [
        "{% set k = p %}{{ k|default('d') }}",
        "{% if p %}{% set k = 1 %}{% endif %}{{ k|default('d') }}",
        "{% set k %}{{ p }}{% endset %}{{ k|default('d') }}",
        "{% macro m() %}{{ p }}{% endmacro %}{{ m is defined }}",
        "{% for i in [p] %}{% set ns.n = i %}{% endfor %}{{ ns.n }}",
        "{% if p %}{% macro m() %}{% endmacro %}{% endif %}{{ m is defined }}",
    ],
)
def test_state_of_a_hole_is_seen_by_what_follows(source: str) -> None:
    """A later part that mentions nothing unknown may depend on what a hole did."""
    made = environment()

    assert not isinstance(
        both(Prompt(source, environment=made), {}, {"p": "P"}).op, PartialPromptOp
    )


def test_loop_variables_count_as_mentioned() -> None:
    """A name bound in a piece that is also pending makes it a hole: more than needed, and safe."""
    prompt = Prompt("{% for p in a %}{{ p }}{% endfor %}{{ p }}{{ a }}")

    assert shape(prompt, a=[1]) == [[{"p"}, "[1]"]]
    both(prompt, {"a": [1]}, {"p": "P"})


@pytest.mark.parametrize("where", ["filters", "globals"])
def test_functions_that_read_the_whole_context(where: str) -> None:
    """They would miss what is not known yet, so nothing that could call one is rendered early."""
    made = environment(holder={"seen": seen})
    getattr(made, where)["seen"] = seen
    sources = [
        "{{ ''|seen }}",
        "{{ ['']|map('se' ~ 'en')|list }}",
        "{% filter seen %}{% endfilter %}",
    ]
    if where == "globals":
        sources = ["{{ seen() }}", "{{ holder['seen']() }}", "{% call seen() %}{% endcall %}"]
    for source in sources:
        prompt = Prompt(f"{{{{ a }}}}{source}{{{{ p }}}}", environment=made)
        chat = ChatPrompt(prompt, Prompt("{{ b }}", environment=made))
        both(prompt, {"a": "A"}, {"p": "P"})
        both(prompt, {"a": "A", "p": "P"}, {})
        both(chat, {"a": "A", "p": "P", "b": "B"}, {})
        both(chat, {"a": "A", "b": "B"}, {"p": "P"})


def test_a_callable_object_that_reads_the_context() -> None:
    """Jinja passes the context to the method ``__call__`` too."""

    class Seen:
        @pass_context
        def __call__(self, context: Any) -> str:
            return seen(context)

    prompt = Prompt("{{ a }}{{ o() }}{{ p }}", environment=environment(o=Seen()))
    both(prompt, {"a": "A"}, {"p": "P"})


# --- errors and limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "cut"),
    [
        ("{{ a }}\n{{ 1 / p }}\n{{ a }}", True),
        ("{{ a }}\n{% for i in p %}\n{{ i.x }}{% endfor %}", True),
        ("{{ a }}\n{{ p }}\n{{ 1 / a }}", False),
        ("{{ 1 / p }}\n{{ 1 / a }}", False),
        ("{{ a }}{{ p }}{{ nothing|default('') }}", True),
        ("{{ a }}{{ p }}{{ f.x }}", False),
    ],
)
def test_errors_are_those_of_the_whole(source: str, cut: bool) -> None:
    """Text and line are the same; a constant part that fails leaves the prompt as it is."""
    prompt = Prompt(source, environment=environment())
    made = both(prompt, {"a": 0}, {"p": 0})

    assert isinstance(made.op, PartialPromptOp) is cut
    if not cut:
        assert shape(prompt, a=0) == [[{"p"}]]


def loop(turns: str) -> str:
    return f"{{% for i in range({turns}) %}}{{% endfor %}}"


@pytest.mark.parametrize("late", ["n", "m", "nm", ""])
@pytest.mark.parametrize("extra", [0, 1])
def test_steps_count_for_the_rendering_as_a_whole(late: str, extra: int) -> None:
    """Half of the steps in each of two loops is as much as a template may take, in two steps too."""
    values = {"n": STEP_LIMIT // 2 - 50, "m": STEP_LIMIT // 2 + 50 + extra}
    exact = Prompt(f"{loop('n')}{{{{ t }}}}{loop('m')}")
    pending = {name: values.pop(name) for name in late}
    made = both(exact, values | {"t": "t"}, pending)

    got = outcome(exact._op, values | {"t": "t"} | pending)
    assert got == "t" if not extra else "steps" in got[1]
    assert made.kwargs.keys() == set(late) or not late


def test_the_text_counts_as_a_whole() -> None:
    """Two halves of the largest text are allowed, and not one character more."""
    half = "x" * (TEXT_LIMIT // 2)
    prompt = Prompt("{{ a }}{{ p }}")
    for more in ("", "y"):
        both(prompt, {"a": half}, {"p": half + more})
        both(prompt, {"a": half, "p": half + more}, {})
    assert outcome(fold(prompt(a=half, p=later())._node).op, {"p": half})[-1] == "x"


def test_values_may_be_as_large_as_all_variables_allow() -> None:
    """What a template may build depends on all values, also on those that come later."""
    half, calls = "x" * (TEXT_LIMIT // 2), []
    made = environment(note=lambda value: calls.append(value) or "")
    early = Prompt(
        "{{ note([a, a, a]|length) }}{{ [a, a, a]|length }}{{ p|length }}", environment=made
    )
    late = Prompt("{{ note(1) }}1{{ 'x' ~ a }}{{ note([p, p, p, a]|length) }}", environment=made)

    assert isinstance(both(early, {"a": half}, {"p": half}).op, PartialPromptOp)
    assert isinstance(both(late, {"a": ""}, {"p": half}).op, PartialPromptOp)
    assert calls == [3, 3, 1, 4, 1, 4]  # in two steps, then as a whole
    both(Prompt("{{ ([a] * 9)|length }}{{ p|length }}"), {"a": half}, {"p": half + half[:-1]})


def test_late_values_must_be_plain_data() -> None:
    """The error for a late value is that of the whole, as are those of the constants."""
    node = Prompt("{{ a }}{{ p }}")(a="A", p=later())._node
    for op in (node.op, fold(node).op):
        with pytest.raises(PlainDataError, match="variable p"):
            op.fn(p={1}, **({} if isinstance(op, PartialPromptOp) else {"a": "A"}))  # type: ignore[attr-defined]


def test_a_value_is_not_shared_with_what_changes_it() -> None:
    """A function that changes its argument changes a copy, in each rendering."""

    def empty(items: list[Any]) -> str:
        return str([items.pop() for _ in range(len(items))])

    prompt = Prompt(
        "{{ a }}{% if p %}{{ empty(b) }}{% endif %}", environment=environment(empty=empty)
    )
    node = prompt(a="A", b=[1, 2], p=later())._node
    op: Any = fold(node).op

    assert [op.fn(p=1), op.fn(p=1)] == ["A[2, 1]", "A[2, 1]"]
    early = Prompt("{{ empty(b) }}{{ p }}", environment=environment(empty=empty))
    node = early(b=[1, 2], p=later())._node
    assert segments_of(node)[0][0] == "[2, 1]"
    assert node.kwargs["b"] == [1, 2]


# --- the op ------------------------------------------------------------------------------------------


def test_the_op_travels() -> None:
    """It goes to other processes with its texts and compiles its holes there."""
    made = environment()
    del made.globals["ns"]
    chat = ChatPrompt("You are {{ a }}.", "{{ a|shout }} {{ p }}", environment=made)
    node = fold(chat(a="me", p=later())._node)
    copy = cloudpickle.loads(cloudpickle.dumps(node.op))

    assert isinstance(copy, PartialPromptOp)
    assert copy.fn(p="P") == node.op.fn(p="P")  # type: ignore[attr-defined]
    assert [m["content"] for m in copy.fn(p="P")] == ["You are me.", "ME! P"]
    assert (copy.identity, copy.kind, copy.name) == (node.op.identity, "prompt", "prompt")
    assert segments_of(node)[1][0] == "ME! "


def test_identity_is_that_of_template_and_constants() -> None:
    """Equal ops have equal identities; other constants, or the whole prompt, have others."""
    prompt = Prompt("{{ a }}{{ p }}")
    ops = [fold(prompt(a=a, p=later())._node).op for a in ("x", "x", "y", 1, True)]
    found = [op.identity for op in ops] + [prompt._op.identity]

    assert found[0] == found[1]
    assert len(set(found)) == 5


def test_segments_of_messages() -> None:
    """One for each message, also of prompts that are rendered or not known at all."""
    chat = ChatPrompt("You are {{ a }}.", "{{ p }}?")

    assert shape(chat, a="me") == [["You are me."], [{"p"}, "?"]]
    assert shape(chat, a="me", p="Why") == [["You are me."], ["Why?"]]
    node = chat(a="me", p="Why")._node
    assert segments_of(fold(node)) == (("You are me.",), ("Why?",))
    assert segments_of(fold(chat(a="me", p=later())._node))[0] == ("You are me.",)


def test_a_missing_variable_is_not_another_one() -> None:
    """Two optional variables of one piece: which is given matters, not only the value."""
    prompt = Prompt(
        "{% if a is defined %}a{% endif %}{% if b is defined %}b{% endif %}{{ a|d('-') ~ b|d('-') }}{{ p }}"
    )
    nodes = [prompt(p=later("p"), **given) for given in ({"a": "x"}, {"b": "x"}, {})]

    assert feste.compute(*nodes) == ("ax-p", "b-xp", "--p")


def test_impure_names_are_holes() -> None:
    """What may differ from call to call has no text before the run; the rest has."""
    made = environment(now=lambda: "late")
    made.impure.update(["now", "shout"])
    prompt = Prompt("{{ a }} {{ now() }} {{ a|shout }} {{ a }}", environment=made)

    assert shape(prompt, a="A") == [["A ", {"now"}, " ", {"shout"}, " A"]]
    both(prompt, {"a": "A"}, {})
