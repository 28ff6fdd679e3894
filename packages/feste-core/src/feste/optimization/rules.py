"""The rules that make a rewrite legal, each a function of its own.

A pass makes a rewrite only if all of its rules hold. There are two kinds of rules: predicates, and
keys, which must be equal for what is put together. No rule is implied by the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any

from feste.backend import Call, Params
from feste.draw import Determinism
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.packing import Nested, Slot

__all__ = [
    "arguments",
    "exact",
    "inputs",
    "is_call",
    "is_draw",
    "is_mergeable",
    "is_open",
    "is_renderable",
    "is_visible",
    "may_fuse",
    "may_share",
    "operation",
    "parameters",
    "ready_event",
    "takes_draws",
    "takes_lists",
]

_NONE: Mapping[str, str] = MappingProxyType({})


# --- of nodes -------------------------------------------------------------------------------------


def is_open(node: Node) -> bool:
    """Whether a node's value is not known: a known one is an answer, and is not asked for again.

    :param node: the node.
    """
    return node.value is PENDING


def is_call(node: Node) -> bool:
    """Whether a node is a call of a backend.

    :param node: the node.
    """
    return node.op.kind == "call"


def is_visible(node: Node) -> bool:
    """Whether running a node changes something outside, so that each must run by itself.

    :param node: the node.
    """
    return node.determinism is Determinism.EFFECT


def is_renderable(node: Node) -> bool:
    """Whether a prompt may be rendered before the run: equal variables give equal texts.

    :param node: the node.
    """
    return node.op.kind == "prompt" and node.determinism is Determinism.PURE


def is_mergeable(node: Node) -> bool:
    """Whether an equal node may stand for this one: only for PURE and GREEDY. A SAMPLE is a draw.

    :param node: the node.
    """
    return node.determinism in (Determinism.PURE, Determinism.GREEDY)


def is_draw(node: Node) -> bool:
    """Whether a node is a fresh draw each time: two equal ones stay two.

    :param node: the node.
    """
    return node.determinism is Determinism.SAMPLE


# --- equality -------------------------------------------------------------------------------------


def operation(node: Node) -> Hashable:
    """Return a key that is equal for nodes that do the same: of calls, with equal backends and keys.

    :param node: the node.
    """
    return getattr(node.op, "token", None) or id(node.op)


def arguments(node: Node) -> Hashable:
    """Return a key that is equal for nodes whose constants have equal types and values.

    :param node: the node.
    """
    return (exact(node.args), exact(node.kwargs))


def inputs(graph: FesteGraph, node: Node, merged: Mapping[str, str] = _NONE) -> Hashable:
    """Return a key that is equal for nodes whose inputs are the same, or equal known values.

    :param graph: the graph.
    :param node: the node.
    :param merged: for keys that are being merged, the keys that replace them.
    """
    return tuple(_input(graph, merged.get(key, key)) for key in graph.dependencies(node.key))


def _input(graph: FesteGraph, key: str) -> Hashable:
    value = graph.nodes[key].value
    return key if value is PENDING else ("value", exact(value))


def exact(value: Any) -> Hashable:
    """Return a key that is equal for values of equal types and content at all levels.

    :param value: any value; objects besides plain data and parameters are equal only to themselves.
    """
    kind = type(value)
    if kind in (str, bytes, type(None)):  # equal to no value of another type
        return value  # type: ignore[no-any-return]
    if kind in (int, bool):
        return (kind, value)
    if kind is float:
        return (kind, value.hex())  # keeps 0.0 and -0.0 distinct
    if kind is Slot:
        return (kind, value.index)
    if kind is Nested:
        return (kind, exact(value.build), tuple(exact(p) for p in value.parts))
    if kind in (list, tuple):
        return (kind, tuple(exact(v) for v in value))
    if kind is dict:
        return (kind, tuple((exact(k), exact(v)) for k, v in value.items()))
    if kind is slice:
        return (kind, exact(value.start), exact(value.stop), exact(value.step))
    if isinstance(value, Params):
        return (kind, exact(value.body()))
    return (kind, id(value))


# --- sharing a request ----------------------------------------------------------------------------


def takes_lists(call: Call[Any]) -> bool:
    """Whether an operation answers a list of calls in one request.

    :param call: the operation.
    """
    return call.rule is not None and call.max_items > 1


def takes_draws(call: Call[Any], model: str) -> bool:
    """Whether several answers to one request of an operation are independent draws.

    :param call: the operation.
    :param model: the model.
    """
    return call.max_draws(model) > 1


def may_share(node: Node) -> bool:
    """Whether a call's parameters hold for each item of a list by itself; a seed does not.

    :param node: the call.
    """
    return all(a.may_share() for a in node.args if isinstance(a, Params))


def may_fuse(node: Node) -> bool:
    """Whether a call asks for one answer, and nothing in it would change if it asked for several.

    :param node: the call.
    """
    call = node.call
    assert call is not None, "only calls are fused"
    return call.may_fuse(node.args)


def parameters(node: Node) -> Hashable | None:
    """Return a key that is equal for calls that differ only in the item of a list.

    :param node: the call.
    :returns: None if an argument besides the item is not known before the run.
    """
    call = node.call
    assert call is not None, "only calls share requests"
    return call.group(node.args)


def ready_event(graph: FesteGraph, node: Node) -> Hashable:
    """Return a key that is equal for nodes that become ready at the same time.

    They have the same unfinished inputs, or none. So a batch of them lets none of them wait; and
    because its members have the same inputs, contracting any number of such batches leaves the
    graph acyclic: a way from one member to another would be a way from that member to itself.

    :param graph: the graph.
    :param node: the node.
    """
    return frozenset(d for d in graph.dependencies(node.key) if graph.nodes[d].value is PENDING)
