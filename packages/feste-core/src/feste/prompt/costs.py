"""What the filters and tests of Jinja, and the methods of plain data, cost: each is named here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

__all__ = ["COUNTED", "FILTERS", "METHODS", "TESTS", "Cost"]


class Cost(NamedTuple):
    """What it costs to handle a value.

    :param text: how many characters of it are a step, as a power of two.
    :param items: how many of its items are.
    :param reads: its items one by one, as ``later`` those of the result are taken; the parts of its
        items as well, since they are compared; or all of it, as a text.
    """

    text: int = 8
    items: int = 4
    reads: Literal["later", "items", "parts", "text"] = "text"


def _each(names: str, cost: Cost | None) -> dict[str, Cost | None]:
    return dict.fromkeys(names.split(), cost)


#: Anything that is not named: above all your own filters.
COUNTED: Final = Cost()

_FAST: Final = Cost(11)  # a few nanoseconds for each character
_SLOW: Final = Cost(4, 0)  # microseconds for each item, or 100 nanoseconds for each character

#: The filters; None for those that take no time.
FILTERS: Final[Mapping[str, Cost | None]] = {
    **_each("count d default first last length", None),
    **_each(
        "attr items map reject rejectattr reverse select selectattr unique", Cost(reads="later")
    ),
    **_each("batch slice", Cost(0, 0, "later")),
    **_each("join list sum", Cost(4, 4, "items")),
    **_each("max min", Cost(4, 4, "parts")),
    **_each("dictsort groupby sort", Cost(0, 0, "parts")),
    **_each("center lower replace safe string trim truncate upper", _FAST),
    **_each("abs capitalize e escape filesizeformat float forceescape indent int round", COUNTED),
    **_each("urlencode xmlattr", COUNTED),
    **_each("wordcount", Cost(7)),
    **_each("format pprint striptags title tojson wordwrap", _SLOW),
}

#: The tests.
TESTS: Final[Mapping[str, Cost | None]] = {
    **_each("boolean callable defined escaped even false filter float integer iterable", None),
    **_each("mapping none number odd sameas sequence string test true undefined", None),
    **_each("== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le", Cost(reads="parts")),
    **_each("divisibleby in", Cost(reads="parts")),
    **_each("lower upper", _FAST),
}

#: The methods of texts, lists, tuples, dicts and their views, ranges and numbers.
METHODS: Final[Mapping[str, Cost | None]] = {
    **_each("get items keys values", None),  # they look at the first argument only
    **_each("as_integer_ratio bit_count bit_length conjugate hex is_integer", None),
    **_each("count endswith find index isspace join lower lstrip partition removeprefix", _FAST),
    **_each("removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines", _FAST),
    **_each("startswith strip upper", _FAST),
    **_each("format format_map", Cost(3)),
    **_each("capitalize casefold center expandtabs isalnum isalpha isascii isdecimal", COUNTED),
    **_each("isdigit isidentifier islower isnumeric isprintable istitle isupper ljust", COUNTED),
    **_each("rjust swapcase title translate zfill", COUNTED),
    **_each("copy difference intersection isdisjoint issubset issuperset", COUNTED),
    **_each("symmetric_difference union", COUNTED),
    **_each("fromhex fromkeys from_bytes maketrans", Cost(2, 2)),  # of a class: they make a value
}
