"""The sandbox of templates. This module imports Jinja, so import it on first use only.

Jinja's own sandbox keeps templates from private names and from changing data. This one adds limits:
the work of operators, calls, filters and loops is counted against the budget of one rendering.
"""

from __future__ import annotations

import functools
import json
import pprint
from collections.abc import Callable, Iterable
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Undefined, nodes, pass_context
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from feste.prompt.limits import NODE_LIMIT, TAG_LIMIT, TEXT_LIMIT, Budget, TooMuch, extent
from feste.prompt.operands import check_call, check_format, check_operator, search_steps

__all__ = ["BUDGET", "JINJA_NAMES", "Filters", "count_work", "sandbox_with", "takes_context"]

Filters = tuple[tuple[str, Callable[..., Any]], ...]

#: The name under which a rendering keeps its budget; no template can write it.
BUDGET: Final = " budget"

#: The globals that Jinja provides. They are not in any environment, so variables can override them.
JINJA_NAMES: Final = {
    name: safe_range if name == "range" else value
    for name, value in DEFAULT_NAMESPACE.items()
    if name != "lipsum"
}

_LIMITED: Final = tuple("batch center format indent replace round slice title wordwrap".split())
#: Filters that take no time, and tests that take as long as a comparison.
_FREE: Final = frozenset("attr count d default first items last length map".split())
_COMPARING: Final = frozenset(
    "== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in lower upper".split()
)
#: Filters that work item by item; all others may make a text of their whole input.
_BY_ITEM: Final = _FREE | frozenset(
    "batch dictsort groupby join list max min reject rejectattr reverse select selectattr slice "
    "sort sum unique".split()
)
#: Filters that take microseconds for each item, or 100 nanoseconds and more for each character.
_SLOW: Final = frozenset(
    "batch dictsort format groupby pprint slice sort striptags title tojson wordwrap".split()
)
#: Filters, and methods of texts, that take a few nanoseconds for each character.
_FAST: Final = frozenset(
    "center count endswith find index isspace join lower lstrip partition replace "
    "rfind rindex rpartition rsplit rstrip safe split splitlines startswith string strip trim "
    "truncate upper".split()
)


def takes_context(function: Any) -> bool:
    """Return True if Jinja gives a function all names of the template.

    :param function: a filter, or what a template calls.
    """
    return _PassArg.from_obj(function) is _PassArg.context


def _budget(context: Context) -> Budget:
    return context.parent[BUDGET]  # type: ignore[no-any-return]


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a macro or a captured block."""
        texts = list(parts)
        if sum(map(len, texts)) > TEXT_LIMIT:
            raise TooMuch("a block of it is too large")
        return "".join(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuse methods that give bytes, since the methods of bytes are not checked."""
        if attr in ("encode", "to_bytes"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_filter(self, name: str, value: Any, *rest: Any, **more: Any) -> Any:
        """Call a filter that ``map`` names."""
        context = more.get("context") or rest[2]
        if name not in _BY_ITEM:
            _budget(context).measure(value, 6, 8)
        _budget(context).weigh(value, *_pace(name))
        return _budget(context).weigh(super().call_filter(name, value, *rest, **more))

    def call_test(self, name: str, value: Any, args: Any = None, *rest: Any, **more: Any) -> Any:
        """Call a test that ``select`` or ``reject`` names."""
        budget = _budget(more.get("context") or rest[1])
        budget.spend()
        for operand in (value, *(args or ())):
            budget.compare(operand)
        return super().call_test(name, value, args, *rest, **more)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "%" and isinstance(left, str):
            budget.weigh(left, 3)  # looking for fields takes longer than filling them
        check_operator(operator, left, right)
        made = super().call_binop(context, operator, left, right)
        return budget.weigh(budget.measure(made, 7), items=6)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        called = getattr(obj, "__call__", None)  # noqa: B004 - Jinja passes the context to it, too
        if not _budget(context).is_whole and (takes_context(obj) or takes_context(called)):
            raise TypeError("it reads the whole context, and only a piece is rendered here")
        budget = _budget(context)
        budget.take(len(args) + len(kwargs) >> 4)
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps the `format` method of texts
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, (str, list, tuple)):
            shift = 3 if name.startswith("format") else 11 if name in _FAST else 8
            budget.weigh(budget.measure(text), shift)
        if isinstance(text, str):
            if name == "join":
                return _join(context, args[0], text)
            if name.startswith("format"):
                check_format("{", text, args, args[0] if name == "format_map" else kwargs)
            else:
                budget.take(search_steps(name, text, args, kwargs))
                check_call(name, text, args, kwargs)
        made = super().call(context, obj, *args, **kwargs)
        if obj is dict or obj is Namespace:
            budget.measure(made)
        return made if isinstance(made, range) else budget.weigh(made, items=6)


def _pace(name: str) -> tuple[int, int]:
    """Return how many characters, and how many items, a filter handles in a step."""
    items = 0 if name in _SLOW else 4
    if name in _BY_ITEM:
        return items, items
    return (11 if name in _FAST else 7 if name == "wordcount" else items + 4), items


#: Has Jinja's own filters, without the limits of :func:`sandbox_with`.
_unlimited: Final = _Sandbox()


@pass_context
def _tick(context: Context, _: None) -> bool:
    _budget(context).spend()
    return True


@pass_context
def _weigh(context: Context, value: Any, text: int = 10, items: int = 4) -> Any:
    return _budget(context).weigh(value, text, items)


@pass_context
def _compare(context: Context, value: Any) -> Any:
    return _budget(context).compare(value)


@pass_context
def _measure(context: Context, value: Any, items: int = 6, text: int = 64) -> Any:
    return _budget(context).measure(value, items, text)


@pass_context
def _join(context: Context, parts: Any, d: str = "", attribute: Any = None) -> str:
    """Implement the filter ``join``, the method ``join``, and the operator ``~``."""
    if attribute is not None:
        named = {"attribute": attribute}
        parts = context.environment.call_filter("map", parts, [], named, context)
    parts, between = list(parts), str(d)
    _budget(context).spend(len(between) * len(parts) + extent(parts))
    _budget(context).take(len(parts) >> 4)
    _budget(context).take(extent([p for p in parts if not isinstance(p, str)]) >> 6)
    return between.join(map(str, parts))


@pass_context
def _printable(context: Context, value: Any) -> Any:
    """Refuse a value that would be printed as ``<... object at 0x...>``."""
    if isinstance(value, (str, int, Undefined)):  # an Undefined raises by itself
        return value
    kind: Any = type(value)
    opaque = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    if opaque or callable(value) or hasattr(kind, "__next__"):
        raise TypeError(
            f"an expression gives a {kind.__name__}, which is no text: call it, use |list, "
            "or write x['name'] for the key of a dict"
        )
    _budget(context).spend(extent(value), 8)
    return value


@pass_context
def _trim(context: Context, value: Any, chars: str | None = None) -> str:
    text = str(value)
    if chars:
        _budget(context).take(search_steps("strip", text, (chars,), {}))
    return text.strip(chars)


@pass_context
def _tojson(context: Context, value: Any, indent: int | None = None) -> str:
    _budget(context).measure(value, 4)
    return json.dumps(value, ensure_ascii=False, indent=min(indent, 16) if indent else indent)


@pass_context
def _pprint(context: Context, value: Any) -> str:
    _budget(context).measure(value, 0)
    level = [value]
    for _ in range(33):
        level = [part for holder in level for part in _held(holder)]
    if level:  # pformat keeps the text of every level in memory until it is done
        raise TooMuch("it gives pprint more than 32 levels of lists and dicts")
    return pprint.pformat(value)


def _module(_: None) -> Namespace:
    return Namespace()


def _held(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _limited(name: str) -> Callable[..., Any]:
    """Return Jinja's filter of that name, with limits."""

    @pass_context
    def limited(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "format":
            check_format("%", str(value), args, kwargs)
        else:
            check_call(name, value, args, kwargs)
        # not our own `call_filter`, which counts the input: that is done already
        made = Environment.call_filter(_unlimited, name, value, args, kwargs, context)
        return _budget(context).weigh(made, 11)

    return limited


@functools.lru_cache(maxsize=64)
def sandbox_with(filters: Filters) -> Environment:
    """Return the sandbox with these filters; the only place where sandboxes are made.

    Nothing is folded at compile time (that would bypass the limits), and nothing is loaded: see `including`.

    :param filters: the user's filters, by name.
    """
    made = _Sandbox(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        optimized=False,
        finalize=_printable,
    )
    made.globals.clear()
    del made.filters["random"], made.filters["urlize"]
    made.filters.update({name: _limited(name) for name in _LIMITED}, join=_join)
    made.filters.update(pprint=_pprint, tojson=_tojson, trim=_trim)
    made.filters.update(filters)
    counting = {"tick!": _tick, "weigh!": _weigh, "measure!": _measure, "compare!": _compare}
    made.filters.update(counting)  # see count_work
    made.filters.update({"join!": _join, "module!": _module})
    return made


def count_work(tree: nodes.Template) -> None:
    """Make a template count its loop turns, the inputs of its filters, and the operands of ``~``.

    Containers that it builds, stores or compares are measured.

    :param tree: the template; it is changed in place.
    :raises TooMuch: if it has too many statements and expressions.
    """
    _check_parts(tree)
    _Measured().visit(tree)
    for node in list(tree.find_all((nodes.For, nodes.Filter, nodes.Concat))):
        if isinstance(node, nodes.Filter) and node.node and not node.name.endswith("!"):
            whole = node.node if node.name in _BY_ITEM else _hidden(node.node, "measure!", 6, 8)
            if node.name not in _FREE:
                node.node = _hidden(whole, "weigh!", *_pace(node.name))
        elif isinstance(node, nodes.Concat):
            node.nodes = [_hidden(nodes.List(node.nodes, lineno=node.lineno), "join!")]
        elif isinstance(node, nodes.For):
            turn = _hidden(nodes.Const(None, lineno=node.lineno), "tick!")
            node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
            node.test = node.test and nodes.And(turn, node.test, lineno=node.lineno)


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

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        if stored or node.find(nodes.Slice) or not node.find(nodes.Name):
            return node
        return _hidden(node, "measure!")

    visit_Tuple = visit_Dict = visit_List

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node.node, "name", "") != "measure!":  # not measured as a literal already
            node.node = _hidden(node.node, "measure!", 7)  # type: ignore[arg-type]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            if not isinstance(side.expr, nodes.Const):
                side.expr = _hidden(side.expr, "compare!")
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.name in _COMPARING:
            node.node = _hidden(node.node, "compare!")
            node.args = [_hidden(operand, "compare!") for operand in node.args]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _hidden(node, "weigh!") if isinstance(node.arg, nodes.Slice) else node


def _hidden(node: nodes.Expr, name: str, *args: int) -> nodes.Filter:
    given = [nodes.Const(arg, lineno=node.lineno) for arg in args]
    return nodes.Filter(node, name, given, [], None, None, lineno=node.lineno)
