"""The node: one call that was written down instead of run.

``args`` and ``kwargs`` are plain data in which a :class:`Slot` stands wherever the value of another
node will go; ``deps`` names these nodes, so ``fill(node.args, values)`` with the values of ``deps``
gives the arguments. Nodes are immutable but for the three things a run learns of them: their key,
their draw, their value.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import is_
from types import CodeType, FrameType
from typing import Any, Final, Protocol

from feste.draw import Determinism, Draw
from feste.errors import GraphError

__all__ = [
    "PENDING",
    "Lazy",
    "Node",
    "Op",
    "Slot",
    "fill",
    "here",
    "holds_nodes",
    "origin_of",
    "pack",
    "topological",
]

Origin = tuple[CodeType, int]


class Op(Protocol):
    """What a node does; a Python task or a call of a backend's operation."""

    @property
    def name(self) -> str:
        """A short name for keys, pictures and reports."""

    @property
    def kind(self) -> str:
        """``"call"``, ``"prompt"``, ``"task"`` or ``"data"``."""

    @property
    def identity(self) -> str:
        """What the op is, as text: equal for equal ops in every run of the program."""

    @property
    def emits(self) -> bool:
        """Whether its result may hold nodes."""

    def determinism(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Determinism:
        """Return the class of a call with these packed arguments."""


class _Pending:
    """The value of a node that has none yet."""

    def __repr__(self) -> str:
        return "PENDING"

    def __reduce__(self) -> str:
        return "PENDING"


PENDING: Final = _Pending()
_NO_KWARGS: Mapping[str, Any] = {}
_sequence = itertools.count()
_process = ""
_lock = threading.RLock()


def process_name() -> str:
    """A name for this process that no other one has; made anew in a forked child."""
    global _process
    with _lock:
        if not _process:
            _process = secrets.token_hex(4)
        return _process


def _forget_process() -> None:
    global _process, _lock
    _process, _lock = "", threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_process)


class Node:
    """One recorded call.

    :param op: what to do.
    :param args: packed positional arguments; for a call of an operation, in the order of its
        parameters.
    :param kwargs: packed keyword arguments.
    :param deps: the nodes whose values go into the slots of the arguments.
    :param origin: the user's code object and instruction offset.
    """

    __slots__ = (
        "__weakref__",
        "_key",
        "args",
        "deps",
        "draw",
        "kwargs",
        "op",
        "origin",
        "seq",
        "value",
    )

    def __init__(
        self,
        op: Op,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = _NO_KWARGS,
        deps: tuple[Node, ...] = (),
        origin: Origin | str | None = None,
    ) -> None:
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.deps = deps
        self.origin = origin
        self.seq = next(_sequence)
        self.draw: Draw | None = None
        self.value: Any = PENDING
        self._key: str | None = None

    @property
    def key(self) -> str:
        """The node's name, unique across processes."""
        if self._key is None:
            self._key = f"{self.op.name}-{process_name()}-{self.seq}"
        return self._key

    @property
    def determinism(self) -> Determinism:
        """The determinism class of this call."""
        return self.op.determinism(self.args, self.kwargs)

    @property
    def where(self) -> str:
        """``file:line`` of the user's call, or an empty string where it is not known."""
        origin = self.origin
        return origin if isinstance(origin, str) else _line_of(origin)

    def replace(
        self,
        *,
        op: Op | None = None,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        deps: tuple[Node, ...] | None = None,
    ) -> Node:
        """Return a node that stands for this one (same key, draw, origin) but does something else.

        :param op: the new op, or None to keep it; likewise the others.
        """
        new = copy.copy(self)
        new._key = self.key
        new.op = op or self.op
        new.args = self.args if args is None else args
        new.kwargs = self.kwargs if kwargs is None else kwargs
        new.deps = self.deps if deps is None else deps
        return new

    def __copy__(self) -> Node:
        new = object.__new__(Node)
        for name in Node.__slots__:
            if name != "__weakref__":
                setattr(new, name, getattr(self, name))
        return new

    def __repr__(self) -> str:
        return f"<Node {self.key}{' = ' + repr(self.value) if self.value is not PENDING else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_revive, _records(self))


class Lazy:
    """The base of the user's handle of a node; see :class:`feste.delayed.FesteDelayed`."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node


# --- nodes travel as flat records: a long chain of linked objects would not pickle ---------------


def topological(roots: Iterable[Node]) -> list[Node]:
    """Return the nodes that the roots need, themselves included, inputs before consumers.

    :param roots: nodes.
    """
    seen: set[int] = set()
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((dep, False) for dep in node.deps if id(dep) not in seen)
    return order


def _records(root: Node) -> tuple[list[tuple[Any, ...]], int]:
    """Flat data of a node and all that it needs, in creation order, and where the node is in it."""
    order = sorted(topological([root]), key=lambda n: n.seq)
    position = {id(n): i for i, n in enumerate(order)}
    records = [
        (
            n.op,
            n.args,
            dict(n.kwargs),
            [position[id(d)] for d in n.deps],
            n.where,
            n.key,
            n.draw,
            n.value,
        )
        for n in order
    ]
    return records, position[id(root)]


def _revive(records: list[tuple[Any, ...]], index: int) -> Node:
    return _revived(records, {})[index]


def _revived(records: list[tuple[Any, ...]], known: Mapping[str, Node]) -> list[Node]:
    """The nodes of some records; those that are known by their keys are not made again."""
    nodes: list[Node] = []
    for op, args, kwargs, _, where, key, draw, value in records:
        node = known.get(key)
        if node is None:
            node = Node(op, args, kwargs, (), where)
            node._key, node.draw = key, draw
        if node.value is PENDING:
            node.value = value
        nodes.append(node)
    for node, (_, _, _, deps, _, key, _, _) in zip(nodes, records, strict=True):
        if key not in known:
            node.deps = tuple(nodes[i] for i in deps)
    return nodes


#: The nodes whose handles were pickled or unpickled here. One that comes back, alone or together
#: with others that need it, is the same object: one draw.
_travelled: weakref.WeakValueDictionary[str, Node] = weakref.WeakValueDictionary()


def records_of_handle(node: Node) -> tuple[list[tuple[Any, ...]], int]:
    """Return what the handle of a node is pickled as.

    :param node: the node.
    """
    with _lock:
        _travelled.update((n.key, n) for n in topological([node]))
    return _records(node)


def travels(node: Node) -> None:
    """Remember a node whose key, not its handle, goes to where it may come back from.

    :param node: the node.
    """
    with _lock:
        _travelled[node.key] = node


def travelled(key: str) -> Node | None:
    """Return the node of a key that came back, or None if it is not known here.

    :param key: its key.
    """
    with _lock:
        return _travelled.get(key)


def node_of_handle(records: list[tuple[Any, ...]], index: int) -> Node:
    """Return the node of a handle that was unpickled; the same object for the same node.

    :param records: what :func:`records_of_handle` gave; likewise ``index``.
    """
    with _lock:
        nodes = _revived(records, _travelled)
        _travelled.update((n.key, n) for n in nodes)
    return nodes[index]


# --- packing: containers with nodes inside become data with slots --------------------------------


class Slot:
    """The place of the value of ``deps[index]``."""

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
    """A container that holds slots: ``build(parts)`` makes it once the parts are filled."""

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


_slots: dict[int, Slot] = {}


def _slot(index: int) -> Slot:
    slot = _slots.get(index)
    return _slots.setdefault(index, Slot(index)) if slot is None else slot


class Deps:
    """Collects the nodes met while packing; each gets one slot, however often it occurs."""

    __slots__ = ("index", "nodes")

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.index: dict[int, Slot] = {}

    def slot(self, node: Node) -> Slot:
        slot = self.index.get(id(node))
        if slot is None:
            slot = self.index[id(node)] = _slot(len(self.nodes))
            self.nodes.append(node)
        return slot


#: Deeper nesting than this is taken for a container that contains itself.
MAX_DEPTH = 200

_Packer = Callable[[Any, Deps, int], Any]


def pack(value: Any, deps: Deps, depth: int = 0) -> Any:
    """Return a copy of a value in which slots stand for nodes.

    Lists, tuples, dicts, sets, their subclasses and dataclasses are searched. What can be changed
    of them is copied, so that the call keeps what it was given; any other object is kept as it is.

    :param value: what the user gave.
    :param deps: where the nodes go.
    :param depth: how deep the value lies; leave it out.
    :raises GraphError: if a container contains itself.

    >>> pack([1, {"a": 2}], Deps())
    [1, {'a': 2}]
    """
    kind = type(value)
    packer = _packers.get(kind, _UNKNOWN)
    if packer is _UNKNOWN:
        packer = _packers[kind] = _packer_for(kind)
    return value if packer is None else packer(value, deps, depth)


def fill(packed: Any, values: Sequence[Any]) -> Any:
    """Return the packed value with the values of the nodes in their slots.

    :param packed: what :func:`pack` gave.
    :param values: the values of the nodes, in the order of the collected deps.
    """
    kind = type(packed)
    if kind is Slot:
        return values[packed.index]
    if kind is Nested:
        return packed.build([fill(part, values) for part in packed.parts])
    return packed


def _parts(values: Iterable[Any], deps: Deps, depth: int) -> tuple[list[Any], bool]:
    if depth >= MAX_DEPTH:
        raise GraphError(
            f"a cycle: a container is nested over {MAX_DEPTH} levels deep or contains itself; "
            "give calls plain, finite data"
        )
    parts = [pack(v, deps, depth + 1) for v in values]
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
    """A list, dict, set of the user's own class."""
    if isinstance(value, dict):
        parts, lazy = _parts(itertools.chain.from_iterable(value.items()), deps, depth)
    else:
        parts, lazy = _parts(value, deps, depth)
    try:
        empty = copy.copy(value)
        empty.clear()
        build = partial(_build_subclass, empty)
        return Nested(build, parts) if lazy else build(parts)
    except Exception:  # one that cannot be changed need not be copied, either
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


def _pack_dataclass(value: Any, deps: Deps, depth: int) -> Any:
    names = tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
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


def _pack_collection(value: Any, deps: Deps, depth: int) -> Any:
    """A Dask collection becomes a node of its own, computed by Dask before the run."""
    return deps.slot(Node(COLLECTION, (value,)))


class _Collection:
    """The op of a Dask collection given to a call."""

    name = "dask"
    kind = "data"
    identity = "dask collection"
    emits = False
    executor = "thread"
    is_async = False

    @staticmethod
    def fn(collection: Any) -> Any:
        """Return the value of a collection that was not known when its run began."""
        import dask

        return dask.compute(collection)[0]  # type: ignore[attr-defined, no-untyped-call]

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
    if hasattr(kind, "__dask_graph__"):
        return _pack_collection
    return None


def holds_nodes(value: Any) -> bool:
    """Tell whether a result holds nodes, so that it is not a value yet.

    :param value: what a task returned.

    >>> holds_nodes([1, "two", {"three": 3}])
    False
    """
    return _holds(value, 0)


def _holds(value: Any, depth: int) -> bool:
    kind = type(value)
    packer = _packers.get(kind, _UNKNOWN)
    if packer is _UNKNOWN:
        packer = _packers[kind] = _packer_for(kind)
    if packer is None:
        return False
    if packer is _pack_lazy:
        return True
    if packer is _pack_collection or depth >= MAX_DEPTH:
        return False  # a task may well return a Dask collection, or an object that holds itself
    parts: Iterable[Any]
    if isinstance(value, dict):
        parts = itertools.chain.from_iterable(value.items())
    elif packer is _pack_dataclass:
        parts = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    else:
        parts = value
    return any(_holds(part, depth + 1) for part in parts)


def origin_of(frame: FrameType | None) -> Origin | None:
    """Return the place of the nearest frame that is not Feste's own: code and offset.

    Reading ``f_lineno`` would cost 159 µs inside a function of 5,000 lines, this pair 0.15 µs; it
    is resolved to a line only for display.

    :param frame: where to begin.
    """
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not (name.startswith("feste.") or name == "feste"):
            return frame.f_code, frame.f_lasti
        frame = frame.f_back
    return None


def here() -> str:
    """Return ``file:line`` of the user's call that is under way, or an empty string."""
    return _line_of(origin_of(sys._getframe(1)))


def _line_of(origin: Origin | None) -> str:
    if origin is None:
        return ""
    code, offset = origin
    positions = next(itertools.islice(code.co_positions(), offset // 2, None), None)
    line = (positions[0] if positions else None) or code.co_firstlineno
    return f"{code.co_filename}:{line}"
