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
from feste.report.spans import Span, lanes_of, packed
from feste.report.svg import (BOLD, KINDS, SMALL, Palette, Rect, fit, sheet, svg_rect, svg_text, width_of, xml)

__all__ = ["Span", "draw_timeline"]

CURVE = 58.0
BINS, SHADES = 208, 8  # of a density strip


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
    axis = _axis(spans)
    lanes = _lanes(spans)
    dense = len(spans) > max_spans
    packed = [[members] if dense else _packed(members) for _, members in lanes]
    pitch = _pitch(sum(map(len, packed)))
    y, body = 22.0, []
    for (name, members), rows in zip(lanes, packed, strict=True):
        height = max(38.0, len(rows) * pitch + 10)
        inside = Rect(0, y + 5 + (height - 10 - len(rows) * pitch) / 2, 0, pitch)
        drawn = _strip(members, axis, y + 6, height - 12) if dense else _bars(rows, axis, inside)
        body.append(_lane(name, members, drawn, Rect(0, y, GUTTER + CHART, height)))
        y += height + 4
    peak, curve = _curve(spans, axis, y + 8)
    if spans:
        body = [_grid(axis, y + 8 + CURVE), *body, curve]
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
        style=_style(),
    )


def _axis(spans: Sequence[Span]) -> _Axis:
    for span in spans:
        times = (span.start, span.end, span.wait)
        if not all(map(math.isfinite, times)) or span.end < span.start or span.wait < 0:
            raise ValueError(f"the span {span.label!r} of {span.lane!r} has impossible times")
    low = min((span.start for span in spans), default=0.0)
    high = max((span.end for span in spans), default=0.0)
    low = min(low, 0.0)
    return _Axis(low, high if high > low else low + 1.0)


def _pitch(rows: int) -> float:
    return 19.0 if rows <= 60 else 10.0 if rows <= 200 else 5.0


def _bars(rows: Sequence[Sequence[Span]], axis: _Axis, first: Rect) -> str:
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
    facts = [f"{_clock(span.start)} to {_clock(span.end)} ({_clock(span.end - span.start)})"]
    facts += [f"waited {_clock(span.wait)}"] * bool(span.wait)
    facts += [f"{span.items:,} calls"] * (span.items != 1) + ["failed"] * (not span.ok)
    title = f"<title>{xml(span.label)}&#10;{xml(', '.join(facts))}</title>"
    words = _words(span, at.width - 10) if at.height > 10 else ""
    if words:
        words = svg_text("inbar", at.x + 5, at.y + at.height / 2 + 3.5, words)
    state = "bar fill" if span.ok else "bar bad"
    return f"<g>{title}{svg_rect(state, at, min(3.0, at.height / 3))}{words}</g>"


def _words(span: Span, room: float) -> str:
    """What a bar of this width can say: all, the number of its calls, most of it, or nothing."""
    count = f"× {span.items:,}" if span.items != 1 else ""
    full = f"{span.label} {count}"
    whole = (text for text in (full, count) if text and width_of(text, SMALL) <= room)
    return fit(next(whole, full if room > 56 else ""), room, SMALL)


def _strip(spans: Sequence[Span], axis: _Axis, y: float, height: float) -> str:
    """How much ran at each moment, as shades; failures as ticks at the lower edge."""
    wide = (axis.high - axis.low) / BINS
    busy, failed = [0.0] * (BINS + 1), [False] * BINS
    slope = [0.0] * (BINS + 1)  # whole bins as differences: a long span costs no more than a short
    for span in spans:
        first, last = (
            min(BINS - 1, int((time - axis.low) / wide)) for time in (span.start, span.end)
        )
        busy[first] -= (span.start - axis.low) / wide - first
        busy[last] += (span.end - axis.low) / wide - last
        slope[first] += 1.0
        slope[last] -= 1.0
        failed[last] = failed[last] or not span.ok
    level = [part + whole for part, whole in zip(busy, accumulate(slope), strict=True)]
    most = max(level) or 1.0
    shades = [math.ceil(SHADES * math.sqrt(max(0.0, at) / most) - 1e-9) for at in level[:BINS]]
    cell = CHART / BINS
    parts, x = [], GUTTER
    for shade, run in groupby(shades):
        width = cell * len(list(run))
        if shade:
            parts.append(svg_rect(f"heat fill s{shade}", Rect(x, y, width, height), 0))
        x += width
    ticks = [number for number, bad in enumerate(failed) if bad]
    return "".join(parts) + "".join(
        svg_rect("fault bad", Rect(GUTTER + number * cell, y + height - 5, cell, 5), 0)
        for number in ticks
    )


def _lane(name: str, spans: Sequence[Span], drawn: str, at: Rect) -> str:
    mean = sum(span.end - span.start for span in spans) / len(spans)
    middle = at.y + min(at.height, 46.0) / 2
    words = svg_text("label", 12, middle - 2, fit(name, GUTTER - 24, BOLD))
    small = svg_text("small", 12, middle + 12, f"{_many(spans)}, mean {_clock(mean)}")
    band = svg_rect("band", at, 8)
    return (
        f'<g class="lane {_kind(name)}"><title>{xml(name)}</title>{band}{words}{small}{drawn}</g>'
    )


def _kind(lane: str) -> str:
    kind = lane.partition(" ")[0]
    return kind if kind in ("task", "prompt", "data") else "call"


def _curve(spans: Sequence[Span], axis: _Axis, y: float) -> tuple[int, str]:
    """The most that ran at once, and the course of it as a filled step line."""
    changes: dict[float, int] = defaultdict(int)
    for span in spans:
        if span.start < span.end:
            changes[span.start] += 1
            changes[span.end] -= 1
    levels = list(accumulate(changes[time] for time in sorted(changes)))
    peak = max(levels, default=0)
    # The highest and the last level of each column of pixels, so that the path stays short; columns
    # are wider, and only their highest level is drawn, where one could not tell the steps apart.
    grain = 1 if len(levels) < CHART else 4
    columns: dict[int, tuple[int, int]] = {}
    for time, level in zip(sorted(changes), levels, strict=True):
        column = round(axis.x(time) / grain) * grain
        most = max(level, columns.get(column, (0, 0))[0])
        columns[column] = most, (level if grain == 1 else most)
    floor, scale = y + CURVE, (CURVE - 16) / max(1, peak)
    path = [f"M{GUTTER:.0f} {floor:.1f}"]
    for column, (most, level) in columns.items():
        spike = f"V{floor - most * scale:.1f}" if most != level else ""
        path.append(f"H{column}{spike}V{floor - level * scale:.1f}")
    words = svg_text("label", 12, y + 30, "at once") + svg_text(
        "small", 12, y + 44, f"most: {peak:,}"
    )
    return peak, f'<g class="curve">{words}<path d="{"".join(path)}V{floor:.1f}Z"/></g>'


def _many(spans: Sequence[Span]) -> str:
    return f"{len(spans):,} {'span' if len(spans) == 1 else 'spans'}"


def _totals(spans: Sequence[Span], peak: int) -> str:
    if not spans:
        return "Nothing to draw: nothing ran."
    calls, failed = sum(span.items for span in spans), sum(not span.ok for span in spans)
    took = max(span.end for span in spans) - min(span.start for span in spans)
    facts = [f"{_many(spans)} in {_clock(took)}, at most {peak:,} at once"]
    facts += [f"{calls:,} calls"] * (calls != len(spans)) + [f"{failed:,} failed"] * bool(failed)
    return "; ".join(facts) + "."


def _legend(spans: Sequence[Span]) -> list[tuple[str, str]]:
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


def _style() -> str:
    shapes = [
        ".label{font-size:12px}",
        ".grid path{stroke-width:1px;stroke-dasharray:2 4;fill:none}",
        ".waits{opacity:.45}",
        ".curve path{stroke-width:1.4px;stroke-linejoin:round;fill-opacity:.16}",
        f".inbar{{font-size:{SMALL - 0.5}px}}",
        *(f".s{shade}{{fill-opacity:{shade / SHADES:.3f}}}" for shade in range(1, SHADES + 1)),
    ]
    light, dark = (
        "".join(f".feste-timeline {rule}" for rule in rules)
        for rules in ([*shapes, *_colours(LIGHT)], _colours(DARK))
    )
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _colours(palette: Mapping[str, tuple[str, str]]) -> list[str]:
    panel, line = palette["panel"]
    return [
        f".band{{fill:{palette['data'][0]};fill-opacity:.6}}",
        f".grid path{{stroke:{line}}}",
        f".inbar{{fill:{panel}}}",
        f".curve path{{fill:{palette['prompt'][1]};stroke:{palette['prompt'][1]}}}",
        *(f".{kind} .fill{{fill:{palette[kind][1]}}}" for kind in KINDS),
        f".bad{{fill:{palette['bad'][1]}}}",
    ]
