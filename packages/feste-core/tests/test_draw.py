"""Draw identity: which calls are the same draw, in this process and in the next one."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import feste
from feste import context, draw
from feste.backend import Reply
from feste.draw import Determinism, Draw
from feste.errors import InvalidRequest, RunFailed
from feste.graph import FesteGraph
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws
from feste.testing.odd_backend import OddBackend, VoicedParams


@pytest.fixture(autouse=True)
def counting_from_zero() -> Iterator[None]:
    """Each test begins with fresh counters."""
    fresh_draws()
    yield
    fresh_draws()


@feste.task
def effect(*args: Any, **kwargs: Any) -> Any:
    return args


@feste.task(pure=True)
def pure(*args: Any, **kwargs: Any) -> Any:
    return args


def drawn(node: Any) -> Draw:
    """The node's draw, given by a collect if it has none."""
    FesteGraph.collect(node)
    found = node._node.draw
    assert isinstance(found, Draw)
    return found


def fingerprint(node: Any) -> str:
    return drawn(node).fingerprint


llm = FakeBackend()


# --- the ordinal ------------------------------------------------------------------------------------


def test_equal_calls_are_counted_in_the_order_they_were_written() -> None:
    """n is the ordinal by creation, whatever the order in which a collect meets the nodes."""
    nodes = [llm.chat("Hi") for _ in range(4)]
    other = llm.chat("Ho")
    FesteGraph.collect([nodes[3], nodes[1], other, nodes[0], nodes[2]])

    assert [n._node.draw.n for n in nodes] == [0, 1, 2, 3]
    assert len({n._node.draw.fingerprint for n in nodes}) == 1
    assert drawn(other).n == 0


def test_n_is_given_at_the_first_collect_and_kept() -> None:
    """A node that was written first but collected later comes after; no draw ever changes."""
    first, second = llm.chat("Hi"), llm.chat("Hi")
    assert drawn(second).n == 0
    before = drawn(second)

    assert drawn(first).n == 1
    assert drawn(second) is before


def test_counting_goes_on_over_computes_and_eager_calls() -> None:
    """No two equal calls of a process are one draw, whichever way they were run."""
    backend = FakeBackend()
    answers = [backend.chat("Hi").compute(), backend.chat("Hi").compute()]
    with context.set(eager=True):
        answers += [backend.chat("Hi"), backend.chat("Hi")]
    answers += feste.compute(backend.chat("Hi"), backend.chat("Hi"))
    fresh_draws()
    again = feste.compute([backend.chat("Hi") for _ in range(6)])[0]

    assert len(set(answers)) == 6
    assert answers == again


def test_pure_nodes_are_not_counted() -> None:
    """Equal PURE nodes are one draw: n is 0 for all."""
    embeds = [llm.embed("Hi") for _ in range(3)]
    prompts = [Prompt("{{ x }}")(x=1) for _ in range(3)]
    tasks = [pure(1) for _ in range(3)]
    draws = [{drawn(n) for n in nodes} for nodes in (embeds, prompts, tasks)]

    assert [[d.n for d in found] for found in draws] == [[0], [0], [0]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: llm.chat("Hi"),
        lambda: llm.chat("Hi", FakeParams(temperature=0)),
        lambda: effect(1),
        lambda: pure("a").upper(),
    ],
)
def test_all_others_are_counted(make: Any) -> None:
    """SAMPLE, GREEDY and EFFECT nodes, calls of unknown methods too, are counted."""
    assert [drawn(make()).n for _ in range(3)] == [0, 1, 2]


def test_consumers_of_different_draws_are_different() -> None:
    """Equal calls on different draws of one input are no equals: each is number 0."""
    one, two = effect(llm.chat("Hi")), effect(llm.chat("Hi"))

    assert drawn(one).n == drawn(two).n == 0
    assert drawn(one).fingerprint != drawn(two).fingerprint


def test_threads_that_collect_at_once_give_each_draw_once() -> None:
    """Counting is safe under threads."""
    nodes = [effect(1) for _ in range(200)]
    barrier = threading.Barrier(4)

    def collect() -> None:
        barrier.wait(10)
        for node in nodes:
            FesteGraph.collect(node)

    threads = [threading.Thread(target=collect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert sorted(n._node.draw.n for n in nodes) == list(range(200))


# --- scopes -----------------------------------------------------------------------------------------


def test_scopes_count_apart() -> None:
    """The main program and each emitting task count for themselves."""
    here, there = llm.chat("Hi"), llm.chat("Hi")
    FesteGraph.collect(here)
    FesteGraph.collect(there, scope="main/abc.0")

    assert here._node.draw == Draw("main", here._node.draw.fingerprint, 0)
    assert there._node.draw == Draw("main/abc.0", here._node.draw.fingerprint, 0)
    assert str(there._node.draw) == f"main/abc.0/{here._node.draw.fingerprint}.0"


def test_a_scope_counts_from_zero_again_when_its_task_runs_again() -> None:
    """The nodes of a task that runs twice are the same draws both times, so they could be replayed."""
    backend = FakeBackend()

    @feste.task(emits=True)
    def ask_twice() -> Any:
        return [backend.chat("Hi"), backend.chat("Hi")]

    node = ask_twice()
    first, second = node.compute(keep="none"), node.compute(keep="none")

    assert first == second
    assert first[0] != first[1]
    assert [r.items for r in backend.requests] == [2, 2]


def test_two_emitting_tasks_draw_for_themselves() -> None:
    """Two calls of one task are two scopes: what they emit are different draws."""
    backend = FakeBackend()

    @feste.task(emits=True)
    def ask() -> Any:
        return backend.chat("Hi")

    feste.compute(ask(), ask())
    scopes = {r.draws[0].scope for r in backend.requests}

    assert len(scopes) == 2
    assert "main" not in scopes


# --- fingerprints -----------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


@dataclasses.dataclass
class Other:
    x: Any
    y: Any = 0


class Own(list[Any]):
    pass


CONSTANTS: list[Any] = [
    None,
    0,
    1,
    1.0,
    True,
    False,
    -1,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "1",
    "1.0",
    "true",
    "null",
    "[]",
    b"",
    b"1",
    bytearray(b"1"),
    [],
    [1],
    ["1"],
    [[1]],
    [1, 1],
    (),
    (1,),
    ((1,),),
    [(1,)],
    Own([1]),
    {},
    {"a": 1},
    {"a": 1.0},
    {"a": [1]},
    {"a": (1,)},
    {"b": 1},
    {1: "a"},
    {"1": "a"},
    {1.0: "a"},
    {True: "a"},
    {None: "a"},
    {"list": [1]},
    ["list", 1],
    OrderedDict(a=1),
    set(),
    frozenset(),
    Point(1),
    Point(1.0),
    Point([1]),
    Point((1,)),
    Other(1),
    Colour.RED,
    Point,
    "é",
    "e\u0301",
    "\ud800",
    10**5000,
]


def test_different_constants_have_different_fingerprints() -> None:
    """Lists and tuples, 1, 1.0 and True, the keys 1 and "1": what Python tells apart, a draw does."""
    seen: dict[str, Any] = {}
    for value in CONSTANTS:
        print_ = fingerprint(effect(value))

        assert print_ not in seen, f"{value!r} has the fingerprint of {seen[print_]!r}"
        seen[print_] = value


def test_equal_constants_have_equal_fingerprints() -> None:
    """Content counts, not identity, nor the order of keys; objects count by their class only."""

    class Thing:
        pass

    equals = [
        ([1, [2]], [1, [2]]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: "a", "b": 2}, {"b": 2, 1: "a"}),
        (b"ab", b"ab"),
        (Reply("Hi", model="m"), "Hi"),
        (Point([1]), Point([1])),
        (Thing(), Thing()),
        ({1, 2}, {3}),
    ]
    for one, two in equals:
        assert fingerprint(effect(one)) == fingerprint(effect(two)), (one, two)
    assert fingerprint(effect(a=1, b=2)) == fingerprint(effect(b=2, a=1))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.floats(0, 2), st.text(max_size=2)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=1), st.integers(0, 1)), inner, max_size=2),
    ),
    max_leaves=5,
)


@given(json_values, json_values)
def test_fingerprints_are_equal_exactly_for_equal_values(one: Any, two: Any) -> None:
    """Of data, two fingerprints are equal if and only if types and values are."""

    def exact(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return (type(value), tuple(exact(v) for v in value))
        if isinstance(value, dict):
            return (dict, frozenset((exact(k), exact(v)) for k, v in value.items()))
        return (type(value), repr(value))

    same = fingerprint(effect(one)) == fingerprint(effect(two))

    assert same is (exact(one) == exact(two))


DIFFERENT: dict[str, list[Any]] = {
    "operation": [lambda: llm.chat("Hi"), lambda: llm.complete("Hi"), lambda: llm.embed("Hi")],
    "client": [lambda: llm.chat("Hi"), lambda: FakeBackend("fake-2").chat("Hi")],
    "parameters": [
        lambda: llm.chat("Hi"),
        lambda: llm.chat("Hi", FakeParams(temperature=0)),
        lambda: llm.chat("Hi", FakeParams(temperature=1)),
        lambda: llm.chat("Hi", FakeParams(temperature=1.0)),
        lambda: llm.chat("Hi", FakeParams(max_tokens=1)),
        lambda: llm.chat("Hi", FakeParams(max_tokens=effect(1))),
    ],
    "parameters that are not sent": [
        lambda: OddBackend().say("a", VoicedParams()),
        lambda: OddBackend().say("a", VoicedParams(voice="loud")),
    ],
    "template": [
        lambda: Prompt("a {{ x }}")(x=1),
        lambda: Prompt("b {{ x }}")(x=1),
        lambda: Prompt("a {{ x }}", language="de")(x=1),
    ],
    "variables": [
        lambda: Prompt("{{ x }}{{ y }}")(x=1, y=2),
        lambda: Prompt("{{ x }}{{ y }}")(x=2, y=1),
        lambda: Prompt("{{ x }}{{ y }}")(x=effect(), y=2),
    ],
    "task": [lambda: effect(1), lambda: pure(1), lambda: feste.task(abs)(1)],
    "inputs": [
        lambda: effect(pure(1)),
        lambda: effect(pure(2)),
        lambda: effect([pure(1)]),
        lambda: effect((pure(1),)),
        lambda: effect({"a": pure(1)}),
        lambda: effect(Point(pure(1))),
        lambda: effect(Other(pure(1))),
        lambda: effect(Own([pure(1)])),
        lambda: effect(pure(1), pure(1)),
        lambda: effect(pure(1), pure(2)),
        lambda: effect(pure(2), pure(1)),
        lambda: effect(a=pure(1)),
        lambda: effect(b=pure(1)),
    ],
    "operator": [lambda: pure(1) + 2, lambda: 2 + pure(1), lambda: pure(1) - 2, lambda: -pure(1)],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_in_a_call_differs_in_its_fingerprint(name: str) -> None:
    """Operation, client, parameters, template, inputs and the places of inputs all count."""
    prints = [fingerprint(make()) for make in DIFFERENT[name]]

    assert len(set(prints)) == len(prints)


def test_clients_of_equal_configuration_share_a_fingerprint() -> None:
    """A client made again, as a program that is run again does, asks the same."""
    assert fingerprint(FakeBackend().chat("Hi")) == fingerprint(FakeBackend().chat("Hi"))


PROGRAM = """
import json
import feste
from feste.graph import FesteGraph
from feste.prompt import ChatPrompt, Prompt
from feste.testing import FakeBackend, FakeParams

llm = FakeBackend()
ask = Prompt("About {{ x }}: {% for w in words %}{{ w }}{% endfor %}")
talk = ChatPrompt(system="You are {{ x }}.", user="Hi")

@feste.task
def pick(**options):
    return options

class Tool:
    def __init__(self, size): self.size = size

nodes = [llm.chat(ask(x=i, words=["a", "b"])) for i in (1, 2, 1)]
nodes += [llm.complete(nodes[0] + "!", FakeParams(temperature=0)), llm.chat(talk(x="me"))]
nodes += [pick(tags={"x", "y", "z"}, tool=Tool(3), table={"b": 1, "a": (nodes[1], 2)}, kind=Tool)]
nodes += [llm.embed(n) for n in nodes[:2]]
FesteGraph.collect(nodes[::-1])
answers = feste.compute(nodes[:5])[0]
print(json.dumps([[str(n._node.draw) for n in nodes], answers]))
"""


def test_the_same_program_has_the_same_draws_in_every_process() -> None:
    """Neither hash seeds nor addresses nor keys get into a draw, so a rerun can find its answers."""
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", PROGRAM]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.append(json.loads(run.stdout))

    assert found[0] == found[1]
    assert len(set(found[0][0])) == len(found[0][0])


# --- one node is one draw, which keeps its answer ---------------------------------------------------


def test_a_node_is_asked_once() -> None:
    """Computing a node again costs nothing, alone or in something new."""
    backend = FakeBackend()
    node = backend.chat("Hi")
    answers = [node.compute(), node.compute(), *feste.compute(node, [node, effect(node)])]
    again = asyncio.run(feste.acompute(node))

    assert len({answers[0], answers[1], answers[2], answers[3][0], again[0]}) == 1
    assert len(backend.requests) == 1


def test_two_nodes_are_asked_twice() -> None:
    """Two equal calls are two draws with two answers, in one compute and in two."""
    backend = FakeBackend()
    one, two = backend.chat("Hi"), backend.chat("Hi")
    first, second = feste.compute(one, two)
    third = backend.chat("Hi").compute()

    assert len({first, second, third}) == 3
    assert [r.items for r in backend.requests] == [2, 1]  # two answers to one prompt, and one


def test_answers_that_were_paid_survive_a_failed_run() -> None:
    """After a failure only what failed is asked again."""
    backend = FakeBackend(fail={"bad": InvalidRequest("no")})
    good, bad = backend.chat("good"), backend.chat("bad")
    both = effect(good, bad)
    with pytest.raises(RunFailed):
        both.compute()
    asked = len(backend.requests)
    backend.fail.clear()
    value = both.compute()

    assert value == (good.compute(), bad.compute())
    assert [str(r.body).count("good") for r in backend.requests].count(1) == 1
    assert len(backend.requests) == asked + 1


@pytest.mark.parametrize(("keep", "calls", "runs"), [("paid", 1, 2), ("all", 1, 1), ("none", 2, 2)])
def test_keep_decides_what_nodes_remember(keep: str, calls: int, runs: int) -> None:
    """Paid answers by default; everything; or nothing."""
    backend, ran = FakeBackend(), itertools.count()

    @feste.task
    def count(text: str) -> int:
        return next(ran)

    node = count(backend.chat("Hi"))
    feste.compute(node, keep=keep)
    feste.compute(node, keep=keep)

    assert (len(backend.requests), next(ran)) == (calls, runs)


def test_embeddings_are_kept_too() -> None:
    """PURE calls cost money as well: a node keeps its vector."""
    backend = FakeBackend()
    node = backend.embed("Hi")

    assert node.compute() == node.compute()
    assert len(backend.requests) == 1


def test_merged_calls_all_learn_the_answer() -> None:
    """Of equal GREEDY calls one is asked, and each keeps the answer."""
    backend = FakeBackend()
    params = FakeParams(temperature=0)
    one, two = backend.chat("Hi", params), backend.chat("Hi", params)
    feste.compute(one, two)

    assert one.compute() == two.compute()
    assert len(backend.requests) == 1


def test_an_unpickled_node_brings_its_answer() -> None:
    """A node that was computed elsewhere is not asked again here."""
    code = """
import sys, cloudpickle
from feste.testing import FakeBackend
node = FakeBackend().chat("Hi")
node.compute()
sys.stdout.buffer.write(cloudpickle.dumps(node))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    node = pickle.loads(run.stdout)
    answer = node.compute()

    assert answer.startswith("fake-1:")
    assert node._node.op.client.requests == []


def test_the_classes_of_calls() -> None:
    """SAMPLE unless the caller asks for determinism; embeddings PURE; tasks EFFECT unless pure."""
    calls: list[tuple[Any, Determinism]] = [
        (llm.chat("Hi"), Determinism.SAMPLE),
        (llm.chat("Hi", FakeParams(temperature=0.0)), Determinism.GREEDY),
        (llm.chat("Hi", FakeParams(temperature=0.1)), Determinism.SAMPLE),
        (llm.chat("Hi", FakeParams(temperature=0.1, seed=0)), Determinism.GREEDY),
        (llm.chat("Hi", FakeParams(temperature=effect(0))), Determinism.SAMPLE),
        (llm.embed("Hi"), Determinism.PURE),
        (Prompt("Hi")(), Determinism.PURE),
        (effect(), Determinism.EFFECT),
        (pure(), Determinism.PURE),
        (pure() + 1, Determinism.PURE),
        (pure().x, Determinism.PURE),
        (pure().x(), Determinism.EFFECT),
        (pure()(), Determinism.EFFECT),
    ]

    assert [n._node.determinism for n, _ in calls] == [wanted for _, wanted in calls]


def test_forgetting_one_scope_leaves_the_others() -> None:
    """``forget`` counts one scope from 0 again, or all."""
    FesteGraph.collect(effect(1))
    FesteGraph.collect(effect(1), scope="s")
    draw.forget("s")
    inner, outer = effect(1), effect(1)
    FesteGraph.collect(inner, scope="s")

    assert (inner._node.draw.n, drawn(outer).n) == (0, 1)
