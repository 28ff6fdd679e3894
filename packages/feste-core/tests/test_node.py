"""Nodes: packing, filling, keys, topological order, flat records."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import feste
from feste.delayed import FesteDelayed
from feste.node import PENDING, Node, call_site, topological
from feste.packing import MAX_DEPTH, Deps, Nested, Slot, fill, holds_nodes, pack


@feste.task(pure=True)
def same(value: Any) -> Any:
    return value


@dataclasses.dataclass
class Doc:
    title: Any
    body: Any = None


#: Leaves that stand for nodes: replaced by a node before packing, by its value after filling.
class Hole(int):
    pass


leaves = st.one_of(st.integers(0, 5), st.text(max_size=3), st.none(), st.integers(0, 4).map(Hole))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Doc(*pair)),
    ),
    max_leaves=12,
)


def replaced(tree: Any, leaf: Any) -> Any:
    """A copy of a tree with something else in its holes."""
    if isinstance(tree, Hole):
        return leaf(int(tree))
    if isinstance(tree, Doc):
        return Doc(replaced(tree.title, leaf), replaced(tree.body, leaf))
    if isinstance(tree, dict):
        return type(tree)((k, replaced(v, leaf)) for k, v in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree)(replaced(v, leaf) for v in tree)
    return tree


def holes(tree: Any) -> list[int]:
    """The numbers of the holes of a tree, from left to right."""
    found: list[int] = []
    replaced(tree, found.append)
    return found


@given(trees)
def test_fill_undoes_pack(tree: Any) -> None:
    """A packed structure, filled with the values of its nodes, is the structure of the values."""
    nodes = [same(i) for i in range(5)]
    deps = Deps()
    packed = pack(replaced(tree, nodes.__getitem__), deps)
    values = {id(n._node): f"value {i}" for i, n in enumerate(nodes)}
    filled = fill(packed, [values[id(d)] for d in deps.nodes])

    assert filled == replaced(tree, "value {}".format)
    assert [d.seq - nodes[0]._node.seq for d in deps.nodes] == list(dict.fromkeys(holes(tree)))


@given(trees)
def test_packed_data_pickles(tree: Any) -> None:
    """What a worker is sent fills to the same."""
    deps = Deps()
    nodes = [same(i) for i in range(5)]
    packed = pack(replaced(tree, nodes.__getitem__), deps)
    again = pickle.loads(pickle.dumps(packed))
    values = list(range(len(deps.nodes)))

    assert fill(again, values) == fill(packed, values)


@given(trees)
def test_holds_nodes_agrees_with_pack(tree: Any) -> None:
    """A result holds nodes exactly if packing finds some."""
    value = replaced(tree, lambda i: same(i))
    deps = Deps()
    pack(value, deps)

    assert holds_nodes(value) is bool(deps.nodes)


def test_filling_twice_gives_two_structures() -> None:
    """What one consumer does to its arguments, another does not see."""
    packed = pack([same(1), Doc(same(2)), {"a": same(3)}, OrderedDict(b=same(4))], Deps())
    one, two = fill(packed, [1, 2, 3, 4]), fill(packed, [1, 2, 3, 4])
    one[0], one[1].title, one[2]["a"], one[3]["b"] = 0, 0, 0, 0

    assert two == [1, Doc(2), {"a": 3}, OrderedDict(b=4)]


def test_each_node_gets_one_slot() -> None:
    """However often a node occurs, its value is handed over once."""
    node = same(1)
    deps = Deps()
    packed = pack([node, [node], {"a": FesteDelayed(node._node)}], deps)

    assert deps.nodes == [node._node]
    assert fill(packed, [7]) == [7, [7], {"a": 7}]


def test_a_value_is_not_looked_into() -> None:
    """What a node gives is handed over as it is, also if it looks like packed data."""
    packed = pack([same(1)], Deps())
    odd = [Slot(0), Nested(list, [1])]

    assert fill(packed, [odd])[0] is odd


def test_only_containers_of_the_list_are_searched() -> None:
    """Objects, deques and classes are handed over themselves."""
    for value in (object(), deque([1]), Doc, Exception("x"), {1: 2}.items(), range(3)):
        deps = Deps()

        assert pack(value, deps) is value
        assert deps.nodes == []


def test_a_task_may_return_endless_data() -> None:
    """A result that contains itself holds no nodes: it is a value like any other."""
    endless: list[Any] = []
    endless.append(endless)

    endless.append(endless)

    assert holds_nodes(endless) is False


def test_keys_are_unique_across_processes() -> None:
    """A key names the op, the process and the place in it; a forked child has a name of its own."""
    node = same(1)
    code = "import feste; print(feste.task(abs)(1).key)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine, other = feste.task(abs)(1).key.split("-"), run.stdout.strip().split("-")

    assert node.key == node._node.key == node._node.key
    assert mine[0] == other[0] == "abs"
    assert mine[1] != other[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_names_its_nodes_differently() -> None:
    """After a fork both go on counting from one number: the name of the process tells them apart."""
    same(1).key  # noqa: B018
    end, start = os.pipe()
    child = os.fork()
    if not child:
        os.write(start, same(1).key.encode())
        os._exit(0)
    os.waitpid(child, 0)
    key = os.read(end, 100).decode()
    os.close(end), os.close(start)

    assert key.split("-")[1] != same(1).key.split("-")[1]


def test_topological_order() -> None:
    """Inputs come before consumers, each node once, also where ways cross."""
    a = same(1)
    b, c = same(a), same([a, a])
    d = same({"b": b, "c": c, "a": a})
    order = topological([d._node, b._node])
    place = {id(n): i for i, n in enumerate(order)}

    assert len(order) == len(place) == 4
    assert all(place[id(dep)] < place[id(n)] for n in order for dep in n.deps)


def test_a_node_pickles_with_all_that_it_needs() -> None:
    """The records of a node rebuild the graph with its sharing."""
    a = same(1)
    d = same([same(a), same((a,))])
    back = pickle.loads(pickle.dumps(d._node))
    nodes = topological([back])

    assert len(nodes) == 4
    assert len({n.key for n in nodes}) == 4
    assert back.deps[0].deps[0] is back.deps[1].deps[0]
    assert [n.value for n in nodes] == [PENDING] * 4


def test_here_is_the_users_line() -> None:
    """``call_site()`` called inside Feste names the line outside it."""
    frame = sys._getframe()
    found = call_site()

    assert found == f"{Path(__file__)}:{frame.f_lineno - 2}"


def test_an_origin_without_lines_is_shown_all_the_same() -> None:
    """Code that lost its line table is named by its first line; no origin at all is no text."""
    code = compile("\n\nx = 1", "made_up.py", "exec")
    bare = code.replace(co_linetable=b"")

    assert Node(same, origin=(bare, 0)).where == f"made_up.py:{bare.co_firstlineno}"
    assert Node(same, origin=(code, 10_000)).where == f"made_up.py:{code.co_firstlineno}"
    assert Node(same).where == ""


def test_packing_has_a_limit_of_depth_not_of_length() -> None:
    """Long flat data is fine; what is deeper than the limit is refused, dicts and dataclasses too."""
    assert len(pack(list(range(100_000)), Deps())) == 100_000
    for wrap in (lambda x: {"a": x}, Doc, lambda x: (x,)):
        deep: Any = 0
        for _ in range(MAX_DEPTH + 1):
            deep = wrap(deep)
        with pytest.raises(feste.errors.GraphError, match="a cycle"):
            pack(deep, Deps())
