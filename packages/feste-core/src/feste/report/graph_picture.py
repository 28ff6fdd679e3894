"""Draw a graph as an SVG picture, for pages and notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from feste.report.layers import Edge
from feste.report.layout import Layout, Point, arrange
from feste.report.summary import EDGES_PER_BOX, MAX_TEXT, Box, Picture, kind_of, picture_of
from feste.report.svg import (
    BOLD,
    KINDS,
    SMALL,
    Rect,
    Svg,
    fit,
    sheet,
    svg_plate,
    svg_rect,
    svg_text,
    width_of,
    xml,
)
from feste.wording import counted

__all__ = ["Box", "draw_svg"]

HEIGHT = 46.0

_CORNERS = {"prompt": 9, "call": 16, "task": 5, "data": 12}
_ICONS = {  # strokes in a square of 16 × 16 pixels
    "prompt": "M2 3.5H14M2 8H14M2 12.5H9",
    "call": "M8 1.5Q8.6 7.4 14.5 8Q8.6 8.6 8 14.5Q7.4 8.6 1.5 8Q7.4 7.4 8 1.5Z",
    "task": "M6 2.5C2.5 2.5 5.5 7.6 2 8C5.5 8.4 2.5 13.5 6 13.5"
    "M10 2.5C13.5 2.5 10.5 7.6 14 8C10.5 8.4 13.5 13.5 10 13.5",
    "data": "M2.5 4C2.5 1.6 13.5 1.6 13.5 4V12C13.5 14.4 2.5 14.4 2.5 12Z"
    "M2.5 4C2.5 6.4 13.5 6.4 13.5 4M2.5 8C2.5 10.4 13.5 10.4 13.5 8",
}
_MARKS = {"done": "M-3.2 .3L-.9 2.6L3.4 -2.2", "failed": "M-2.6 -2.6L2.6 2.6M2.6 -2.6L-2.6 2.6",
          "skipped": "M-3 0H3"}  # fmt: skip


def draw_svg(
    boxes: Sequence[Box],
    edges: Sequence[tuple[str, str]],
    *,
    title: str = "",
    max_boxes: int = 200,
) -> Svg:
    """Draw a graph as one self-contained SVG file; above `max_boxes`, draw a summary.

    :param boxes: the nodes; their order breaks ties in the layout.
    :param edges: pairs of keys: a node, and a node that needs it.
    :param title: a heading.
    :param max_boxes: the maximum number of boxes drawn singly.
    :returns: the text of the file.
    :raises ValueError: if two boxes share a key, an edge names no box, or there is a cycle.

    >>> draw_svg([Box("a", "summarize", "call")], []).count('class="card"')
    1
    """
    picture = picture_of(boxes, edges, max_boxes, EDGES_PER_BOX * max_boxes)
    lines = [
        (fit(box.label, MAX_TEXT, BOLD), fit(box.detail, MAX_TEXT, SMALL)) for box in picture.boxes
    ]
    widths = [
        max(104.0, 52 + max(width_of(label, BOLD), width_of(detail, SMALL)))
        for label, detail in lines
    ]
    gap = 96.0 if any(weight > 1 for weight in picture.edges.values()) else 48.0
    layout = arrange(widths, HEIGHT, list(picture.edges), picture.groups(), gap)
    frames = [rect for _, rect in layout.outlines]
    captions = [picture.caption(picture.boxes[nodes[0]].group) for nodes, _ in layout.outlines]
    body = [
        *(svg_rect("frame", frame, 14) for frame in frames),
        *(_edge(picture, edge, layout) for edge in picture.edges),
        *(
            svg_plate("caption", frame.x + 10, frame.y + 16, caption)
            for frame, caption in zip(frames, captions)
        ),
        *map(_card, picture.boxes, picture.counts, layout.rects, lines),
        *(
            _weight(weight, layout.routes[edge])
            for edge, weight in picture.edges.items()
            if weight > 1
        ),
    ]
    size_told = f"{counted(len(boxes), 'node')}, {counted(len(set(edges)), 'edge')}"
    summary = f"{title or 'Graph'}: {size_told}"
    legend = _legend(picture.boxes, bool(frames))
    notes = picture.remarks if boxes else ["Nothing to draw: the graph is empty."]
    size = (layout.width, layout.height)
    return sheet("graph", title, summary, body=body, size=size, legend=legend, notes=notes)


def _card(box: Box, count: int, at: Rect, lines: tuple[str, str]) -> str:
    """Draw a box: first copies and ring, then the card with icon, texts and state mark."""
    label, detail = lines
    kind = kind_of(box)
    told = (box.label, box.detail, box.state.replace("_", " "), box.origin)
    full = "\n".join(text for text in told if text)
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
    names = f"box {kind}"
    if box.state in _MARKS:
        names += f" {box.state}"
        parts.append(_mark(box.state, at.x + at.width - 3, at.y + 3))
    return f'<g class="{names}" data-key="{xml(box.key)}">{"".join(parts)}</g>'


def _icon(kind: str, x: float, y: float) -> str:
    return f'<path class="icon" transform="translate({x:.1f} {y:.1f})" d="{_ICONS[kind]}"/>'


def _mark(state: str, x: float, y: float) -> str:
    return (
        f'<g class="mark {state}" transform="translate({x:.1f} {y:.1f})">'
        f'<circle r="7.5"/><path d="{_MARKS[state]}"/></g>'
    )


def _edge(picture: Picture, edge: Edge, layout: Layout) -> str:
    """Draw a smooth line along the edge's route, with a small open arrow at its end."""
    points = layout.routes[edge]
    path = [f"M{_at(points[0])}"]
    for number, (one, other) in enumerate(pairwise(points)):
        if number % 2:
            path.append(_curve(one, other, layout.rightwards))
        elif one != other:
            path.append(f"L{_at(other)}")
    tail, head = (picture.boxes[number] for number in edge)
    x, y = points[-1]
    tip = -5.5 if head.output else -0.5  # stop before the ring of a result
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
    across, along = (x + to_x) / 2, (y + to_y) / 2
    bend, end = ((across, y), (across, to_y)) if rightwards else ((x, along), (to_x, along))
    return f"C{_at(bend)} {_at(end)} {_at(other)}"


def _weight(weight: int, points: Sequence[Point]) -> str:
    # In the middle of the last curve, because edges from one source share all the others.
    (x, y), (to_x, to_y) = points[-3], points[-2]
    return svg_plate("plate", (x + to_x) / 2, (y + to_y) / 2 + 3.5, f"× {weight:,}", "middle")


def _legend(boxes: Sequence[Box], batches: bool) -> list[tuple[str, str]]:
    """Return (swatch, words) for everything that the picture uses."""
    swatch = Rect(0, -12, 26, 17)
    entries = [
        (f'<g class="box {kind}">{svg_rect("key", swatch, 5)}'
         f'<g transform="translate(6.4 -10) scale(.82)">{_icon(kind, 0, 0)}</g></g>', name)
        for kind, name in KINDS.items()
        if any(kind_of(box) == kind for box in boxes)
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
