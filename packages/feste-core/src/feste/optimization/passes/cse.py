"""Merge equal nodes where the result is indistinguishable."""

from __future__ import annotations

from collections.abc import Hashable

from feste.graph import FesteGraph
from feste.node import Node
from feste.optimization import rules
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["CommonSubexpressionOptimization"]


class CommonSubexpressionOptimization:
    """Merge equal PURE nodes and equal GREEDY calls. Equal SAMPLE calls are two draws: never merged.

    Nodes are equal if their operations are equal, their inputs are the same nodes after merging or
    equal known values, and their constants have equal types and values. Other objects must be
    identical.
    """

    name = "cse"
    level = Level.E1G
    phase = Phase.SIMPLIFY

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with equal nodes merged.

        :param graph: the graph.
        :param cx: receives a remark on merged nodes, and one on equal draws.
        """
        first: dict[Hashable, str] = {}
        merged: dict[str, str] = {}
        sampled: dict[Hashable, list[Node]] = {}
        for key in graph.order():
            node = graph.nodes[key]
            if not rules.is_open(node):
                continue
            expression = rules.expression(graph, node, merged)
            if rules.is_mergeable(node):
                kept = first.setdefault(expression, key)
                if kept != key and cx.allow():
                    merged[key] = kept
            elif rules.is_draw(node):
                sampled.setdefault(expression, []).append(node)
        for equal in sampled.values():
            if len(equal) > 1:
                cx.missed(f"{len(equal):,} equal calls stay {len(equal):,} draws", equal)
        if not merged:
            return graph
        gone = [graph.nodes[key] for key in merged]
        cx.applied(f"merged {counted(len(gone), 'node')} into an equal one", gone)
        return graph.merged(merged)
