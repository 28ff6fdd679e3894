"""Rewrite a template so that it counts its own work: loop turns, comparisons, what its names hold.

What it calls for that are filters with names that no template can write; :mod:`feste.prompt.sandbox`
has them. This module imports Jinja, so import it on first use only.
"""

from __future__ import annotations

from typing import Any, Final

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from feste.prompt.limits import NODE_LIMIT, TAG_LIMIT, TooMuch

__all__ = ["count_work"]

#: What may be executed more than once.
_REPEATED: Final[Any] = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
#: What takes longer than other parts of an expression.
_LONG: Final = (nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test)


def count_work(tree: nodes.Template) -> None:
    """Make a template count its loop turns, comparisons, and the operands of ``~``.

    Containers that it builds or compares are measured, and what its names hold.

    :param tree: the template; it is changed in place.
    :raises TooMuch: if it has too many statements and expressions.
    """
    _check_parts(tree)
    bodies = [(node, _parts_in(node.body)) for node in tree.find_all(_REPEATED)]
    tests = [(node, _parts_in([node.test])) for node in tree.find_all(nodes.For) if node.test]
    _Measured().visit(tree)
    for node in list(tree.find_all(nodes.Concat)):
        node.nodes = [_hidden(nodes.List(node.nodes, lineno=node.lineno), "join!")]
    for node, parts in bodies:  # a call is counted already
        steps = (parts >> 6) + isinstance(node, nodes.For)
        if steps:
            node.body.insert(0, nodes.ExprStmt(_turn(node, steps), lineno=node.lineno))
    for loop, parts in tests:
        assert loop.test is not None
        loop.test = nodes.And(_turn(loop, 1 + (parts >> 6)), loop.test, lineno=loop.lineno)


def _parts_in(body: list[nodes.Node]) -> int:
    """Return how much there is to do in a part of a template."""
    kinds = [type(part) for node in body for part in (node, *node.find_all(nodes.Node))]
    return len(kinds) + 3 * sum(issubclass(kind, _LONG) for kind in kinds)


def _turn(node: nodes.Node, steps: int) -> nodes.Filter:
    return _hidden(nodes.Const(None, lineno=node.lineno), "tick!", steps)


def _check_parts(tree: nodes.Template) -> None:
    """Raise before a tree is compiled that has too many parts."""
    tags = 0
    for parts, node in enumerate(tree.find_all(nodes.Node)):
        if isinstance(node, nodes.Output):
            tags += sum(not isinstance(child, nodes.TemplateData) for child in node.nodes)
        elif isinstance(node, nodes.Stmt):
            tags += 1
        if tags > TAG_LIMIT or parts > NODE_LIMIT:
            what = f"{TAG_LIMIT:,} statements and expressions, or {NODE_LIMIT:,} parts of them"
            raise TooMuch(f"it has more than {what}; give long texts and lists as variables")


class _Measured(NodeTransformer):
    """Measures stored and compared values, and container literals that contain names."""

    def __init__(self) -> None:
        self.places = 0

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        if stored or node.find(nodes.Slice) or not node.find(nodes.Name):
            return node
        return _hidden(node, "measure!")

    visit_Tuple = visit_Dict = visit_List

    def visit_Assign(self, node: nodes.Assign | nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        self.places += 1
        if isinstance(node, nodes.AssignBlock):
            node.filter = _hidden(node.filter, "keep!", self.places)
        else:
            node.node = _hidden(node.node, "keep!", self.places)
        return node

    visit_AssignBlock = visit_Assign

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        self.places += len(node.values)
        node.values = [
            _hidden(value, "keep!", self.places - i) for i, value in enumerate(node.values)
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        first, *more = node.ops
        if first.op in ("in", "notin") and not more:
            test = nodes.Test(node.expr, "in", [first.expr], [], None, None, lineno=node.lineno)
            return test if first.op == "in" else nodes.Not(test, lineno=node.lineno)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            if not isinstance(side.expr, nodes.Const):
                searched = getattr(side, "op", "") in ("in", "notin")
                side.expr = _hidden(side.expr, "contain!" if searched else "compare!")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _hidden(node, "weigh!")
        if not isinstance(node.arg, nodes.Const):
            node.arg = _hidden(node.arg, "compare!")  # a key is hashed
        return node


def _hidden(node: nodes.Node | None, name: str, *args: int) -> nodes.Filter:
    line = node.lineno if node else 1
    given: list[nodes.Expr] = [nodes.Const(arg, lineno=line) for arg in args]
    return nodes.Filter(node, name, given, [], None, None, lineno=line)
