"""How figures of plans and runs are written: tokens, dollars, seconds; known, likely, or unknown."""

from __future__ import annotations

import math

from feste.optimization.analysis.ranges import NOTHING, Range
from feste.report.axis import clock

__all__ = ["bounded", "dollars", "money", "time", "tokens"]


def tokens(of: Range) -> str:
    """Write a number of tokens: what is likely, else what it is at least.

    :param of: the tokens.

    >>> tokens(Range.of(4200)), tokens(Range(3800, None, None)), tokens(Range.of(0))
    ('~4,200', '>= 3,800', '0')
    """
    if of == NOTHING:
        return "0"
    if of.likely is not None:
        return f"~{round(of.likely):,}"
    return "unknown" if of.low is None else f">= {round(of.low):,}"


def bounded(of: Range) -> str:
    """Write a number of tokens with the largest that there may be.

    :param of: the tokens.

    >>> bounded(Range(1, 32, 64)), bounded(Range(1, 256, None)), bounded(Range.of(None))
    ('~32 <= 64', '~256, no bound', 'unknown')
    """
    if of == NOTHING or of.low is None:
        return tokens(of)
    return tokens(of) + (", no bound" if of.worst is None else f" <= {round(of.worst):,}")


def money(amount: float) -> str:
    """Write an amount of dollars, to two digits below a dollar.

    :param amount: dollars.

    >>> money(1234.5), money(0.00213), money(0)
    ('$1,234.50', '$0.0021', '$0')
    """
    if not amount:
        return "$0"
    digits = 2 if amount >= 0.995 else 1 - math.floor(math.log10(amount))
    return f"${amount:,.{max(2, digits)}f}"


def dollars(of: Range, unpriced: int = 0) -> str:
    """Write a price: what is likely, else what it is at least.

    :param of: the known price.
    :param unpriced: the number of calls of unknown price.

    >>> dollars(Range(0.0009, 0.0021, 0.0051)), dollars(Range(0.5, 1.0, None), 2)
    ('$0.0021', '>= $1.00')
    """
    if of.likely is not None:
        return f"{'>= ' if unpriced else ''}{money(of.likely)}"
    return "unknown" if of.low is None else f">= {money(of.low)}"


def time(of: Range) -> str:
    """Write a time: what is likely, else what it is at least.

    :param of: seconds.

    >>> time(Range(0.9, 1.3, 4.0)), time(Range(0.9, None, None))
    ('~1.3 s', '>= 900 ms')
    """
    if of.likely is not None:
        return f"~{clock(of.likely)}"
    return "unknown" if of.low is None else f">= {clock(of.low)}"
