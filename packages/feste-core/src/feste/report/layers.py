"""Assign the boxes of a layered drawing to rows, and order the boxes in each row."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Edge = tuple[int, int]

ORDER_SWEEPS = 12
SWEPT = 60_000  # the total of nodes and dummies in all sweeps, so huge pictures get fewer sweeps


@dataclass(slots=True)
class Grid:
    """Units (a box, the boxes of one outline, or a dummy) in rows, and their links."""

    rows: list[list[int]]
    members: list[list[int]]
    outlined: set[int]
    above: list[list[int]]
    below: list[list[int]]
    routes: dict[Edge, list[int]]

    def nodes(self, row: Sequence[int]) -> list[int]:
        """Return the boxes and dummies in the units of a row."""
        return [node for unit in row for node in self.members[unit]]

    def sweeps(self, most: int) -> int:
        """Return how many sweeps over all rows a grid of this size can afford."""
        return max(2, min(most, SWEPT // max(1, len(self.above))))


def layered(edges: Sequence[Edge], groups: Sequence[str]) -> Grid:
    """Put boxes into ordered rows, with a dummy in each row that a long edge passes.

    :param edges: pairs of box numbers, without a cycle.
    :param groups: one name per box; boxes with the same name form one unit, "" is a unit of its
        own.
    :returns: the rows; dummies are numbered after the boxes.
    :raises ValueError: if the edges have a cycle.
    """
    grid = _grid(edges, groups)
    _order(grid)
    return grid


def middle_of(nodes: Sequence[int], near: Sequence[Sequence[int]], at: Sequence[float]) -> float:
    """Return the mean position of some nodes if each moved to the mean of its neighbours."""
    return sum(_mean(near[node], at, node) for node in nodes) / len(nodes)


def _mean(near: Sequence[int], at: Sequence[float], itself: int) -> float:
    return sum(at[node] for node in near) / len(near) if near else at[itself]


def depths(count: int, edges: Iterable[Edge]) -> list[int]:
    """Return the longest path from a source to each node; -1 for nodes in or after a cycle.

    >>> depths(3, [(0, 1), (1, 2), (0, 2)])
    [0, 1, 2]
    """
    after: list[list[int]] = [[] for _ in range(count)]
    waiting, level, found = [0] * count, [0] * count, [-1] * count
    for tail, head in edges:
        after[tail].append(head)
        waiting[head] += 1
    ready = [node for node in range(count) if not waiting[node]]
    for node in ready:  # `ready` grows during the loop
        found[node] = level[node]
        for head in after[node]:
            level[head] = max(level[head], level[node] + 1)
            waiting[head] -= 1
            if not waiting[head]:
                ready.append(head)
    return found


def cycle(edges: Iterable[Edge], depth: Sequence[int]) -> list[int]:
    """Return the nodes of one cycle, given depths that contain a -1.

    >>> sorted(cycle([(0, 1), (1, 0), (1, 2)], [-1, -1, -1]))
    [0, 1]
    """
    # Every stuck node waits for another one, so walking backwards must reach a node twice.
    before = {head: tail for tail, head in edges if depth[tail] < 0 and depth[head] < 0}
    node, seen = next(iter(before)), dict[int, None]()
    while node not in seen:
        seen[node] = None
        node = before[node]
    walked = list(seen)
    return walked[walked.index(node) :]


def _grid(edges: Sequence[Edge], groups: Sequence[str]) -> Grid:
    members, outlined, level = _units(edges, groups)
    unit_of = {node: unit for unit, nodes in enumerate(members) for node in nodes}
    rows: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
    for unit, row in enumerate(level):
        rows[row].append(unit)
    dummies: dict[tuple[int, int], int] = {}  # one per source and row, shared by a source's edges
    routes: dict[Edge, list[int]] = {}
    for tail, head in edges:
        route = [tail]
        for row in range(level[unit_of[tail]] + 1, level[unit_of[head]]):
            if (tail, row) not in dummies:
                dummies[tail, row] = len(groups) + len(dummies)
                rows[row].append(len(members))
                members.append([dummies[tail, row]])
            route.append(dummies[tail, row])
        routes[tail, head] = [*route, head]
    count = len(groups) + len(dummies)
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for one, other in dict.fromkeys(link for route in routes.values() for link in pairwise(route)):
        below[one].append(other)
        above[other].append(one)
    return Grid(rows, members, outlined, above, below, routes)


def _units(
    edges: Sequence[Edge], groups: Sequence[str]
) -> tuple[list[list[int]], set[int], list[int]]:
    """Return the units as lists of boxes, the units with an outline, and the row of each unit."""
    names: list[str] = list(groups)
    while True:
        number: dict[str | int, int] = {}
        unit = [number.setdefault(name or node, len(number)) for node, name in enumerate(names)]
        links = list(dict.fromkeys((unit[tail], unit[head]) for tail, head in edges))
        level = depths(len(number), links)
        if -1 not in level:
            break
        # A group that would wait for itself cannot be one unit, so its boxes become single units.
        ring = set(cycle(links, level))
        apart = ["" if unit[node] in ring else name for node, name in enumerate(names)]
        if apart == names:
            raise ValueError("the edges have a cycle")
        names = apart
    members: list[list[int]] = [[] for _ in number]
    for node, home in enumerate(unit):
        members[home].append(node)
    nearest: dict[int, int] = {}
    for tail, head in links:
        nearest[tail] = min(nearest.get(tail, level[head]), level[head])
    fed = {head for _, head in links}
    for source in nearest.keys() - fed:  # put inputs one row before their first consumer
        level[source] = nearest[source] - 1
    outlined = {unit[node] for node, name in enumerate(names) if name}
    return members, outlined, level


def _order(grid: Grid) -> None:
    """Order each row to reduce crossings: barycentre sweeps, of which the best result is kept."""
    spot = [0.0] * len(grid.above)
    for row in grid.rows:
        _rank(grid.nodes(row), spot)
    least, best = math.inf, (grid.rows, grid.members)
    for sweep in range(grid.sweeps(ORDER_SWEEPS)):
        crossings = _crossings(grid, spot)
        if crossings < least:
            least = crossings
            best = [list(row) for row in grid.rows], [list(nodes) for nodes in grid.members]
        if not crossings:
            break
        near = grid.below if sweep % 2 else grid.above
        for row in reversed(grid.rows) if sweep % 2 else grid.rows:
            for unit in row:
                grid.members[unit].sort(key=lambda node: _mean(near[node], spot, node))
            row.sort(key=lambda unit: middle_of(grid.members[unit], near, spot))
            _rank(grid.nodes(row), spot)
    grid.rows, grid.members = best


def _rank(nodes: Sequence[int], spot: list[float]) -> None:
    """Set the relative position of each node in a row, from 0 to 1, comparable between rows."""
    for rank, node in enumerate(nodes):
        spot[node] = (rank + 0.5) / len(nodes)


def _crossings(grid: Grid, spot: Sequence[float]) -> int:
    total = 0
    for row in grid.rows:
        seen: list[float] = []
        links = [(spot[node], spot[to]) for node in grid.nodes(row) for to in grid.below[node]]
        for _, end in sorted(links):
            total += len(seen) - bisect_right(seen, end)
            insort(seen, end)
    return total
