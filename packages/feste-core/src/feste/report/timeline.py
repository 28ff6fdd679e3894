"""When what ran: the spans of a run as an SVG timeline with swim lanes.

A pure function from spans to text. Each lane packs its spans into as few rows as they need; very
many spans become a strip of density per lane, so that the picture stays small.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from feste.report.graph_picture import (
    BOLD,
    DARK,
    KINDS,
    LIGHT,
    SMALL,
    sheet,
    svg_rect,
    svg_text,
)
from feste.report.layout import Rect, fit, width_of, xml

GUTTER, CHART = 190.0, 830.0  # pixels for the names of the lanes, and for the time
CURVE = 58.0
MAX_LANES = 40
BINS, SHADES = 208, 8  # of a density strip


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that ran.

    :param lane: where it is drawn, such as "openai.chat gpt-5-mini" or "task clean".
    :param label: what it was.
    :param start: when it began, in seconds since the run began.
    :param end: when it ended.
    :param ok: whether it succeeded.
    :param wait: how many seconds it was ready before it began.
    :param items: how many logical calls it carried.
    """

    lane: str
    label: str
    start: float
    end: float
    ok: bool = True
    wait: float = 0.0
    items: int = 1


@dataclass(frozen=True, slots=True)
class _Axis:
    """Time, from left to right."""

    low: float
    high: float

    def x(self, time: float) -> float:
        return GUTTER + CHART * (time - self.low) / (self.high - self.low)

    def bar(self, start: float, end: float, y: float, height: float) -> Rect:
        left = self.x(max(start, self.low))
        return Rect(left, y, max(1.5, self.x(end) - left), height)


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


def _lanes(spans: Iterable[Span]) -> list[tuple[str, list[Span]]]:
    """The spans of each lane by start, lanes by their first span; the idlest of many as one."""
    lanes: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        lanes.setdefault(span.lane, []).append(span)
    if len(lanes) > MAX_LANES:
        busy = {name: sum(s.end - s.start for s in members) for name, members in lanes.items()}
        kept = set(heapq.nlargest(MAX_LANES - 1, lanes, key=busy.__getitem__))
        rest = [span for name, members in lanes.items() if name not in kept for span in members]
        name = f"{len(lanes) - len(kept):,} other lanes"
        lanes = {name: members for name, members in lanes.items() if name in kept}
        lanes[name] = sorted(rest, key=lambda span: (span.start, span.end))
    return list(lanes.items())


def _packed(spans: Iterable[Span]) -> list[list[Span]]:
    """Rows without overlaps, as few as possible: each span goes to the first row that is free.

    >>> spans = [Span("", "a", 0, 2), Span("", "b", 1, 3), Span("", "c", 2, 4)]
    >>> [[span.label for span in row] for row in _packed(spans)]
    [['a', 'c'], ['b']]
    """
    rows: list[list[Span]] = []
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    for span in spans:
        while busy and busy[0][0] <= span.start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        row = heapq.heappop(free) if free else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(span)
        heapq.heappush(busy, (span.end, row))
    return rows


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


def _grid(axis: _Axis, bottom: float) -> str:
    """Upright lines at round times, with the times above."""
    step = _step((axis.high - axis.low) / 10)
    parts = []
    for number in range(math.ceil(axis.low / step), math.floor(axis.high / step + 1e-9) + 1):
        x = axis.x(number * step)
        words = svg_text("small", x, 12, _clock(number * step), "middle")
        parts.append(f'<path d="M{x:.1f} 18V{bottom:.1f}"/>{words}')
    return f'<g class="grid">{"".join(parts)}</g>'


def _step(least: float) -> float:
    """The next round time.

    >>> _step(0.013), _step(3), _step(40), _step(4000)
    (0.02, 5.0, 60.0, 7200.0)
    """
    round_times = (30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0, 43200.0)
    if least > 20:
        return next(
            (time for time in round_times if time >= least), 86400.0 * math.ceil(least / 86400)
        )
    power = 10.0 ** math.floor(math.log10(least))
    return next(
        round(factor * power, 12) for factor in (1, 2, 5, 10) if factor * power >= least * 0.999
    )


def _clock(seconds: float) -> str:
    """A time for people.

    >>> [_clock(time) for time in (0, 0.0042, 1.5, 75, 3700)]
    ['0 s', '4.2 ms', '1.5 s', '1:15 min', '1:01 h']
    """
    whole = round(seconds)
    if abs(whole) >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02} h"
    if abs(whole) >= 60:
        return f"{whole // 60}:{whole % 60:02} min"
    if abs(seconds) > 0.9995 or not seconds:
        return f"{seconds:.3g} s"
    return f"{1000 * seconds:.3g} ms"


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
