"""How nodes are named in pictures and plans: what they do, and where they were written."""

from __future__ import annotations

import os
from typing import Any

from feste.node import Node
from feste.prompt.operation import PromptOp

__all__ = ["Places", "detail_of"]


def detail_of(node: Node) -> str:
    """Return a few words to distinguish nodes of one name: the model, or a template's beginning.

    :param node: the node.
    """
    op: Any = node.op
    if isinstance(op, PromptOp):
        return op.templates[-1].short  # the last message of a conversation, which asks
    return node.call.model(node.args) if node.call is not None else ""


class Places:
    """The source lines of nodes, each looked up once.

    Paths below the working directory become relative, because pictures are shown to others.
    """

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}
        self._here = f"{os.getcwd()}{os.sep}"

    def of(self, node: Node) -> str:
        """Return ``file:line`` of a node, or an empty string.

        :param node: the node.
        """
        known = self._known.get(node.origin)
        if known is None:
            known = self._known[node.origin] = self.short(node.where)
        return known

    def short(self, place: str) -> str:
        """Return ``file:line`` relative to the working directory, if it is below that.

        :param place: ``file:line``.
        """
        return place.removeprefix(self._here)
