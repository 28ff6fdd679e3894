"""Equal things are computed once, and only where nobody could notice."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import feste
from feste import context
from feste.backend import Backend, Determinism, Params, Secret, operation
from feste.context import settings
from feste.graph import FesteGraph
from feste.node import PENDING
from feste.optimization import (
    CommonSubexpressionOptimization,
    FoldOptimization,
    Level,
    Optimizer,
    Plan,
)
from feste.optimization.rules import exact
from feste.prompt import ChatPrompt, Prompt
from feste.testing import FakeBackend, FakeParams
from feste.testing.odd_backend import OddBackend, VoicedParams

GREEDY = FakeParams(temperature=0)


@feste.task(pure=True)
def pure(*args: Any, **kwargs: Any) -> Any:
    return args


@feste.task
def effect(*args: Any) -> Any:
    return args


def merged(*nodes: Any) -> Plan:
    """The plan of the pass alone."""
    graph = FesteGraph.collect(*nodes)[0]
    return Optimizer([CommonSubexpressionOptimization()]).run(graph, settings(strict=True))


def are_one(one: Any, two: Any) -> bool:
    """Whether the pass computes two nodes once."""
    wanted = merged(one, two).graph.wanted()
    return wanted[0] == wanted[1]


llm, odd = FakeBackend(), OddBackend()


# --- by class ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "one"),
    [
        (lambda: pure(1), True),
        (lambda: pure(1) + 2, True),
        (lambda: pure("a")["x"].y, True),
        (lambda: Prompt("Hi")() + "!", False),  # two templates, two ops: see below
        (lambda: llm.embed("Hi"), True),
        (lambda: llm.chat("Hi", GREEDY), True),
        (lambda: llm.complete("Hi", FakeParams(seed=3, temperature=1.0)), True),
        (lambda: llm.chat("Hi"), False),
        (lambda: llm.complete("Hi", FakeParams(temperature=0.5)), False),
        (lambda: effect(1), False),
        (lambda: pure(1).strip(), False),
    ],
)
def test_pure_and_greedy_are_merged_sample_and_effect_never(make: Any, one: bool) -> None:
    """A SAMPLE is a draw of its own, an EFFECT may be seen outside: equal ones stay two."""
    assert are_one(make(), make()) is one


def test_the_same_node_twice_is_one_anyway() -> None:
    """A draw is shared by using its node twice."""
    call = llm.chat("Hi")

    assert merged(call, [call]).graph.wanted() == [call.key]


def test_voting_over_samples_is_not_destroyed() -> None:
    """Five equal questions get five answers, however they are optimized."""
    backend = FakeBackend()
    ask = Prompt("What is {{ x }}?")
    (answers,) = feste.compute([backend.chat(ask(x="it")) for _ in range(5)])

    assert len(set(answers)) == 5
    assert [r.items for r in backend.requests] == [5]


def test_equal_samples_are_remarked() -> None:
    """Explain says that equal calls are kept apart, and where they are."""
    nodes = [llm.chat("Hi") for _ in range(3)]
    (report,) = merged(*nodes).passes

    assert [(r.kind, r.text) for r in report.remarks] == [("missed", "3 equal calls stay 3 draws")]
    assert report.remarks[0].origins == (nodes[0]._node.where,)


def test_merged_calls_are_accounted() -> None:
    """The plan says of each call that is gone where its answer comes from."""
    one, two = llm.chat("Hi", GREEDY), llm.chat("Hi", GREEDY)
    made = merged(one, two)

    assert made.accounted == {two.key: f"merged into {one.key}"}
    assert made.passes[0].level is Level.E1G


# --- what makes calls equal -------------------------------------------------------------------------


def test_inputs_count_after_merging() -> None:
    """Whole equal subgraphs collapse, from the inputs on, in one round."""

    def tree() -> Any:
        vectors = [llm.embed(t) for t in "ab"]
        return pure({"all": vectors, "sum": pure(*vectors)})

    plan = merged(tree(), tree())

    assert plan.graph.wanted()[0] == plan.graph.wanted()[1]
    assert len(plan.graph.nodes) == 4


def test_draws_are_different_inputs() -> None:
    """Equal calls on two draws of one question are different calls."""
    one, two = llm.chat("Hi"), llm.chat("Hi")

    assert not are_one(llm.chat(one, GREEDY), llm.chat(two, GREEDY))
    assert not are_one(pure(one), pure(two))
    assert are_one(llm.chat(one, GREEDY), llm.chat(one, GREEDY))


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "text": (lambda: llm.embed("a"), lambda: llm.embed("b")),
    "operation": (lambda: llm.chat("a", GREEDY), lambda: llm.complete("a", GREEDY)),
    "model": (lambda: llm.embed("a"), lambda: FakeBackend("fake-2").embed("a")),
    "parameter": (
        lambda: llm.chat("a", GREEDY),
        lambda: llm.chat("a", FakeParams(temperature=0, max_tokens=1)),
    ),
    "seed": (
        lambda: llm.chat("a", FakeParams(seed=1)),
        lambda: llm.chat("a", FakeParams(seed=2)),
    ),
    "type of a parameter": (
        lambda: llm.chat("a", FakeParams(temperature=0)),
        lambda: llm.chat("a", FakeParams(temperature=0.0)),
    ),
    "parameter that is not sent": (
        lambda: odd.say("a", VoicedParams(temperature=0)),
        lambda: odd.say("a", VoicedParams(temperature=0, voice="loud")),
    ),
    "type of a constant": (lambda: pure(1), lambda: pure(1.0)),
    "bool": (lambda: pure(1), lambda: pure(True)),
    "list or tuple": (lambda: pure([1]), lambda: pure((1,))),
    "list or tuple with a node": (lambda: pure([pure(1)]), lambda: pure((pure(1),))),
    "sign of zero": (lambda: pure(0.0), lambda: pure(-0.0)),
    "text or bytes": (lambda: pure("a"), lambda: pure(b"a")),
    "order of a dict": (lambda: pure({"a": 1, "b": 2}), lambda: pure({"b": 2, "a": 1})),
    "type of a key": (lambda: pure({1: "a"}), lambda: pure({"1": "a"})),
    "place of an input": (
        lambda: pure(pure(1), pure(2)),
        lambda: pure(pure(2), pure(1)),
    ),
    "name of an argument": (lambda: pure(a=1), lambda: pure(b=1)),
    "task": (lambda: pure("a"), lambda: feste.task(pure=True)(len)("a")),
    "object": (lambda: pure(object()), lambda: pure(object())),
    "set": (lambda: pure({1}), lambda: pure({2})),
    "attribute": (lambda: pure(1).real, lambda: pure(1).imag),
    "operator": (lambda: pure(1) + 1, lambda: 1 + pure(1)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_not_merged(name: str) -> None:
    """One difference anywhere, down to types and the sign of zero, keeps two nodes apart."""
    one, two = DIFFERENT[name]

    assert not are_one(one(), two())
    assert name in ("object", "set") or are_one(one(), one())


@pytest.mark.parametrize("how", [{"optimize": True}, {"optimize": False}, {"eager": True}])
def test_one_answer_is_read_as_each_call_wants(how: dict[str, bool]) -> None:
    """Calls that send the same but read it in two ways have two values, in every mode."""
    with context.set(**how):
        plain, loud = feste.compute(
            *[odd.say("a", VoicedParams(temperature=0, voice=voice)) for voice in ("plain", "loud")]
        )

    assert loud == plain.upper() != plain


def test_objects_are_compared_by_identity() -> None:
    """What Feste cannot look into must be the same object, equal is not enough."""

    @dataclasses.dataclass(frozen=True)
    class Point:
        x: int

    point = Point(1)

    assert are_one(pure(point), pure(point))
    assert not are_one(pure(point), pure(Point(1)))
    assert not are_one(pure(OrderedDict(a=1)), pure({"a": 1}))


def test_equal_functions_are_two_tasks() -> None:
    """Two closures of one name may do different things."""

    def make(n: int) -> Any:
        @feste.task(pure=True)
        def scaled(x: int) -> int:
            return n * x

        return scaled

    two, three = make(2)(5), make(3)(5)

    assert feste.compute(two, three) == (10, 15)


exact_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.floats(-1, 1), st.text(max_size=1)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.text(max_size=1), inner, max_size=2),
    ),
    max_leaves=4,
)


@given(exact_values, exact_values)
def test_exact_equality_is_equality_of_repr(one: Any, two: Any) -> None:
    """For plain data the test of equality is that of the written form."""
    assert (exact(one) == exact(two)) is (repr(one) == repr(two))


# --- clients ----------------------------------------------------------------------------------------


class Keyed(Backend):
    """A third party's backend that takes a key."""

    def __init__(self, api_key: Any = None, *, model: str = "m", tool: Any = None) -> None:
        self.key = api_key

    @operation(determinism=Determinism.PURE)
    async def embed(self, text: str) -> str:
        return f"{self.key} {text}"

    @embed.batch(max_items=10)
    async def embed_many(self, texts: list[str]) -> list[str]:
        return [f"{self.key} {t}" for t in texts]


class Other(Keyed):
    """Another class with the same name for its plugin."""

    plugin = Keyed.plugin


class Roaming(Keyed):
    """A backend that finds its key by itself."""

    found = "A"

    def __init__(self) -> None:
        self.key = Secret(self.found)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        return (self.key,)


def roaming(found: str) -> Roaming:
    made = Roaming()
    made.key = Secret(found)
    return made


CLIENTS: dict[str, tuple[Any, Any, bool]] = {
    "equal configuration": (lambda: FakeBackend(), lambda: FakeBackend(), True),
    "equal key": (lambda: Keyed("sk-a"), lambda: Keyed(api_key="sk-a"), True),
    "key by name": (lambda: Keyed(Secret("A")), lambda: Keyed(Secret("A")), True),
    "different literal keys": (lambda: Keyed("sk-a"), lambda: Keyed("sk-b"), False),
    "different literal keys by keyword": (
        lambda: Keyed(api_key="sk-a"),
        lambda: Keyed(api_key="sk-b"),
        False,
    ),
    "different names": (lambda: Keyed(Secret("A")), lambda: Keyed(Secret("B")), False),
    "literal and named": (lambda: Keyed("A"), lambda: Keyed(Secret("A")), False),
    "different keys that were found": (lambda: roaming("A"), lambda: roaming("B"), False),
    "model": (lambda: Keyed(model="a"), lambda: Keyed(model="b"), False),
    "class": (lambda: Keyed(), lambda: Other(), False),
    "objects": (lambda: Keyed(tool=object()), lambda: Keyed(tool=object()), False),
    "keys inside": (
        lambda: Keyed(tool={"authorization": "a"}),
        lambda: Keyed(tool={"authorization": "b"}),
        False,
    ),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_calls_of_clients_are_merged_only_if_these_are_alike(name: str) -> None:
    """Same class, configuration and key; calls of two accounts never get one answer."""
    one, two, alike = CLIENTS[name]

    assert are_one(one().embed("Hi"), two().embed("Hi")) is alike


def test_accounts_do_not_share_answers_nor_requests() -> None:
    """Run, not only planned: each key answers its own calls."""
    a, b = Keyed("sk-a"), Keyed("sk-b")
    nodes = [client.embed(t) for t, client in itertools.product("xy", (a, b))]
    (values,) = feste.compute(nodes)

    assert values == ["sk-a x", "sk-b x", "sk-a y", "sk-b y"]


# --- together with folding --------------------------------------------------------------------------


def folded(*nodes: Any) -> Plan:
    passes = [FoldOptimization(), CommonSubexpressionOptimization()]
    return Optimizer(passes).run(FesteGraph.collect(*nodes)[0], settings(strict=True))


def test_equal_rendered_prompts_are_equal_inputs() -> None:
    """Greedy calls on prompts of equal text are one call, also from two templates."""
    ask, again = Prompt("About {{ x }}"), Prompt("{{ a }} {{ b }}")
    nodes = [
        llm.chat(ask(x="it"), GREEDY),
        llm.chat(ask(x="it"), GREEDY),
        llm.chat(again(a="About", b="it"), GREEDY),
    ]
    talk = ChatPrompt(user="Hi {{ x }}")
    talks = [llm.chat(talk(x=1), GREEDY), llm.chat(talk(x=1), GREEDY)]
    wanted = folded(*nodes, *talks).graph.wanted()

    assert [len(set(wanted[:3])), len(set(wanted[3:]))] == [1, 1]


def test_different_rendered_prompts_are_different_inputs() -> None:
    """Text against messages, and one letter, make two calls; samples on equal prompts too."""
    ask, talk = Prompt("Hi {{ x }}"), ChatPrompt(user="Hi {{ x }}")
    nodes = [
        llm.chat(ask(x=1), GREEDY),
        llm.chat(ask(x=2), GREEDY),
        llm.chat(talk(x=1), GREEDY),
        llm.chat(ask(x=1)),
        llm.chat(ask(x=1)),
    ]

    assert len(set(folded(*nodes).graph.wanted())) == 5


def test_folding_remarks_prompts_that_do_not_render() -> None:
    """A prompt that fails is left for the run, where on_error decides."""
    good, bad = Prompt("{{ 6 / x }}")(x=3), Prompt("{{ 6 / x }}")(x=0)
    plan = Optimizer([FoldOptimization()]).run(FesteGraph.collect(good, bad)[0], settings())
    values = feste.compute(good, bad, on_error="return")

    assert [(r.kind, r.count) for r in plan.passes[0].remarks] == [("missed", 1), ("applied", 1)]
    assert plan.graph.nodes[good.key].value == "2.0"
    assert (values[0], type(values[1])) == ("2.0", feste.errors.PromptError)


def test_folding_leaves_the_users_node_alone() -> None:
    """A plan is not a run: explain must not give nodes values."""
    node = Prompt("Hi")()
    feste.explain(node)

    assert node._node.value is PENDING


def test_params_with_other_fields_of_no_effect_are_equal() -> None:
    """Fields that are None are not sent: two records that send the same are the same."""

    class Wide(Params):
        temperature: float | None = None
        top_p: float | None = None

    class Wider(Wide):
        user: str | None = None

    class Backend_(Backend):
        @operation
        async def chat(self, prompt: str, params: Wide = Wide()) -> str:
            return prompt

    client = Backend_()

    assert are_one(client.chat("a", Wide(temperature=0)), client.chat("a", Wide(temperature=0)))
    assert not are_one(
        client.chat("a", Wide(temperature=0)), client.chat("a", Wider(temperature=0))
    )


class Extra(Params):
    """Parameters whose ``extra`` goes before the fields."""

    temperature: float | None = None
    seed: int | None = None
    extra: dict[str, Any] | None = None


class Open(Backend):
    """A backend that sends whatever is in the parameters."""

    @operation
    async def chat(self, prompt: str, params: Extra = Extra()) -> str:
        return prompt

    @chat.batch(max_items=10)
    async def chat_many(self, prompts: list[str], params: Extra) -> list[str]:
        return prompts


@pytest.mark.parametrize(
    ("params", "one"),
    [
        (Extra(temperature=0), True),
        (Extra(temperature=0, extra={"temperature": 1}), False),
        (Extra(temperature=1, extra={"temperature": 0}), True),
        (Extra(seed=1, extra={"seed": None}), False),
        (Extra(extra={"seed": 1}), True),
    ],
)
def test_the_class_is_that_of_what_is_sent(params: Extra, one: bool) -> None:
    """What ``extra`` puts into the body decides, not the field that it overrides."""
    client = Open()

    assert are_one(client.chat("a", params), client.chat("a", params)) is one


def test_tasks_with_other_resources_stay_two() -> None:
    """What runs elsewhere is another task, even of the same function."""
    fn = pure.fn
    small, large = (feste.task(pure=True, resources={"GPU": n})(fn) for n in (1, 2))

    assert are_one(small(1), small(1))
    assert not are_one(small(1), large(1))
    assert not are_one(small(1), feste.task(pure=True)(fn)(1))
