"""How much a template may make: its author is trusted, but accidents and borrowed templates happen.

What an operator, a filter or a call has made is counted afterwards; what could fill the memory
before that is refused by its operands, in the module of that name.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any, Final

__all__ = [
    "SOURCE_LIMIT",
    "STEP_LIMIT",
    "TEXT_LIMIT",
    "Budget",
    "TooMuch",
    "allow",
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
    """What one rendering may still do.

    :param given: the variables of the template. What the template makes of them may be larger than
        a text, by four times what they hold: such values are lists of them, not copies.
    """

    def __init__(self, given: object = ()) -> None:
        self.steps = STEP_LIMIT
        self._given = given

    def spend(self, count: int = 0) -> None:
        """Count one step.

        :param count: the characters or items that it handles.
        :raises TooMuch: if that is more than a template may do.
        """
        allow(count)
        self._take(1 + (count >> 10))

    def weigh(self, value: Any) -> Any:
        """Count a value by its length, a number by its digits, and return it.

        :param value: what a filter is given, or an operator or a call has made.
        :raises TooMuch: if that is more than a template may do.
        """
        if isinstance(value, int):
            allow(value.bit_length() << 6)  # numbers of up to 16,384 bits
        elif isinstance(value, (str, list, tuple, dict, range)):
            self.spend(len(value))
        return value

    def measure(self, value: Any) -> Any:
        """Check how much a container holds, and return it.

        A list that holds the same list twice is short, but its text and its comparisons are not.

        :param value: what may be a container that the template has made.
        :raises TooMuch: if it holds more than a template may make.
        """
        if not isinstance(value, (str, int, float)):
            total, parts = _walk(value, self._most)
            allow(total, self._most)
            self._take(parts >> 8)
        return value

    @cached_property
    def _most(self) -> int:
        return TEXT_LIMIT + 4 * _walk(self._given, sys.maxsize)[0]

    def _take(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEP_LIMIT:,} steps (turns of loops and calls)")


def allow(count: int, most: int = TEXT_LIMIT) -> None:
    """Refuse to make a value that is too large.

    :param count: how many characters or items it would hold.
    :param most: how many it may.
    :raises TooMuch: if those are fewer.
    """
    if count > most:
        raise TooMuch(f"it makes a value of more than {most:,} characters or items")


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
    return _walk(value, TEXT_LIMIT)[0]


_EMPTY: Final[dict[str, str]] = {}
_VIEWS: Final = tuple(map(type, (_EMPTY.keys(), _EMPTY.values(), _EMPTY.items())))
_ITEMS: Final[Any] = (list, tuple, set, frozenset, *_VIEWS)


def _walk(value: Any, most: int) -> tuple[int, int]:
    """The extent of a value, counted up to a limit, and how many parts were looked at for it."""
    total, parts = 0, 0
    stack: list[Any] = [(value,)]
    while stack and total <= most:
        items = stack.pop()
        parts += len(items)
        for part in items:
            kind: Any = type(part)
            if part is None or kind is bool or kind is float:
                continue
            if isinstance(part, str):
                total += len(part)
            elif isinstance(part, int):
                total += part.bit_length() >> 6  # nothing for ordinary numbers
            elif isinstance(part, _ITEMS):
                total += len(part)
                stack.append(part)
            elif isinstance(part, dict):
                total += len(part)
                stack += (part, part.values())
            elif kind.__module__ == "jinja2.utils":  # a namespace shows what it holds
                stack.append((getattr(part, "_Namespace__attrs", None),))
    return total, parts
