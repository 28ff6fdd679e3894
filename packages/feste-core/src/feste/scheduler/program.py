"""A graph compiled for the brain: nodes by position, their connections, and priorities."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Final

from feste.errors import GraphError
from feste.fused import Fused
from feste.graph import FesteGraph
from feste.node import Node
from feste.optimization.analysis.estimates import SOME_REQUEST, SOME_WORK
from feste.optimization.passes.batch import sharing_key
from feste.sharing import Prefix

__all__ = ["Program"]

_NOBODY: Final[list[int]] = []


class Program:
    """The positions, connections and priorities of a graph's nodes; built in linear time.

    :param graph: the optimized graph.
    :param before: the nodes as the user made them, by key; they receive the values.
    :param rewrites: how many rewrites the optimizer has made.
    :param seconds: returns how long a node takes as measured, or None. It ranks the nodes of a graph
        that has no ranks.
    :raises GraphError: if the graph lacks an input, or has a cycle and no ranks, for which the
        optimizer has looked for one; the message names the keys.
    """

    __slots__ = (
        "batches",
        "consumers",
        "deps",
        "groups",
        "index",
        "inner",
        "keepers",
        "nodes",
        "outputs",
        "prefixes",
        "rank",
        "rewrites",
    )

    def __init__(
        self,
        graph: FesteGraph,
        before: Mapping[str, Node] | None = None,
        rewrites: int = 0,
        seconds: Callable[[Node], float | None] = lambda node: None,
    ) -> None:
        self.rewrites = rewrites
        self.nodes: list[Node] = list(graph.nodes.values())
        #: The position of each node; a merged node has the position of the node that replaces it.
        self.index: dict[str, int] = {key: i for i, key in enumerate(graph.nodes)}
        #: The positions of the fused nodes in which tasks run: nobody holds the values of these.
        self.inner: dict[str, int] = {
            step.node.key: i
            for i, node in enumerate(self.nodes)
            if type(node.op) is Fused
            for step in node.op.steps[:-1]
        }
        index = self.index
        for key in graph.aliases:
            kept = index.get(graph.resolve(key))
            if kept is not None:
                index[key] = kept
        try:
            self.deps: list[Sequence[int]] = [
                tuple([index[d] for d in graph.dependencies(key)]) for key in graph.nodes
            ]
            self.outputs: list[int] = [index[key] for key in graph.wanted()]
        except KeyError as error:
            raise GraphError(f"the graph lacks the node {error.args[0]}") from None
        #: Filled by :meth:`connect` alone: most nodes have none, and share the empty list.
        self.consumers: list[list[int]] = [_NOBODY] * len(self.nodes)
        for i, deps in enumerate(self.deps):
            self.connect(i, deps)
        #: The positions of each batch's calls, and whether equal ones are several answers.
        self.batches: list[tuple[list[int], bool]] = [
            ([index[m] for m in b.members], bool(b.draws)) for b in graph.batches
        ]
        #: What the calls of each group have in common, and their positions.
        self.groups: list[tuple[Hashable, list[int]]] = [
            (sharing_key(graph.nodes[g.members[0]]), [index[m] for m in g.members])
            for g in graph.groups
        ]
        #: The prefixes of each call's request, the shortest first.
        self.prefixes: dict[int, list[Prefix]] = {}
        for prefix in sorted(graph.prefixes, key=lambda p: p.tokens):
            for member in prefix.members:
                self.prefixes.setdefault(index[member], []).append(prefix)
        if graph.ranks:
            self.rank = [graph.ranks[key] for key in graph.nodes]
        else:
            self.rank = self._ranks(_weights(self.nodes, seconds))
        self.keepers: list[tuple[Node, ...]] = self._keepers(graph, before or {})

    def append(self, node: Node, rank: int, keepers: tuple[Node, ...]) -> int:
        """Add a node without connections; return its position.

        :param node: the node.
        :param rank: its priority: the highest goes first.
        :param keepers: the user's nodes that receive its value.
        """
        position = self.index[node.key] = len(self.nodes)
        self.nodes.append(node)
        self.deps.append(())
        self.consumers.append(_NOBODY)
        self.rank.append(rank)
        self.keepers.append(keepers)
        return position

    def connect(self, i: int, deps: Sequence[int]) -> None:
        """Set the inputs of a node.

        :param i: its position.
        :param deps: the positions of its inputs.
        """
        self.deps[i] = deps
        for d in deps:
            consumers = self.consumers[d]
            if consumers is _NOBODY:
                self.consumers[d] = [i]
            else:
                consumers.append(i)

    def _ranks(self, weights: Sequence[int]) -> list[int]:
        """Return each node's longest path to an output: nodes on the critical path go first."""
        waiting = [len(c) for c in self.consumers]
        rank = list(weights)
        stack = [i for i, count in enumerate(waiting) if not count]
        seen = 0
        while stack:
            i = stack.pop()
            seen += 1
            for d in self.deps[i]:
                rank[d] = max(rank[d], rank[i] + weights[d])
                waiting[d] -= 1
                if not waiting[d]:
                    stack.append(d)
        if seen < len(self.nodes):
            stuck = [self.nodes[i].key for i, count in enumerate(waiting) if count]
            raise GraphError(f"the graph has a cycle among {', '.join(stuck[:5])}")
        return rank

    def _keepers(self, graph: FesteGraph, before: Mapping[str, Node]) -> list[tuple[Node, ...]]:
        """Return the user's nodes that receive each value: the node and those merged into it."""
        merged: dict[str, list[Node]] = {}
        for key in graph.aliases:
            if key in before:
                merged.setdefault(graph.resolve(key), []).append(before[key])
        if not merged and before is graph.nodes:
            return [(node,) for node in self.nodes]
        return [(before.get(key, node), *merged.get(key, ())) for key, node in graph.nodes.items()]


def _weights(nodes: Sequence[Node], seconds: Callable[[Node], float | None]) -> list[int]:
    """Return what each node adds to a path: 1, or milliseconds where any were measured."""
    by_op: dict[int, float | None] = {}
    for node in nodes:
        if id(node.op) not in by_op:
            by_op[id(node.op)] = seconds(node)
    measured = [by_op[id(node.op)] for node in nodes]
    if not any(measured):
        return [1] * len(nodes)
    guesses = (SOME_WORK if node.call is None else SOME_REQUEST for node in nodes)
    pairs = zip(measured, guesses, strict=True)
    return [round(1000 * (guess if known is None else known)) + 1 for known, guess in pairs]
