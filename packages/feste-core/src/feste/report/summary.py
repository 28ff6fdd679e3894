"""Select what a picture of a graph shows: all boxes, or a summary if there are too many.

A summary merges equal boxes into one that shows their number, so that even 100,000 nodes make a
small picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from feste.report.layers import Edge, cycle, depths
from feste.report.svg import BOLD, KINDS, fit
from feste.wording import counted

MAX_TEXT = 200.0
EDGES_PER_BOX = 5  # with more edges than this, the summary is easier to read than the picture


@dataclass(frozen=True, slots=True)
class Box:
    """One node to draw.

    :param key: its key, unique in the graph.
    :param label: the first line.
    :param kind: "prompt", "call", "task" or "data"; others are drawn as data.
    :param detail: the small second line, such as a model or `file.py:12`.
    :param group: the ID of its batch; boxes of the same group are one request.
    :param output: whether the user asked for its value.
    :param state: its final state, such as "done", "failed" or "skipped"; "" if there is none.
    :param origin: the user's source line, `file.py:12`.
    """

    key: str
    label: str
    kind: str
    detail: str = ""
    group: str = ""
    output: bool = False
    state: str = ""
    origin: str = ""


def kind_of(box: Box) -> str:
    """Return the kind that a box is drawn as."""
    return box.kind if box.kind in KINDS else "data"


@dataclass(frozen=True, slots=True)
class Picture:
    """The content of a picture: boxes that may stand for several nodes, weighted edges, remarks."""

    boxes: list[Box]
    counts: list[int]
    edges: dict[Edge, int]
    remarks: list[str]

    def sizes(self) -> Counter[str]:
        """Return the number of nodes in each batch."""
        sizes: Counter[str] = Counter()
        for box, count in zip(self.boxes, self.counts):
            sizes[box.group] += count
        return sizes

    def groups(self) -> list[str]:
        """Return the outline of each box: its batch, if that has more than one node."""
        sizes = self.sizes()
        return [box.group if sizes[box.group] > 1 else "" for box in self.boxes]

    def caption(self, group: str) -> str:
        """Return the text at the outline of a batch."""
        return f"1 request · {counted(self.sizes()[group], 'call')}"


def picture_of(
    boxes: Sequence[Box], edges: Sequence[tuple[str, str]], max_boxes: int, max_edges: int
) -> Picture:
    """Return the graph itself if it is small enough, otherwise the most detailed summary that is.

    :param boxes: the nodes.
    :param edges: pairs of keys: a node, and a node that needs it.
    :param max_boxes: the maximum number of boxes.
    :param max_edges: the maximum number of edges.
    :returns: what to draw; the coarsest summary, if even that is too large.
    :raises ValueError: if two boxes share a key, an edge names no box, or there is a cycle.
    """
    links, depth = _checked(boxes, edges)
    picture = Picture(list(boxes), [1] * len(boxes), dict.fromkeys(links, 1), [])
    for fields in (4, 3, 2, 1, 0):
        if len(picture.boxes) <= max_boxes and len(picture.edges) <= max_edges:
            break
        picture = _merged(boxes, links, depth, fields)
    return picture


def _checked(
    boxes: Sequence[Box], edges: Sequence[tuple[str, str]]
) -> tuple[list[Edge], list[int]]:
    """Return the edges by box numbers, without duplicates, and the depth of each box."""
    number: dict[str, int] = {}
    for box in boxes:
        if box.key in number:
            raise ValueError(f"two boxes have the key {box.key!r}")
        number[box.key] = len(number)
    for key in (key for edge in edges for key in edge):
        if key not in number:
            raise ValueError(f"an edge names {key!r}, which is no box")
    links = list(dict.fromkeys((number[tail], number[head]) for tail, head in edges))
    depth = depths(len(boxes), links)
    if -1 in depth:
        ring = cycle(links, depth)
        raise ValueError(f"the graph has a cycle of {len(ring)} through {boxes[ring[0]].key!r}")
    return links, depth


def _merged(
    boxes: Sequence[Box], links: Sequence[Edge], depth: Sequence[int], fields: int
) -> Picture:
    """Merge boxes that agree in the first `fields` fields; backward edges become a remark."""
    classes: dict[tuple[str | int, ...], list[int]] = {}
    for node in sorted(range(len(boxes)), key=depth.__getitem__):
        box = boxes[node]
        alike = (box.kind, box.label, box.detail, depth[node])[:fields]
        classes.setdefault(alike, []).append(node)
    home = {node: number for number, nodes in enumerate(classes.values()) for node in nodes}
    merged = [_one([boxes[node] for node in nodes]) for nodes in classes.values()]
    weights = Counter((home[tail], home[head]) for tail, head in links)
    forward = {(tail, head): weight for (tail, head), weight in weights.items() if tail < head}
    loops = [(edge, weight) for edge, weight in weights.most_common() if edge not in forward]
    size = f"{counted(len(boxes), 'node')} and {counted(len(links), 'edge')}"
    remarks = [f"{size}, drawn as {counted(len(merged), 'box', 'boxes')}."]
    if loops:
        told = [
            f"{fit(merged[tail].label, MAX_TEXT, BOLD)} → {fit(merged[head].label, MAX_TEXT, BOLD)}"
            f" ({counted(weight, 'edge')})"
            for (tail, head), weight in loops[:3]
        ]
        if len(loops) > 3:
            told.append(f"and {len(loops) - 3:,} more")
        remarks.append(f"Loops, not drawn: {', '.join(told)}.")
    return Picture(merged, [len(nodes) for nodes in classes.values()], forward, remarks)


def _one(members: Sequence[Box]) -> Box:
    """Return the box that stands for several boxes."""
    first, count = members[0], len(members)
    if count == 1:
        return first
    labels, kinds = {box.label for box in members}, {box.kind for box in members}
    details, groups = {box.detail for box in members}, {box.group for box in members}
    states = Counter(box.state for box in members)
    # next to failed boxes "done" needs no words, but next to boxes without a state it does
    told = [name for name in sorted(states) if name and (name != "done" or "" in states)]
    label = (
        first.label if len(labels) == 1 else KINDS[kind_of(first)] if len(kinds) == 1 else "node"
    )
    facts = [
        first.detail if len(details) == 1 else "",
        counted(len(groups), "request") if len(groups) > 1 and "" not in groups else "",
        *(f"{states[name]:,} {name.replace('_', ' ')}" for name in told if states[name] < count),
    ]
    return replace(
        first,
        label=f"{label} × {count:,}",
        detail=" · ".join(filter(None, facts)),
        group=first.group if len(groups) == 1 else "",
        output=any(box.output for box in members),
        state="failed" if states["failed"] else first.state if len(states) == 1 else "",
        origin=first.origin if len({box.origin for box in members}) == 1 else "",
    )
