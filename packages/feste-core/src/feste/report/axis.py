"""The time axis of a timeline: positions of times, and their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from feste.report.svg import Rect, svg_text

BINS = 208  # the resolution of strips and bands
GUTTER, CHART = 212.0, 830.0  # the width in pixels of the lanes' names, and of the time axis
ROUND_TIMES = (30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0, 43200.0)


@dataclass(frozen=True, slots=True)
class Axis:
    """A time axis from left to right."""

    low: float
    high: float

    def x(self, time: float) -> float:
        """Return the position of a time in pixels."""
        return GUTTER + CHART * (time - self.low) / (self.high - self.low)

    def bar(self, start: float, end: float, y: float, height: float) -> Rect:
        """Return the rectangle of a period, wide enough to be visible."""
        left = self.x(max(start, self.low))
        return Rect(left, y, max(1.5, self.x(end) - left), height)

    def levels(self, periods: Iterable[tuple[float, float]]) -> list[float]:
        """Return how many periods there are in each of :data:`BINS` equal parts of the axis.

        :param periods: starts and ends, on the axis.
        """
        wide = (self.high - self.low) / BINS
        part, slope = [0.0] * BINS, [0.0] * BINS  # differences: a long period costs no more
        for start, end in periods:
            first, last = (min(BINS - 1, int((t - self.low) / wide)) for t in (start, end))
            part[first] -= (start - self.low) / wide - first
            part[last] += (end - self.low) / wide - last
            slope[first] += 1.0
            slope[last] -= 1.0
        return [max(0.0, some + whole) for some, whole in zip(part, accumulate(slope))]

    def grid(self, bottom: float) -> str:
        """Draw vertical lines at round times, with the times above them."""
        step = _step((self.high - self.low) / 10)
        parts = []
        for number in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1):
            x = self.x(number * step)
            words = svg_text("small", x, 12, clock(number * step), "middle")
            parts.append(f'<path d="M{x:.1f} 18V{bottom:.1f}"/>{words}')
        return f'<g class="grid">{"".join(parts)}</g>'


def _step(least: float) -> float:
    """Return the next larger round time.

    >>> _step(0.013), _step(3), _step(40), _step(4000)
    (0.02, 5.0, 60.0, 7200.0)
    """
    if least > 20:
        days = 86400.0 * math.ceil(least / 86400)
        return next((time for time in ROUND_TIMES if time >= least), days)
    power = 10.0 ** math.floor(math.log10(least))
    steps = (factor * power for factor in (1, 2, 5, 10))
    return round(next(step for step in steps if step >= least * 0.999), 12)


def clock(seconds: float) -> str:
    """Format a time for people.

    >>> [clock(time) for time in (0, 0.0042, 1.5, 75, 3700)]
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
