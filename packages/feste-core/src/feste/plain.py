"""What a template may be given, plain data, and how much it may make of it.

A sandbox keeps a template from private names, not from ``{{ client.api_key }}``: so no live object
ever gets in. :func:`plain` copies a value to text, numbers, None, lists and dicts, or refuses it.
The limits below it stop a template that would fill the memory or never end.
"""

from __future__ import annotations

import array
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from feste.delayed import refuse_node_text
from feste.errors import LazyValueError, PlainDataError
from feste.node import Lazy

__all__ = [
    "Budget",
    "TooMuch",
    "check_filter",
    "check_format",
    "check_method",
    "check_operator",
    "extent",
    "plain",
]

#: Deeper nesting than this is refused; real data is flatter, and rendering it is recursive.
MAX_DEPTH: Final = 100

_ATOMS: Final = frozenset((int, float, bool, type(None)))
_VECTORS: Final = (array.array, bytes, bytearray, memoryview)


def plain(value: Any, path: str = "value", *, lazy: bool = False) -> Any:
    """Return a deep copy of a value as plain data: what JSON can say.

    Subclasses of ``str``, ``int`` and ``float`` become these; tuples become lists; dataclasses and
    pydantic models become dicts. Parts that occur twice are copied once.

    :param value: any value.
    :param path: how an error names the value; parts are named from there, ``docs[2].title``.
    :param lazy: keep lazy values as they are, and refuse text that holds the name of one.
    :returns: text, a number, None, or lists and dicts of them.
    :raises PlainDataError: for anything else, and for data that contains itself or is nested more
        than 100 levels deep.
    :raises LazyValueError: for a lazy value, or with ``lazy`` for the text of one.

    >>> plain({"ids": (1, 2)})
    {'ids': [1, 2]}
    >>> plain({"tags": {"a"}}, "doc")
    Traceback (most recent call last):
        ...
    feste.errors.PlainDataError: doc['tags'] is a set, which has no order: give sorted(...) of it
    """
    kind = type(value)
    if kind in _ATOMS or (kind is str and not lazy):
        return value
    return _Copier(lazy).copy(value, path, 0)


class _Copier:
    """One deep copy; ``done`` keeps the originals too, so that no id is used twice meanwhile."""

    __slots__ = ("done", "lazy")

    def __init__(self, lazy: bool) -> None:
        self.lazy = lazy
        self.done: dict[int, tuple[Any, Any]] = {}

    def copy(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, str):
            return self._text(value, path)
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, Lazy) or hasattr(kind, "__dask_graph__"):
            if self.lazy:
                return value
            raise LazyValueError(f"{path} is a lazy value here; compute it first")
        known = self.done.get(id(value))
        if known is not None:
            if known[1] is _UNDER_WAY:
                raise PlainDataError(f"{path} contains itself; give finite data")
            return known[1]
        if depth >= MAX_DEPTH:
            raise PlainDataError(f"{path} is nested more than {MAX_DEPTH} levels deep")
        self.done[id(value)] = (value, _UNDER_WAY)
        made = self._container(value, kind, path, depth + 1)
        self.done[id(value)] = (value, made)
        return made

    def _text(self, value: str, path: str) -> str:
        if self.lazy:
            try:
                refuse_node_text(value)
            except LazyValueError as error:
                raise LazyValueError(f"{path}: {error}") from None
        return str.__str__(value)  # the characters, also of a subclass that prints itself otherwise

    def _container(self, value: Any, kind: type, path: str, depth: int) -> Any:
        for base in (list, tuple):
            if isinstance(value, base) and _same(kind, base, "__iter__", "__getitem__"):
                return self._items(value, path, depth)
        if isinstance(value, dict) and _same(kind, dict, "__getitem__", "get"):
            return self._pairs(dict.items(value), path, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
            return {n: self.copy(getattr(value, n), f"{path}.{n}", depth) for n in fields}
        if callable(getattr(kind, "model_dump", None)):  # pydantic, without importing it
            dumped = value.model_dump()
            if type(dumped) is dict:
                return self._pairs(dumped.items(), path, depth)
        raise PlainDataError(f"{path} is {_refusal(value, kind)}")

    def _items(self, value: Iterable[Any], path: str, depth: int) -> list[Any]:
        atoms = _ATOMS if self.lazy else _PLAIN
        return [
            item if type(item) in atoms else self.copy(item, f"{path}[{i}]", depth)
            for i, item in enumerate(value)
        ]

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], path: str, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, item in pairs:
            if not isinstance(key, str):
                raise PlainDataError(
                    f"{path} has the key {key!r}, {_a(type(key).__name__)}: keys must be text, "
                    "give {str(k): v for k, v in ...}"
                )
            made[self._text(key, path)] = self.copy(item, f"{path}[{key!r}]", depth)
        return made


_PLAIN: Final = _ATOMS | {str}
_UNDER_WAY: Final = object()


def _same(kind: type, base: type, *names: str) -> bool:
    """Whether a subclass reads its items as its base does: a dict that computes them is no data."""
    return all(getattr(kind, name) is getattr(base, name) for name in names)


def _a(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _refusal(value: Any, kind: type) -> str:
    name = _a(kind.__qualname__)
    if isinstance(value, (set, frozenset)):
        return f"{name}, which has no order: give sorted(...) of it"
    if isinstance(value, _VECTORS) or (
        hasattr(kind, "__array__") and getattr(value, "ndim", 1) != 0
    ):
        return f"{name}: vectors cannot go into a template, and bytes must be decoded first"
    if isinstance(value, type):
        return f"the class {value.__qualname__}: give plain data"
    return f"{name}, not plain data: give str(...) of it, or a dict of what the template needs"


# --- limits: the authors of templates are trusted, accidents and borrowed templates happen --------

#: No text of a template, of one of its expressions or of its output is larger; in characters.
TEXT_LIMIT: Final = 1 << 20

#: Turns of loops and calls in one rendering; 1,024 characters or items count as one.
STEP_LIMIT: Final = 100_000


class TooMuch(Exception):
    """A template went over a limit; :class:`~feste.errors.PromptError` names it to the user."""


class Budget:
    """What one rendering may still do."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = STEP_LIMIT

    def spend(self, size: int = 0) -> None:
        """Count one step.

        :param size: the characters or items that it handles.
        :raises TooMuch: if that is more than a template may do.
        """
        _allow(size)
        self.steps -= 1 + (size >> 10)
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEP_LIMIT:,} steps (turns of loops and calls)")


def _allow(size: int) -> None:
    if size > TEXT_LIMIT:
        raise TooMuch(f"it makes a value of more than {TEXT_LIMIT:,} characters or items")


def extent(value: Any) -> int:
    """Return how many characters and items a value holds; beyond the limit it stops counting.

    :param value: any value; parts that occur twice count twice, as they do in the printed text.

    >>> extent(["ab", {"c": "d"}])
    7
    """
    total, stack = 0, [value]
    while stack and total <= TEXT_LIMIT:
        part = stack.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, (list, tuple, set, frozenset)):
            total += len(part)
            stack.extend(part)
        elif isinstance(part, dict):
            total += len(part)
            stack.extend(part)
            stack.extend(part.values())
    return total


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse ``left operator right`` before it makes something huge.

    :param operator: ``+``, ``*``, ``**`` or ``%``.
    :raises TooMuch: if the result would be over the limit.
    """
    sized = (str, list, tuple)
    if isinstance(left, int) and isinstance(right, sized):
        left, right = right, left
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}
        _allow(bits.get(operator, 0) << 6)  # numbers of up to 16,384 bits
    elif operator == "%" and isinstance(left, str):
        _check_format(left, "%", right if isinstance(right, tuple) else (right,))
    elif operator == "*" and isinstance(left, sized) and isinstance(right, int):
        _allow(len(left) * right)
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        _allow(len(left) + len(right))


def check_method(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Refuse a call of a method of a text before it makes something huge.

    :param method: anything callable; only methods of texts are looked at.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :returns: the positional arguments; what could be read only once is a list now.
    :raises TooMuch: if the result would be over the limit.
    """
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str):
        return args
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        width = _largest((*args, *kwargs.values()))
        _allow(width * text.count("\t") if name == "expandtabs" else width)
    elif name == "replace":
        _check_replace(text, args)
    elif name == "join" and args:
        items = list(args[0])
        _allow(len(text) * len(items) + extent(items))
        return (items, *args[1:])
    elif name == "translate" and args and isinstance(args[0], dict):
        _allow(len(text) * max(map(extent, args[0].values()), default=1))
    return args


def check_filter(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Refuse a call of a built-in filter before it makes something huge.

    :param name: the filter's name.
    :param value: what is filtered.
    :param args: the filter's positional arguments.
    :param kwargs: its keyword arguments.
    :returns: the value; what could be read only once is a list now.
    :raises TooMuch: if the result would be over the limit.
    """
    given = (*args, *kwargs.values())
    number = _largest(given)
    if name == "format":
        _check_format(str(value), "%", given)
    elif name == "replace":
        _check_replace(str(value), given)
    elif name == "join":
        value = list(value)
        between = kwargs.get("d", args[0] if args else "")
        partly = len(args) > 1 or "attribute" in kwargs  # of each item, only its attribute
        items = 0 if partly else extent(value)
        _allow(len(value) * extent(between) + items)
    elif name == "indent":
        width = max(number, *map(extent, (*given, "")))
        _allow(extent(value) + (str(value).count("\n") + 1) * width)
    elif name == "wordwrap":
        _allow(extent(value) * max(map(extent, (*given, " "))))
    elif name == "round":
        _allow(number << 10)  # digits
    else:
        _allow(number)
    return value


def _largest(given: Iterable[Any]) -> int:
    return max((x for x in given if isinstance(x, int)), default=0)


def _check_replace(text: str, given: Sequence[Any]) -> None:
    if len(given) > 1 and isinstance(given[0], str):
        _allow(len(text) + text.count(given[0]) * extent(given[1]))


def check_format(text: str, args: Sequence[Any]) -> None:
    """Refuse ``text.format(*args)`` before it makes something huge.

    :raises TooMuch: if the result would be over the limit, or a width is a field itself.
    """
    if re.search(r"\{[^{}]*\{", text.replace("{{", "")):
        raise TooMuch("a format has a field inside a field")
    _check_format(text, "{", args)


def _check_format(text: str, opener: str, args: Sequence[Any]) -> None:
    if opener == "%" and re.search(r"%[-+ #0\d.]*\*", text):
        raise TooMuch("a format takes a width from its arguments")
    fields = text.count(opener)
    sizes = [extent(arg) for arg in args]
    longest = max(sizes, default=0)
    widest = max((int(n[:9]) for n in re.findall(r"\d+", text)), default=0)
    _allow(len(text) + fields * widest + (sum(sizes) if fields == len(args) else fields * longest))
