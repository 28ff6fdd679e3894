"""The result of a task that returned nodes."""

from __future__ import annotations

from typing import Any

from feste.draw import Determinism
from feste.node import Node, node_of_handle, records_of_handle
from feste.scheduler.executor import QUICK

__all__ = ["REPACK", "Emission"]


class _Repack:
    """The op that replaces a task which returned nodes: it puts their values into the result."""

    name = "repack"
    kind = "data"
    identity = "repack"
    emits = False
    executor = QUICK
    is_async = False

    def determinism(self, args: Any, kwargs: Any) -> Determinism:
        return Determinism.EFFECT  # because the node still stands for its task

    @staticmethod
    def fn(value: Any) -> Any:
        return value


REPACK = _Repack()


class Emission:
    """The result of a task that contains nodes, and so is not a value yet.

    :param packed: the result, with slots in place of the nodes.
    :param nodes: the nodes.
    :param at: the position of the step of a fused node that returned it; -1 is the last, or the node.
    """

    __slots__ = ("at", "nodes", "packed")

    def __init__(self, packed: Any, nodes: list[Node], at: int = -1) -> None:
        self.packed = packed
        self.nodes = nodes
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        # pickled as one root node, so that shared nodes stay one node and thus one draw
        root = Node(REPACK, (self.packed,), {}, tuple(self.nodes))
        return (_emission, (*records_of_handle(root), self.at))


def _emission(records: Any, index: int, at: int) -> Emission:
    root = node_of_handle(records, index)
    return Emission(root.args[0], list(root.deps), at)
