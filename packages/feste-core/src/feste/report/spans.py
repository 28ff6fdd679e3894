"""Spans: what ran when, in which lane and row it is drawn."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LANES = 40


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work with its start and end.

    :param lane: the lane it is drawn in, such as "openai.chat gpt-5-mini" or "task clean".
    :param label: its name.
    :param start: the start in seconds since the run started.
    :param end: the end, likewise.
    :param ok: whether it succeeded.
    :param items: the number of calls that it carried.
    :param waits: causes and seconds of what it waited for before its start, in this order.
    :param worker: the name of the worker that it ran on; empty for the process of the run.
    """

    lane: str
    label: str
    start: float
    end: float
    ok: bool = True
    items: int = 1
    waits: Sequence[tuple[str, float]] = ()
    worker: str = ""

    @property
    def wait(self) -> float:
        """The seconds between being ready and starting."""
        return sum(wait for _, wait in self.waits)


def extent_of(spans: Sequence[Span]) -> tuple[float, float]:
    """Return the start of the run, or of an earlier span, and the end of the last span.

    :param spans: the spans.
    :returns: both times in seconds; one second apart if nothing took any time.
    :raises ValueError: if a span has a time that is not finite, or ends before it starts.
    """
    for span in spans:
        waits = [wait for _, wait in span.waits]
        finite = all(map(math.isfinite, (span.start, span.end, *waits)))
        if not finite or span.end < span.start or min(waits, default=0.0) < 0:
            raise ValueError(f"the span {span.label!r} of {span.lane!r} has impossible times")
    low = min([0.0, *(span.start for span in spans)])
    high = max((span.end for span in spans), default=0.0)
    return low, high if high > low else low + 1.0


def lanes_of(spans: Iterable[Span]) -> list[tuple[str, list[Span]]]:
    """Group spans by lane, in order of start; if there are too many lanes, merge the idlest.

    What ran on workers comes last, with a lane for each worker, in the order of their names.
    """
    found: dict[tuple[str, str], list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        name = ("", span.lane) if not span.worker else (span.worker, "")
        found.setdefault(name, []).append(span)
    lanes = sorted(found.items(), key=lambda lane: _in_order(lane[0][0]))
    if len(lanes) > MAX_LANES:
        busy = {name: sum(s.end - s.start for s in members) for name, members in lanes}
        kept = set(heapq.nlargest(MAX_LANES - 1, busy, key=busy.__getitem__))
        rest = [span for name, members in lanes if name not in kept for span in members]
        others = f"{len(lanes) - len(kept):,} other lanes"
        lanes = [lane for lane in lanes if lane[0] in kept]
        lanes.append((("", others), sorted(rest, key=lambda span: (span.start, span.end))))
    return [(worker or lane, members) for (worker, lane), members in lanes]


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them.

    >>> sorted(["worker-10", "worker-2", ""], key=_in_order)
    ['', 'worker-2', 'worker-10']
    """
    parts = (part.lstrip("0") if part.isdecimal() else part for part in re.split(r"(\d+)", name))
    return [(len(part) * (n % 2), part) for n, part in enumerate(parts)]


def packed(spans: Iterable[Span]) -> list[list[Span]]:
    """Pack spans into as few rows without overlaps as possible, each into the first free row.

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
