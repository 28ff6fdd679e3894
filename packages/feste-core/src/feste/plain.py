"""Restrict template variables to plain data.

A sandbox protects private names but not ``{{ client.api_key }}``, so no live object may enter a
template. :func:`plain` copies a value to text, numbers, None, lists and dicts, or refuses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from feste.delayed import refuse_node_text
from feste.errors import LazyValueError, PlainDataError
from feste.node import Lazy
from feste.wording import a_kind, how_plain

__all__ = ["plain"]

#: Deeper nesting than this is refused: real data is flatter, and rendering recurses.
MAX_DEPTH: Final = 100

#: More parts than this that only repeat others are refused: lists that hold one list twice, again
#: and again, are short, but endless when they are printed.
MAX_REPEATED: Final = 1_000_000

#: Numbers of more bits cannot be printed: Python's limit is 4,300 digits.
MAX_BITS: Final = 16_384

_ATOMS: Final = frozenset((float, bool, type(None)))
_MOST: Final = 1 << MAX_BITS
_UNDER_WAY: Final = object()


def plain(value: Any, path: str = "value", *, lazy: bool = False) -> Any:
    """Return a deep copy of a value as plain data that JSON can represent.

    Subclasses of ``str``, ``int`` and ``float`` become the base type, tuples become lists,
    dataclasses and pydantic models become dicts. Parts that occur twice are copied once.

    :param value: any value.
    :param path: the name of the value in errors; parts are named from it, ``docs[2].title``.
    :param lazy: keep lazy values, and refuse text that contains the repr of one.
    :returns: text, a number, None, or lists and dicts of them.
    :raises PlainDataError: for any other type, and for data that contains itself, is nested more
        than 100 levels deep, repeats more than 1,000,000 parts, or has a number of more than 16,384
        bits.
    :raises LazyValueError: for a lazy value; with ``lazy``, for text that contains the repr of one.

    >>> plain({"ids": (1, 2)})
    {'ids': [1, 2]}
    >>> plain({"tags": {"a"}}, "doc")
    Traceback (most recent call last):
        ...
    feste.errors.PlainDataError: doc['tags'] is a set, which has no order: give sorted(...) of it
    """
    if type(value) in _ATOMS or (type(value) is str and not lazy):
        return value
    return _Copier(lazy).copy(value, path, 0)


class _Copier:
    """One deep copy; ``done`` holds the originals too, so that no id is reused during the copy."""

    __slots__ = ("done", "lazy", "parts", "repeated")

    def __init__(self, lazy: bool) -> None:
        self.lazy = lazy
        self.done: dict[int, tuple[Any, Any, int]] = {}
        self.parts = 0
        self.repeated = 0

    def copy(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, str):
            return self._text(value, path)
        if isinstance(value, int):
            if not -_MOST < value < _MOST:
                raise PlainDataError(f"{path} is a number of more than {MAX_BITS:,} bits")
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, Lazy) or hasattr(kind, "__dask_graph__"):
            if self.lazy:
                return value
            raise LazyValueError(f"{path} is a lazy value here; compute it first")
        _, known, parts = self.done.get(id(value), (value, None, 0))
        if known is _UNDER_WAY:
            raise PlainDataError(f"{path} contains itself; give finite data")
        if known is not None:
            self.parts += parts
            self.repeated += parts
            if self.repeated > MAX_REPEATED:
                what = f"{path} repeats more than {MAX_REPEATED:,} parts"
                raise PlainDataError(f"{what} that occur before; give each once")
            return known
        if depth >= MAX_DEPTH:
            raise PlainDataError(f"{path} is nested more than {MAX_DEPTH} levels deep")
        before = self.parts
        self.done[id(value)] = (value, _UNDER_WAY, 0)
        made = self._container(value, kind, path, depth + 1)
        self.parts += len(made)
        self.done[id(value)] = (value, made, self.parts - before)
        return made

    def _text(self, value: str, path: str) -> str:
        if self.lazy:
            try:
                refuse_node_text(value)
            except LazyValueError as error:
                raise LazyValueError(f"{path}: {error}") from None
        return str.__str__(value)  # the characters, even if a subclass overrides __str__

    def _container(self, value: Any, kind: type, path: str, depth: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [
                item
                if type(item) in _ATOMS or (type(item) is int and -_MOST < item < _MOST)
                else self.copy(item, f"{path}[{i}]", depth)
                for i, item in enumerate(value)
            ]
        if isinstance(value, dict):
            return self._pairs(dict.items(value), path, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
            return {n: self.copy(getattr(value, n), f"{path}.{n}", depth) for n in fields}
        if callable(getattr(kind, "model_dump", None)):  # a pydantic model, without the import
            dumped = value.model_dump()
            if isinstance(dumped, dict):
                return self._pairs(dumped.items(), path, depth)
        if isinstance(value, (set, frozenset)):
            raise PlainDataError(
                f"{path} is {a_kind(value)}, which has no order: give sorted(...) of it"
            )
        raise PlainDataError(
            f"{path} is {a_kind(value)}, which is not plain data: give {how_plain(value)}"
        )

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], path: str, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, item in pairs:
            if not isinstance(key, str):
                raise PlainDataError(
                    f"{path} has the key {key!r}, {a_kind(key)}: keys must be text, give "
                    "{str(k): v for k, v in ...}"
                )
            made[self._text(key, path)] = self.copy(item, f"{path}[{key!r}]", depth)
        return made
