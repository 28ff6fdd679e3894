"""Write a graph as Mermaid text, for Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from feste.report.layers import depths
from feste.report.summary import EDGES_PER_BOX, MAX_TEXT, Box, kind_of, picture_of
from feste.report.svg import BOLD, KINDS, LIGHT, fit

MERMAID_EDGES = 500  # Mermaid's own limit: above it, it shows an error instead of a graph

_SHAPES = {"prompt": "[{}]", "call": "([{}])", "task": "[[{}]]", "data": "[({})]"}
_STYLES = {
    **{
        kind: f"fill:{LIGHT[kind][0]},stroke:{LIGHT[kind][1]},color:{LIGHT['ink'][0]}"
        for kind in KINDS
    },
    "output": "stroke-width:3px",
    "failed": f"stroke:{LIGHT['bad'][1]},stroke-width:2px",
    "skipped": "stroke-dasharray:4 3,opacity:0.6",
}
# Letters, digits, spaces and a hyphen inside a word are safe. Letters outside ASCII are safe too,
# except the ligature that starts Mermaid's own escapes.
_SPECIAL = re.compile(r"(?<![A-Za-z0-9])-|-(?![A-Za-z0-9])|[^\w\s,\xb7\xd7-]|[_\ufb02]")


class Mermaid(str):
    """The text of a Mermaid chart; a notebook with Mermaid support displays the picture."""

    __slots__ = ()

    def _repr_mimebundle_(self, **options: object) -> dict[str, str]:
        return {"text/vnd.mermaid": str(self)}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(
            str(self)
        )  # where Mermaid is not known: the chart's lines, not a quoted string


def draw_mermaid(
    boxes: Sequence[Box], edges: Sequence[tuple[str, str]], *, max_boxes: int = 200
) -> Mermaid:
    """Write a graph as a Mermaid flowchart; above `max_boxes`, write a summary.

    :param boxes: the nodes.
    :param edges: pairs of keys: a node, and a node that needs it.
    :param max_boxes: the maximum number of boxes drawn singly.
    :returns: the text of the chart, without a code fence.
    :raises ValueError: if two boxes share a key, an edge names no box, or there is a cycle.

    >>> print(draw_mermaid([Box("a", "summarize", "call")], []).splitlines()[1].strip())
    n0(["summarize"]):::callBox
    """
    most_edges = min(MERMAID_EDGES, EDGES_PER_BOX * max_boxes)
    picture = picture_of(boxes, edges, max_boxes, most_edges)
    rows = Counter(depths(len(picture.boxes), picture.edges))
    long = len(rows) > max([6, *rows.values()])
    nodes: dict[str, list[str]] = {}
    for number, (box, group) in enumerate(zip(picture.boxes, picture.groups())):
        nodes.setdefault(group, []).append(_node(number, box))
    lines = ["flowchart TB" if long else "flowchart LR", *nodes.pop("", [])]
    for number, (group, members) in enumerate(nodes.items()):
        lines.append(f'  subgraph g{number}["{picture.caption(group)}"]')
        lines += [*(f"  {line}" for line in members), "  end"]
    for (tail, head), weight in picture.edges.items():
        arrow = f'-->|"× {weight:,}"|' if weight > 1 else "-->"
        lines.append(f"  n{tail} {arrow} n{head}")
    for name, style in _STYLES.items():
        names = [f"n{number}" for number, box in enumerate(picture.boxes) if _has(box, name)]
        if names:
            lines.append(f"  classDef {name}Box {style}")
        if names and name not in KINDS:
            lines.append(f"  class {','.join(names)} {name}Box")
    return Mermaid("\n".join([*lines, *(f"  %% {_comment(note)}" for note in picture.remarks), ""]))


def _escaped(text: str) -> str:
    line = fit(text, 2 * MAX_TEXT, BOLD)
    return _SPECIAL.sub(lambda match: f"#{ord(match[0])};", line)


def _comment(text: str) -> str:
    """Prepare text for a comment, where escapes are not read and `%%{` starts a directive."""
    return re.sub(r"[{}%]", "", fit(text, 2 * MAX_TEXT, BOLD))


def _node(number: int, box: Box) -> str:
    words = "<br/>".join(_escaped(text) for text in (box.label, box.detail) if text)
    shape = _SHAPES[kind_of(box)].format(f'"{words or " "}"')
    return f"  n{number}{shape}:::{kind_of(box)}Box"  # "call" alone is a keyword


def _has(box: Box, style: str) -> bool:
    return box.output if style == "output" else style in (kind_of(box), box.state)
