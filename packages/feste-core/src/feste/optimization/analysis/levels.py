"""How calls of one group stand behind each other, and how few requests can answer them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from feste.graph import FesteGraph

__all__ = ["least_requests", "levels_of"]

#: How many groups get exact levels; the largest ones. Each takes a walk through the graph.
MOST_GROUPS = 64


def levels_of(graph: FesteGraph, groups: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return for each call how many calls of its group are on the longest path that ends in it.

    The level of a call is at least 1, and calls of one level do not depend on each other. Groups
    beyond the largest 64 get level 1 throughout.

    :param graph: the graph.
    :param groups: the keys of each group.

    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> first = llm.complete("Hi")
    >>> second = llm.complete(first)
    >>> graph, _, _ = FesteGraph.collect(second)
    >>> levels_of(graph, [[first.key, second.key]])
    [[1, 2]]
    """
    if all(len(keys) < 2 for keys in groups):
        return [[1] * len(keys) for keys in groups]
    order = {key: i for i, key in enumerate(graph.order())}
    consumers: dict[str, list[str]] = {}
    for key in order:
        for need in graph.dependencies(key):
            consumers.setdefault(need, []).append(key)
    largest = sorted(range(len(groups)), key=lambda i: -len(groups[i]))[:MOST_GROUPS]
    exact = {i: _levels(order, consumers, groups[i]) for i in largest if len(groups[i]) > 1}
    return [
        [exact[i][key] for key in keys] if i in exact else [1] * len(keys)
        for i, keys in enumerate(groups)
    ]


def _levels(
    order: Mapping[str, int], consumers: Mapping[str, Sequence[str]], members: Sequence[str]
) -> dict[str, int]:
    """Walk from the members to all that needs them, inputs before consumers."""
    own = frozenset(members)
    depth = dict.fromkeys(own, 0)
    waiting = [(order[key], key) for key in own]
    heapq.heapify(waiting)
    while waiting:
        _, key = heapq.heappop(waiting)
        if key in own:
            depth[key] += 1
        for consumer in consumers.get(key, ()):
            if consumer not in depth:
                heapq.heappush(waiting, (order[consumer], consumer))
            depth[consumer] = max(depth.get(consumer, 0), depth[key])
    return {key: depth[key] for key in own}


def least_requests(levels: Iterable[int], limit: int) -> int:
    """Return a lower bound of the requests for some calls, for any order and grouping.

    One request cannot hold calls of which one needs the other. So with l levels done, at least l
    requests were sent, and the calls above need ``ceil(count / limit)`` more: the bound is the
    largest such sum.

    :param levels: the level of each call.
    :param limit: the maximum number of calls in one request.

    >>> least_requests([1, 1, 1, 2], limit=16), least_requests([1] * 17, limit=16)
    (2, 2)
    """
    counts = Counter(levels)
    above = sum(counts.values())
    best = 0
    for level in range(max(counts, default=0)):
        above -= counts[level]
        best = max(best, level + -(-above // limit))
    return best
