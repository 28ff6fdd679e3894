"""Make one node of each chain of Python tasks, so that the scheduler handles one task."""

from __future__ import annotations

from collections.abc import Iterator

from feste import fused
from feste.graph import FesteGraph
from feste.node import Node
from feste.optimization import rules
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["FuseOptimization"]


class FuseOptimization:
    """Fuse each task into the only task that needs it, where that one needs nothing else.

    The fused node runs the same functions in the same order and place; see
    :class:`~feste.fused.Fused`. Values in between are not held for anyone: so nothing else in the
    graph may need one. Another run that needs one computes it again, even at the same time.
    """

    name = "fuse"
    level = Level.E0
    phase = Phase.SIMPLIFY
    after = ("cse", "resolve")

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with chains of tasks fused.

        :param graph: the graph.
        :param cx: receives one remark for all chains.
        """
        if rules.keeps_values(cx.settings):
            return graph
        made: dict[str, Node] = {}
        gone: list[Node] = []
        for chain in _chains(graph):
            if cx.allow():
                made[chain[-1].key] = fused.fuse(chain, graph.resolve)
                gone += chain[:-1]
        if not made:
            return graph
        tasks = counted(len(gone) + len(made), "task")
        cx.applied(f"fused {tasks} into {len(made):,}", list(made.values()))
        inner = {node.key for node in gone}
        return graph.replace(
            nodes={key: made.get(key, n) for key, n in graph.nodes.items() if key not in inner}
        )


def _chains(graph: FesteGraph) -> Iterator[list[Node]]:
    """Yield the chains of at least two nodes, inputs first."""
    nodes = graph.nodes
    consumers: dict[str, list[str]] = {key: [] for key in nodes}
    for key in nodes:
        for need in dict.fromkeys(graph.dependencies(key)):
            consumers[need].append(key)
    outputs, standing = frozenset(graph.wanted()), frozenset(map(graph.resolve, graph.aliases))
    growing = any(rules.may_emit(n) and rules.is_open(n) for n in nodes.values())
    tasks = {key for key, node in nodes.items() if _is_fusible(node)}
    following: dict[str, str] = {}
    for key in tasks:
        node, consumer = nodes[key], rules.only_consumer(consumers[key])
        if (
            consumer in tasks
            and not rules.is_output(node, outputs)
            and not rules.stands_for_others(node, standing)
            and not rules.is_held(node, growing)
            and rules.run_alike(node, nodes[consumer])
            and rules.waits_for(graph, nodes[consumer], node)
            and rules.enters_first(graph, nodes[consumer], node)
        ):
            following[key] = consumer
    inner = set(following.values())
    for key in nodes:
        if key in following and key not in inner:
            chain = [nodes[key]]
            while key in following:
                key = following[key]
                chain.append(nodes[key])
            yield chain


def _is_fusible(node: Node) -> bool:
    return (
        rules.is_task(node)
        and rules.is_open(node)
        and rules.is_sync(node)
        and not rules.is_begun(node)
        and not rules.may_emit(node)
        and not rules.runs_once(node)
    )
