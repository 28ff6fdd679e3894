"""Draw the spans of a run as an SVG timeline with swim lanes.

This is a pure function from spans to text. Each lane packs its spans into as few rows as possible;
lanes with too many spans become density strips, so that the picture stays small.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, groupby

from feste.report import waiting
from feste.report.axis import BINS, CHART, GUTTER, Axis, clock
from feste.report.spans import Span, extent_of, lanes_of, packed
from feste.report.svg import (
    BOLD,
    KINDS,
    SMALL,
    Palette,
    Rect,
    Svg,
    fit,
    sheet,
    style_of,
    svg_rect,
    svg_text,
    width_of,
    xml,
)
from feste.wording import counted

__all__ = ["Span", "draw_timeline"]

CURVE = 58.0
MAX_ROWS = 40  # the maximum rows of bars in all lanes together
SHADES = 8  # of a density strip
SHAPES = [
    ".label{font-size:12px}",
    ".grid path{stroke-width:1px;stroke-dasharray:2 4;fill:none}",
    ".curve path{stroke-width:1.4px;stroke-linejoin:round;fill-opacity:.16}",
    f".inbar{{font-size:{SMALL - 0.5}px}}",
    *(f".s{shade}{{fill-opacity:{shade / SHADES:.3f}}}" for shade in range(1, SHADES + 1)),
]


def draw_timeline(spans: Sequence[Span], *, title: str = "", max_spans: int = 2000) -> Svg:
    """Draw a run as one self-contained SVG file; above `max_spans`, draw the density of each lane.

    :param spans: the spans, in any order.
    :param title: a heading.
    :param max_spans: the maximum number of spans drawn singly.
    :returns: the text of the file.
    :raises ValueError: if a span has a time that is not finite, or ends before it starts.

    >>> draw_timeline([Span("task clean", "a.txt", 0.0, 1.5)]).count('class="bar fill"')
    1
    """
    axis = Axis(*extent_of(spans))
    lanes = lanes_of(spans)
    dense = len(spans) > max_spans
    rows_of = [[members] if dense else _rows(members) for _, members in lanes]
    folded = set(range(len(lanes))) if dense else _folded([len(rows) for rows in rows_of])
    pitch = (
        19.0 if sum(len(rows) for i, rows in enumerate(rows_of) if i not in folded) <= 20 else 12.0
    )
    peak, curve = _curve(spans, axis, 22.0)
    y, body = 22.0 + CURVE + 10, [curve] if spans else []
    causes = waiting.causes_of(spans, axis)
    if causes:
        body.append(waiting.band(spans, causes, axis, y))
        y += waiting.HEIGHT + 10
    for i, (name, members) in enumerate(lanes):
        rows = 0 if i in folded else len(rows_of[i])
        words = _name_lines(name)
        height = max(24.0 + 14.0 * len(words), rows * pitch + 10)
        inside = Rect(0, y + 5 + (height - 10 - rows * pitch) / 2, 0, pitch)
        strip = _strip(members, axis, y + 6, height - 12) if i in folded else ""
        drawn = strip or _bars(rows_of[i], axis, inside)
        body.append(_lane(name, words, members, drawn, Rect(0, y, GUTTER + CHART, height)))
        y += height + 4
    if spans:
        body.insert(0, axis.grid(y))
    notes = [_totals(spans, peak)]
    if dense:
        notes.append("Too many spans for single bars: the darker, the more ran at once.")
    elif folded:
        most = max(len(rows_of[i]) for i in folded)
        notes.append(
            f"Too many at once for single bars in {counted(len(folded), 'lane')} (up to {most:,}): "
            "the darker, the more ran at once."
        )
    return sheet(
        "timeline",
        title,
        f"{title or 'Timeline'}: {notes[0]}",
        body=body,
        size=(GUTTER + CHART, y) if spans else (0, 0),
        legend=_legend(spans) + waiting.legend(causes),
        notes=notes,
        style=style_of("timeline", SHAPES, _colours),
    )


def _rows(spans: Sequence[Span]) -> list[list[Span]]:
    """Pack the spans of a lane into rows; on a worker, tasks and calls have rows of their own."""
    by_kind: dict[str, list[Span]] = {kind: [] for kind in ("task", *KINDS)}
    for span in spans:
        by_kind[_kind(span.lane)].append(span)
    return [row for members in by_kind.values() for row in packed(members)]


def _folded(rows: Sequence[int]) -> set[int]:
    """Return the lanes to draw as strips, so that the others need few enough rows of bars.

    :param rows: the number of rows of bars that each lane needs.

    >>> sorted(_folded([3, 512, 30, 20]))
    [1, 2]
    """
    folded, left = set[int](), sum(rows)
    for lane in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if left <= MAX_ROWS or rows[lane] <= 2:  # a strip itself is as high as two rows
            break
        folded.add(lane)
        left -= rows[lane]
    return folded


def _name_lines(name: str) -> list[str]:
    """Put the name of a lane on one line, or on two: the operation and its model."""
    room = GUTTER - 24
    first, _, rest = name.partition(" ")
    if width_of(name, BOLD) <= room or not rest:
        return [fit(name, room, BOLD)]
    return [fit(first, room, BOLD), fit(rest, room, SMALL)]


def _bars(rows: Sequence[Sequence[Span]], axis: Axis, first: Rect) -> str:
    """Draw a bar for each span, and thin bars before it for its waits."""
    pitch = first.height
    thick, thin = pitch * 0.68, pitch * 0.2
    waits, bars = [], []
    for number, row in enumerate(rows):
        y = first.y + number * pitch
        for span in row:
            if span.waits:
                waits += waiting.thin_bars(span, axis, y + pitch - thin - 1, thin)
            bars.append(_bar(span, axis.bar(span.start, span.end, y, thick)))
    return "".join(waits + bars)


def _bar(span: Span, at: Rect) -> str:
    facts = [f"{span.lane} on {span.worker}"] if span.worker else []
    facts.append(f"{clock(span.start)} to {clock(span.end)} ({clock(span.end - span.start)})")
    waits: dict[str, float] = {}
    for cause, wait in span.waits:
        waits[cause] = wait + waits.get(cause, 0.0)
    for cause, wait in waits.items():
        words = waiting.WORDS.get(cause, waiting.WORDS["other"])
        facts.append(words.replace("waits", f"waited {clock(wait)}"))
    if span.items != 1:
        facts.append(counted(span.items, "call"))
    if not span.ok:
        facts.append("failed")
    state = "bar fill" if span.ok else "bar bad"
    drawn = svg_rect(state, at, min(3.0, at.height / 3))
    if at.height > 10 and (words := _words(span, at.width - 10)):
        drawn += svg_text("inbar", at.x + 5, at.y + at.height / 2 + 3.5, words)
    kind = f' class="{_kind(span.lane)}"' if span.worker else ""
    return f"<g{kind}><title>{xml(span.label)}&#10;{xml(', '.join(facts))}</title>{drawn}</g>"


def _words(span: Span, room: float) -> str:
    """Return the text that fits into a bar: label and count, count only, a short label, or none."""
    count = f"× {span.items:,}" if span.items != 1 else ""
    full = f"{span.label} {count}"
    whole = (text for text in (full, count) if text and width_of(text, SMALL) <= room)
    return fit(next(whole, full if room > 56 else ""), room, SMALL)


def _strip(spans: Sequence[Span], axis: Axis, y: float, height: float) -> str:
    """Draw how much ran at each time as shades, with failures as ticks at the lower edge."""
    wide = (axis.high - axis.low) / BINS
    failed = {min(BINS - 1, int((s.end - axis.low) / wide)) for s in spans if not s.ok}
    levels = axis.levels((span.start, span.end) for span in spans)
    most = max(levels) or 1.0
    shades = [math.ceil(SHADES * math.sqrt(at / most) - 1e-9) for at in levels]
    cell = CHART / BINS
    parts, x = [], GUTTER
    for shade, run in groupby(shades):
        width = cell * len(list(run))
        if shade:
            parts.append(svg_rect(f"heat fill s{shade}", Rect(x, y, width, height), 0))
        x += width
    for number in sorted(failed):
        tick = Rect(GUTTER + number * cell, y + height - 5, cell, 5)
        parts.append(svg_rect("fault bad", tick, 0))
    return "".join(parts)


def _lane(name: str, words: Sequence[str], spans: Sequence[Span], drawn: str, at: Rect) -> str:
    took, count = sum(span.end - span.start for span in spans), counted(len(spans), "span")
    kind, sizes = _kind(name), f"{count}, mean {clock(took / len(spans))}"
    if len({span.worker for span in spans}) == 1 and spans[0].worker:
        kind, sizes = _most(spans), f"worker: {clock(took)} in {count}"
    lines = [*words, sizes]
    y = at.y + min(at.height, 52.0) / 2 + 5 - 7 * (len(lines) - 1)
    texts = [
        svg_text("small" if number else "label", 12, y + 14 * number, line)
        for number, line in enumerate(lines)
    ]
    parts = f"<title>{xml(name)}</title>{svg_rect('band', at, 8)}{''.join(texts)}{drawn}"
    return f'<g class="lane {kind}">{parts}</g>'


def _kind(lane: str) -> str:
    kind = lane.partition(" ")[0]
    return kind if kind in ("task", "prompt", "data") else "call"


def _most(spans: Sequence[Span]) -> str:
    """Return the kind that most of the time of a worker's spans went to, which colours its strip."""
    took: dict[str, float] = defaultdict(float)
    for span in spans:
        took[_kind(span.lane)] += span.end - span.start
    return max(took, key=took.__getitem__)


def _curve(spans: Sequence[Span], axis: Axis, y: float) -> tuple[int, str]:
    """Return the maximum of concurrent spans, and their number over time as a filled step line."""
    changes: dict[float, int] = defaultdict(int)
    for span in spans:
        if span.start < span.end:
            changes[span.start] += 1
            changes[span.end] -= 1
    times = sorted(changes)
    levels = list(accumulate(changes[time] for time in times))
    peak = max(levels, default=0)
    # Keep only the highest and the last level of each pixel column, so that the path stays short.
    # Where steps are too dense to distinguish, use wider columns and only their highest level.
    grain = 1 if len(levels) < CHART else 4
    columns: dict[int, tuple[int, int]] = {}
    for time, level in zip(times, levels):
        column = round(axis.x(time) / grain) * grain
        most = max(level, columns.get(column, (0, 0))[0])
        columns[column] = most, (level if grain == 1 else most)
    floor, scale = y + CURVE, (CURVE - 16) / max(1, peak)
    path = [f"M{GUTTER:.0f} {floor:.1f}"]
    for column, (most, level) in columns.items():
        spike = f"V{floor - most * scale:.1f}" if most != level else ""
        path.append(f"H{column}{spike}V{floor - level * scale:.1f}")
    words = svg_text("label", 12, y + 30, "at once")
    small = svg_text("small", 12, y + 44, f"most: {peak:,}")
    return peak, f'<g class="curve">{words}{small}<path d="{"".join(path)}V{floor:.1f}Z"/></g>'


def _totals(spans: Sequence[Span], peak: int) -> str:
    if not spans:
        return "Nothing to draw: nothing ran."
    calls, failed = sum(span.items for span in spans), sum(not span.ok for span in spans)
    took = max(span.end for span in spans) - min(span.start for span in spans)
    facts = [f"{counted(len(spans), 'span')} in {clock(took)}, at most {peak:,} at once"]
    if calls != len(spans):
        facts.append(counted(calls, "call"))
    if failed:
        facts.append(f"{failed:,} failed")
    return "; ".join(facts) + "."


def _legend(spans: Sequence[Span]) -> list[tuple[str, str]]:
    """Return (swatch, words) for the kinds of bars."""
    at = Rect(0, -10, 26, 13)
    kinds = {_kind(span.lane) for span in spans}
    entries = [
        (f'<g class="lane {kind}">{svg_rect("fill", at, 3)}</g>', name)
        for kind, name in KINDS.items()
        if kind in kinds
    ]
    if not all(span.ok for span in spans):
        entries.append((svg_rect("bad", at, 3), "failed"))
    return entries


def _colours(palette: Palette) -> list[str]:
    panel, line = palette["panel"]
    return [
        f".band{{fill:{palette['data'][0]};fill-opacity:.6}}",
        f".grid path{{stroke:{line}}}",
        f".inbar{{fill:{panel}}}",
        f".curve path{{fill:{palette['prompt'][1]};stroke:{palette['prompt'][1]}}}",
        *(f".{kind} .fill{{fill:{palette[kind][1]}}}" for kind in KINDS),
        f".bad{{fill:{palette['bad'][1]}}}",
        *(f".w-{cause}{{fill:{colour}}}" for cause, colour in waiting.COLOURS.items()),
    ]
