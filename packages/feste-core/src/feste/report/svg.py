"""The parts that all pictures share: palettes, fonts, SVG elements, and the sheet around them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

MARGIN = 26.0
LABEL, SMALL, HEADING = 13.0, 11.0, 16.0  # font sizes
BOLD = 1.07 * LABEL

KINDS = {"prompt": "prompt", "call": "LLM call", "task": "Python task", "data": "data"}

Palette = Mapping[str, tuple[str, str]]

# (fill, stroke) of each part. No CSS variables: renderers without support would paint black.
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
# Fonts with the same metrics, so that text fits its box everywhere.
_FONT = "'Helvetica Neue',Helvetica,Arial,'Liberation Sans',Arimo,sans-serif"
_SHAPES = [
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
    ".mark path{fill:none;stroke-width:1.8px;stroke-linecap:round;stroke-linejoin:round}",
    ".mark circle{stroke-width:1.5px}",
    ".skipped .icon{opacity:.55}",
    ".skipped .label{opacity:.55}",
    ".skipped .card{stroke-dasharray:4 3}",
]

_NOT_XML = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Svg(str):
    """The text of an SVG file; a notebook displays the picture, a Python prompt one line."""

    __slots__ = ()

    def _repr_svg_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<SVG picture of {len(self):,} characters>"


@dataclass(frozen=True, slots=True)
class Rect:
    """A rectangle on the sheet, in pixels."""

    x: float
    y: float
    width: float
    height: float


def _plain(text: str) -> str:
    """Replace every character that XML cannot hold by a visible one.

    >>> _plain("a\\x1bb")
    'a␛b'
    """
    return _NOT_XML.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else "\ufffd", text)


def xml(text: str) -> str:
    """Escape text for XML content or attributes so that it parses back equal, with line ends.

    >>> xml('a "b" <c>')
    'a &quot;b&quot; &lt;c&gt;'
    """
    quoted = escape(_plain(text))
    return quoted.replace("\r", "&#13;").replace("\n", "&#10;").replace("\t", "&#9;")


def width_of(text: str, size: float) -> float:
    """Estimate the width of text in Arial, Helvetica or Liberation Sans in pixels, rather high."""
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
    """Put text on one line, and shorten it in the middle until it fits the room in pixels.

    >>> fit("a very long label indeed", 90, 12)
    'a very…indeed'
    """
    line = " ".join(_BIDI.sub("", _plain(text)).split())
    if width_of(line[:400], size) <= room and len(line) <= 400:
        return line
    keep = min(200, len(line))
    pairs = [_advance(line[n]) + _advance(line[-1 - n]) for n in range(keep)]
    wide = sum(pairs) + _advance("…")
    while keep > 1 and size * wide > room:
        keep -= 1
        wide -= pairs[keep]
    return line[:keep].rstrip() + "…" + line[-keep:].lstrip()


def svg_rect(name: str, at: Rect, corner: float, shift: float = 0.0) -> str:
    """Return a rectangle with round corners, moved right and down by `shift`."""
    return (
        f'<rect class="{name}" x="{at.x + shift:.1f}" y="{at.y + shift:.1f}" '
        f'width="{at.width:.1f}" height="{at.height:.1f}" rx="{corner:g}"/>'
    )


def svg_text(name: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    """Return one line of text, escaped."""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}"{place}>{xml(text)}</text>'


def svg_plate(name: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    """Return one line of small text on its own background, readable above lines.

    A halo around the letters (`paint-order`) would hide them in renderers without support for it.
    """
    width = width_of(text, SMALL) + 8
    left = x - 4 if anchor == "start" else x - width / 2
    plate = svg_rect(name, Rect(left, y - 11, width, 15), 4)
    return plate + svg_text("small", x, y, text, anchor)


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
) -> Svg:
    """Put a drawing on a panel with its title, legend and notes, as one SVG file.

    :param name: the kind of picture; all its style rules apply to the class `feste-{name}` only, so
        that several pictures fit into one HTML page.
    :param title: the heading, "" for none.
    :param summary: the text for screen readers.
    :param body: the elements of the drawing, with its corner at (0, 0).
    :param size: the width and height of the drawing in pixels.
    :param legend: pairs of a swatch and its words.
    :param notes: lines below the legend.
    :param style: more style rules.
    :returns: the text of the file.
    """
    room = max(size[0], 380.0)
    heading = fit(title, room, HEADING)
    rows = _flow(legend, room)
    top = MARGIN + (34 if heading else 0)
    below = top + size[1] + (30 if size[1] else 0)
    texts = [svg_text("heading", MARGIN, MARGIN + 12, heading)] if heading else []
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
    return Svg(
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="feste-{name}" role="img" '
                f'aria-label="{xml(summary)}" width="{width:.0f}" height="{height:.0f}" '
                f'viewBox="0 0 {width:.0f} {height:.0f}">',
                f"<title>{xml(summary)}</title>",
                f"<style>{style_of(name, _SHAPES, _colours)}{style}</style>",
                svg_rect("panel", Rect(0.5, 0.5, round(width) - 1, round(height) - 1), 14),
                f'<g transform="translate({shift})">',
                *body,
                "</g>",
                *texts,
                "</svg>",
                "",
            ]
        )
    )


def _flow(legend: Sequence[tuple[str, str]], room: float) -> list[list[tuple[float, str, str]]]:
    """Break the legend into rows of (x, swatch, words)."""
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


def style_of(name: str, shapes: Iterable[str], colours: Callable[[Palette], Iterable[str]]) -> str:
    """Return the style rules of a picture: shapes once, colours for light and for dark screens.

    :param name: the kind of picture, as in `sheet`.
    :param shapes: rules without colours.
    :param colours: returns the rules for a palette.
    :returns: the rules, limited to pictures of that kind.
    """
    light, dark = (
        "".join(f".feste-{name} {rule}" for rule in rules)
        for rules in ([*shapes, *colours(LIGHT)], colours(DARK))
    )
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _colours(palette: Palette) -> list[str]:
    """Return the rules for a palette of (fill, stroke)."""
    (ink, muted), (panel, line), edge = palette["ink"], palette["panel"], palette["edge"][1]
    batch, bad, good = palette["batch"], palette["bad"][1], palette["task"][1]
    kinds = []
    for kind in KINDS:
        fill, stroke = palette[kind]
        kinds += [f".{kind} .{part}{{fill:{fill};stroke:{stroke}}}" for part in ("card", "key")]
        kinds += [f".{kind} .{part}{{stroke:{stroke}}}" for part in ("icon", "ring")]
    return [
        f".panel{{fill:{panel};stroke:{line}}}",
        f".label{{fill:{ink}}}",
        f".heading{{fill:{ink}}}",
        f".small{{fill:{muted}}}",
        f".plate{{fill:{panel}}}",
        f".caption{{fill:{batch[0]}}}",
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
