"""The rules that make a rewrite legal, each a function of its own.

A pass makes a rewrite only if all of its rules hold. There are two kinds of rules: predicates, and
keys, which must be equal for what is put together. No rule is implied by the others; one key,
:func:`expression`, has three others as its parts.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType, NoneType
from typing import Any

from feste.backend import Call, Params
from feste.context import Settings
from feste.draw import Determinism
from feste.fused import Fused
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.packing import Nested, Slot

__all__ = [
    "arguments",
    "enters_first",
    "exact",
    "expression",
    "inputs",
    "is_begun",
    "is_call",
    "is_draw",
    "is_held",
    "is_mergeable",
    "is_open",
    "is_output",
    "is_renderable",
    "is_sync",
    "is_task",
    "is_visible",
    "keeps_values",
    "limits",
    "may_emit",
    "may_repeat",
    "may_share",
    "only_consumer",
    "operation",
    "parameters",
    "ready_event",
    "run_alike",
    "runs_once",
    "stands_for_others",
    "takes_draws",
    "takes_lists",
    "waits_for",
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


def expression(graph: FesteGraph, node: Node, merged: Mapping[str, str] = _NONE) -> Hashable:
    """Return a key that is equal for nodes that do the same with the same.

    :param graph: the graph.
    :param node: the node.
    :param merged: as for :func:`inputs`.
    """
    return (operation(node), inputs(graph, node, merged), arguments(node))


def exact(value: Any) -> Hashable:
    """Return a key that is equal for values of equal types and content at all levels.

    :param value: any value; objects besides plain data and parameters are equal only to themselves.
    """
    kind = type(value)
    if kind in (str, bytes, NoneType):
        itself: Hashable = value  # equal to no value of another type
        return itself
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
    if isinstance(value, Params):  # all fields: `parse` may read one that `body()` leaves out
        return (kind, tuple(exact(getattr(value, f.name)) for f in fields(value)))  # type: ignore[arg-type]
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


def limits(node: Node) -> Hashable:
    """Return a key that is equal for calls whose clients allow equally many calls in a request.

    Clients that are equal otherwise may differ in this, and a request keeps the limits of one.

    :param node: the call.
    """
    call = node.call
    assert call is not None, "only calls share requests"
    return (call.max_items, call.max_draws(call.model(node.args)))


def may_share(node: Node) -> bool:
    """Whether a call's parameters hold for each item of a list by itself; a seed does not.

    :param node: the call.
    """
    return all(a.may_share() for a in node.args if isinstance(a, Params))


def may_repeat(node: Node) -> bool:
    """Whether a call asks for one answer, and nothing in it would change if it asked for several.

    :param node: the call.
    """
    call = node.call
    assert call is not None, "only calls are repeated"
    return call.may_repeat(node.args)


def parameters(node: Node) -> Hashable | None:
    """Return a key that is equal for calls that differ only in the item of a list.

    :param node: the call.
    :returns: None if an argument besides the item is not known before the run, or the operation
        takes no lists.
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


# --- fusing tasks ---------------------------------------------------------------------------------


def is_task(node: Node) -> bool:
    """Whether a node is a user's Python task or an operator; not a prompt, nor a call of a backend.

    :param node: the node.
    """
    return node.op.kind == "task"


def is_sync(node: Node) -> bool:
    """Whether a task runs in a thread or a process of its own, not on a loop with others.

    :param node: the task.
    """
    return not getattr(node.op, "is_async", False)


def is_begun(node: Node) -> bool:
    """Whether something was paid for towards a node's value, from which its next run goes on.

    :param node: the node.
    """
    return node.paid is not None


def may_emit(node: Node) -> bool:
    """Whether a node is declared to return nodes, which batches wait for.

    :param node: the node.
    """
    return node.op.emits


def runs_once(node: Node) -> bool:
    """Whether a task must not run again after it was started, so that a store notes its start.

    :param node: the task.
    """
    return bool(getattr(node.op, "once", False))


def run_alike(one: Node, other: Node) -> bool:
    """Whether two tasks run in the same kind of place, and need the same of it.

    :param one: a task.
    :param other: another.
    """
    a, b = (
        (getattr(node.op, "executor", None), getattr(node.op, "resources", None) or {})
        for node in (one, other)
    )
    return a == b


def only_consumer(consumers: Sequence[str]) -> str | None:
    """Return the consumer of a node's value if there is one alone, else None.

    :param consumers: the keys of all.
    """
    return consumers[0] if len(consumers) == 1 else None


def waits_for(graph: FesteGraph, node: Node, before: Node) -> bool:
    """Whether a node becomes ready when another ends: it waits for nothing that this one does not.

    Otherwise the other would wait for more than its own inputs, and not run if one of these failed.

    :param graph: the graph.
    :param node: the node.
    :param before: the other, one of its inputs.
    """
    own = graph.dependencies(node.key)
    if len(own) == 1:
        return True
    known = {before.key, *graph.dependencies(before.key)}
    return all(key in known or not is_open(graph.nodes[key]) for key in own)


def enters_first(graph: FesteGraph, node: Node, before: Node) -> bool:
    """Whether of a fused node only the first step needs the value of another node.

    :param graph: the graph.
    :param node: any node.
    :param before: the other, one of its inputs.
    """
    if type(node.op) is not Fused:
        return True
    places = {i for i, dep in enumerate(node.deps) if graph.resolve(dep.key) == before.key}
    return all(places.isdisjoint(step.sources) for step in node.op.steps[1:])


def is_output(node: Node, outputs: Container[str]) -> bool:
    """Whether a node's value is asked for.

    :param node: the node.
    :param outputs: the keys of what is asked for, after merges.
    """
    return node.key in outputs


def stands_for_others(node: Node, standing: Container[str]) -> bool:
    """Whether nodes were merged into a node, which keep what is paid for towards its value.

    :param node: the node.
    :param standing: the keys of all nodes that others were merged into.
    """
    return node.key in standing


def is_held(node: Node, growing: bool) -> bool:
    """Whether a run holds a node's value for nodes that a task may still return.

    :param node: the node.
    :param growing: whether there is such a task.
    """
    return growing and node.determinism is not Determinism.PURE


def keeps_values(settings: Settings) -> bool:
    """Whether every node keeps its value after a run.

    :param settings: the settings of the run.
    """
    return bool(settings["keep"] == "all")
