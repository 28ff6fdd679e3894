"""What a picture of a graph shows: its boxes, or a summary when they are too many.

In a summary equal boxes are one that says how many it stands for, so that 100,000 nodes make a
small picture too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from feste.report.layers import Edge, cycle, depths
from feste.report.svg import BOLD, KINDS, fit

MAX_TEXT = 200.0
EDGES_PER_BOX = 5  # with more edges than this a picture says less than its summary


@dataclass(frozen=True, slots=True)
class Box:
    """One node to draw.

    :param key: its name, unique in the graph.
    :param label: the first line.
    :param kind: "prompt", "call", "task" or "data"; anything else looks like data.
    :param detail: the small second line, such as a model or `file.py:12`.
    :param group: the id of its batch; boxes of one group are one request.
    :param output: whether the user asked for its value.
    :param state: "", "done", "failed" or "skipped".
    """

    key: str
    label: str
    kind: str
    detail: str = ""
    group: str = ""
    output: bool = False
    state: str = ""


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is drawn: boxes that each stand for some nodes, edges with a weight, remarks."""

    boxes: list[Box]
    counts: list[int]
    edges: dict[Edge, int]
    remarks: list[str]


def _picture(
    boxes: Sequence[Box], edges: Sequence[tuple[str, str]], max_boxes: int, max_edges: int
) -> _Picture:
    """The graph itself if it is small enough, else the least coarse summary that is."""
    links, depth = _checked(boxes, edges)
    picture = _Picture(list(boxes), [1] * len(boxes), dict.fromkeys(links, 1), [])
    for fields in (4, 3, 2, 1, 0):
        if len(picture.boxes) <= max_boxes and len(picture.edges) <= max_edges:
            break
        picture = _merged(boxes, links, depth, fields)
    return picture


def _checked(
    boxes: Sequence[Box], edges: Sequence[tuple[str, str]]
) -> tuple[list[Edge], list[int]]:
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
    boxes: Sequence[Box],
    links: Iterable[Edge],
    depth: Sequence[int],
    fields: int,
) -> _Picture:
    """One box for all that agree in so many fields; edges that run backwards become a remark."""
    classes: dict[tuple[str | int, ...], list[int]] = {}
    for node in sorted(range(len(boxes)), key=depth.__getitem__):
        box = boxes[node]
        alike = (box.kind, box.label, box.detail, depth[node])[:fields]
        classes.setdefault(alike, []).append(node)
    home = {node: number for number, nodes in enumerate(classes.values()) for node in nodes}
    merged = [_one([boxes[node] for node in nodes]) for nodes in classes.values()]
    weights = Counter((home[tail], home[head]) for tail, head in links)
    forward = {edge: weight for edge, weight in weights.items() if edge[0] < edge[1]}
    loops = [
        f"{fit(merged[tail].label, MAX_TEXT, BOLD)} → {fit(merged[head].label, MAX_TEXT, BOLD)}"
        f" ({weight:,} {'edges' if weight > 1 else 'edge'})"
        for (tail, head), weight in weights.most_common()
        if tail >= head
    ]
    size = f"{len(merged):,} {'box' if len(merged) == 1 else 'boxes'}"
    remarks = [f"{len(boxes):,} nodes and {weights.total():,} edges, drawn as {size}."]
    if loops:
        more = [f"and {len(loops) - 3:,} more"] if len(loops) > 3 else []
        remarks.append("Loops, not drawn: " + ", ".join([*loops[:3], *more]) + ".")
    return _Picture(merged, [len(nodes) for nodes in classes.values()], forward, remarks)


def _one(members: Sequence[Box]) -> Box:
    """The box that stands for some boxes."""
    first, count = members[0], len(members)
    if count == 1:
        return first
    labels, kinds, details, groups = (
        {getattr(box, name) for box in members} for name in ("label", "kind", "detail", "group")
    )
    states = Counter(box.state for box in members)
    label = first.label if len(labels) == 1 else KINDS[_kind(first)] if len(kinds) == 1 else "node"
    details_of_all = [first.detail] if len(details) == 1 and first.detail else []
    requests = [f"{len(groups):,} requests"] if "" not in groups and len(groups) > 1 else []
    partly = [
        f"{states[state]:,} {state}" for state in ("failed", "skipped") if 0 < states[state] < count
    ]
    return replace(
        first,
        label=f"{label} × {count:,}",
        detail=" · ".join([*details_of_all, *requests, *partly]),
        group=first.group if len(groups) == 1 else "",
        output=any(box.output for box in members),
        state="failed" if states["failed"] else first.state if len(states) == 1 else "",
    )


def _groups(picture: _Picture) -> list[str]:
    """The outline of each box: its batch, if the batch has more than one node in it."""
    sizes: Counter[str] = Counter()
    for box, count in zip(picture.boxes, picture.counts, strict=True):
        sizes[box.group] += count
    return [box.group if sizes[box.group] > 1 else "" for box in picture.boxes]


def _caption(picture: _Picture, group: str) -> str:
    pairs = zip(picture.boxes, picture.counts, strict=True)
    return f"1 request · {sum(count for box, count in pairs if box.group == group):,} calls"


def _kind(box: Box) -> str:
    return box.kind if box.kind in KINDS else "data"
