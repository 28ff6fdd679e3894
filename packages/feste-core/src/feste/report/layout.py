"""The geometry of graph pictures: the positions of boxes and edges.

The layout is the classic layered one: rows by longest path, shared dummy points for long edges,
barycentre sweeps against crossings, and an isotonic fit that straightens edges and never lets boxes
overlap. Nothing recurses, so graphs may be of any depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from feste.report.layers import Edge, Grid, layered, middle_of
from feste.report.svg import Rect

Point = tuple[float, float]

SETTLE_SWEEPS = 16
PAGE = 1200.0
MAX_CLIMB = 90.0
BOX_GAP, INNER_GAP = 16.0, 8.0
PADS = (10.0, 24.0, 10.0, 10.0)  # left, top, right, bottom padding of an outline around its boxes


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry; routes are straight from each even point to the next, curved from odd ones."""

    rightwards: bool
    width: float
    height: float
    rects: list[Rect]
    outlines: list[tuple[list[int], Rect]]
    routes: dict[Edge, list[Point]]


def arrange(
    widths: Sequence[float],
    height: float,
    edges: Sequence[Edge],
    groups: Sequence[str],
    gap: float = 44.0,
) -> Layout:
    """Place boxes in layers, left to right or top to bottom, whichever gives the better shape.

    :param widths: the natural width of each box.
    :param height: the height of all boxes.
    :param edges: pairs of box numbers, without a cycle.
    :param groups: one name per box; boxes with the same name share an outline, "" has none.
    :param gap: the minimum distance between rows, for the edges.
    :returns: rectangles, outlines and routes, with the corner of the drawing at (0, 0).
    :raises ValueError: if the edges have a cycle.

    >>> arrange([80, 90], 40, [(0, 1)], ["", ""]).rightwards
    True
    """
    grid = layered(edges, groups)
    left, top, right, bottom = PADS
    sideways = _place(grid, [(width, height) for width in widths], PADS, gap)
    turned_pads = (top, left, bottom, right)
    downwards = _turned(_place(grid, [(height, width) for width in widths], turned_pads, gap))
    return sideways if _ugliness(sideways) - 0.6 <= _ugliness(downwards) else downwards


def _ugliness(layout: Layout) -> float:
    # The frame around the drawing (title, legend) counts as part of its shape. A page scrolls
    # vertically but shrinks a picture that is too wide.
    width, height = max(layout.width, 380) + 48, layout.height + 110
    return abs(math.log(width / height / 1.6)) + max(0.0, width / PAGE - 1)


def _place(
    grid: Grid,
    sizes: Sequence[tuple[float, float]],
    pads: tuple[float, float, float, float],
    gap: float,
) -> Layout:
    """Turn ordered rows into rectangles, with edges running to the right.

    All boxes of a row are as long as its longest; dummies are numbered after the boxes.
    """
    lead, before, trail, after = pads
    middle = _settle(grid, [wide for _, wide in sizes], before, after)
    longs = [long for long, _ in sizes]
    bands = _bands(grid, middle, longs, lead=lead, trail=trail, gap=gap)
    low = [middle[node] - wide / 2 for node, (_, wide) in enumerate(sizes)]
    rects = [
        Rect(bands[node].start, low[node], bands[node].size, wide)
        for node, (_, wide) in enumerate(sizes)
    ]
    outlines = []
    for unit in sorted(grid.outlined):
        nodes = grid.members[unit]
        band, last = bands[nodes[0]], rects[nodes[-1]]
        top = low[nodes[0]] - before
        frame = Rect(
            band.start - lead, top, lead + band.size + trail, last.y + last.height + after - top
        )
        outlines.append((nodes, frame))
    routes = {
        edge: [(at, middle[node]) for node in route for at in bands[node].passage(node, edge)]
        for edge, route in grid.routes.items()
    }
    shapes = [*rects, *(frame for _, frame in outlines)]
    width = max((shape.x + shape.width for shape in shapes), default=0.0)
    height = max((shape.y + shape.height for shape in shapes), default=0.0)
    return Layout(True, width, height, rects, outlines, routes)


def _turned(layout: Layout) -> Layout:
    """Return the layout with x and y exchanged."""

    def turn(rect: Rect) -> Rect:
        return Rect(rect.y, rect.x, rect.height, rect.width)

    return Layout(
        False,
        layout.height,
        layout.width,
        [turn(rect) for rect in layout.rects],
        [(nodes, turn(frame)) for nodes, frame in layout.outlines],
        {edge: [(y, x) for x, y in points] for edge, points in layout.routes.items()},
    )


@dataclass(frozen=True, slots=True)
class _Band:
    """The strip of a row: outlines fill it, boxes stand inside, beginning at `start`."""

    low: float
    start: float
    size: float
    high: float

    def passage(self, node: int, edge: Edge) -> tuple[float, float]:
        """Return where an edge enters and leaves a node's strip; it starts and ends at boxes."""
        return (
            self.start + self.size if node == edge[0] else self.low,
            self.start if node == edge[1] else self.high,
        )


def _bands(
    grid: Grid,
    middle: Sequence[float],
    longs: Sequence[float],
    *,
    lead: float,
    trail: float,
    gap: float,
) -> dict[int, _Band]:
    """Return the strip of each node; strips follow one another."""
    bands: dict[int, _Band] = {}
    low = 0.0
    for row in grid.rows:
        nodes = grid.nodes(row)
        size = max((longs[node] for node in nodes if node < len(longs)), default=0.0)
        framed = not grid.outlined.isdisjoint(row)
        start = low + lead * framed
        high = start + size + trail * framed
        bands.update(dict.fromkeys(nodes, _Band(low, start, size, high)))
        # Edges that climb far get more room, so that they stay flat.
        climb = max((abs(middle[n] - middle[m]) for n in nodes for m in grid.below[n]), default=0.0)
        low = high + gap + min(MAX_CLIMB, 0.12 * climb)
    return bands


def _settle(grid: Grid, breadth: Sequence[float], before: float, after: float) -> list[float]:
    """Return each node's middle across its row: near its neighbours, in order, without overlap."""
    middle = [0.0] * len(grid.above)
    offset = [0.0] * len(grid.above)  # from the start of a unit to the middle of its node
    extent = [0.0] * len(grid.members)
    for unit, nodes in enumerate(grid.members):
        at = BOX_GAP / 2 + before * (unit in grid.outlined)
        for node in nodes:
            size = breadth[node] if node < len(breadth) else 0.0
            offset[node] = at + size / 2
            at += size + INNER_GAP
        extent[unit] = at - INNER_GAP + after * (unit in grid.outlined) + BOX_GAP / 2
    near = [up + down for up, down in zip(grid.above, grid.below)]
    down, up = grid.rows, grid.rows[::-1]
    both = [(down, grid.above), (up, grid.below)]
    passes = [(down, near), *both * grid.sweeps(SETTLE_SWEEPS)]
    # Finally, align everything with the widest row, which has the least freedom.
    pivot = max(range(len(down)), key=lambda row: sum(extent[u] for u in down[row]), default=0)
    passes += [(down[pivot + 1 :], grid.above), (down[:pivot][::-1], grid.below)]
    for rows, towards in passes:
        for row in rows:
            wishes, weights = [], []
            for unit in row:
                nodes = grid.members[unit]
                start = sum(offset[node] for node in nodes) / len(nodes)
                wishes.append(middle_of(nodes, towards, middle) - start)
                weights.append(1.0 + sum(len(towards[node]) for node in nodes))
            starts = _spread(wishes, weights, [extent[unit] for unit in row])
            for unit, start in zip(row, starts):
                for node in grid.members[unit]:
                    middle[node] = start + offset[node]
    least = min((middle[n] - offset[n] for nodes in grid.members for n in nodes), default=0.0)
    return [at - least - BOX_GAP / 2 for at in middle]


def _spread(
    wishes: Sequence[float], weights: Sequence[float], extents: Sequence[float]
) -> list[float]:
    """Return starts as near to the wishes as possible (least squares) without overlapping units.

    Pool adjacent violators: after subtracting the extents, the starts only have to be in order.

    >>> _spread([0.0, 1.0], [1.0, 1.0], [10.0, 10.0])
    [-4.5, 5.5]
    """
    pools: list[tuple[float, float, int]] = []
    taken = 0.0
    for wish, weight, extent in zip(wishes, weights, extents):
        mean, mass, size = wish - taken, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, number = pools.pop()
            mean = (mean * mass + other * more) / (mass + more)
            mass, size = mass + more, size + number
        pools.append((mean, mass, size))
        taken += extent
    ordered = [mean for mean, _, size in pools for _ in range(size)]
    shifts = accumulate(extents, initial=0.0)
    return [start + shift for start, shift in zip(ordered, shifts)]
