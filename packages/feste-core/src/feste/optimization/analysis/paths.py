"""Longest paths through a graph: what a run must wait for, and how deep it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from feste.graph import FesteGraph

__all__ = ["Paths"]


class Paths:
    """A graph by positions, in topological order. All walks are iterative and linear.

    :param graph: the graph.
    :raises GraphError: if it has a cycle or lacks an input.

    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> first = llm.complete("Hi")
    >>> graph, _, _ = FesteGraph.collect([llm.complete(first), llm.complete("Ho")])
    >>> paths = Paths(graph)
    >>> paths.ends([1, 1, 5]), paths.begins([1, 1, 5])
    ([1, 2, 5], [2, 1, 5])
    """

    __slots__ = ("deps", "keys", "order")

    def __init__(self, graph: FesteGraph) -> None:
        #: The keys by position.
        self.keys = list(graph.nodes)
        position = {key: i for i, key in enumerate(self.keys)}
        #: The positions of each node's inputs.
        try:
            self.deps = [[position[d] for d in graph.dependencies(key)] for key in self.keys]
        except KeyError:
            graph.order()  # names the node that lacks an input
            raise
        #: The positions, inputs before consumers.
        self.order: Sequence[int] = range(len(self.keys))
        if any(d >= i for i, deps in enumerate(self.deps) for d in deps):
            self.order = self._sorted()
            if len(self.order) < len(self.keys):
                graph.order()  # names the cycle

    def through(self, steps: Sequence[tuple[int, Sequence[int]]]) -> Paths:
        """Return these paths with further steps, whose positions are behind those of the nodes.

        :param steps: for each, the position of the node that it needs, and of those that need it.
        """
        made = copy.copy(self)
        made.deps = list(self.deps)
        for at, (first, others) in enumerate(steps, start=len(self.deps)):
            made.deps.append([first])
            for i in others:
                made.deps[i] = [*made.deps[i], at]
        made.order = made._sorted()
        return made

    def _sorted(self) -> list[int]:
        consumers: list[list[int]] = [[] for _ in self.deps]
        waiting = [len(deps) for deps in self.deps]
        for i, deps in enumerate(self.deps):
            for d in deps:
                consumers[d].append(i)
        order = [i for i, count in enumerate(waiting) if not count]
        for i in order:  # grows while it is read
            for c in consumers[i]:
                waiting[c] -= 1
                if not waiting[c]:
                    order.append(c)
        return order

    def ends(self, weights: Sequence[float]) -> list[float]:
        """Return the weight of the heaviest path that ends with each node, itself included.

        :param weights: the weight of each node, by position.
        """
        best = list(weights)
        deps = self.deps
        for i in self.order:
            if deps[i]:
                best[i] += max([best[d] for d in deps[i]])
        return best

    def begins(self, weights: Sequence[float]) -> list[float]:
        """Return the weight of the heaviest path that begins with each node, itself included.

        :param weights: the weight of each node, by position.
        """
        behind: list[float] = [0] * len(self.deps)
        for i in reversed(self.order):
            above = behind[i] = behind[i] + weights[i]
            for d in self.deps[i]:
                if behind[d] < above:
                    behind[d] = above
        return behind

    def heaviest(self, weights: Sequence[float]) -> list[int]:
        """Return the positions of the nodes of a heaviest path, the first to run first.

        :param weights: the weight of each node, by position.
        """
        best = self.ends(weights)
        path: list[int] = []
        at = max(range(len(best)), key=best.__getitem__, default=None)
        while at is not None:
            path.append(at)
            at = max(self.deps[at], key=best.__getitem__, default=None)
        return path[::-1]
