"""A graph as a picture: SVG for pages and notebooks, Mermaid for Markdown.

Pure functions from boxes and edges to text. A graph with too many boxes is summarised, equal boxes
becoming one that says how many it stands for, so that 100,000 nodes make a small picture too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from feste.report.layout import (
    Edge,
    Layout,
    Point,
    Rect,
    arrange,
    cycle,
    depths,
    fit,
    width_of,
    xml,
)

HEIGHT, MARGIN = 46.0, 26.0
LABEL, SMALL, HEADING = 13.0, 11.0, 16.0  # font sizes
BOLD = 1.07 * LABEL
MAX_TEXT = 200.0
EDGES_PER_BOX = 5  # with more edges than this a picture says less than its summary
MERMAID_EDGES = 500  # Mermaid's own limit: above it one sees an error instead of a graph

KINDS = {"prompt": "prompt", "call": "LLM call", "task": "Python task", "data": "data"}
_CORNERS = {"prompt": 9, "call": 16, "task": 5, "data": 12}
_ICONS = {  # strokes in a square of 16 pixels
    "prompt": "M2 3.5H14M2 8H14M2 12.5H9",
    "call": "M8 1.5Q8.6 7.4 14.5 8Q8.6 8.6 8 14.5Q7.4 8.6 1.5 8Q7.4 7.4 8 1.5Z",
    "task": "M6 2.5C2.5 2.5 5.5 7.6 2 8C5.5 8.4 2.5 13.5 6 13.5"
    "M10 2.5C13.5 2.5 10.5 7.6 14 8C10.5 8.4 13.5 13.5 10 13.5",
    "data": "M2.5 4C2.5 1.6 13.5 1.6 13.5 4V12C13.5 14.4 2.5 14.4 2.5 12Z"
    "M2.5 4C2.5 6.4 13.5 6.4 13.5 4M2.5 8C2.5 10.4 13.5 10.4 13.5 8",
}
_MARKS = {"done": "M-3.2 .3L-.9 2.6L3.4 -2.2", "failed": "M-2.6 -2.6L2.6 2.6M2.6 -2.6L-2.6 2.6",
          "skipped": "M-3 0H3"}  # fmt: skip

# (fill, stroke) of each part. No CSS variables: renderers that do not know them would paint black.
LIGHT = {
    "panel": ("#ffffff", "#e2e5ee"), "ink": ("#1b2130", "#667085"), "edge": ("none", "#a2abbe"),
    "prompt": ("#edf4ff", "#3b74e6"), "call": ("#f4efff", "#7c4bdc"),
    "task": ("#e7f8f1", "#11876a"), "data": ("#f2f4f8", "#77829a"),
    "batch": ("#fffaf0", "#d8981f"), "bad": ("#ffffff", "#d62f46"),
}  # fmt: skip
DARK = {
    "panel": ("#10141d", "#2a3040"), "ink": ("#eaedf5", "#9aa4b8"), "edge": ("none", "#5d677d"),
    "prompt": ("#15233f", "#74a2ff"), "call": ("#231a3d", "#b08cff"),
    "task": ("#0f2b25", "#43c9a1"), "data": ("#1d2330", "#98a3b8"),
    "batch": ("#1c1913", "#e0a63a"), "bad": ("#10141d", "#ff6b7d"),
}  # fmt: skip
# Fonts of the same metrics, so that text fits its box everywhere.
_FONT = "'Helvetica Neue',Helvetica,Arial,'Liberation Sans',Arimo,sans-serif"


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


def draw_svg(
    boxes: Sequence[Box],
    edges: Sequence[tuple[str, str]],
    *,
    title: str = "",
    max_boxes: int = 200,
) -> str:
    """Draw the graph as one self-contained SVG file; above `max_boxes` its summary.

    :param boxes: the nodes; their order decides where the layout leaves a choice.
    :param edges: pairs of keys, from a node to the one that needs it.
    :param title: a heading.
    :param max_boxes: how many boxes are drawn one by one.
    :returns: the text of the file.
    :raises ValueError: two boxes share a key, an edge names no box, or there is a cycle.

    >>> draw_svg([Box("a", "summarize", "call")], []).count('class="card"')
    1
    """
    picture = _picture(boxes, edges, max_boxes, EDGES_PER_BOX * max_boxes)
    lines = [
        (fit(box.label, MAX_TEXT, BOLD), fit(box.detail, MAX_TEXT, SMALL)) for box in picture.boxes
    ]
    widths = [
        max(104.0, 52 + max(width_of(label, BOLD), width_of(detail, SMALL)))
        for label, detail in lines
    ]
    gap = 96.0 if any(weight > 1 for weight in picture.edges.values()) else 48.0
    layout = arrange(widths, HEIGHT, list(picture.edges), _groups(picture), gap)
    body = [
        *(svg_rect("frame", rect, 14) for _, rect in layout.outlines),
        *(_edge(picture, edge, layout) for edge in picture.edges),
        *(_captioned(picture, nodes[0], rect) for nodes, rect in layout.outlines),
        *map(_card, picture.boxes, picture.counts, layout.rects, lines),
        *(
            _weight(weight, layout.routes[edge])
            for edge, weight in picture.edges.items()
            if weight > 1
        ),
    ]
    summary = f"{title or 'Graph'}: {len(boxes):,} nodes, {len(set(edges)):,} edges"
    legend = _legend(picture.boxes, bool(layout.outlines))
    notes = picture.remarks if boxes else ["Nothing to draw: the graph is empty."]
    size = (layout.width, layout.height)
    return sheet("graph", title, summary, body=body, size=size, legend=legend, notes=notes)


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


# SVG


def _card(box: Box, count: int, at: Rect, lines: tuple[str, str]) -> str:
    """A box: copies and ring below, then the card, its icon and texts, the mark of its state."""
    label, detail = lines
    kind = _kind(box)
    full = "\n".join(text for text in (box.label, box.detail, box.state) if text)
    parts = [f"<title>{xml(full)}</title>"]
    if count > 1:
        parts += [svg_rect("card copy", at, _CORNERS[kind], shift) for shift in (7.0, 3.5)]
    if box.output:
        ring = Rect(at.x - 4, at.y - 4, at.width + 8, at.height + 8)
        parts.append(svg_rect("ring", ring, _CORNERS[kind] + 4))
    parts.append(svg_rect("card", at, _CORNERS[kind]))
    parts.append(_icon(kind, at.x + 12, at.y + (at.height - 16) / 2))
    middle = at.y + at.height / 2
    parts.append(svg_text("label", at.x + 37, middle + (-2 if detail else 4.5), label))
    if detail:
        parts.append(svg_text("small", at.x + 37, middle + 13, detail))
    if box.state in _MARKS:
        parts.append(_mark(box.state, at.x + at.width - 3, at.y + 3))
    names = " ".join(["box", kind, *[box.state] * (box.state in _MARKS)])
    return f'<g class="{names}" data-key="{xml(box.key)}">{"".join(parts)}</g>'


def svg_rect(name: str, at: Rect, corner: float, shift: float = 0.0) -> str:
    """A rectangle with round corners, moved to the right and down by `shift`."""
    return (
        f'<rect class="{name}" x="{at.x + shift:.1f}" y="{at.y + shift:.1f}" '
        f'width="{at.width:.1f}" height="{at.height:.1f}" rx="{corner:g}"/>'
    )


def svg_text(name: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    """One line of text, escaped."""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}"{place}>{xml(text)}</text>'


def _icon(kind: str, x: float, y: float) -> str:
    return f'<path class="icon" transform="translate({x:.1f} {y:.1f})" d="{_ICONS[kind]}"/>'


def _mark(state: str, x: float, y: float) -> str:
    return (
        f'<g class="mark {state}" transform="translate({x:.1f} {y:.1f})">'
        f'<circle r="7.5"/><path d="{_MARKS[state]}"/></g>'
    )


def _captioned(picture: _Picture, member: int, frame: Rect) -> str:
    caption = _caption(picture, picture.boxes[member].group)
    return svg_text("small caption", frame.x + 10, frame.y + 16, caption)


def _edge(picture: _Picture, edge: Edge, layout: Layout) -> str:
    """A smooth line along its route, with a small open arrow where it arrives."""
    points = layout.routes[edge]
    path = [f"M{_at(points[0])}"]
    for number, (one, other) in enumerate(pairwise(points)):
        if number % 2:
            path.append(_curve(one, other, layout.rightwards))
        elif one != other:
            path.append(f"L{_at(other)}")
    tail, head = (picture.boxes[number] for number in edge)
    x, y = points[-1]
    tip = -5.5 if head.output else -0.5  # before the ring of a result
    wings = [(tip - 6, -4.0), (tip, 0.0), (tip - 6, 4.0)]
    arrow = [(x + a, y + b) if layout.rightwards else (x + b, y + a) for a, b in wings]
    path.append("M" + "L".join(map(_at, arrow)))
    width = 1.4 + min(2.0, 0.6 * math.log10(picture.edges[edge]))
    title = f"<title>{xml(f'{tail.label} → {head.label}')}</title>"
    return f'<path class="edge" stroke-width="{width:.1f}" d="{"".join(path)}">{title}</path>'


def _at(point: Point) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"


def _curve(one: Point, other: Point, rightwards: bool) -> str:
    (x, y), (to_x, to_y) = one, other
    if rightwards:
        half = (x + to_x) / 2
        return f"C{_at((half, y))} {_at((half, to_y))} {_at(other)}"
    half = (y + to_y) / 2
    return f"C{_at((x, half))} {_at((to_x, half))} {_at(other)}"


def _weight(weight: int, points: Sequence[Point]) -> str:
    # Middle of the last curve: edges of one source share all the others.
    (x, y), (to_x, to_y) = points[-3], points[-2]
    return svg_text("small weight", (x + to_x) / 2, (y + to_y) / 2 + 3.5, f"× {weight:,}", "middle")


def _legend(boxes: Sequence[Box], batches: bool) -> list[tuple[str, str]]:
    """(swatch, words) of everything that the picture uses."""
    swatch = Rect(0, -12, 26, 17)
    entries = [
        (f'<g class="box {kind}">{svg_rect("key", swatch, 5)}'
         f'<g transform="translate(6.4 -10) scale(.82)">{_icon(kind, 0, 0)}</g></g>', name)
        for kind, name in KINDS.items()
        if any(_kind(box) == kind for box in boxes)
    ]  # fmt: skip
    if batches:
        entries.append((svg_rect("key frame", swatch, 5), "one request"))
    if any(box.output for box in boxes):
        inner = Rect(3, -9, 20, 11)
        rings = svg_rect("ring", swatch, 6) + svg_rect("key", inner, 3)
        entries.append((f'<g class="box data">{rings}</g>', "result"))
    for state in _MARKS:
        if any(box.state == state for box in boxes):
            entries.append((_mark(state, 16, -3.5), state))
    return entries


def sheet(
    name: str,
    title: str,
    summary: str,
    *,
    body: Sequence[str],
    size: tuple[float, float],
    legend: Sequence[tuple[str, str]],
    notes: Sequence[str],
    style: str = "",
) -> str:
    """Put a drawing on a panel with its title, legend and notes, as one SVG file.

    :param name: the picture's kind; all its style rules are kept to the class `feste-{name}`, so
        that several pictures can stand in one HTML page.
    :param title: the heading, "" for none.
    :param summary: what a screen reader says.
    :param body: the elements of the drawing, their corner at (0, 0).
    :param size: width and height of the drawing.
    :param legend: pairs of a swatch and its words.
    :param notes: lines below the legend.
    :param style: more style rules.
    :returns: the text of the file.
    """
    room = max(size[0], 380.0)
    heading = fit(title, room, HEADING)
    rows = _flow(legend, room)
    top = MARGIN + 34 * bool(heading)
    below = top + size[1] + (30 if size[1] else 0)
    texts = [svg_text("heading", MARGIN, MARGIN + 12, heading)] * bool(heading)
    for number, row in enumerate(rows):
        for x, swatch, words in row:
            place = f"{MARGIN + x:.1f} {below + 12 + 24 * number:.1f}"
            texts.append(
                f'<g transform="translate({place})">{swatch}{svg_text("small", 32, 0, words)}</g>'
            )
    below += 24 * len(rows)
    for number, note in enumerate(notes):
        texts.append(svg_text("small", MARGIN, below + 12 + 16 * number, fit(note, room, SMALL)))
    width, height = room + 2 * MARGIN, below + 16 * len(notes) + MARGIN - 6
    shift = f"{MARGIN + (room - size[0]) / 2:.1f} {top:.1f}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="feste-{name}" role="img" '
            f'aria-label="{xml(summary)}" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}">',
            f"<title>{xml(summary)}</title>",
            f"<style>{_rules(f'.feste-{name} ')}{style}</style>",
            svg_rect("panel", Rect(0.5, 0.5, round(width) - 1, round(height) - 1), 14),
            f'<g transform="translate({shift})">',
            *body,
            "</g>",
            *texts,
            "</svg>",
            "",
        ]
    )


def _flow(legend: Sequence[tuple[str, str]], room: float) -> list[list[tuple[float, str, str]]]:
    """Break the legend into rows: (x, swatch, words)."""
    rows: list[list[tuple[float, str, str]]] = []
    x = room
    for swatch, words in legend:
        wide = 32 + width_of(words, SMALL) + 18
        if x + wide > room:
            rows.append([])
            x = 0.0
        rows[-1].append((x, swatch, words))
        x += wide
    return rows


def _rules(scope: str) -> str:
    """The style sheet: shapes once, colours for light, and again for dark."""
    shapes = [
        f"text{{font-family:{_FONT}}}",
        f".label{{font-size:{LABEL}px;font-weight:600}}",
        f".heading{{font-size:{HEADING}px;font-weight:650}}",
        f".small{{font-size:{SMALL}px}}",
        ".edge{fill:none;stroke-linecap:round;stroke-linejoin:round}",
        ".card,.key,.frame{stroke-width:1.4px}",
        ".ring{stroke-width:1.6px}",
        ".copy{opacity:.55}",
        ".frame{stroke-dasharray:5 3}",
        ".icon{fill:none;stroke-width:1.5px;stroke-linecap:round;stroke-linejoin:round}",
        ".weight{paint-order:stroke;stroke-width:5px;stroke-linejoin:round}",
        ".caption{paint-order:stroke;stroke-width:4px;stroke-linejoin:round}",
        ".mark path{fill:none;stroke-width:1.8px;stroke-linecap:round;stroke-linejoin:round}",
        ".mark circle{stroke-width:1.5px}",
        ".skipped .icon{opacity:.55}",
        ".skipped .label{opacity:.55}",
        ".skipped .card{stroke-dasharray:4 3}",
    ]
    dark = "".join(scope + rule for rule in colours(DARK))
    light = "".join(scope + rule for rule in [*shapes, *colours(LIGHT)])
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"


def colours(palette: Mapping[str, tuple[str, str]]) -> list[str]:
    """The rules that a palette of (fill, stroke) sets."""
    (ink, muted), (panel, line), edge = palette["ink"], palette["panel"], palette["edge"][1]
    batch, bad, good = palette["batch"], palette["bad"][1], palette["task"][1]
    kinds = [
        f"{part}{{{style}}}"
        for kind in KINDS
        for fill, stroke in [palette[kind]]
        for part, style in (
            (f".{kind} .card", f"fill:{fill};stroke:{stroke}"),
            (f".{kind} .key", f"fill:{fill};stroke:{stroke}"),
            (f".{kind} .icon", f"stroke:{stroke}"),
            (f".{kind} .ring", f"stroke:{stroke}"),
        )
    ]
    return [
        f".panel{{fill:{panel};stroke:{line}}}",
        f".label{{fill:{ink}}}",
        f".heading{{fill:{ink}}}",
        f".small{{fill:{muted}}}",
        f".weight{{stroke:{panel}}}",
        f".caption{{stroke:{batch[0]}}}",
        f".ring{{fill:{panel}}}",
        f".edge{{stroke:{edge}}}",
        f".frame{{fill:{batch[0]};stroke:{batch[1]}}}",
        *kinds,
        f".box.failed .card{{stroke:{bad}}}",
        f".mark path{{stroke:{panel}}}",
        f".mark circle{{fill:{edge};stroke:{panel}}}",
        f".mark.done circle{{fill:{good}}}",
        f".mark.failed circle{{fill:{bad}}}",
    ]
