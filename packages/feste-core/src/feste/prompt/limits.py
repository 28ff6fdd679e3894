"""Limit how much work a template can do: accidents and borrowed templates happen.

The results of operators, filters and calls are counted afterwards; what could exhaust the memory
before that is refused in advance by :mod:`feste.prompt.operands`.
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

#: The maximum size of a template, in bytes of UTF-8.
SOURCE_LIMIT: Final = 256 << 10

#: The maximum size of every text in a template, of each expression's result, and of the output.
TEXT_LIMIT: Final = 1 << 20

#: The maximum of loop turns and calls in one rendering; 1,024 characters or items count as one.
STEP_LIMIT: Final = 100_000


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
        self._given = given

    @property
    def spent(self) -> int:
        """The number of steps taken so far."""
        return STEP_LIMIT - self.steps

    def spend(self, count: int = 0) -> None:
        """Count one step.

        :param count: the number of characters or items that the step handles.
        :raises TooMuch: if a limit is exceeded.
        """
        allow(count)
        self.take(1 + (count >> 10))

    def weigh(self, value: Any) -> Any:
        """Count a value by its length, or a number by its digits, and return the value.

        :param value: the input of a filter, or the result of an operator or a call.
        :raises TooMuch: if a limit is exceeded.
        """
        if isinstance(value, int):
            allow(value.bit_length() << 6)  # numbers of up to 16,384 bits
        elif isinstance(value, (str, list, tuple, dict, range)):
            self.spend(len(value))
        return value

    def measure(self, value: Any) -> Any:
        """Check the full size of a container, and return the container.

        A list that contains the same list twice is short, but its text and its comparisons are not.

        :param value: a value that may be a container made by the template.
        :raises TooMuch: if it is larger than a template may make.
        """
        if not isinstance(value, (str, int, float)):
            total, parts = _walk(value, self._most)
            allow(total, self._most)
            self.take(parts >> 8)
        return value

    @cached_property
    def _most(self) -> int:
        return TEXT_LIMIT + 4 * _walk(self._given, sys.maxsize)[0]

    def take(self, steps: int) -> None:
        """Count some steps at once.

        :param steps: their number.
        :raises TooMuch: if the limit is exceeded.
        """
        self.steps -= steps
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEP_LIMIT:,} steps (turns of loops and calls)")


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
    """Return the number of characters and items in a value; counting stops above the limit.

    :param value: any value; parts that occur twice count twice, as in the printed text.

    >>> extent(["ab", {"c": "d"}])
    7
    """
    return _walk(value, TEXT_LIMIT)[0]


_EMPTY: Final[dict[str, str]] = {}
_VIEWS: Final = tuple(map(type, (_EMPTY.keys(), _EMPTY.values(), _EMPTY.items())))
_ITEMS: Final[Any] = (list, tuple, set, frozenset, *_VIEWS)


def _walk(value: Any, most: int) -> tuple[int, int]:
    """Return a value's extent, counted up to a limit, and the number of parts examined."""
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
                total += part.bit_length() >> 6  # 0 for ordinary numbers
            elif isinstance(part, _ITEMS):
                total += len(part)
                stack.append(part)
            elif isinstance(part, dict):
                total += len(part)
                stack += (part, part.values())
            elif kind.__module__ == "jinja2.utils":  # a namespace, which prints its contents
                stack.append((getattr(part, "_Namespace__attrs", None),))
    return total, parts
