"""The node: one recorded call.

In ``args`` and ``kwargs`` a :class:`Slot` stands for the value of another node; ``deps`` lists
these nodes, so ``fill(node.args, values)`` with the values of ``deps`` gives the arguments. Nodes
are immutable, except that a run sets their key, their draw, their value and what was paid towards
it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol

from feste.draw import Determinism, Draw

if TYPE_CHECKING:
    from feste.backend import Call

__all__ = ["PENDING", "Lazy", "Node", "Op", "call_site", "origin_of", "process_name", "topological"]

Origin = tuple[CodeType, int]


class Op(Protocol):
    """The interface of what a node does: a Python task or a call of a backend's operation."""

    @property
    def name(self) -> str:
        """A short name for keys, pictures and reports."""

    @property
    def kind(self) -> str:
        """``"call"``, ``"prompt"``, ``"task"`` or ``"data"``."""

    @property
    def identity(self) -> str:
        """A text that identifies the op: equal for equal ops in every run of the program."""

    @property
    def emits(self) -> bool:
        """Whether its result may contain nodes."""

    def determinism(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Determinism:
        """Return the determinism class of a call with these packed arguments."""


class _Pending:
    """The placeholder for a value that is not known yet."""

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
    """Return a unique name of this process; a forked child gets a new one."""
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

    :param op: the operation to perform.
    :param args: packed positional arguments; for a call of a backend, in the order of the
        operation's parameters.
    :param kwargs: packed keyword arguments.
    :param deps: the nodes whose values fill the slots in the arguments.
    :param origin: the user's code object and instruction offset, or ``file:line`` as text.
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
        "paid",
        "seq",
        "unstored",
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
        #: A paid result on the way to the value, or None: a call's unparsed response, or the nodes
        #: that a task returned. A later run continues from it.
        self.paid: Any = None
        #: The paid answer that could not be written to a store, or None.
        self.unstored: Any = None
        self._key: str | None = None

    @property
    def key(self) -> str:
        """The node's name, unique across all processes."""
        if self._key is None:
            self._key = f"{self.op.name}-{process_name()}-{self.seq}"
        return self._key

    @property
    def determinism(self) -> Determinism:
        """The determinism class of this call."""
        return self.op.determinism(self.args, self.kwargs)

    @property
    def call(self) -> Call[Any] | None:
        """The op of a call of a backend; None for Python tasks, prompts and data."""
        op: Any = self.op
        return op if op.kind == "call" else None

    @property
    def where(self) -> str:
        """``file:line`` of the user's call, or an empty string if unknown."""
        origin = self.origin
        return origin if isinstance(origin, str) else _line_of(origin)

    def replace(
        self,
        *,
        op: Op | None = None,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        deps: tuple[Node, ...] | None = None,
        value: Any = PENDING,
    ) -> Node:
        """Return a node with the same key, draw and origin, but other parts.

        :param op: the new op, or None to keep it; likewise args, kwargs and deps.
        :param value: the value, if it is known now.
        """
        new = copy.copy(self)
        new._key = self.key
        new.op = op or self.op
        new.args = self.args if args is None else args
        new.kwargs = self.kwargs if kwargs is None else kwargs
        new.deps = self.deps if deps is None else deps
        if value is not PENDING:
            new.value = value
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


# --- pickling: as flat records, since pickle would recurse too deeply into a long chain -----------


def topological(roots: Iterable[Node]) -> list[Node]:
    """Return the roots and all nodes that they need, inputs before consumers.

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
    """Return a node and all its inputs as flat data in creation order, and its position there."""
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
    """Rebuild nodes from records; a node already known by its key is reused."""
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


#: Nodes whose handles were pickled or unpickled here. When one comes back, alone or as an input of
#: others, the same object is used, so that it stays one draw.
_travelled: weakref.WeakValueDictionary[str, Node] = weakref.WeakValueDictionary()


def records_of_handle(node: Node) -> tuple[list[tuple[Any, ...]], int]:
    """Return the pickled form of a node's handle.

    :param node: the node.
    """
    with _lock:
        _travelled.update((n.key, n) for n in topological([node]))
    return _records(node)


def travels(node: Node) -> None:
    """Remember a node that is sent away by key only, so that :func:`travelled` finds it.

    :param node: the node.
    """
    with _lock:
        _travelled[node.key] = node


def travelled(key: str) -> Node | None:
    """Return the remembered node with this key, or None if it is not known here.

    :param key: the node's key.
    """
    with _lock:
        return _travelled.get(key)


def node_of_handle(records: list[tuple[Any, ...]], index: int) -> Node:
    """Return the node of an unpickled handle; equal handles give the same object.

    :param records: the result of :func:`records_of_handle`; likewise ``index``.
    """
    with _lock:
        nodes = _revived(records, _travelled)
        _travelled.update((n.key, n) for n in nodes)
    return nodes[index]


# --- the user's source line -----------------------------------------------------------------------


def origin_of(frame: FrameType | None) -> Origin | None:
    """Return the code object and offset of the nearest frame outside Feste.

    This pair takes 0.15 µs, while reading ``f_lineno`` takes 159 µs inside a function of 5,000
    lines. It is resolved to a line only for display.

    :param frame: the frame to start from.
    """
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not (name.startswith("feste.") or name == "feste"):
            return frame.f_code, frame.f_lasti
        frame = frame.f_back
    return None


def call_site() -> str:
    """Return ``file:line`` of the user's current call, or an empty string."""
    return _line_of(origin_of(sys._getframe(1)))


def _line_of(origin: Origin | None) -> str:
    if origin is None:
        return ""
    code, offset = origin
    lines = _lines_of(code)
    line = lines[offset // 2] if offset // 2 < len(lines) else None
    return f"{code.co_filename}:{line or code.co_firstlineno}"


@functools.lru_cache(maxsize=128)
def _lines_of(code: CodeType) -> list[int | None]:
    """Return the line of each instruction; made once, since it takes a walk through the code."""
    return [positions[0] for positions in code.co_positions()]
