"""Make plain data again what annotations name: tuples, dataclasses, records of parameters."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["alternatives", "rebuilt", "resolved"]


def rebuilt(value: Any, hint: Any) -> Any:
    """Return plain data with the tuples and dataclasses that an annotation names, at any depth.

    A dataclass is made of its fields alone: ``__init__`` ran where the original was made. A dict that
    has just its fields becomes one, too, because plain data does not tell which of both it was.

    :param value: plain data.
    :param hint: the annotation; where it names neither, lists and dicts stay what they are.

    >>> rebuilt({"sizes": [1, 2], "names": ["a"]}, dict[str, tuple[int | str, ...]])
    {'sizes': (1, 2), 'names': ('a',)}
    >>> rebuilt([1, 2], list[int] | None)
    [1, 2]
    """
    for kind in alternatives(hint):
        origin = typing.get_origin(kind) or kind
        inner = typing.get_args(kind)
        if not isinstance(origin, type):
            continue
        if isinstance(value, list):
            if issubclass(origin, tuple):
                each = inner[:1] if inner[1:] == (...,) else inner
                ends = itertools.repeat(each[0] if inner[1:] == (...,) else None)
                make = getattr(origin, "_make", origin)  # of a namedtuple
                return make(map(rebuilt, value, itertools.chain(each, ends)))
            if inner and issubclass(origin, Sequence):
                return [rebuilt(item, inner[0]) for item in value]
        if isinstance(value, dict):
            is_record = dataclasses.is_dataclass(kind)
            if is_record and value.keys() == _hints(kind).keys():
                made = object.__new__(kind)
                for name, annotation in _hints(kind).items():
                    object.__setattr__(made, name, rebuilt(value[name], annotation))
                return made
            if inner and issubclass(origin, Mapping):
                return {name: rebuilt(item, inner[1]) for name, item in value.items()}
    return value


def alternatives(hint: Any) -> Iterable[Any]:
    """Return the members of a union; of any other annotation itself.

    :param hint: the annotation.
    """
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def resolved(annotation: Any, names: Mapping[str, Any]) -> Any:
    """Return an annotation, or None if it cannot be resolved.

    :param annotation: the annotation, perhaps as text.
    :param names: the names that it may use.
    """
    one = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(one, dict(names))["it"]
    except Exception:  # defined only for type checkers, or local to a function; or it is any text
        return None


@functools.lru_cache(maxsize=256)
def _hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields."""
    names: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        names |= vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
    return {f.name: resolved(f.type, names) for f in dataclasses.fields(kind)}
