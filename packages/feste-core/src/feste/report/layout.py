"""Where boxes go, and how much text they hold: the geometry behind Feste's pictures.

The layout is the classic layered one: rows by longest path, shared dummy points for long edges,
barycentre sweeps against crossings, and an isotonic fit that straightens edges without ever letting
two boxes overlap. Nothing recurses, so the depth of a graph is no limit.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

Edge = tuple[int, int]
Point = tuple[float, float]

ORDER_SWEEPS, SETTLE_SWEEPS = 12, 16
SWEPT = 60_000  # nodes and dummies, all sweeps together: huge pictures get fewer sweeps
PAGE = 1200.0
MAX_CLIMB = 90.0
BOX_GAP, INNER_GAP = 16.0, 8.0
PADS = (10.0, 24.0, 10.0, 10.0)  # left, top, right, bottom, between an outline and its boxes

_NOT_XML = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Rect:
    """A box on the sheet, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes; a route is straight from an even point, curved from an odd one."""

    rightwards: bool
    width: float
    height: float
    rects: list[Rect]
    outlines: list[tuple[list[int], Rect]]
    routes: dict[Edge, list[Point]]


@dataclass(slots=True)
class _Grid:
    """Units (a box, the boxes of one outline, or a dummy) in rows, and who touches whom."""

    rows: list[list[int]]
    members: list[list[int]]
    outlined: set[int]
    above: list[list[int]]
    below: list[list[int]]
    routes: dict[Edge, list[int]]


def arrange(
    widths: Sequence[float],
    height: float,
    edges: Sequence[Edge],
    groups: Sequence[str],
    gap: float = 44.0,
) -> Layout:
    """Place boxes in layers, left to right or top to bottom, whichever has the better shape.

    :param widths: one natural width a box.
    :param height: the height of every box.
    :param edges: pairs of box numbers, without a cycle.
    :param groups: one name a box; boxes of one name stand together in one outline, "" is alone.
    :param gap: the least room between rows, for the edges.
    :returns: rectangles, outlines and routes, with the corner of the drawing at (0, 0).
    :raises ValueError: the edges have a cycle.

    >>> arrange([80, 90], 40, [(0, 1)], ["", ""]).rightwards
    True
    """
    grid = _order(_grid(edges, groups))
    left, top, right, bottom = PADS
    sideways = _place(grid, [(width, height) for width in widths], PADS, gap)
    turned_pads = (top, left, bottom, right)
    downwards = _turned(_place(grid, [(height, width) for width in widths], turned_pads, gap))
    return sideways if _ugliness(sideways) - 0.6 <= _ugliness(downwards) else downwards


def depths(count: int, edges: Iterable[Edge]) -> list[int]:
    """The longest path from a source to each node; -1 for nodes in or behind a cycle.

    >>> depths(3, [(0, 1), (1, 2), (0, 2)])
    [0, 1, 2]
    """
    after: list[list[int]] = [[] for _ in range(count)]
    waiting, level, found = [0] * count, [0] * count, [-1] * count
    for tail, head in edges:
        after[tail].append(head)
        waiting[head] += 1
    ready = [node for node in range(count) if not waiting[node]]
    for node in ready:  # grows while it is walked
        found[node] = level[node]
        for head in after[node]:
            level[head] = max(level[head], level[node] + 1)
            waiting[head] -= 1
            if not waiting[head]:
                ready.append(head)
    return found


def cycle(edges: Iterable[Edge], depth: Sequence[int]) -> list[int]:
    """The nodes of one cycle, given depths that hold a -1.

    >>> sorted(cycle([(0, 1), (1, 0), (1, 2)], [-1, -1, -1]))
    [0, 1]
    """
    # Every stuck node waits for a stuck one, so walking backwards must come round.
    before = {head: tail for tail, head in edges if depth[tail] < 0 and depth[head] < 0}
    node, seen = next(iter(before)), dict[int, None]()
    while node not in seen:
        seen[node] = None
        node = before[node]
    walked = list(seen)
    return walked[walked.index(node) :]


def _ugliness(layout: Layout) -> float:
    # The frame around the drawing (title, legend) counts: it is part of the shape one sees. A page
    # scrolls downwards but shrinks what is too wide.
    width, height = max(layout.width, 380) + 48, layout.height + 110
    return abs(math.log(width / height / 1.6)) + max(0.0, width / PAGE - 1)


def _grid(edges: Sequence[Edge], groups: Sequence[str]) -> _Grid:
    """Put boxes in rows, and give every long edge a dummy in each row that it passes."""
    members, outlined, level = _units(edges, groups)
    unit_of = {node: unit for unit, nodes in enumerate(members) for node in nodes}
    rows: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
    for unit, row in enumerate(level):
        rows[row].append(unit)
    dummies: dict[tuple[int, int], int] = {}  # one a source and row: edges of one source share
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
    return _Grid(rows, members, outlined, above, below, routes)


def _units(
    edges: Sequence[Edge], groups: Sequence[str]
) -> tuple[list[list[int]], set[int], list[int]]:
    """Boxes that stand together, which of these units have an outline, and the row of each."""
    names: list[str] = list(groups)
    while True:
        number: dict[str | int, int] = {}
        unit = [number.setdefault(name or node, len(number)) for node, name in enumerate(names)]
        links = list(dict.fromkeys((unit[tail], unit[head]) for tail, head in edges))
        level = depths(len(number), links)
        if -1 not in level:
            break
        # A group that would wait for itself cannot be one unit: its boxes stand alone.
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
    for source in nearest.keys() - fed:  # inputs stand beside the first who needs them
        level[source] = nearest[source] - 1
    outlined = {unit[node] for node, name in enumerate(names) if name}
    return members, outlined, level


def _order(grid: _Grid) -> _Grid:
    """Order each row so that few edges cross: barycentre sweeps, the best one kept."""
    spot = [0.0] * len(grid.above)
    for row in grid.rows:
        _rank(row, grid.members, spot)
    least, best = math.inf, (grid.rows, grid.members)
    for sweep in range(_sweeps(grid, ORDER_SWEEPS)):
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
            row.sort(key=lambda unit: _middle(grid.members[unit], near, spot))
            _rank(row, grid.members, spot)
    grid.rows, grid.members = best
    return grid


def _sweeps(grid: _Grid, most: int) -> int:
    return max(2, min(most, SWEPT // max(1, len(grid.above))))


def _mean(near: Sequence[int], at: Sequence[float], itself: int) -> float:
    return sum(at[node] for node in near) / len(near) if near else at[itself]


def _middle(nodes: Sequence[int], near: list[list[int]], at: Sequence[float]) -> float:
    return sum(_mean(near[node], at, node) for node in nodes) / len(nodes)


def _rank(row: Sequence[int], members: list[list[int]], spot: list[float]) -> None:
    """Write the place of each node of a row, from 0 to 1, so that rows of all lengths compare."""
    nodes = [node for unit in row for node in members[unit]]
    for rank, node in enumerate(nodes):
        spot[node] = (rank + 0.5) / len(nodes)


def _crossings(grid: _Grid, spot: Sequence[float]) -> int:
    total = 0
    for row in grid.rows:
        nodes = [node for unit in row for node in grid.members[unit]]
        seen: list[float] = []
        for _, end in sorted((spot[node], spot[to]) for node in nodes for to in grid.below[node]):
            total += len(seen) - bisect_right(seen, end)
            insort(seen, end)
    return total


def _place(
    grid: _Grid,
    sizes: Sequence[tuple[float, float]],
    pads: tuple[float, float, float, float],
    gap: float,
) -> Layout:
    """Turn rows and their order into rectangles, with edges running to the right.

    A box is as long as the longest of its row; dummies are numbered after the boxes.
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
    """The strip that a row takes: outlines fill it, boxes stand inside from `start` on."""

    low: float
    start: float
    size: float
    high: float

    def passage(self, node: int, edge: Edge) -> tuple[float, float]:
        """Where an edge enters and leaves the strip at a node: at boxes it begins or ends."""
        return (
            self.start + self.size if node == edge[0] else self.low,
            self.start if node == edge[1] else self.high,
        )


def _bands(
    grid: _Grid,
    middle: Sequence[float],
    longs: Sequence[float],
    *,
    lead: float,
    trail: float,
    gap: float,
) -> dict[int, _Band]:
    bands: dict[int, _Band] = {}
    low = 0.0
    for row in grid.rows:
        nodes = [node for unit in row for node in grid.members[unit]]
        size = max((longs[node] for node in nodes if node < len(longs)), default=0.0)
        framed = not grid.outlined.isdisjoint(row)
        start = low + lead * framed
        high = start + size + trail * framed
        bands.update(dict.fromkeys(nodes, _Band(low, start, size, high)))
        # Edges that climb far get more room, so that they stay gentle.
        climb = max((abs(middle[n] - middle[m]) for n in nodes for m in grid.below[n]), default=0.0)
        low = high + gap + min(MAX_CLIMB, 0.12 * climb)
    return bands


def _settle(grid: _Grid, breadth: Sequence[float], before: float, after: float) -> list[float]:
    """The middle of each node across its row: near its neighbours, in order, never overlapping."""
    middle = [0.0] * len(grid.above)
    offset = [0.0] * len(grid.above)  # of a node's middle from the start of its unit
    extent = [0.0] * len(grid.members)
    for unit, nodes in enumerate(grid.members):
        at = BOX_GAP / 2 + before * (unit in grid.outlined)
        for node in nodes:
            size = breadth[node] if node < len(breadth) else 0.0
            offset[node] = at + size / 2
            at += size + INNER_GAP
        extent[unit] = at - INNER_GAP + after * (unit in grid.outlined) + BOX_GAP / 2
    near = [up + down for up, down in zip(grid.above, grid.below, strict=True)]
    down, up = grid.rows, grid.rows[::-1]
    both = [(down, grid.above), (up, grid.below)]
    passes = [(down, near), *both * _sweeps(grid, SETTLE_SWEEPS)]
    # At last everything lines up with the widest row, which has the least freedom.
    pivot = max(range(len(down)), key=lambda row: sum(extent[u] for u in down[row]), default=0)
    passes += [(down[pivot + 1 :], grid.above), (down[:pivot][::-1], grid.below)]
    for rows, towards in passes:
        for row in rows:
            wishes, weights = [], []
            for unit in row:
                nodes = grid.members[unit]
                start = sum(offset[node] for node in nodes) / len(nodes)
                wishes.append(_middle(nodes, towards, middle) - start)
                weights.append(1.0 + sum(len(towards[node]) for node in nodes))
            starts = _spread(wishes, weights, [extent[unit] for unit in row])
            for unit, start in zip(row, starts, strict=True):
                for node in grid.members[unit]:
                    middle[node] = start + offset[node]
    least = min((middle[n] - offset[n] for nodes in grid.members for n in nodes), default=0.0)
    return [at - least - BOX_GAP / 2 for at in middle]


def _spread(
    wishes: Sequence[float], weights: Sequence[float], extents: Sequence[float]
) -> list[float]:
    """Starts as near to the wishes as possible (least squares) with no two units overlapping.

    Pool adjacent violators: with the extents taken off, the starts only have to be in order.

    >>> _spread([0.0, 1.0], [1.0, 1.0], [10.0, 10.0])
    [-4.5, 5.5]
    """
    pools: list[tuple[float, float, int]] = []
    taken = 0.0
    for wish, weight, extent in zip(wishes, weights, extents, strict=True):
        mean, mass, size = wish - taken, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, number = pools.pop()
            mean = (mean * mass + other * more) / (mass + more)
            mass, size = mass + more, size + number
        pools.append((mean, mass, size))
        taken += extent
    ordered = [mean for mean, _, size in pools for _ in range(size)]
    shifts = accumulate(extents, initial=0.0)
    return [start + shift for start, shift in zip(ordered, shifts, strict=False)]


def plain(text: str) -> str:
    """Text with a visible stand-in for every character that XML cannot hold.

    >>> plain("a\\x1bb")
    'a␛b'
    """
    return _NOT_XML.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else "\ufffd", text)


def xml(text: str) -> str:
    """Text as XML content or attribute value that parses back equal, line ends included.

    >>> xml('a "b" <c>')
    'a &quot;b&quot; &lt;c&gt;'
    """
    quoted = escape(plain(text))
    return quoted.replace("\r", "&#13;").replace("\n", "&#10;").replace("\t", "&#9;")


def width_of(text: str, size: float) -> float:
    """About how wide text is in Arial, Helvetica or Liberation Sans, in pixels; rather too wide."""
    return size * sum(map(_advance, text))


def _advance(char: str) -> float:
    if char in "iljtfrI.,;:'|!()[]-/\\ ":
        return 0.34
    if char in "mwMW@%…" or unicodedata.east_asian_width(char) in "WF":
        return 1.0
    if unicodedata.combining(char):
        return 0.0
    return 0.74 if char.isupper() else 0.59


def fit(text: str, room: float, size: float) -> str:
    """Text on one line, shortened in its middle until it fits the room.

    >>> fit("a very long label indeed", 90, 12)
    'a very…indeed'
    """
    line = " ".join(_BIDI.sub("", plain(text)).split())
    if width_of(line[:400], size) <= room and len(line) <= 400:
        return line
    keep = 200
    while keep > 1 and width_of(line[:keep] + "…" + line[-keep:], size) > room:
        keep -= 1
    return line[:keep].rstrip() + "…" + line[-keep:].lstrip()
