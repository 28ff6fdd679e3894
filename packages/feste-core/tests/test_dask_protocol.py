"""Lazy values are Dask collections: Dask computes them as Feste does, and pays for nothing twice."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
import dask.base
import dask.threaded
import pytest
from dask.graph_manipulation import clone

import feste
from feste.errors import ConfigError, InvalidRequest, NodeError, RunFailed, UngatedCall
from feste.graph import FesteGraph
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Box:
    content: Any


@feste.task
def join(*parts: Any) -> str:
    return "|".join(str(p) for p in parts)


@feste.task(pure=True)
def upper(text: str) -> str:
    return text.upper()


@feste.task
async def slowly(text: str) -> str:
    await asyncio.sleep(0)
    return f"({text})"


@feste.task
def parts(text: str, *, by: int = 2) -> list[str]:
    return [text[i : i + by] for i in range(0, len(text), by)]


@feste.task
def add(a: int, b: int) -> int:
    return a + b


class Program:
    """The same program, built anew: samples that are alike, batches, tools, prompts, an agent."""

    def __init__(self) -> None:
        fresh_draws()
        self.llm = llm = FakeBackend()
        ask = Prompt("Join {{ a }} and {{ b }}.")

        @feste.task(emits=True)
        def agent(text: str) -> Any:
            one, two = llm.chat(text), llm.chat(text)
            return {"both": join(one, two), "one": one}

        words = [llm.complete(f"word {i}") for i in range(5)]
        first, second = llm.chat("alike"), llm.chat("alike")
        greedy = [llm.chat("sure", FakeParams(temperature=0)) for _ in range(2)]
        vectors = [llm.embed(w) for w in words[:3]]
        # the consumer of the second is made, and stands, before that of the first
        late, early = upper(second), upper(first)
        text = ask(a=words[0], b=[late, {"c": early}])
        acted = agent(join(late, greedy[0]))
        self.wanted: list[Any] = [
            [late, early, *words],
            {"answer": llm.chat(text), "vectors": vectors, "greedy": greedy},
            (slowly(join(text, vectors[0][0])), acted["both"], acted),
            parts(words[4], by=3)[1].lower() + "!",
        ]

    @property
    def logical(self) -> int:
        """How many calls were sent, those that shared a request one by one."""
        return sum(r.items for r in self.llm.requests)


def by_dask_get(get: Callable[..., Any]) -> Callable[..., Any]:
    def run(*wanted: Any) -> Any:
        graph, keys, repack = FesteGraph.collect(*wanted)
        return repack(get(dict(graph), keys))

    return run


def by_delayed(*wanted: Any) -> Any:
    return dask.delayed(lambda *values: values)(*wanted).compute()


WAYS: dict[str, Callable[..., Any]] = {
    "dask.compute": dask.compute,
    "dask.compute, one thread": lambda *w: dask.compute(*w, scheduler="sync"),
    "dask.compute, as built": lambda *w: dask.compute(*w, optimize_graph=False),
    "dask.get": by_dask_get(dask.get),
    "dask.threaded.get": by_dask_get(dask.threaded.get),
    "scheduler=dask.get": lambda *w: feste.compute(*w, scheduler=dask.get),
    "scheduler=dask.threaded.get": lambda *w: feste.compute(*w, scheduler=dask.threaded.get),
    "dask.persist": lambda *w: feste.compute(*dask.persist(*w)),
    "dask.optimize": lambda *w: dask.compute(*dask.optimize(*w)),
    "dask.delayed": by_delayed,
    "pickled": lambda *w: by_dask_get(dask.get)(*w),
}


@pytest.fixture(scope="module")
def reference() -> tuple[Any, int]:
    program = Program()
    return feste.compute(*program.wanted), program.logical


@pytest.mark.parametrize("way", WAYS)
def test_dask_computes_what_feste_does(way: str, reference: tuple[Any, int]) -> None:
    """Whatever runs the graph, the values are the same to the bit, and so is the number of calls."""
    program = Program()
    values, calls = reference
    assert WAYS[way](*program.wanted) == values
    assert (
        program.logical <= calls + 1
    )  # equal GREEDY calls are one only where the graph is optimized


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_bought_twice(way: str) -> None:
    """What Dask has paid for stays with its node: computing it again, by whoever, sends nothing."""
    program = Program()
    values = WAYS[way](*program.wanted)
    sent = len(program.llm.requests)
    assert dask.compute(*program.wanted) == values
    assert feste.compute(*program.wanted) == values
    assert by_delayed(*program.wanted) == values
    assert len(program.llm.requests) == sent


def test_batches_are_formed_for_dask_too() -> None:
    """`dask.compute` runs Feste's optimizer on all that it is given: calls share requests."""
    llm = FakeBackend()
    nodes = [llm.complete(f"word {i}") for i in range(40)]
    dask.compute(nodes[:20], {"rest": nodes[20:]})
    assert len(llm.requests) == 3


def test_the_order_of_collections_does_not_count() -> None:
    """Draws are counted in the order in which nodes were made, in whatever order Dask meets them."""

    def build() -> list[Any]:
        fresh_draws()
        llm = FakeBackend()
        return [llm.chat("alike") for _ in range(6)]

    expected = feste.compute(*build())
    assert dask.compute(*build()[::-1])[::-1] == expected
    assert by_delayed(*build()[::-1])[::-1] == expected
    assert dask.compute(*build()[::-1], optimize_graph=False)[::-1] == expected


def test_merged_calls_are_both_paid() -> None:
    """Of two equal GREEDY calls one is sent, and both nodes keep the answer."""
    llm = FakeBackend()
    a, b = (llm.chat("sure", FakeParams(seed=1)) for _ in range(2))
    first = dask.compute(a, b)
    assert first[0] == first[1] == b.compute() == dask.compute(b)[0]
    assert len(llm.requests) == 1


def test_keep_none_keeps_nothing() -> None:
    """With keep="none" each computation pays, by Dask as by Feste."""
    llm = FakeBackend()
    node = llm.chat("once")
    with feste.context.set(keep="none"):
        dask.compute(node, scheduler="sync")
        dask.compute(node, scheduler="sync")
    assert len(llm.requests) == 2


def test_threads_that_compute_one_node_pay_once() -> None:
    """A node in flight is waited for, however many computations of Dask and Feste hold it."""
    llm = FakeBackend(latency=0.05)
    node, more = llm.chat("one"), llm.complete("two")
    both = join(node, more)
    ways: list[Callable[[], Any]] = [
        lambda: dask.compute(both)[0],
        lambda: dask.compute(both, optimize_graph=False)[0],
        lambda: by_delayed(both)[0],
        lambda: feste.compute(both)[0],
        lambda: feste.compute(both, scheduler=dask.threaded.get)[0],
    ]
    results: list[Any] = []
    threads = [threading.Thread(target=lambda way=way: results.append(way())) for way in ways * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == len(threads)
    assert len(set(results)) == 1
    assert sorted(r.operation for r in llm.requests) == ["chat", "complete"]


def test_a_node_in_several_delayed_calls_is_paid_once() -> None:
    """Dask copies the tasks of a collection for each call that takes it; the node is still one."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def agent() -> Any:
        return llm.chat("from an agent")

    node, acted = llm.chat("shared"), agent()
    calls = [dask.delayed(lambda x, y: (x, y))(node, [acted]) for _ in range(4)]
    results = dask.compute(*calls)
    assert set(map(str, results)) == {str((node.compute(), [acted.compute()]))}
    assert len(llm.requests) == 2


def test_containers_come_back_in_their_shape() -> None:
    """Sets, dataclasses and named tuples are rebuilt with values, where Dask itself would not."""
    one, two = add(1, 0), add(1, 1)
    nested = join({one}, Box(two), Pair(one, [two]), (one, {"k": two}))
    text = "{1}|Box(content=2)|Pair(left=1, right=[2])|(1, {'k': 2})"
    assert dask.compute([nested], {"x": Pair(one, two)}) == ([text], {"x": Pair(1, 2)})
    assert by_dask_get(dask.get)({one}, Box(two), Pair(one, [two])) == (
        {1},
        Box(2),
        Pair(1, [2]),
    )


def test_nodes_are_inputs_of_delayed_calls() -> None:
    """dask.delayed takes nodes anywhere in its arguments, and gives its results back to nodes."""
    node = add(1, 2)
    mixed = dask.delayed(lambda a, b, c: [a, *b, c["k"]])(node, [node, 4], {"k": add(node, 1)})
    assert mixed.compute() == [3, 3, 4, 4]
    again = join(mixed, node)
    assert again.compute() == "[3, 3, 4, 4]|3"
    assert dask.compute(again, node, mixed) == ("[3, 3, 4, 4]|3", 3, [3, 3, 4, 4])


def test_collections_of_dask_are_inputs_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All Dask collections that a run needs are computed by one call of Dask, before it begins."""
    import dask.bag

    calls: list[int] = []
    compute = dask.compute
    monkeypatch.setattr(dask, "compute", lambda *a, **k: calls.append(len(a)) or compute(*a, **k))
    number = dask.delayed(add.fn)(2, 3)
    bag = dask.bag.from_sequence([1, 2, 3], npartitions=2)
    llm = FakeBackend()
    prompt = Prompt("{{ n }} and {{ all }}")(n=number, all={"bag": [bag]})
    with dask.config.set(scheduler="sync"):
        results = feste.compute(add(number, 1), join({"x": [number]}, bag), llm.chat(prompt))
    assert results[:2] == (6, "{'x': [5]}|[1, 2, 3]")
    assert llm.requests[0].body["messages"][0]["content"] == "5 and {'bag': [[1, 2, 3]]}"
    assert len(calls) == 1


def test_collections_of_all_kinds_keep_their_places() -> None:
    """Each node gets its own collection's value, whatever kinds stand between, and by which scheduler."""
    import dask.bag

    made: list[Any] = []
    for i in range(3):
        made += [dask.bag.from_sequence([i]), dask.delayed(i + 10), add(i, 20)]
    nodes = [join(m) for m in made]
    expected = [f"[{i // 3}]" if i % 3 == 0 else str(i // 3 + 10 * (i % 3)) for i in range(9)]
    with dask.config.set(scheduler="threads"):
        assert feste.compute(nodes) == (expected,)
        assert dask.compute(nodes) == (expected,)
    assert join(made[1], made[2]).compute() == "10|20"


def test_arrays_of_dask_are_inputs_of_nodes() -> None:
    """A Dask array given to a task arrives as a NumPy array; a node beside it is computed with it."""
    pytest.importorskip("numpy")
    import dask.array

    array = dask.array.arange(10, chunks=3)
    total = feste.task(lambda a, b: int(a.sum()) + b)(array, add(1, 1))
    assert total.compute() == 47
    assert [int(v) for v in dask.compute(array.sum(), total, add(0, 1))] == [45, 47, 1]


def test_a_failed_collection_costs_what_needs_it() -> None:
    """If one of the collections of a run fails, the others are computed all the same."""

    def boom(text: str) -> None:
        raise KeyError(text)

    nodes = [
        join(dask.delayed(boom)("oh")),
        join(dask.delayed(add.fn)(1, 2)),
        FakeBackend().chat("x"),
    ]
    with pytest.raises(RunFailed) as caught:
        feste.compute(nodes)
    (error,) = caught.value.errors
    assert isinstance(error, NodeError)
    assert error.cause_type == "KeyError"
    assert "in boom" in error.traceback
    assert "test_dask_protocol.py" in error.origin
    (partial,) = caught.value.partial
    assert partial[1] == "3"
    assert partial[2]


def test_mistakes_are_told_before_a_collection_is_computed() -> None:
    """What can be known without the values of collections is told before Dask computes them."""
    ran: list[int] = []
    value = dask.delayed(ran.append)(1)
    once = feste.task(once=True)(lambda value: value)
    for scheduler in ("local", dask.get):
        with pytest.raises(ConfigError, match="store"):
            feste.compute(once(value), scheduler=scheduler)
    assert not ran


def test_emitted_nodes_may_need_collections_of_dask() -> None:
    """A task may return nodes whose inputs are Dask collections."""

    @feste.task(emits=True)
    def agent() -> Any:
        return [add(dask.delayed(add.fn)(1, 2), 3)]

    assert agent().compute() == [6]
    assert dask.compute(agent()) == ([6],)


def test_errors_of_dask_runs_are_the_users_own() -> None:
    """dask.compute raises what the task or call raised; feste.compute raises RunFailed, as ever."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no")})

    @feste.task
    def broken(text: Any) -> None:
        raise KeyError(text)

    with pytest.raises(KeyError, match="oh"):
        dask.compute(broken("oh"))
    with pytest.raises(InvalidRequest, match="no"):
        dask.compute(join(llm.chat("bad")))
    with pytest.raises(InvalidRequest, match="no"):
        dask.compute(*[llm.complete(t) for t in ("good", "bad", "well")])
    with pytest.raises(RunFailed) as caught:
        feste.compute(broken("oh"), scheduler=dask.get)
    assert isinstance(caught.value.errors[0], NodeError)
    assert "KeyError: 'oh'" in str(caught.value.errors[0])
    with pytest.raises(RunFailed) as caught:
        feste.compute(llm.chat("bad"), scheduler=dask.threaded.get)
    assert isinstance(caught.value.errors[0], InvalidRequest)


def test_explain_says_what_a_get_function_lacks() -> None:
    """explain tells that nothing is batched while a plain get function runs."""
    told = str(feste.explain(FakeBackend().chat("x"), scheduler=dask.get))
    assert "plain get function" in told


def test_persisted_values_are_the_values() -> None:
    """dask.persist keeps a value as it is, also one with an attribute `value`; optimize keeps none."""
    box = feste.task(Holder)(5)
    (optimized,) = dask.optimize(box)
    assert isinstance(optimized.compute(), Holder)
    (persisted,) = dask.persist(box)
    assert isinstance(persisted, feste.FesteDelayed)
    assert persisted.compute().value == box.compute().value == 5
    assert persisted.compute() is box.compute()


class Holder:
    def __init__(self, value: int) -> None:
        self.value = value


def test_clones_are_refused() -> None:
    """Dask's graph manipulation renames tasks; a node has one name, and says so."""
    with pytest.raises(NotImplementedError, match="build the lazy value anew"):
        clone(add(1, 2))


def test_the_graph_travels_as_tasks_of_dask() -> None:
    """A pickled graph is a Dask graph: it runs, and its calls know the process that may pay."""
    llm = FakeBackend()
    node = join(llm.chat("x"), add(1, 2))
    graph, keys, _ = FesteGraph.collect(node)
    sent = pickle.loads(pickle.dumps(graph))
    assert dask.get(sent, keys) == (node.compute(),)
    assert len(llm.requests) == 1


def test_tokens_and_keys_are_the_nodes_own() -> None:
    """A node is a collection whose key and token name it alone."""
    one, two = add(1, 1), add(1, 1)
    assert dask.is_dask_collection(one)
    assert one.__dask_keys__() == [one.key]
    assert dask.base.tokenize(one) == dask.base.tokenize(one) != dask.base.tokenize(two)
    assert len({one.key, two.key}) == 2


def test_long_chains_run() -> None:
    """A chain of 2,000 nodes is nothing special to any of the ways."""
    node = add(0, 1)
    for _ in range(2000):
        node = add(node, 1)
    assert dask.compute(node) == (2001,)
    assert by_dask_get(dask.get)(node) == (2001,)


class TestOtherProcesses:
    """Dask's own processes: what is free runs there, what is paid does not."""

    def test_python_runs_there(self) -> None:
        """Tasks, sync and async, and tasks that return them run in any process."""

        @feste.task
        def plus(a: int, b: int) -> int:
            return a + b

        @feste.task
        async def later(text: str) -> str:
            await asyncio.sleep(0)
            return f"({text})"

        @feste.task(emits=True)
        def grow(n: int) -> Any:
            return [plus(n, 1), {"then": grow.fn(n - 1)}] if n else later("end")

        nodes = [later(plus(1, 2)), grow(2)]
        expected = ("(3)", [3, {"then": [2, {"then": "(end)"}]}])
        assert dask.compute(*nodes, scheduler="processes") == expected
        assert feste.compute(*nodes) == expected

    def test_a_paid_call_does_not(self) -> None:
        """A paid call refuses to run where its gate is not, and names the way to run it."""
        llm = FakeBackend()

        @feste.task(emits=True)
        def buy(text: str) -> Any:
            return [FakeBackend().chat(text)]

        batch = [llm.complete(f"{i}") for i in range(3)]
        for node in (llm.chat("x"), buy("x"), batch):
            with pytest.raises(UngatedCall, match='scheduler="dask"'):
                dask.compute(node, scheduler="processes")
        assert not llm.requests
