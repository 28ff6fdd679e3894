"""The sandbox of templates. This module imports Jinja, so import it on first use only.

Jinja's own sandbox keeps templates from private names and from changing data. This one adds limits:
the work of operators, calls, filters and loops is counted against the budget of one rendering.
"""

from __future__ import annotations

import functools
import inspect
import json
import pprint
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Undefined, nodes, pass_context
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from feste.prompt.costs import COUNTED, FILTERS, METHODS, TESTS, Cost
from feste.prompt.limits import (
    NODE_LIMIT,
    TAG_LIMIT,
    TEXT_LIMIT,
    VIEWS,
    Budget,
    TooMuch,
    allow,
    extent,
)
from feste.prompt.operands import MAKING, check_call, check_format, check_operator, search_steps

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

#: What can be in the data of a template, with methods of Python.
_PLAIN: Final[Any] = (str, list, tuple, dict, set, frozenset, range, int, float, *VIEWS)
_ATOMS: Final = frozenset((str, int, float, bool))
#: Methods of their classes that make a value, and methods that need an object first.
_OF_CLASSES: Final = frozenset("fromhex fromkeys from_bytes maketrans".split())
_UNBOUND: Final = (FunctionType, MethodDescriptorType, WrapperDescriptorType)
#: Methods that change containers and are not known to Jinja.
_CHANGING: Final = frozenset(
    "intersection_update insert move_to_end reverse rotate subtract".split()
)
#: From so many pieces of a text on, their memory counts.
_MANY: Final = 65_536
#: Filters that take all items until one is found for the result.
_LOOKING: Final = frozenset("map reject rejectattr select selectattr unique".split())
#: What may be executed more than once.
_REPEATED: Final[Any] = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
#: What takes longer than other parts of an expression.
_LONG: Final = (nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test)
#: The position of the attribute among the arguments of filters.
_ATTRIBUTE: Final = {
    **dict.fromkeys("map reject select".split(), 99),
    **dict.fromkeys("groupby rejectattr selectattr sum".split(), 0),
    **dict.fromkeys("join max min unique".split(), 1),
    "sort": 2,
}
#: Filters whose arguments are looked at, beside those.
_CHECKED: Final = frozenset(("format", "replace"))


def takes_context(function: Any) -> bool:
    """Return True if Jinja gives a function all names of the template.

    :param function: a filter, or what a template calls.
    """
    return _PassArg.from_obj(function) is _PassArg.context


def _budget(context: Context) -> Budget:
    return context.parent[BUDGET]  # type: ignore[no-any-return]


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "**", "//", "%"))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a macro or a captured block."""
        texts = list(parts)
        if sum(map(len, texts)) > TEXT_LIMIT:
            raise TooMuch("a block of it is too large")
        return "".join(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuse methods that give bytes, whose methods are not checked, and those of a class.

        ``dict.update`` would change whatever dict is its argument.
        """
        if attr in ("encode", "to_bytes"):
            return False
        if type(obj) in _ATOMS:
            return not attr.startswith("_")
        if isinstance(obj, type) and isinstance(value, _UNBOUND):
            found = inspect.getattr_static(obj, attr, None)
            return isinstance(found, staticmethod) and super().is_safe_attribute(obj, attr, value)
        if attr in _CHANGING and isinstance(obj, (dict, set, deque)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "%" and isinstance(left, str):
            budget.weigh(left, 3)  # looking for fields takes longer than filling them
            budget.measure(right, 6, 8)
        elif operator in ("//", "%"):
            budget.weigh(left)  # the time is the product of the lengths
        check_operator(operator, left, right)
        made = super().call_binop(context, operator, left, right)
        return budget.weigh(budget.measure(made, 7), items=6)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        called = getattr(obj, "__call__", None)  # noqa: B004 - Jinja passes the context to it, too
        budget = _budget(context)
        if not budget.is_whole and (takes_context(obj) or takes_context(called)):
            raise TypeError("it reads the whole context, and only a piece is rendered here")
        budget.take(len(args) + len(kwargs) >> 4)
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps the `format` method of texts
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, _PLAIN) or name in _OF_CLASSES or isinstance(owner, LoopContext):
            _count_method(budget, owner, name, args, kwargs)
        elif obj is dict or obj is Namespace:
            for arg in args:
                budget.weigh(arg, 2, 2)
        if isinstance(owner, str):
            if name == "join":
                return _join(context, args[0], owner)
            if name.startswith("format"):
                check_format("{", owner, args, args[0] if name == "format_map" else kwargs)
            else:
                budget.take(search_steps(name, owner, args, kwargs))
                check_call(name, owner, args, kwargs)
        budget.depth += 1
        if budget.depth > 8:  # a macro that calls itself keeps all of its arguments
            for i, arg in enumerate((*args, *kwargs.values())):
                budget.keep(arg, -i)
        made = super().call(context, obj, *args, **kwargs)
        budget.depth -= 1
        if obj is dict or obj is Namespace:
            budget.measure(made)
        budget.take(not isinstance(made, range))
        if isinstance(owner, str) and isinstance(made, list) and len(made) > _MANY:
            budget.take(len(made) >> 2)
        return budget.made(made, 10)


def _count_method(
    budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Count what a method of plain data looks at."""
    cost = METHODS.get(name, COUNTED)
    for arg in (*args, *kwargs.values()) if cost else args[:1]:
        budget.compare(arg)
        if name in _OF_CLASSES:
            budget.weigh(arg, 2, 2)
        elif name.startswith("format"):
            budget.measure(arg, 6, 8)
    if cost:
        budget.weigh(budget.measure(owner), cost.text, cost.items)


def _with_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or test that takes the context first, whatever it takes itself."""
    match _PassArg.from_obj(function):
        case _PassArg.context:
            return function
        case _PassArg.eval_context:
            return lambda context, *args, **kwargs: function(context.eval_ctx, *args, **kwargs)
        case _PassArg.environment:
            return lambda context, *args, **kwargs: function(context.environment, *args, **kwargs)
    return lambda _, *args, **kwargs: function(*args, **kwargs)


def _counted(name: str, function: Callable[..., Any], cost: Cost) -> Callable[..., Any]:
    """Return a filter that counts what it handles, whether it is called or named in ``map``."""
    made_by = _with_context(function)
    # a text of Jinja's is as long as its parts at least; yours may take much, and tell little
    whole = {"text": (6, 8, TEXT_LIMIT if name else 0), "parts": (4, 11)}.get(cost.reads)
    takes_iterators = cost.reads == "text"
    is_checked = name in _ATTRIBUTE or name in _CHECKED or name in MAKING

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        before = budget.steps
        if not isinstance(value, str):
            if not takes_iterators and hasattr(value, "__next__"):
                value = _gathered(budget, value)
            if whole:
                budget.measure(value, *whole)
        budget.weigh(value, cost.text, cost.items)
        if budget.steps == before:
            budget.take(1)
        if is_checked:
            _check_filter(budget, name, value, args, kwargs)
        return budget.made(made_by(context, value, *args, **kwargs))

    return counted


def _check_filter(
    budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Count what depends on the arguments of a filter, and refuse a huge result."""
    if name in _ATTRIBUTE:
        budget.take(_path_of(name, args, kwargs) * (1 + len(value)) >> 4)
    if name == "format":
        for arg in (*args, *kwargs.values()):
            budget.measure(arg, 6, 8)
        check_format("%", str(value), args, kwargs)
    elif name == "sum":
        if not isinstance(kwargs.get("start", (*args, 0, 0)[1]), (int, float)):
            raise TypeError("sum adds numbers: use join for texts, and + for lists")
    elif name == "replace":
        budget.take(search_steps(name, str(value), args, kwargs))
    check_call(name, value, args, kwargs)


def _later(name: str, function: Callable[..., Any], cost: Cost) -> Callable[..., Any]:
    """Return a filter that takes its items when those of its result are taken."""
    made_by = _with_context(function)

    @pass_context
    def later(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.take(1)
        if hasattr(value, "__next__"):  # not iterators in iterators, in which Python would crash
            value = _gathered(budget, value)
        if name in _LOOKING:
            path = _path_of(name, args, kwargs)
            every = 1 if args and name != "unique" else 16
            value = _ticking(budget, value, every, path, compares=name == "unique")
            return made_by(context, value, *args, **kwargs)
        budget.weigh(value, cost.text, cost.items)
        check_call(name, value, args, kwargs)
        made = made_by(context, value, *args, **kwargs)
        if hasattr(made, "__next__"):
            return _ticking(budget, made, 1 if name == "slice" else 16)
        return budget.made(made)

    return later


def _path_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many attributes a filter looks up for each item, beyond the first."""
    i = _ATTRIBUTE[name]
    path = kwargs.get("attribute", args[i] if i < len(args) else None)
    return path.count(".") + path.count(",") if isinstance(path, str) else 0


def _ticking(
    budget: Budget, items: Iterable[Any], every: int = 16, path: int = 0, compares: bool = False
) -> Iterator[Any]:
    """Yield items, and count them.

    :param every: how many are a step.
    :param path: how many attributes are looked up for each.
    :param compares: whether all of an item is looked at.
    """
    budget.take(path >> 4)
    for i, item in enumerate(items or ()):
        if not i % every:
            budget.take(1 + (path * every >> 4))
        if compares:
            budget.compare(item)
        yield item


def _gathered(budget: Budget, items: Iterable[Any]) -> list[Any]:
    """Return the items of an iterator, which must not make too many characters."""
    made, total = [], 0
    for item in _ticking(budget, items):
        if isinstance(item, str):
            total += len(item)
            if total > TEXT_LIMIT:
                allow(total, budget.most)
        made.append(item)
    return made


def _tested(name: str, function: Callable[..., Any], cost: Cost) -> Callable[..., Any]:
    """Return a test that counts what it looks at."""
    made_by = _with_context(function)

    @pass_context
    def tested(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        for operand in (value, *args, *kwargs.values()):
            budget.compare(operand)
        if cost.reads == "text":
            budget.weigh(budget.measure(value, 6, 8), cost.text, cost.items)
        elif name == "divisibleby":
            budget.weigh(value)
        elif name == "in" and args and isinstance(args[0], str):
            budget.take(search_steps(name, args[0], (value,), {}))
        return made_by(context, value, *args, **kwargs)

    return tested


@pass_context
def _tick(context: Context, _: None, steps: int) -> bool:
    _budget(context).take(steps)
    return True


@pass_context
def _weigh(context: Context, value: Any, text: int = 10, items: int = 4) -> Any:
    return _budget(context).weigh(value, text, items)


@pass_context
def _compare(context: Context, value: Any) -> Any:
    return _budget(context).compare(value)


@pass_context
def _keep(context: Context, value: Any, place: int) -> Any:
    return _budget(context).keep(value, place)


@pass_context
def _contain(context: Context, value: Any) -> Any:
    """Count a text in which another may be searched, which is not known here."""
    if isinstance(value, str) and len(value) < 30_000:
        _budget(context).take(min(len(value) ** 2 >> 15, 100))
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
    parts = _gathered(_budget(context), parts) if hasattr(parts, "__next__") else list(parts)
    between = str(d)
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
    made.filters.update(join=_join, pprint=_pprint, tojson=_tojson, trim=_trim)
    for name, function in made.filters.items():
        if cost := FILTERS.get(name, COUNTED):
            counted = _later if cost.reads == "later" else _counted
            made.filters[name] = counted(name, function, cost)
    made.filters.update({name: _counted("", function, COUNTED) for name, function in filters})
    tests: dict[str, Any] = made.tests
    for name, test in tests.items():
        if cost := TESTS.get(name, COUNTED):
            tests[name] = _tested(name, test, cost)
    counting = {"tick!": _tick, "weigh!": _weigh, "measure!": _measure, "compare!": _compare}
    made.filters.update(counting)  # see count_work
    made.filters.update({"keep!": _keep, "contain!": _contain, "join!": _join, "module!": _module})
    return made


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
