"""The callables inside the Dask tasks of a lowered graph: a node's op, or a whole batch of calls.

Dask runs one task at a time and knows neither draws nor gates, so these objects carry both: the
draw of the user's node, and the process whose gate a paid call must pass.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from feste import draw
from feste.context import Settings
from feste.fused import Fused
from feste.node import Node, process_name, travelled, travels

__all__ = ["Lowered", "LoweredBatch", "draw_lowered", "note_lowered", "unwrap"]

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # in a forked child, nothing would release the lock
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
_without_draws: weakref.WeakSet[Node] = weakref.WeakSet()
_merged: weakref.WeakKeyDictionary[Node, weakref.WeakSet[Node]] = weakref.WeakKeyDictionary()


def note_lowered(nodes: Iterable[Node]) -> None:
    """Remember nodes that are given to Dask without a draw, for :func:`draw_lowered`.

    :param nodes: the nodes.
    """
    with _lock:
        _without_draws.update(n for n in nodes if n.draw is None)


def draw_lowered() -> None:
    """Assign draws to all lowered nodes that have none yet."""
    if _without_draws:
        with _lock:
            nodes = list(_without_draws)
            _without_draws.clear()
            draw.assign(nodes)


class Lowered:
    """The callable of one node's Dask task: applies the node's op to the values of its inputs.

    A paid call goes through the gate, retry and journal of the process that made the graph; in any
    other process it raises :class:`~feste.errors.UngatedCall`.

    :param node: the node.
    :param process: the name of the process that made the graph; empty for this one.
    :param is_whole: False in a process that received the node without its inputs.
    """

    __slots__ = ("is_whole", "node", "own", "process", "settings")

    def __init__(self, node: Node, process: str = "", is_whole: bool = True) -> None:
        self.node = node
        self.process = process or process_name()
        self.is_whole = is_whole
        #: The user's node; differs from `node` if an optimization replaced it.
        self.own = node
        #: The settings of the run that it belongs to; None where Dask runs it by itself.
        self.settings: Settings | None = None

    @property
    def __name__(self) -> str:
        return self.node.op.name

    @property
    def keepers(self) -> tuple[Node, ...]:
        """The user's nodes that receive the value of a paid call: its own, then merged ones."""
        return (self.own, *_merged.get(self.own, ()))

    def belongs_to(self, own: Node, *merged: Node) -> None:
        """Set the user's nodes that this stands for; remembered for other lowered copies too.

        :param own: the user's node with the same key.
        :param merged: the user's nodes that an optimization merged into it.
        """
        self.own = own
        if merged:
            _merged.setdefault(own, weakref.WeakSet()).update(merged)

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made the graph."""
        return self.process == process_name()

    def __call__(self, *values: Any) -> Any:
        from feste import _compute

        return _compute.run_lowered(self, values)

    def __reduce__(self) -> tuple[Any, ...]:
        draw_lowered()
        n, drawn = self.node, self.own.draw
        if self.is_here:
            travels(self.own)
        # without its inputs: Dask passes their values
        return (_lowered, (n.op, n.args, dict(n.kwargs), n.where, n.key, drawn, self.process))

    def __repr__(self) -> str:
        return f"<{self.node.op.name}>"


def _lowered(
    op: Any,
    args: Any,
    kwargs: Any,
    where: str,
    key: str,
    drawn: Any,
    process: str,
) -> Lowered:
    known = travelled(key) if process == process_name() else None
    if known is not None and type(op) is not Fused:
        return Lowered(known, process)
    node = Node(op, args, kwargs, (), where)
    node._key, node.draw = key, drawn
    low = Lowered(node, process, is_whole=False)
    low.own = known or node
    return low


class LoweredBatch:
    """The callable of a batch's Dask task: returns one outcome for each member.

    :param members: the members, lowered.
    :param counts: how many of the input values belong to each member.
    """

    __slots__ = ("counts", "members")

    def __init__(self, members: list[Lowered], counts: list[int]) -> None:
        self.members = members
        self.counts = counts

    @property
    def __name__(self) -> str:
        return f"batch-{self.members[0].node.op.name}"

    def __call__(self, *values: Any) -> list[Any]:
        from feste import _compute

        return _compute.run_lowered_batch(self, values)

    def __reduce__(self) -> tuple[Any, ...]:
        return (LoweredBatch, (self.members, self.counts))


def unwrap(outcomes: list[Any], index: int) -> Any:
    """Return one call's value from a batch's outcomes, or raise its error.

    :param outcomes: the outcomes of all members.
    :param index: the position of the member.
    """
    outcome = outcomes[index]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
