"""Ask for several answers to one prompt, instead of sending the prompt several times."""

from __future__ import annotations

from collections.abc import Hashable

from feste.graph import Batch, FesteGraph
from feste.node import Node
from feste.optimization import rules
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["SampleFusionOptimization"]


class SampleFusionOptimization:
    """Make k equal SAMPLE calls one request for k answers, so that the prompt is paid once.

    Each call still gets an answer of its own. The answers to one request must be independent draws;
    a backend says so by a :class:`~feste.backend.SampleRule` and its profile. Then the joint
    distribution of all outputs is unchanged.
    """

    name = "sample_fusion"
    level = Level.E1
    phase = Phase.PHYSICAL
    before = ("batch",)

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with equal draws in common batches.

        :param graph: the graph.
        :param cx: receives a remark for the draws of each operation.
        """
        batched = {member for batch in graph.batches for member in batch.members}
        equal: dict[Hashable, list[Node]] = {}
        for node in graph.calls():
            if rules.is_draw(node) and node.key not in batched:
                same = (rules.limits(node), rules.expression(graph, node))
                equal.setdefault(same, []).append(node)
        batches: list[Batch] = []
        fused: dict[str, list[Node]] = {}
        single: dict[str, list[Node]] = {}
        for nodes in equal.values():
            call = nodes[0].call
            if len(nodes) == 1 or call is None or not rules.may_repeat(nodes[0]):
                continue
            if not rules.takes_draws(call, call.model(nodes[0].args)):
                single.setdefault(call.name, []).extend(nodes)
            elif cx.allow():
                keys = tuple(n.key for n in nodes)
                batches.append(Batch(keys, draws=(keys,)))
                fused.setdefault(call.name, []).extend(nodes)
        for name, nodes in fused.items():
            cx.applied(
                f"{counted(len(nodes), 'call')} of {name} are several answers to one prompt", nodes
            )
        for name, nodes in single.items():
            cx.missed(
                f"{counted(len(nodes), 'equal call')} of {name} are sent singly: the backend promises no "
                "independent answers to one request",
                nodes,
            )
        return graph.replace(batches=[*graph.batches, *batches]) if batches else graph
