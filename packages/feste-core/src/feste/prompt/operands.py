"""Refuse operators, calls and filters whose operands would make a huge result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, Final

from feste.prompt.limits import VIEWS, TooMuch, allow, extent

__all__ = ["MAKING", "check_call", "check_format", "check_operator", "search_steps"]


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise before ``left operator right`` makes a huge result.

    :param operator: ``*``, ``**``, ``%`` or ``-``; others only add up existing sizes.
    :raises TooMuch: if the result would exceed the limit.
    :raises TypeError: if it would be a set, which has no order.
    """
    if operator == "%" and isinstance(left, str):
        args = right if isinstance(right, tuple) else (right,)
        check_format("%", left, args, right if isinstance(right, dict) else {})
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        allow(left.bit_length() * right << 6)
    elif operator == "*":
        for parts, times in ((left, right), (right, left)):
            if isinstance(parts, (str, list, tuple)) and isinstance(times, int):
                allow(len(parts) * times)
    elif operator == "-" and isinstance(left, VIEWS):
        raise TypeError("the views of a dict cannot be subtracted")


def check_format(opener: str, text: str, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise before formatting a text makes a huge result.

    :param opener: the character that starts a field, ``%`` or ``{``.
    :param text: the text with fields.
    :param args: the values of fields in order, or by number.
    :param named: the values of fields by name.
    :raises TooMuch: if the result would exceed the limit, or a width is itself a field.
    """
    total, used = 0, Counter[str | None]()
    for name, width in _percent_fields(text) if opener == "%" else _brace_fields(text):
        total += width
        used[name] += 1
    for name, times in used.items():
        if name is None:
            total += sum(map(_printed, args))
        elif name in named:
            total += times * _printed(named[name])
        elif name.isdecimal() and int(name[:9]) < len(args):
            total += times * _printed(args[int(name)])
    allow(total)


def _percent_fields(text: str) -> Iterator[tuple[str | None, int]]:
    """Yield the name, or None, and the width of each field."""
    field = r"%(?:\(([^()]*)\))?[-+ #0]*(\d*)(?:\.(\d*))?[hlL]?(.?)"
    for name, width, precision, kind in re.findall(field, text, re.DOTALL):
        if kind in ("*", "("):
            raise TooMuch("a format takes a width from its arguments, or has a name with brackets")
        yield name, _number(width) + _number(precision)


def _brace_fields(text: str) -> Iterator[tuple[str | None, int]]:
    for _, field, spec, _ in Formatter().parse(text):
        if field is None:
            continue
        if "{" in (spec or ""):
            raise TooMuch("a format takes a width from its arguments")
        yield (
            re.split(r"[.\[]", field)[0] or None,
            sum(map(_number, re.findall(r"\d+", spec or ""))),
        )


def _number(digits: str) -> int:
    return int(digits[:9] or 0)


def _printed(value: Any) -> int:
    """Return an upper bound of the characters that a field prints for a value."""
    if isinstance(value, int):
        return value.bit_length()  # no number has more decimal digits than binary ones
    return 309 if isinstance(value, float) else extent(value)  # the largest float has 309 digits


def _lines(text: str, width: int | None) -> int:
    """Return an upper bound of the lines after wrapping: two adjacent ones exceed one width."""
    return len(text.splitlines()) + 2 * len(text) // max(1, width or 79)


#: Filters and text methods that can make a large result from a small input: their parameters, and
#: a function that returns the number of characters or items they make.
_MAKES: Final[Mapping[str, tuple[tuple[str, ...], Callable[..., int]]]] = {
    "batch": (("linecount", "fill_with"), lambda _, items, fill: items * max(1, extent(fill))),
    "center": (("width",), lambda _, width: width),
    "expandtabs": (("tabsize",), lambda text, width: text.count("\t") * (width or 8)),
    "indent": (
        ("width",),
        lambda text, by: (text.count("\n") + 1) * (by if isinstance(by, int) else extent(by)),
    ),
    "ljust": (("width",), lambda _, width: width),
    "replace": (("old", "new"), lambda text, old, new: text.count(str(old)) * extent(new)),
    "rjust": (("width",), lambda _, width: width),
    "round": (("precision",), lambda _, digits: abs(digits) * 1024),  # 10 ** digits is made
    "slice": (("slices", "fill_with"), lambda _, items, fill: items * max(1, extent(fill))),
    "title": ((), lambda text: 4 * len(text)),  # it makes a list of words first
    "translate": (("table",), lambda text, table: len(text) * _longest(table)),
    "wordwrap": (
        ("width", "", "wrapstring"),
        lambda text, width, _, between: 4 * len(text) + _lines(text, width) * extent(between),
    ),
    "zfill": (("width",), lambda _, width: width),
}


def _longest(table: Any) -> int:
    return max(map(extent, table.values() if isinstance(table, dict) else table), default=0)


def check_call(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise before a built-in filter, or a method of a text, makes a huge result.

    :param name: its name; a filter and a method of the same name do the same.
    :param value: the filter's input, or the text.
    :param args: the positional arguments.
    :param kwargs: the keyword arguments.
    :raises TooMuch: if the result would exceed the limit.
    """
    if name in _MAKES:
        names, makes = _MAKES[name]
        given = {**dict(zip(names, args)), **kwargs}
        allow(makes(str(value) if name in _OF_TEXTS else value, *(given.get(n, 0) for n in names)))


#: The names that :func:`check_call` knows, and those of them that take a text.
MAKING: Final = frozenset(_MAKES)
_OF_TEXTS: Final = MAKING - {"batch", "round", "slice"}
#: Methods that look for each character in the argument, or for all of it everywhere.
_SLOW: Final = frozenset("lstrip rfind rindex rpartition rsplit rstrip strip trim".split())
#: Methods that do so in a short text only; in others Python prepares the search.
_SEARCHES: Final = frozenset("count find in index partition replace split".split())


def search_steps(name: str, value: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the steps of a search whose time is the product of two lengths.

    :param name: the name of a method of a text, or of a filter or test that does the same.
    :param value: the text.
    :param args: the positional arguments.
    :param kwargs: the keyword arguments.
    """
    wanted = (*args[:1], *kwargs.values())
    length = max((len(text) for text in wanted if isinstance(text, str)), default=0)
    if name in _SLOW:
        return len(value) * length >> 12
    is_short = len(value) < 2_500 or (len(value) < 30_000 and length < 100)
    return len(value) * length >> 15 if name in _SEARCHES and is_short else 0
