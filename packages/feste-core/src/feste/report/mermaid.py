"""A graph as Mermaid text, for Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from feste.report.layers import depths
from feste.report.summary import EDGES_PER_BOX, MAX_TEXT, Box, kind_of, picture_of
from feste.report.svg import BOLD, KINDS, LIGHT, fit

MERMAID_EDGES = 500  # Mermaid's own limit: above it one sees an error instead of a graph

_MERMAID_STYLES.items():
        names = [f"n{number}" for number, box in enumerate(picture.boxes) if _has(box, state)]
        if names:
            text += [f"  classDef {state}Box {style}"]
            text += [f"  class {','.join(names)} {state}Box"] * (state not in KINDS)
    return "\n".join([*text, *(f"  %% {_mermaid_text(note)}" for note in picture.remarks), ""])


# Summaries


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


# Mermaid

_MERMAID_STYLES = {
    **{
        kind: f"fill:{LIGHT[kind][0]},stroke:{LIGHT[kind][1]},color:{LIGHT['ink'][0]}"
        for kind in KINDS
    },
    "output": "stroke-width:3px",
    "failed": f"stroke:{LIGHT['bad'][1]},stroke-width:2px",
    "skipped": "stroke-dasharray:4 3,opacity:0.6",
}
_MERMAID_SHAPES = {"prompt": "[{}]", "call": "([{}])", "task": "[[{}]]", "data": "[({})]"}
# Letters, digits, spaces and a hyphen inside a word are safe; Mermaid's own escapes begin
# with a ligature, so letters outside of ASCII are safe but for that one.
_MERMAID_SPECIAL = re.compile(r"(?<![A-Za-z0-9])-|-(?![A-Za-z0-9])|[^\w\s,\xb7\xd7-]|[_\ufb02]")


def draw_mermaid(
    boxes: Sequence[Box], edges: Sequence[tuple[str, str]], *, max_boxes: int = 200
) -> str:
    """Write the graph as a Mermaid flowchart; above `max_boxes` its summary.

    :param boxes: the nodes.
    :param edges: pairs of keys, from a node to the one that needs it.
    :param max_boxes: how many boxes are drawn one by one.
    :returns: the text of the chart, without a code fence.
    :raises ValueError: two boxes share a key, an edge names no box, or there is a cycle.

    >>> print(draw_mermaid([Box("a", "summarize", "call")], []).splitlines()[1].strip())
    n0(["summarize"]):::callBox
    """
    most_edges = min(MERMAID_EDGES, EDGES_PER_BOX * max_boxes)
    picture = _picture(boxes, edges, max_boxes, most_edges)
    level = depths(len(picture.boxes), picture.edges)
    long = max(level, default=0) + 1 > max(6, *Counter(level).values(), 0)
    teams: dict[str, list[str]] = {}
    for number, (box, group) in enumerate(zip(picture.boxes, _groups(picture), strict=True)):
        teams.setdefault(group, []).append(_mermaid_box(number, box))
    alone = teams.pop("", [])
    text = ["flowchart TB" if long else "flowchart LR", *alone]
    for number, (group, members) in enumerate(teams.items()):
        caption = _caption(picture, group)
        text += [f'  subgraph g{number}["{caption}"]', *(f"  {line}" for line in members), "  end"]
    for (tail, head), weight in picture.edges.items():
        text.append(
            f'  n{tail} -->|"× {weight:,}"| n{head}' if weight > 1 else f"  n{tail} --> n{head}"
        )
    for state, style in _MERMAID_STYLES.items():
        names = [f"n{number}" for number, box in enumerate(picture.boxes) if _has(box, state)]
        if names:
            text += [f"  classDef {state}Box {style}"]
            text += [f"  class {','.join(names)} {state}Box"] * (state not in KINDS)
    return "\n".join([*text, *(f"  %% {_mermaid_text(note)}" for note in picture.remarks), ""])


def _mermaid_text(text: str) -> str:
    line = fit(text, 2 * MAX_TEXT, BOLD)
    return _MERMAID_SPECIAL.sub(lambda match: f"#{ord(match[0])};", line)


def _mermaid_box(number: int, box: Box) -> str:
    words = "<br/>".join(_mermaid_text(text) for text in (box.label, box.detail) if text)
    kind = _kind(box)
    shape = _MERMAID_SHAPES[kind].format(f'"{words or " "}"')
    return f"  n{number}{shape}:::{kind}Box"  # "call" alone is a keyword


def _has(box: Box, style: str) -> bool:
    return box.output if style == "output" else style in (_kind(box), box.state)
