"""When what ran: the spans of a run as an SVG timeline with swim lanes.

A pure function from spans to text. Each lane packs its spans into as few rows as they need; very
many spans become a strip of density per lane, so that the picture stays small.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, groupby

from feste.report.axis import CHART, GUTTER, Axis, clock
from feste.report.spans import Span, extent_of, lanes_of, packed
from feste.report.svg import (
    BOLD,
    KINDS,
    SMALL,
    Palette,
    Rect,
    fit,
    sheet,
    style_of,
    svg_rect,
    svg_text,
    width_of,
    xml,
)

__all__ = ["Span", "draw_timeline"]

CURVE = 58.0
BINS, SHADES = 208, 8  # of a density strip
SHAPES = [
    ".label{font-size:12px}",
    ".grid path{stroke-width:1px;stroke-dasharray:2 4;fill:none}",
    ".waits{opacity:.45}",
    ".curve path{stroke-width:1.4px;stroke-linejoin:round;fill-opacity:.16}",
    f".inbar{{font-size:{SMALL - 0.5}px}}",
    *(f".s{shade}{{fill-opacity:{shade / SHADES:.3f}}}" for shade in range(1, SHADES + 1)),
]


def draw_timeline(spans: Sequence[Span], *, title: str = "", max_spans: int = 2000) -> str:
    """Draw a run as one self-contained SVG file; above `max_spans` as density per lane.

    :param spans: what ran, in any order.
    :param title: a heading.
    :param max_spans: how many spans are drawn one by one.
    :returns: the text of the file.
    :raises ValueError: a span has a time that is no number, or ends before it starts.

    >>> draw_timeline([Span("task clean", "a.txt", 0.0, 1.5)]).count('class="bar fill"')
    1
    """
    axis = Axis(*extent_of(spans))
    lanes = lanes_of(spans)
    dense = len(spans) > max_spans
    rows_of = [[members] if dense else packed(members) for _, members in lanes]
    bars = sum(map(len, rows_of))
    pitch = 19.0 if bars <= 60 else 10.0 if bars <= 200 else 5.0
    y, body = 22.0, []
    for (name, members), rows in zip(lanes, rows_of):
        height = max(38.0, len(rows) * pitch + 10)
        inside = Rect(0, y + 5 + (height - 10 - len(rows) * pitch) / 2, 0, pitch)
        drawn = _strip(members, axis, y + 6, height - 12) if dense else _bars(rows, axis, inside)
        body.append(_lane(name, members, drawn, Rect(0, y, GUTTER + CHART, height)))
        y += height + 4
    peak, curve = _curve(spans, axis, y + 8)
    if spans:
        body = [axis.grid(y + 8 + CURVE), *body, curve]
    notes = [_totals(spans, peak)]
    if dense:
        notes.append("Too many spans for single bars: the darker, the more ran at once.")
    return sheet(
        "timeline",
        title,
        f"{title or 'Timeline'}: {notes[0]}",
        body=body,
        size=(GUTTER + CHART, y + 8 + CURVE) if spans else (0, 0),
        legend=_legend(spans),
        notes=notes,
        style=style_of("timeline", SHAPES, _colours),
    )


def _bars(rows: Sequence[Sequence[Span]], axis: Axis, first: Rect) -> str:
    """A bar for each span, and below and before it a thin pale one for its wait."""
    pitch = first.height
    thick, thin = pitch * 0.72, pitch * 0.16
    waits, bars = [], []
    for number, row in enumerate(rows):
        y = first.y + number * pitch
        for span in row:
            if span.wait:
                wait = axis.bar(span.start - span.wait, span.start, y + pitch - thin - 1, thin)
                waits.append(svg_rect("wait fill", wait, 1))
            bars.append(_bar(span, axis.bar(span.start, span.end, y, thick)))
    # One opacity for all waits of a lane, so that those of many spans do not add up to a solid bar.
    return f'<g class="waits">{"".join(waits)}</g>{"".join(bars)}'


def _bar(span: Span, at: Rect) -> str:
    facts = [f"{clock(span.start)} to {clock(span.end)} ({clock(span.end - span.start)})"]
    if span.wait:
        facts.append(f"waited {clock(span.wait)}")
    if span.items != 1:
        facts.append(f"{span.items:,} calls")
    if not span.ok:
        facts.append("failed")
    state = "bar fill" if span.ok else "bar bad"
    drawn = svg_rect(state, at, min(3.0, at.height / 3))
    if at.height > 10 and (words := _words(span, at.width - 10)):
        drawn += svg_text("inbar", at.x + 5, at.y + at.height / 2 + 3.5, words)
    return f"<g><title>{xml(span.label)}&#10;{xml(', '.join(facts))}</title>{drawn}</g>"


def _words(span: Span, room: float) -> str:
    """What a bar of this width can say: all, the number of its calls, most of it, or nothing."""
    count = f"× {span.items:,}" if span.items != 1 else ""
    full = f"{span.label} {count}"
    whole = (text for text in (full, count) if text and width_of(text, SMALL) <= room)
    return fit(next(whole, full if room > 56 else ""), room, SMALL)


def _strip(spans: Sequence[Span], axis: Axis, y: float, height: float) -> str:
    """How much ran at each moment, as shades; failures as ticks at the lower edge."""
    wide = (axis.high - axis.low) / BINS
    busy, failed = [0.0] * BINS, set[int]()
    slope = [0.0] * BINS  # whole bins as differences: a long span costs no more than a short
    for span in spans:
        first, last = (
            min(BINS - 1, int((time - axis.low) / wide)) for time in (span.start, span.end)
        )
        busy[first] -= (span.start - axis.low) / wide - first
        busy[last] += (span.end - axis.low) / wide - last
        slope[first] += 1.0
        slope[last] -= 1.0
        if not span.ok:
            failed.add(last)
    levels = [part + whole for part, whole in zip(busy, accumulate(slope))]
    most = max(levels) or 1.0
    shades = [math.ceil(SHADES * math.sqrt(max(0.0, at) / most) - 1e-9) for at in levels]
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


def _lane(name: str, spans: Sequence[Span], drawn: str, at: Rect) -> str:
    mean = sum(span.end - span.start for span in spans) / len(spans)
    middle = at.y + min(at.height, 46.0) / 2
    words = svg_text("label", 12, middle - 2, fit(name, GUTTER - 24, BOLD))
    small = svg_text("small", 12, middle + 12, f"{_many(spans)}, mean {clock(mean)}")
    parts = f"<title>{xml(name)}</title>{svg_rect('band', at, 8)}{words}{small}{drawn}"
    return f'<g class="lane {_kind(name)}">{parts}</g>'


def _kind(lane: str) -> str:
    kind = lane.partition(" ")[0]
    return kind if kind in ("task", "prompt", "data") else "call"


def _curve(spans: Sequence[Span], axis: Axis, y: float) -> tuple[int, str]:
    """The most that ran at once, and the course of it as a filled step line."""
    changes: dict[float, int] = defaultdict(int)
    for span in spans:
        if span.start < span.end:
            changes[span.start] += 1
            changes[span.end] -= 1
    times = sorted(changes)
    levels = list(accumulate(changes[time] for time in times))
    peak = max(levels, default=0)
    # The highest and the last level of each column of pixels, so that the path stays short; columns
    # are wider, and only their highest level is drawn, where one could not tell the steps apart.
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


def _many(spans: Sequence[Span]) -> str:
    return f"{len(spans):,} {'span' if len(spans) == 1 else 'spans'}"


def _totals(spans: Sequence[Span], peak: int) -> str:
    if not spans:
        return "Nothing to draw: nothing ran."
    calls, failed = sum(span.items for span in spans), sum(not span.ok for span in spans)
    took = max(span.end for span in spans) - min(span.start for span in spans)
    facts = [f"{_many(spans)} in {clock(took)}, at most {peak:,} at once"]
    if calls != len(spans):
        facts.append(f"{calls:,} calls")
    if failed:
        facts.append(f"{failed:,} failed")
    return "; ".join(facts) + "."


def _legend(spans: Sequence[Span]) -> list[tuple[str, str]]:
    """(swatch, words) of everything that the picture uses."""
    at = Rect(0, -10, 26, 13)
    kinds = {_kind(span.lane) for span in spans}
    entries = [
        (f'<g class="lane {kind}">{svg_rect("fill", at, 3)}</g>', name)
        for kind, name in KINDS.items()
        if kind in kinds
    ]
    if any(span.wait for span in spans):
        thin = svg_rect("fill", Rect(0, -5, 26, 3), 1)
        entries.append((f'<g class="lane {min(kinds)}"><g class="waits">{thin}</g></g>', "waiting"))
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
    ]
