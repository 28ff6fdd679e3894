"""Draw what requests waited for: a thin bar before each, and a band of how many waited at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from feste.report.axis import BINS, CHART, GUTTER, Axis
from feste.report.spans import Span
from feste.report.svg import Rect, svg_rect, svg_text

__all__ = [
    "COLOURS",
    "LEAST",
    "WORDS",
    "band",
    "causes_of",
    "in_order",
    "intervals",
    "legend",
    "thin_bars",
]

#: The causes in the order in which a request meets them, with their words in the legend.
WORDS = {
    "retry": "waits to retry",
    "worker": "waits for a worker",
    "batch": "waits for its batch",
    "prefix": "waits for the prompt cache",
    "rate_limit": "waits for the rate limit",
    "outage": "waits: the provider is down",
    "budget": "waits for room under the budget",
    "slot": "waits for a slot",
    "store": "waits for the store",
    "other": "waits",
}
#: Colours that people tell apart however they see colours (Okabe and Ito), on light and on dark.
COLOURS = {
    "retry": "#d55e00",
    "worker": "#8a8f98",
    "batch": "#0072b2",
    "prefix": "#009e73",
    "rate_limit": "#e69f00",
    "outage": "#a50026",
    "budget": "#f0e442",
    "slot": "#56b4e9",
    "store": "#cc79a7",
    "other": "#b9bec8",
}
#: The height of the band in pixels, and the shortest wait that is drawn, as a part of the axis.
HEIGHT, LEAST = 46.0, 0.5 / CHART


def intervals(span: Span) -> Iterator[tuple[str, float, float]]:
    """Yield cause, start and end of each wait of a span, the last first.

    :param span: the span.

    >>> list(intervals(Span("chat", "chat", 5.0, 6.0, waits=[("retry", 3.0), ("slot", 1.0)])))
    [('slot', 4.0, 5.0), ('retry', 1.0, 4.0)]
    """
    end = span.start
    for cause, wait in reversed(span.waits):
        yield cause if cause in WORDS else "other", end - wait, end
        end -= wait


def in_order(
    waits: Mapping[str, float], sent: float, closed: Sequence[tuple[float, float]]
) -> list[tuple[str, float]]:
    """Return the waits of a request in the order in which they happened.

    Slots and limits take turns at a gate; that it was closed for a while is known, so the limit is put
    there, and what is left of it first.

    :param waits: the seconds by cause.
    :param sent: when the request was sent.
    :param closed: starts and ends of the times for which its gate was closed.

    >>> in_order({"slot": 3.0, "rate_limit": 4.0, "retry": 1.0}, 10.0, [(5.0, 9.0)])
    [('retry', 1.0), ('slot', 2.0), ('rate_limit', 4.0), ('slot', 1.0)]
    """
    slot, limit = waits.get("slot", 0.0), waits.get("rate_limit", 0.0)
    last = waits.get("store", 0.0)
    at = sent - last
    begin = at - slot - limit
    queued: list[tuple[str, float]] = []
    for start, until in reversed(closed):
        start, until = max(start, begin), min(until, at)
        took = min(until - start, limit)
        gap = min(at - until, slot)
        if took > 0 and gap >= 0:
            queued += [("slot", gap), ("rate_limit", took)]
            at, slot, limit = at - gap - took, slot - gap, limit - took
    queued += [("slot", slot), ("rate_limit", limit)]
    before = [(cause, waits[cause]) for cause in waits if cause not in WORDS]
    first = ("retry", "worker", "batch", "prefix", "outage", "budget")
    before += [(cause, waits.get(cause, 0.0)) for cause in first]
    return [(cause, wait) for cause, wait in [*before, *queued[::-1], ("store", last)] if wait > 0]


def thin_bars(span: Span, axis: Axis, y: float, height: float) -> list[str]:
    """Draw the waits of a span before it.

    :param span: the span.
    :param axis: the time axis.
    :param y: the upper edge.
    :param height: the height.
    """
    least = LEAST * (axis.high - axis.low)
    return [
        svg_rect(f"wait w-{cause}", axis.bar(start, end, y, height), 1)
        for cause, start, end in intervals(span)
        if end - start >= least and end > axis.low
    ]


def causes_of(spans: Iterable[Span], axis: Axis) -> list[str]:
    """Return the causes of waits that are long enough to be seen, in the order of the legend.

    :param spans: the spans.
    :param axis: the time axis.
    """
    least = LEAST * (axis.high - axis.low)
    seen = {
        c
        for span in spans
        if span.waits
        for c, start, end in intervals(span)
        if end - start >= least
    }
    return [cause for cause in WORDS if cause in seen]


def band(spans: Sequence[Span], causes: Sequence[str], axis: Axis, y: float) -> str:
    """Draw how many spans waited at each time, one cause on top of the other.

    :param spans: the spans.
    :param causes: the causes to show.
    :param axis: the time axis.
    :param y: the upper edge.
    """
    waits: dict[str, list[tuple[float, float]]] = {cause: [] for cause in causes}
    for span in spans:
        for cause, start, end in intervals(span) if span.waits else ():
            if cause in waits:
                waits[cause].append((max(start, axis.low), max(end, axis.low)))
    levels = {cause: axis.levels(waits[cause]) for cause in causes}
    most = max((sum(column) for column in zip(*levels.values())), default=0.0) or 1.0
    floor, scale = y + HEIGHT, (HEIGHT - 4) / most
    below, parts = [0.0] * BINS, []
    for cause in causes:
        above = [low + high for low, high in zip(below, levels[cause])]
        parts.append(
            _area(cause, [floor - n * scale for n in above], [floor - n * scale for n in below])
        )
        below = above
    words = svg_text("label", 12, y + 22, "waiting")
    small = svg_text("small", 12, y + 36, f"most: {max(1, round(most)):,}")
    return f'<g class="waiting">{words}{small}{"".join(parts)}</g>'


def _area(cause: str, top: Sequence[float], bottom: Sequence[float]) -> str:
    """Draw the area between two lines of steps."""
    cell = CHART / BINS
    path = [f"M{GUTTER:.1f} {bottom[0]:.1f}"]
    for line, step in ((top, 1), (bottom[::-1], -1)):
        at = GUTTER if step > 0 else GUTTER + CHART
        last = ""
        for height in line:
            level = f"V{height:.1f}"
            if level != last:
                path.append(f"H{at:.1f}{level}")
                last = level
            at += step * cell
        path.append(f"H{at:.1f}")
    return f'<path class="w-{cause}" d="{"".join(path)}Z"/>'


def legend(causes: Sequence[str]) -> list[tuple[str, str]]:
    """Return (swatch, words) of each cause.

    :param causes: the causes.
    """
    at = Rect(0, -8, 26, 8)
    return [(svg_rect(f"w-{cause}", at, 1), WORDS[cause]) for cause in causes]
