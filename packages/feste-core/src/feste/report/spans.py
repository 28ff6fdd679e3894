"""What ran when: spans, the lanes they are drawn in, and their rows."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LANES = 40


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


def extent_of(spans: Sequence[Span]) -> tuple[float, float]:
    """When the run began, or what began before it, and when the last span ended.

    :param spans: what ran.
    :returns: both times; a second apart if nothing took any time.
    :raises ValueError: a span has a time that is no number, or ends before it starts.
    """
    for span in spans:
        times = (span.start, span.end, span.wait)
        if not all(map(math.isfinite, times)) or span.end < span.start or span.wait < 0:
            raise ValueError(f"the span {span.label!r} of {span.lane!r} has impossible times")
    low = min([0.0, *(span.start for span in spans)])
    high = max((span.end for span in spans), default=0.0)
    return low, high if high > low else low + 1.0


def lanes_of(spans: Iterable[Span]) -> list[tuple[str, list[Span]]]:
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


def packed(spans: Iterable[Span]) -> list[list[Span]]:
    """Rows without overlaps, as few as possible: each span goes to the first row that is free.

    >>> spans = [Span("", "a", 0, 2), Span("", "b", 1, 3), Span("", "c", 2, 4)]
    >>> [[span.label for span in row] for row in packed(spans)]
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
