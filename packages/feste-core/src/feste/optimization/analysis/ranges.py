"""Numbers that are known only roughly: low, likely and worst, each of which may be unknown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["NOTHING", "UNKNOWN", "Range", "total"]


class Range(NamedTuple):
    """An estimate; None is unknown, which is not zero.

    :param low: what it is at least.
    :param likely: what it probably is.
    :param worst: what it is at most.

    >>> Range(1, 2, None) + Range.of(3)
    Range(low=4, likely=5, worst=None)
    """

    low: float | None
    likely: float | None
    worst: float | None

    @classmethod
    def of(cls, number: float | None) -> Range:
        """Return a number that is known, or a wholly unknown one.

        :param number: the number, or None.
        """
        return cls(number, number, number)

    def __add__(self, other: object) -> Range:
        if not isinstance(other, Range):
            return NotImplemented
        return Range(*(None if a is None or b is None else a + b for a, b in zip(self, other)))


NOTHING = Range(0, 0, 0)
UNKNOWN = Range(None, None, None)


def total(ranges: Iterable[Range]) -> Range:
    """Return the sum of some ranges.

    :param ranges: the ranges.

    >>> total([Range(1, 2, 3), Range.of(1)])
    Range(low=2, likely=3, worst=4)
    """
    lows, likelies, worsts = zip(NOTHING, *ranges)
    return Range(_sum(lows), _sum(likelies), _sum(worsts))


def _sum(parts: Iterable[float | None]) -> float | None:
    known: list[float] = []
    for part in parts:
        if part is None:
            return None
        known.append(part)
    return sum(known)
