"""Pack containers that contain nodes into plain data with slots, and fill the slots again.

Lists, tuples, dicts, sets and dataclasses are searched for nodes at any depth; a :class:`Slot`
replaces each. Packed data is a snapshot: changing the original container afterwards has no effect.
What is no container of these but may hold nodes, such as a column of pandas, is refused if it does.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from operator import is_
from typing import Any, Final

from feste.draw import Determinism
from feste.errors import GraphError
from feste.node import Lazy, Node
from feste.wording import a_kind

__all__ = [
    "COLLECTION",
    "MAX_DEPTH",
    "CallDeps",
    "Deps",
    "Nested",
    "Slot",
    "fill",
    "fresh",
    "holds_nodes",
    "pack",
]


class Slot:
    """A placeholder for the value of ``deps[index]``."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"Slot({self.index})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_slot, (self.index,))

    def __feste_fingerprint__(self) -> Any:
        return {"slot": self.index}


class Nested:
    """A container with slots: ``build(parts)`` makes it from the filled parts."""

    __slots__ = ("build", "parts")

    def __init__(self, build: Callable[[list[Any]], Any], parts: list[Any]) -> None:
        self.build = build
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return (Nested, (self.build, self.parts))

    def __repr__(self) -> str:
        return f"Nested({self.parts})"

    def __feste_fingerprint__(self) -> Any:
        build, kind = self.build, None
        if isinstance(build, partial):
            kind, build = build.args[0], build.func
        return [build.__qualname__, kind if isinstance(kind, type) else type(kind), self.parts]


_ATOMS = frozenset((str, int, float, bool, bytes, type(None)))
_slots: dict[int, Slot] = {}


def _slot(index: int) -> Slot:
    slot = _slots.get(index)
    return _slots.setdefault(index, Slot(index)) if slot is None else slot


class Deps:
    """Collects the nodes found while packing; each gets one slot, however often it occurs."""

    __slots__ = ("index", "nodes")

    #: How much is looked at of what is no container, such as a table or a model; see `_found`.
    most = sys.maxsize

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.index: dict[int, Slot] = {}

    def slot(self, node: Node) -> Slot:
        slot = self.index.get(id(node))
        if slot is None:
            slot = self.index[id(node)] = _slot(len(self.nodes))
            self.nodes.append(node)
        return slot


class CallDeps(Deps):
    """The nodes in a call's arguments: many calls may get the same table, so a part of it has to do."""

    __slots__ = ()
    most = 1_000


class _NoDeps(Deps):
    """For copying what was packed before, and so was searched then."""

    __slots__ = ()
    most = 0


#: Deeper nesting than this is treated as a container that contains itself.
MAX_DEPTH = 200

_Packer = Callable[[Any, Deps, int], Any]


def pack(value: Any, deps: Deps, depth: int = 0) -> Any:
    """Return a copy of a value in which slots replace nodes.

    Lists, tuples, dicts, sets, their subclasses and dataclasses are searched. Mutable ones are
    copied, so that later changes do not affect the call; any other object is kept by reference.

    :param value: the value to pack.
    :param deps: collects the nodes.
    :param depth: the current depth of the recursion; leave it out.
    :raises GraphError: if a container contains itself; for nodes and Dask collections in an array,
        a table, a pydantic model or a deque; for an iterator or a coroutine.

    >>> pack([1, {"a": 2}], Deps())
    [1, {'a': 2}]
    """
    packer = _packer_of(type(value))
    return value if packer is None else packer(value, deps, depth)


def fill(packed: Any, values: Sequence[Any]) -> Any:
    """Return a packed value with the slots filled.

    :param packed: the result of :func:`pack`.
    :param values: the values of the nodes, in the order of the collected deps.
    """
    kind = type(packed)
    if kind is Slot:
        return values[packed.index]
    if kind is Nested:
        return packed.build([fill(part, values) for part in packed.parts])
    return packed


def fresh(packed: Any, values: Sequence[Any]) -> Any:
    """Fill a packed value like :func:`fill`, but copy the lists, dicts and sets in it.

    A task may change its arguments; the node must keep them, because it may run again.

    :param packed: the result of :func:`pack`.
    :param values: the values of the nodes.

    >>> constant = [[1], 2]
    >>> fresh(constant, []).append(3)
    >>> constant
    [[1], 2]
    """
    kind = type(packed)
    if kind is Slot:
        return values[packed.index]
    if kind is Nested:
        return packed.build([fresh(part, values) for part in packed.parts])
    return packed if kind in _ATOMS else pack(packed, _NoDeps())


def _parts(values: Iterable[Any], deps: Deps, depth: int) -> tuple[list[Any], bool]:
    if depth >= MAX_DEPTH:
        raise GraphError(
            f"a cycle: a container is nested over {MAX_DEPTH} levels deep or contains itself; "
            "give calls plain, finite data"
        )
    given = list(values)
    if _ATOMS.issuperset(map(type, given)):
        return given, False
    parts = [pack(v, deps, depth + 1) for v in given]
    return parts, any(type(p) is Slot or type(p) is Nested for p in parts)


def _pack_lazy(value: Lazy, deps: Deps, depth: int) -> Any:
    return deps.slot(value._node)


def _pack_mutable(value: Iterable[Any], deps: Deps, depth: int) -> Any:
    parts, lazy = _parts(value, deps, depth)
    build = type(value)
    return Nested(build, parts) if lazy else build(parts)  # type: ignore[call-arg]


def _pack_immutable(value: Any, deps: Deps, depth: int) -> Any:
    parts, lazy = _parts(value, deps, depth)
    if not lazy and all(map(is_, parts, value)):
        return value
    kind = type(value)
    if kind is tuple or kind is frozenset:
        build: Callable[[list[Any]], Any] = kind
    elif hasattr(kind, "_make"):
        build = kind._make  # a namedtuple
    else:
        build = partial(_build_immutable, value)
    return Nested(build, parts) if lazy else build(parts)


def _build_immutable(like: Any, parts: list[Any]) -> Any:
    base: Any = tuple if isinstance(like, tuple) else frozenset
    made = base.__new__(type(like), parts)
    if hasattr(like, "__dict__"):
        made.__dict__.update(like.__dict__)
    return made


def _pack_dict(value: dict[Any, Any], deps: Deps, depth: int) -> Any:
    parts, lazy = _parts(itertools.chain.from_iterable(value.items()), deps, depth)
    if not lazy:
        return dict(zip(parts[::2], parts[1::2], strict=True))
    return Nested(_build_dict, parts)


def _build_dict(parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _pack_subclass(value: Any, deps: Deps, depth: int) -> Any:
    """Pack a user's subclass of list, dict or set."""
    if isinstance(value, dict):
        parts, lazy = _parts(itertools.chain.from_iterable(value.items()), deps, depth)
    else:
        parts, lazy = _parts(value, deps, depth)
    try:
        empty = copy.copy(value)
        empty.clear()
        build = partial(_build_subclass, empty)
        return Nested(build, parts) if lazy else build(parts)
    except Exception:  # it cannot be modified, so it need not be copied
        if lazy:
            raise
        return value


def _build_subclass(empty: Any, parts: list[Any]) -> Any:
    made = copy.copy(empty)
    if isinstance(made, list):
        made.extend(parts)
    elif isinstance(made, set):
        made.update(parts)
    else:
        made.update(_build_dict(parts))
    return made


@lru_cache(maxsize=1024)
def _fields_of(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _pack_dataclass(value: Any, deps: Deps, depth: int) -> Any:
    kind: Any = type(value)
    names = tuple(name for name in _fields_of(kind) if hasattr(value, name))
    given = [getattr(value, name) for name in names]
    parts, lazy = _parts(given, deps, depth)
    if not lazy:
        unchanged = all(map(is_, parts, given))
        return value if unchanged else _build_dataclass(value, names, parts)
    empty = _build_dataclass(value, names, [None] * len(names))
    return Nested(partial(_build_dataclass, empty, names), parts)


def _build_dataclass(like: Any, names: tuple[str, ...], parts: list[Any]) -> Any:
    made = copy.copy(like)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(made, name, part)
    return made


def _pack_slice(value: slice, deps: Deps, depth: int) -> Any:
    parts, lazy = _parts((value.start, value.stop, value.step), deps, depth)
    return Nested(_build_slice, parts) if lazy else value


def _build_slice(parts: list[Any]) -> slice:
    return slice(*parts)


class _Other:
    """Keeps an object that is not rebuilt, and refuses it if it holds what would be packed or refused.

    :param look: ``look(value, most)`` returns what is in it; of what may be long at most so many.
    :param fix: what to give in its place.
    """

    __slots__ = ("fix", "look")

    def __init__(self, look: Callable[[Any, int], Iterable[Any]], fix: str) -> None:
        self.look = look
        self.fix = fix

    def __call__(self, value: Any, deps: Deps, depth: int) -> Any:
        found = _found(value, _TAKEN, deps.most)
        if found is not None:
            if _packer_of(type(found)) is _pack_once:
                _pack_once(found, deps, depth)
            raise GraphError(
                f"{a_kind(value)} holds lazy values, which nobody would compute there: give {self.fix}"
            )
        return value


def _items(value: Iterable[Any], most: int) -> Iterable[Any]:
    """Return objects of a container: spread over it, if that costs no walk over all of it."""
    if type(value) is list or type(value) is tuple:
        return value[:: max(1, -(-len(value) // most))]
    return itertools.islice(value, most)


def _elements(value: Any, most: int) -> list[Any]:
    """Return objects of an array or a column, spread over it; none of numbers."""
    if not getattr(value.dtype, "hasobject", False):
        return []
    array = getattr(value, "values", value)
    found: list[Any] = array.flat[:: max(1, -(-array.size // most))].tolist()
    return found


def _column(value: Any, most: int) -> list[Any]:
    return [*_elements(value, most), value.index]


def _levels(value: Any, most: int) -> list[Any]:
    return list(value.levels)


def _cells(value: Any, most: int) -> list[Any]:
    objects = [i for i, kind in enumerate(value.dtypes) if getattr(kind, "hasobject", False)]
    return [*(_elements(value.iloc[:, i], most) for i in objects), value.index]


def _fields(value: Any, most: int) -> list[Any]:
    return [*vars(value).values(), getattr(value, "__pydantic_extra__", None)]


_SEQUENCE = _Other(_items, "a list of them")
#: Of classes by package and name, none of which is imported for this.
_OTHERS = {
    ("numpy", "ndarray"): _Other(_elements, "its .tolist()"),
    ("pandas", "Series"): _Other(_column, "its .tolist()"),
    ("pandas", "Index"): _Other(_elements, "its .tolist()"),
    ("pandas", "MultiIndex"): _Other(_levels, "its .tolist()"),
    ("pandas", "DataFrame"): _Other(_cells, "the .tolist() of each column that does"),
    ("pydantic", "BaseModel"): _Other(_fields, "a dict of its fields, dict(...)"),
}


def _names(kind: type) -> list[tuple[str, str]]:
    """Return the packages and names of a class and its bases, nearest first."""
    return [(str(base.__module__).partition(".")[0], base.__qualname__) for base in kind.__mro__]


def _pack_once(value: Any, deps: Deps, depth: int) -> Any:
    """Refuse what gives its values one time only: it cannot be searched, nor given to a task twice."""
    kind = a_kind(value)
    if hasattr(value, "__await__"):
        raise GraphError(f"{kind} is no value: make its function a @feste.task, or await it first")
    raise GraphError(
        f"{kind} gives its items one time only, so it cannot be searched for lazy values: give a "
        "list of them, list(...)"
    )


def _is_used_up(kind: type) -> bool:
    """Whether a class is one of Python's own of iterators, which may hold nodes, or of coroutines."""
    return (
        kind.__module__ in ("builtins", "itertools")
        and any(hasattr(kind, name) for name in ("__next__", "__anext__", "__await__"))
        and kind is not itertools.count
    )


def _pack_collection(value: Any, deps: Deps, depth: int) -> Any:
    """Make a Dask collection or future a node of its own, which the executor computes."""
    return deps.slot(Node(COLLECTION, (value,)))


def _is_future(kind: type) -> bool:
    """Whether a class is that of Dask's futures, which is not imported for this."""
    return ("distributed", "Future") in _names(kind)


class _Collection:
    """The op of a node that stands for a Dask collection, or a future of ``distributed``."""

    name = "dask"
    kind = "data"
    identity = "dask collection"
    emits = False
    executor = "thread"
    is_async = False

    @staticmethod
    def fn(given: Any) -> Any:
        """Return the value of a future, or of a collection that was not computed before the run."""
        if _is_future(type(given)):
            return given.result()
        import dask

        return dask.compute(given)[0]  # type: ignore[attr-defined, no-untyped-call]

    def determinism(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Determinism:
        return Determinism.EFFECT

    def __reduce__(self) -> str:
        return "COLLECTION"


COLLECTION: Final = _Collection()


class _Unknown:
    pass


_UNKNOWN: Any = _Unknown()
_packers: dict[type, _Packer | None] = {
    **dict.fromkeys((str, int, float, bool, type(None), bytes, complex, type), None),
    list: _pack_mutable,
    tuple: _pack_immutable,
    set: _pack_mutable,
    frozenset: _pack_immutable,
    dict: _pack_dict,
    slice: _pack_slice,
    **dict.fromkeys((deque, type({}.keys()), type({}.values()), type({}.items())), _SEQUENCE),
}


def _packer_for(kind: type) -> _Packer | None:
    if issubclass(kind, Lazy):
        return _pack_lazy
    if issubclass(kind, (tuple, frozenset)):
        return _pack_immutable
    if issubclass(kind, (list, dict, set)):
        return _pack_subclass
    if dataclasses.is_dataclass(kind):
        return _pack_dataclass
    if hasattr(kind, "__dask_graph__") or _is_future(kind):
        return _pack_collection
    if _is_used_up(kind):
        return _pack_once
    return next((_OTHERS[name] for name in _names(kind) if name in _OTHERS), None)


def _packer_of(kind: type) -> _Packer | None:
    packer: _Packer | None = _packers.get(kind, _UNKNOWN)
    if packer is _UNKNOWN:
        packer = _packers[kind] = _packer_for(kind)
    return packer


def holds_nodes(value: Any) -> bool:
    """Return True if a task's result contains nodes, and so is not a value yet.

    A Dask collection or an iterator is a value there: a task may return one.

    :param value: the task's result.

    >>> holds_nodes([1, "two", {"three": 3}])
    False
    """
    return type(value) not in _ATOMS and _found(value, _NODES, sys.maxsize) is not None


_NODES: Final = frozenset((_pack_lazy,))
#: What no object may hold that is handed over itself.
_TAKEN: Final = frozenset((_pack_lazy, _pack_collection, _pack_once))
#: How many objects of each container are looked at in any case: the fields of a short record.
_FEW: Final = 16


def _found(value: Any, sought: frozenset[_Packer], most: int) -> Any:
    """Return an object in a value that one of some packers takes, or None.

    :param value: where to look, level by level.
    :param sought: the packers.
    :param most: how many levels, and how many containers of each, are looked into; the objects of
        long ones are shared out alike.
    """
    level = [value]
    seen: dict[int, Any] = {}  # by id; kept, so that no id is used again
    for _ in range(most):
        parts: list[Any] = []
        share = max(_FEW, most // len(level))
        for one in level:
            packer = _packer_of(type(one))
            if packer in sought:
                return one
            if packer is None or packer in _TAKEN or id(one) in seen:
                continue
            seen[id(one)] = one
            parts += [p for p in _inside(one, packer, share) if type(p) not in _ATOMS]
        if not parts:
            break
        level = parts if len(parts) <= most else list(_items(parts, most))
    return None


def _inside(value: Any, packer: _Packer, most: int) -> Iterable[Any]:
    """Return what is in a container: of a long one at most so many, of a record all fields."""
    if type(packer) is _Other:
        return packer.look(value, most)
    if isinstance(value, dict):
        return itertools.chain.from_iterable(_items(value.items(), most))
    if packer is _pack_dataclass:
        kind: Any = type(value)
        return [getattr(value, name, None) for name in _fields_of(kind)]
    if packer is _pack_slice:
        return (value.start, value.stop, value.step)
    return _items(value, most)
