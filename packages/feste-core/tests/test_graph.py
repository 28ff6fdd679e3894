"""The graph: what is collected, how it is rewritten, and that Dask can run what it lowers to."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import random
import threading
from collections.abc import Callable
from typing import Any

import dask
import dask.threaded
import pytest
from dask.task_spec import Alias, DataNode, Task
from hypothesis import given, settings
from hypothesis import strategies as st

import feste
from feste.delayed import FesteDelayed
from feste.errors import GraphError, InvalidRequest
from feste.graph import Batch, FesteGraph
from feste.node import PENDING, Node
from feste.optimization import Optimizer
from feste.testing import FakeBackend, FakeParams, fresh_draws


@feste.task(pure=True)
def same(value: Any) -> Any:
    return value


@feste.task
def add(left: Any, right: Any) -> Any:
    return left + right


@dataclasses.dataclass
class Doc:
    title: Any


def graph_of(*nodes: Any) -> FesteGraph:
    return FesteGraph.collect(*nodes)[0]


def needs(node: Any, *inputs: Any) -> Node:
    """The node, with other inputs: a rewrite that a bad pass might do."""
    changed: Node = node._node.replace(deps=tuple(i._node for i in inputs))
    return changed


# --- collecting -------------------------------------------------------------------------------------


def test_collect_gives_graph_keys_and_repack() -> None:
    """The graph as built, the wanted keys in the order met, and a way to put values back."""
    a, b = same(1), same(2)
    graph, keys, repack = FesteGraph.collect([a, {"b": b}], (a, "plain"), 5)

    assert keys == [a.key, b.key]
    assert list(graph.nodes.values()) == [a._node, b._node]
    assert graph.outputs == (a.key, b.key)
    assert repack([10, 20]) == ([10, {"b": 20}], (10, "plain"), 5)
    assert repack([1, 2]) == ([1, {"b": 2}], (1, "plain"), 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: [x, x],
        lambda x: (x, [x, {"k": x}]),
        lambda x: {x: x},
        lambda x: {x},
        lambda x: frozenset([x]),
        lambda x: Doc([x]),
        lambda x: [[], {}, (), "x", None],
    ],
)
def test_repack_returns_every_shape(make: Callable[[Any], Any]) -> None:
    """Nested, repeated and plain values come back in their own shape."""
    graph, keys, repack = FesteGraph.collect(make(same(1)))
    values = [7] * len(keys)

    assert repack(values) == (make(7),)
    assert len(graph) == len(keys) <= 1


def test_collect_of_nothing_is_an_empty_graph() -> None:
    """Plain values need no graph, and come back equal."""
    graph, keys, repack = FesteGraph.collect(1, ["a"])

    assert (len(graph), keys, repack([])) == (0, [], (1, ["a"]))
    assert FesteGraph.collect()[2]([]) == ()
    assert (dict(graph), graph.order(), graph.calls()) == ({}, [], [])
    graph.check()


def test_collect_returns_the_graph_as_it_was_built() -> None:
    """No pass has run: each node that was written is there under its own key."""
    llm = FakeBackend()
    one, two = llm.embed("Hi"), llm.embed("Hi")
    both = add(one, two)

    assert set(graph_of(both)) == {one.key, two.key, both.key}


def test_collect_stops_where_a_value_is_known() -> None:
    """What an answered node needed is not part of the work any more."""
    llm = FakeBackend()
    call = llm.chat(same("Hi"))
    call.compute()
    after = add(call, "!")
    graph = graph_of(after)

    assert set(graph) == {call.key, after.key}
    assert graph.dependencies(call.key) == []
    assert graph.calls() == []


def test_inputs_come_first_in_the_graph() -> None:
    """Nodes stand in creation order, so that equal programs give equal graphs."""
    a = same(1)
    b = same([a])
    c = add(b, a)

    assert list(graph_of(c, a).nodes) == [a.key, b.key, c.key]


# --- order and checks -------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_order_puts_inputs_first(seed: int) -> None:
    """Every node once, after all that it needs, whatever the graph."""
    rng = random.Random(seed)
    nodes: list[Any] = [same(0)]
    for _ in range(rng.randrange(20)):
        nodes.append(same(rng.sample(nodes, rng.randrange(min(4, len(nodes) + 1)))))
    graph = graph_of(nodes)
    place = {key: i for i, key in enumerate(graph.order())}

    assert place.keys() == graph.nodes.keys()
    assert all(place[d] < place[k] for k in place for d in graph.dependencies(k))


def test_a_chain_of_100_000_is_collected_ordered_and_culled() -> None:
    """All walks are iterative."""
    node: Any = same(0)
    for _ in range(100_000):
        node = node + 1
    graph = graph_of(node)
    extra = graph.with_nodes([same(1)._node])

    assert len(graph.order()) == 100_001
    assert len(extra.cull()) == 100_001


def test_a_cycle_names_its_keys() -> None:
    """A rewrite that closes a cycle is refused with the nodes in it."""
    a, b = same(0), same(0)
    graph = graph_of(a, b).with_nodes([needs(a, b), needs(b, a)])
    with pytest.raises(GraphError) as caught:
        graph.order()

    assert "the graph has a cycle: " in str(caught.value)
    assert a.key in str(caught.value) and b.key in str(caught.value)
    with pytest.raises(GraphError, match="cycle"):
        graph.check()


def test_a_node_that_needs_itself_is_a_cycle() -> None:
    """The shortest cycle is one, too."""
    a = same(0)
    with pytest.raises(GraphError, match=f"{a.key} -> {a.key}"):
        graph_of(a).with_nodes([needs(a, a)]).order()


def test_a_missing_input_is_named() -> None:
    """A graph that lacks an input says which, and who needs it."""
    a = same(0)
    b = same(a)
    graph = FesteGraph({b.key: b._node}, [b.key])
    with pytest.raises(GraphError, match=f"{b.key} needs {a.key}, which is not in the graph"):
        graph.check()


def test_a_missing_output_is_named() -> None:
    """A pass must not lose what is wanted."""
    a = same(0)
    with pytest.raises(GraphError, match=f"the output {a.key} is not in the graph"):
        FesteGraph({}, [a.key]).check()


def test_a_call_is_in_one_batch_at_most() -> None:
    """Batches must not overlap, nor name calls that are not there."""
    a, b = same(0), same(1)
    graph = graph_of(a, b)
    with pytest.raises(GraphError, match="a call is in two batches"):
        graph.replace(batches=[Batch((a.key, b.key)), Batch((b.key,))]).check()
    with pytest.raises(GraphError, match="the call gone of a batch is not in the graph"):
        graph.replace(batches=[Batch((a.key, "gone"))]).check()


# --- batches and the quotient -----------------------------------------------------------------------


def crossing() -> tuple[FesteGraph, list[Any]]:
    """Two chains, A -> B and B -> A: each batch alone is fine, both together wait for each other."""
    a1, b2 = same("a1"), same("b2")
    b1, a2 = same(a1), same(b2)
    return graph_of(b1, a2), [a1, a2, b1, b2]


def test_all_batches_are_contracted_at_once() -> None:
    """Pairwise checks are not enough: two batches can be legal alone and deadly together."""
    graph, (a1, a2, b1, b2) = crossing()
    one, two = Batch((a1.key, a2.key)), Batch((b1.key, b2.key))
    graph.replace(batches=[one]).check()
    graph.replace(batches=[two]).check()
    with pytest.raises(GraphError, match="cycle"):
        graph.replace(batches=[one, two]).check()


def test_a_batch_of_dependent_calls_is_a_cycle() -> None:
    """A call that waits for another cannot share its request."""
    a = same(0)
    b = same([same(a)])
    with pytest.raises(GraphError, match="cycle"):
        graph_of(b).replace(batches=[Batch((a.key, b.key))]).check()


def test_order_with_contracted_batches() -> None:
    """A contracted batch stands in the order for its members, before all that needs one of them."""
    a, b = same(0), same(1)
    c = add(a, b)
    batch = Batch((a.key, b.key))

    assert graph_of(c).order(contract=[batch]) == [batch.key, c.key]


# --- rewriting --------------------------------------------------------------------------------------


def test_cull_drops_what_no_output_needs() -> None:
    """Dead nodes go, members of batches too; without dead nodes the graph is the same object."""
    a, dead = same(0), same(1)
    b = same(a)
    graph = graph_of(b).with_nodes([dead._node]).replace(batches=[Batch((a.key, dead.key))])
    culled = graph.cull()

    assert list(culled.nodes) == [a.key, b.key]
    assert [batch.members for batch in culled.batches] == [(a.key,)]
    assert culled.cull() is culled
    culled.check()


def test_cull_drops_what_only_answered_nodes_needed() -> None:
    """The inputs of a node whose value is known are dead."""
    a = same(0)
    b = same(a)
    graph = graph_of(b)
    known = b._node.replace()
    known.value = 7

    assert list(graph.with_nodes([known]).cull().nodes) == [b.key]


def test_merged_nodes_are_found_under_their_old_names() -> None:
    """Consumers and outputs of a dropped node get what stands for it, over several merges."""
    a, b, c = same(0), same(0), same(0)
    user = add(b, c)
    graph = graph_of(user, c).merged({c.key: b.key}).with_nodes([a._node]).merged({b.key: a.key})
    graph.check()

    assert graph.resolve(c.key) == a.key
    assert graph.dependencies(user.key) == [a.key, a.key]
    assert graph.wanted() == [user.key, a.key]
    assert graph.outputs == (user.key, c.key)


@pytest.mark.parametrize("pairs", ["itself", "each other", "nowhere"])
def test_merging_into_nothing_is_refused(pairs: str) -> None:
    """A key that stands for itself, or for nothing, would be looked up for ever."""
    a, b = same(0), same(1)
    wrong = {
        "itself": {a.key: a.key},
        "each other": {a.key: b.key, b.key: a.key},
        "nowhere": {a.key: "gone"},
    }
    with pytest.raises(GraphError, match="cannot be merged into"):
        graph_of(a, b).merged(wrong[pairs])


def test_cull_forgets_names_of_what_is_gone() -> None:
    """An alias of a dropped node goes with it: Dask would look for it."""
    a, b, c = same(0), same(0), same(1)
    graph = graph_of(a, b, c).merged({b.key: a.key})
    culled = FesteGraph(graph.nodes, [c.key], graph.aliases).cull()

    assert (list(culled), culled.aliases) == ([c.key], {})


def test_rewriting_gives_new_graphs() -> None:
    """The graph that a pass is given is never changed."""
    a, b = same(0), same(0)
    graph = graph_of(add(a, b))
    before = (dict(graph.nodes), graph.outputs, dict(graph.aliases), graph.batches)
    graph.merged({b.key: a.key})
    graph.replace(batches=[Batch((a.key, b.key))])
    graph.with_nodes([same(3)._node])
    graph.cull()

    assert (dict(graph.nodes), graph.outputs, dict(graph.aliases), graph.batches) == before


# --- towards Dask -----------------------------------------------------------------------------------


def rich_graph() -> tuple[FesteGraph, Any, list[Any]]:
    """A graph with merged nodes, batches, known values, and every kind of container."""
    llm = FakeBackend()
    known = llm.chat("known")
    known.compute()
    vectors = [llm.embed(t) for t in ("a", "b", "a")]
    texts = [llm.complete(t) for t in ("x", "y", "x")]
    total = same({"v": vectors, "t": (texts, {same("k")}), "d": Doc(known), "s": known + "!"})
    plan = Optimizer().run(graph_of(total, vectors[2]))
    return plan.graph, total, vectors


def test_the_graph_is_a_mapping() -> None:
    """Length, iteration, membership and items agree."""
    graph, _, _ = rich_graph()
    keys = list(graph)

    assert graph.aliases and graph.batches
    assert len(keys) == len(set(keys)) == len(graph) == len(dict(graph))
    assert all(key in graph for key in keys)
    assert "gone" not in graph and 5 not in graph
    assert {graph[key].key for key in keys} == set(keys)
    assert graph.keys() == set(keys)
    assert repr(graph) == f"<FesteGraph of {len(graph.nodes)} nodes, 2 outputs>"
    with pytest.raises(KeyError):
        graph["gone"]


def test_the_items_are_public_dask_nodes() -> None:
    """Known values are data, merged nodes aliases, all else tasks; each names what it needs."""
    graph, _, _ = rich_graph()
    dsk = dict(graph)
    kinds = {key: type(item) for key, item in dsk.items()}

    assert set(kinds.values()) == {Alias, DataNode, Task}
    assert {k for k in kinds if kinds[k] is Alias} == set(graph.aliases)
    assert all(item.dependencies <= dsk.keys() for item in dsk.values())
    for key, node in graph.nodes.items():
        if node.value is PENDING and key not in graph._batched:
            assert dsk[key].dependencies == set(graph.dependencies(key))


@pytest.mark.parametrize("get", [dask.get, dask.threaded.get])
def test_any_get_function_agrees_with_compute(get: Any) -> None:
    """``dict(graph)`` is a Dask graph; run by Dask, calls still go through the gate."""
    fresh_draws()
    graph, total, vectors = rich_graph()
    values = get(dict(graph), [total.key, vectors[2].key])
    fresh_draws()
    _, total, vectors = rich_graph()
    wanted = feste.compute(total, vectors[2])

    assert tuple(values) == wanted


def test_a_batch_runs_as_one_request_in_dask() -> None:
    """A lowered batch is one task: its members share a request."""
    llm = FakeBackend()
    nodes = [llm.embed(str(i)) for i in range(5)]
    graph = Optimizer().run(graph_of(nodes)).graph
    values = dask.get(dict(graph), [n.key for n in nodes])

    assert [r.items for r in llm.requests] == [5]
    assert list(values) == [n.compute() for n in nodes]


def test_a_failed_member_of_a_batch_fails_alone_in_dask() -> None:
    """The others of its batch have their values."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no")})
    nodes = [llm.complete(t) for t in ("a", "bad", "c")]
    dsk = dict(Optimizer().run(graph_of(nodes)).graph)

    assert dask.get(dsk, nodes[0].key) == nodes[0].compute()
    assert dask.get(dsk, nodes[2].key) == nodes[2].compute()
    with pytest.raises(InvalidRequest, match="no"):
        dask.get(dsk, nodes[1].key)


def test_dask_computes_what_a_task_returned() -> None:
    """A task that returns nodes is resolved, in a lowered graph too; async tasks are awaited."""

    @feste.task
    def more(x: int) -> Any:
        return [same(x), x]

    @feste.task
    async def later(x: int) -> int:
        return x + 1

    node = add(more(1), [later(2)])

    assert dask.get(dict(graph_of(node)), node.key) == [1, 1, 3]


def test_the_collection_protocol() -> None:
    """``dask.compute`` takes nodes alone, together, inside containers, and optimizes them."""
    llm = FakeBackend()
    a, b = llm.complete("a"), llm.complete("b")
    both = add(a, b)

    assert dask.is_dask_collection(a)
    assert dask.compute(both, [a, {"b": b}], scheduler="sync") == (
        both.compute(),
        [a.compute(), {"b": b.compute()}],
    )
    assert len(llm.requests) <= 2
    assert dask.base.tokenize(a) == dask.base.tokenize(FesteDelayed(a._node))
    assert dask.base.tokenize(a) != dask.base.tokenize(b)


def test_persist_keeps_the_value() -> None:
    """A persisted node is the node with its value: it asks no more."""
    llm = FakeBackend()
    (kept,) = dask.persist(llm.chat("Hi"), scheduler="sync")

    assert kept.compute() == kept.compute()
    assert len(llm.requests) == 1


def test_a_dask_collection_is_an_input() -> None:
    """A Dask collection given to a call is computed; all of one run in one Dask call."""
    import dask.array as array

    ones, twos = array.ones(4, chunks=2), array.full(4, 2.0, chunks=2)
    calls: list[int] = []
    lock = threading.Lock()

    def counting(dsk: Any, keys: Any, **kwargs: Any) -> Any:
        with lock:
            calls.append(1)
        return dask.get(dsk, keys, **kwargs)

    with dask.config.set(scheduler=counting):
        value = feste.compute(add(ones.sum(), twos.sum()), same([twos])[0].sum())

    assert value == (12.0, 8.0)
    assert len(calls) == 1


FUNCTIONS = [operator.add, operator.mul, operator.sub]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_random_graphs_agree_with_python_and_dask(seed: int) -> None:
    """The same random expression: in plain Python, by Feste, by Dask's own scheduler."""
    rng = random.Random(seed)
    plain: list[Any] = [rng.randrange(5)]
    nodes: list[Any] = [same(plain[0])]
    for _ in range(rng.randrange(1, 15)):
        i, j, function = rng.randrange(len(nodes)), rng.randrange(len(nodes)), rng.choice(FUNCTIONS)
        if rng.random() < 0.3:
            left: Any = plain[i]
        else:
            left = nodes[i]
        nodes.append(function(left, nodes[j]))
        plain.append(function(plain[i], plain[j]))
    shape = {"last": nodes[-1], "all": nodes}
    graph, keys, repack = FesteGraph.collect(shape)

    assert feste.compute(shape) == ({"last": plain[-1], "all": plain},)
    assert repack(dask.get(dict(graph), keys)) == ({"last": plain[-1], "all": plain},)


def test_params_with_lazy_fields_reach_the_request() -> None:
    """A node inside a record of parameters is filled in, lowered or not."""
    llm = FakeBackend()
    node = llm.chat("Hi", FakeParams(max_tokens=same(5)))
    dask.get(dict(graph_of(node)), node.key)

    assert [r.body["max_tokens"] for r in llm.requests] == [5]


def test_merges_in_a_row_name_the_last_one() -> None:
    """A chain of merges is resolved as it is made; one that goes round is refused."""
    llm = FakeBackend()
    nodes = [llm.embed(str(i)) for i in range(5)]
    keys = [n.key for n in nodes]
    graph = graph_of(*nodes)
    chain = graph.merged(dict(itertools.pairwise(keys)))

    assert dict(chain.aliases) == dict.fromkeys(keys[:-1], keys[-1])
    assert chain.wanted() == [keys[-1]] * 5
    again = graph.merged({keys[0]: keys[1]}).merged({keys[1]: keys[2]})
    assert again.resolve(keys[0]) == keys[2]
    for wrong in ({keys[0]: keys[1], keys[1]: keys[0]}, {keys[0]: keys[1], keys[1]: keys[1]}):
        with pytest.raises(GraphError, match="cannot be merged"):
            graph.merged(wrong)


@pytest.mark.parametrize(
    "aliases", [{"a": "a"}, {"a": "b", "b": "a"}, {"x": "a", "a": "b", "b": "a"}]
)
def test_merges_that_go_round_are_found(aliases: dict[str, str]) -> None:
    """The check ends, and says so."""
    with pytest.raises(GraphError, match="merged into itself"):
        graph_of(FakeBackend().embed("x")).replace(aliases=aliases).check()
