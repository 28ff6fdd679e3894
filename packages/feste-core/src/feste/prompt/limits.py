"""How much a template may make: its author is trusted, but accidents and borrowed templates happen.

What an operator, a filter or a call has made is counted afterwards; what could fill the memory
before that is refused here by its operands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

__all__ = [
    "SOURCE_LIMIT",
    "STEP_LIMIT",
    "TEXT_LIMIT",
    "Budget",
    "TooMuch",
    "check_call",
    "check_format",
    "check_operator",
    "extent",
    "size",
]

#: The largest template, in bytes of UTF-8.
SOURCE_LIMIT: Final = 256 << 10

#: No text of a template, of one of its expressions or of its output is larger.
TEXT_LIMIT: Final = 1 << 20

#: Turns of loops and calls in one rendering; 1,024 characters or items count as one.
STEP_LIMIT: Final = 100_000


class TooMuch(Exception):
    """A template went over a limit; :class:`~feste.errors.PromptError` names it to the user."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps = STEP_LIMIT

    def spend(self, count: int = 0) -> None:
        """Count one step.

        :param count: the characters or items that it handles.
        :raises TooMuch: if that is more than a template may do.
        """
        _allow(count)
        self.steps -= 1 + (count >> 10)
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEP_LIMIT:,} steps (turns of loops and calls)")

    def weigh(self, value: Any) -> Any:
        """Count a value by its length, a number by its digits, and return it.

        :param value: what a filter is given, or an operator or a call has made.
        :raises TooMuch: if that is more than a template may do.
        """
        if isinstance(value, int):
            _allow(value.bit_length() << 6)  # numbers of up to 16,384 bits
        elif isinstance(value, (str, list, tuple, dict, range)):
            self.spend(len(value))
        return value


def _allow(count: int) -> None:
    if count > TEXT_LIMIT:
        raise TooMuch(f"it makes a value of more than {TEXT_LIMIT:,} characters or items")


def size(text: str) -> int:
    """Return how many bytes of UTF-8 a text is.

    :param text: any text, lone surrogates too.
    """
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def extent(value: Any) -> int:
    """Return how many characters and items a value holds; beyond the limit it stops counting.

    :param value: any value; parts that occur twice count twice, as they do in the printed text.

    >>> extent(["ab", {"c": "d"}])
    7
    """
    total, stack = 0, [value]
    while stack and total <= TEXT_LIMIT:
        part = stack.pop()
        if isinstance(part, (str, list, tuple, set, frozenset, dict)):
            total += len(part)
        if isinstance(part, (list, tuple, set, frozenset, dict)):
            stack.extend(part)
        if isinstance(part, dict):
            stack.extend(part.values())
    return total


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse ``left operator right`` before it makes something huge.

    :param operator: ``*``, ``**`` or ``%``; others at most add what is there.
    :raises TooMuch: if the result would be over the limit.
    """
    if operator == "%" and isinstance(left, str):
        check_format("%", left, right if isinstance(right, tuple) else (right,))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _allow(left.bit_length() * right << 6)
    elif operator == "*":
        for parts, times in ((left, right), (right, left)):
            if isinstance(parts, (str, list, tuple)) and isinstance(times, int):
                _allow(len(parts) * times)


def check_format(opener: str, text: str, given: Sequence[Any]) -> None:
    """Refuse the formatting of a text before it makes something huge.

    :param opener: what its fields begin with, ``%`` or ``{``.
    :param text: the text with fields.
    :param given: what goes into them.
    :raises TooMuch: if the result would be over the limit, or a width is a field itself.
    """
    nested = r"%[-+ #0\d.]*\*" if opener == "%" else r"\{[^{}]*\{"
    if re.search(nested, text.replace(2 * opener, "")):
        raise TooMuch("a format takes a width from its arguments")
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    _allow(text.count(opener) * max((*widths, *map(extent, given)), default=0))


#: How often a filter, or the method of a text, puts in what it is given; others do so once.
_TIMES: Final[Mapping[str, Callable[[str, Any], int]]] = {
    "expandtabs": lambda text, _: text.count("\t"),
    "indent": lambda text, _: text.count("\n") + 1,
    "replace": lambda text, old: text.count(str(old)),
    "round": lambda *_: 1024,  # the digits of numbers, not of texts
    "translate": lambda text, _: len(text),
    "wordwrap": lambda text, _: len(text),
}


def check_call(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a built-in filter, or of a method of a text, before it makes something huge.

    :param name: its name; where filter and method share one, they do the same.
    :param value: what is filtered, or the text.
    :param args: the positional arguments.
    :param kwargs: the keyword arguments.
    :raises TooMuch: if the result would be over the limit.
    """
    given = (*args, *kwargs.values())
    largest = max((x if isinstance(x, int) else extent(x) for x in given), default=0)
    old = kwargs.get("old", args[0] if args else "")
    _allow(largest * (_TIMES[name](str(value), old) if name in _TIMES else 1))
