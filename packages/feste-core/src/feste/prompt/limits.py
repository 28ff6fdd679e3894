"""Limit how much work a template can do: accidents and borrowed templates happen.

The results of operators, filters and calls are counted afterwards; what could exhaust the memory
before that is refused in advance by :mod:`feste.prompt.operands`.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from functools import cached_property
from typing import Any, Final

__all__ = [
    "NODE_LIMIT",
    "SOURCE_LIMIT",
    "STEP_LIMIT",
    "TAG_LIMIT",
    "TEXT_LIMIT",
    "VIEWS",
    "Budget",
    "TooMuch",
    "allow",
    "extent",
    "size",
]

#: The maximum size of a template, in bytes of UTF-8.
SOURCE_LIMIT: Final = 256 << 10

#: The maximum size of every text in a template, of each expression's result, and of the output.
TEXT_LIMIT: Final = 1 << 20

#: The maximum of loop turns and calls in one rendering. What they handle counts as well, by the time
#: that it takes: 1,024 characters that are copied are a step, or 16 items that a filter looks at, or
#: 64 parts of the expressions in a loop.
STEP_LIMIT: Final = 100_000

#: The maximum of bytes, about, in what the names of a template hold.
KEPT_LIMIT: Final = 32 << 20

#: The maximum of statements, expressions and their parts: compiling them takes time and memory.
TAG_LIMIT: Final = 2_000
NODE_LIMIT: Final = 20_000


class TooMuch(Exception):
    """A template exceeded a limit; users see it as :class:`~feste.errors.PromptError`."""


class Budget:
    """The remaining budget of one rendering.

    :param given: the template's variables. A value that the template builds may exceed the limit of
        a text by four times the size of these, because it refers to them instead of copying them.
    :param is_whole: False if a piece of the template is rendered by itself, with its variables only.
    """

    def __init__(self, given: object = (), *, is_whole: bool = True) -> None:
        self.steps = STEP_LIMIT
        self.is_whole = is_whole
        #: How many calls are under way.
        self.depth = 0
        self._given = given
        self._kept: dict[Hashable, int] = {}
        self._total = 0

    @property
    def spent(self) -> int:
        """The number of steps taken so far."""
        return STEP_LIMIT - self.steps

    def spend(self, count: int = 0, shift: int = 10) -> None:
        """Count one step, and more for what it handles.

        :param count: the number of characters or items that the step handles.
        :param shift: how many of them are a step, as a power of two.
        :raises TooMuch: if a limit is exceeded.
        """
        allow(count)
        self.take(1 + (count >> shift))

    def weigh(self, value: Any, text: int = 10, items: int = 4) -> Any:
        """Count a value by its length, or a number by its digits, and return the value.

        :param value: the input of a filter, or the result of an operator or a call.
        :param text: how many characters are a step, as a power of two.
        :param items: how many items are.
        :raises TooMuch: if a limit is exceeded.
        """
        if isinstance(value, int):
            bits = value.bit_length()
            allow(bits << 6)  # numbers of up to 16,384 bits
            self.take(bits >> 8)
        elif isinstance(value, str):
            allow(len(value))
            self.take(1 + (_width(value) >> text))
        elif isinstance(value, _SIZED):
            self.spend(len(value), items)
        return value

    def made(self, value: Any, text: int = 12) -> Any:
        """Count the result of a filter or a call, and return it.

        :param value: the result; ranges and views of dicts take no memory.
        :param text: how many characters are a step, as a power of two.
        :raises TooMuch: if a limit is exceeded.
        """
        if isinstance(value, str):
            allow(len(value))
            self.take(_width(value) >> text)
        elif isinstance(value, int):
            self.weigh(value)
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            allow(len(value))  # an item of a dict takes about ten times the memory
            self.take(len(value) >> (6 if isinstance(value, (list, tuple)) else 2))
        return value

    def keep(self, value: Any, place: Hashable) -> Any:
        """Count the memory of what a name holds from now on, and return the value.

        :param value: the value.
        :param place: where the template stores it: what it stored there before is held no more.
        :raises TooMuch: if the names hold too much.
        """
        if isinstance(value, str):
            held = _width(value)
            self.take(held >> 11)  # a block makes it
        elif isinstance(value, (int, float)):
            held = 0
        else:
            total, parts = _walk(value, self.most)
            allow(total, self.most)
            self.take(parts >> 7)
            held = total + _PART * parts
        place = (self.depth, place)
        self._total += held - self._kept.get(place, 0)
        self._kept[place] = held
        if self._total > KEPT_LIMIT and self._total > KEPT_LIMIT + 4 * self._size:
            raise TooMuch(f"its names hold more than {KEPT_LIMIT >> 20} MB")
        return value

    def compare(self, value: Any) -> Any:
        """Count an operand of a comparison, which looks at all of it, and return it.

        :param value: the operand.
        :raises TooMuch: if it is larger than a template may make.
        """
        if isinstance(value, str):
            self.take(_width(value) >> 11)
        elif isinstance(value, range):
            self.take(len(value) >> 6)
        return self.measure(value, 6, 11)

    def measure(self, value: Any, items: int = 6, text: int = 64, most: int = 0) -> Any:
        """Check the full size of a container, and return the container.

        A list that contains the same list twice is short, but its text and its comparisons are not.

        :param value: a value that may be a container made by the template.
        :param items: how many of its parts are a step, as a power of two.
        :param text: how many of its characters are, where a text is made of it.
        :param most: the maximum of its characters; 0 is that for what the template builds.
        :raises TooMuch: if it is larger than a template may make.
        """
        if not isinstance(value, (str, int, float)):
            most = most or self.most
            total, parts = _walk(value, most)
            allow(total, most)
            self.take((parts >> items) + (total >> text))
        return value

    @cached_property
    def _extent(self) -> tuple[int, int]:
        return _walk(self._given, sys.maxsize)  # plain data, which is finite

    @property
    def most(self) -> int:
        """The maximum of characters in a value that the template builds."""
        return TEXT_LIMIT + 4 * self._extent[0]

    @property
    def _size(self) -> int:
        return self._extent[0] + _PART * self._extent[1]

    def take(self, steps: int) -> None:
        """Count some steps at once.

        :param steps: their number.
        :raises TooMuch: if the limit is exceeded.
        """
        self.steps -= steps
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEP_LIMIT:,} steps (turns of loops and calls)")


def _width(text: str) -> int:
    """Return an upper bound of the bytes that a text takes in memory."""
    return len(text) * (1 if text.isascii() else 4)


def allow(count: int, most: int = TEXT_LIMIT) -> None:
    """Raise before a value is made that is too large.

    :param count: its number of characters or items.
    :param most: the maximum.
    :raises TooMuch: if the count exceeds the maximum.
    """
    if count > most:
        raise TooMuch(f"it makes a value of more than {most:,} characters or items")


def size(text: str) -> int:
    """Return the size of a text in bytes of UTF-8.

    :param text: any text, even with lone surrogates.
    """
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def extent(value: Any) -> int:
    """Return the number of characters in a value and between its items; above the limit, it stops.

    :param value: any value; parts that occur twice count twice, as in the printed text.

    >>> extent(["ab", {"c": "d"}])
    10
    """
    return _walk(value, TEXT_LIMIT)[0]


_EMPTY: Final[dict[str, str]] = {}
#: The types of the views of a dict.
VIEWS: Final[Any] = tuple(map(type, (_EMPTY.keys(), _EMPTY.values(), _EMPTY.items())))
_ITEMS: Final[Any] = (list, tuple, set, frozenset, *VIEWS)
_SIZED: Final[Any] = (*_ITEMS, dict, range)
#: The bytes of a part of a container, about.
_PART: Final = 64


def _walk(value: Any, most: int) -> tuple[int, int]:
    """Return a value's extent, counted up to a limit, and the number of parts examined."""
    total, parts = 0, 0
    stack: list[Any] = [(value,)]
    while stack and total <= most:
        items = stack.pop()
        parts += len(items)
        for part in items:
            kind: Any = type(part)
            if kind is str:
                total += len(part)
            elif kind is int:
                if part.bit_length() > 63:
                    total += part.bit_length() >> 6
            elif part is None or kind is bool or kind is float:
                continue
            elif isinstance(part, str):
                total += len(part)
            elif isinstance(part, int):
                total += part.bit_length() >> 6  # 0 for ordinary numbers
            elif isinstance(part, _ITEMS):
                total += 2 * len(part)
                stack.append(part)
            elif isinstance(part, dict):
                total += 2 * len(part)
                stack += (part, part.values())
            elif kind.__module__ == "jinja2.utils":  # a namespace, which prints its contents
                total += 12
                stack.append((getattr(part, "_Namespace__attrs", None),))
    return total, parts
