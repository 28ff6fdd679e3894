"""Merge equal nodes where the result is indistinguishable."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from feste.backend import Params
from feste.draw import Determinism
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization.base import Level, PassContext, Phase
from feste.packing import Nested, Slot
from feste.wording import counted

__all__ = ["CommonSubexpressionOptimization"]


class CommonSubexpressionOptimization:
    """Merge equal PURE nodes and equal GREEDY calls. Equal SAMPLE calls are two draws: never merged.

    Nodes are equal if their ops are equal, their inputs are the same nodes after merging or equal
    known values, and their constants have equal types and values. Other objects must be identical.
    """

    name = "cse"
    level = Level.E1G
    phase = Phase.SIMPLIFY

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with equal nodes merged.

        :param graph: the graph.
        :param cx: receives the account of merged calls.
        """
        first: dict[Hashable, str] = {}
        pairs: dict[str, str] = {}
        sampled: dict[Hashable, list[Node]] = {}
        for key in graph.order():
            node = graph.nodes[key]
            if node.value is not PENDING:
                continue
            inputs = tuple(_input(graph, pairs.get(d, d)) for d in graph.dependencies(key))
            same = expression(node, inputs)
            if not may_merge(node):
                if node.determinism is Determinism.SAMPLE:
                    sampled.setdefault(same, []).append(node)
                continue
            kept = first.setdefault(same, key)
            if kept != key:
                pairs[key] = kept
        for equal in sampled.values():
            if len(equal) > 1:
                cx.missed(f"{len(equal):,} equal calls are kept apart: each is a draw", equal)
        if not pairs:
            return graph
        merged = [graph.nodes[key] for key in pairs]
        for key, kept in pairs.items():
            cx.account([key], f"merged into {kept}")
        cx.applied(f"merged {counted(len(merged), 'node')} into an equal one", merged)
        return graph.merged(pairs)


def may_merge(node: Node) -> bool:
    """Return True if an equal node may replace this one: only for PURE and GREEDY nodes.

    :param node: the node.
    """
    return node.determinism in (Determinism.PURE, Determinism.GREEDY)


def _input(graph: FesteGraph, key: str) -> Hashable:
    """Identify an input by its key, or by its value if known: equal rendered prompts are equal."""
    value = graph.nodes[key].value
    return key if value is PENDING else ("value", _exact(value))


def expression(node: Node, inputs: tuple[Hashable, ...]) -> Hashable:
    """Return a value that is equal exactly for nodes that compute the same.

    :param node: the node.
    :param inputs: identifies each of its inputs after merging.
    """
    token = getattr(node.op, "token", None) or id(node.op)
    return (token, inputs, _exact(node.args), _exact(node.kwargs))


def _exact(value: Any) -> Hashable:
    """Return a hashable that is equal for values of equal types and content at all levels."""
    kind = type(value)
    if kind in (str, bytes, int, bool, type(None)):
        return (kind, value)
    if kind is float:
        return (kind, value.hex())  # keeps 0.0 and -0.0 distinct
    if kind is Slot:
        return (kind, value.index)
    if kind is Nested:
        return (kind, _exact(value.build), tuple(_exact(p) for p in value.parts))
    if kind in (list, tuple):
        return (kind, tuple(_exact(v) for v in value))
    if kind is dict:
        return (kind, tuple((_exact(k), _exact(v)) for k, v in value.items()))
    if kind is slice:
        return (kind, _exact(value.start), _exact(value.stop), _exact(value.step))
    if isinstance(value, Params):
        return (kind, _exact(value.body()))
    return (kind, id(value))
