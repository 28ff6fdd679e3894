"""Give each node a priority by the time that must pass after it starts."""

from __future__ import annotations

from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization.analysis.estimates import SOME_REQUEST, SOME_WORK
from feste.optimization.analysis.paths import Paths
from feste.optimization.analysis.profiles import Profiles
from feste.optimization.analysis.tokens import bound_of, likely_output
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["CriticalPathOptimization"]


class CriticalPathOptimization:
    """Let the nodes of the longest path go first, by estimated seconds instead of by steps.

    Where no latency is known, the scheduler counts the steps, and nothing is to do here.
    """

    name = "critical_path"
    level = Level.E0
    phase = Phase.SCHEDULE

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with ranks: milliseconds to an output, and one more for each step.

        :param graph: the graph.
        :param cx: receives a remark on the calls of known latency.
        """
        profiles = Profiles()
        known: list[Node] = []
        weights: list[float] = []
        items = {m: _items(graph.nodes[m], b.items) for b in graph.batches for m in b.members}
        for node in graph.nodes.values():
            seconds = SOME_WORK
            if node.value is not PENDING:
                seconds = 0.0
            elif (call := node.call) is not None:
                latency = profiles.of(call.client, call.model(node.args)).latency
                seconds = SOME_REQUEST
                if latency is not None:
                    known.append(node)
                    seconds = latency.seconds(items.get(node.key, 1), likely_output(bound_of(node)))
            weights.append(round(1000 * seconds) + 1)
        if not known or not cx.allow():
            return graph
        paths = Paths(graph)
        ranks = zip(paths.keys, map(int, paths.begins(weights)), strict=True)
        cx.applied(f"ranked by the latency of {counted(len(known), 'call')}")
        return graph.replace(ranks=dict(ranks))


def _items(node: Node, items: int) -> int:
    call = node.call
    return items if call is None else min(items, call.max_items)
