"""The filters and tests of the sandbox: Jinja's and yours, which count what they handle.

Those whose names end in ``!`` are called by what :mod:`feste.prompt.counting` puts into a template.
This module imports Jinja, so import it on first use only.
"""

from __future__ import annotations

import json
import pprint
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from jinja2 import Environment, Undefined, pass_context
from jinja2.runtime import Context
from jinja2.utils import Namespace, _PassArg

from feste.prompt.costs import COUNTED, FILTERS, TESTS, Cost
from feste.prompt.limits import TEXT_LIMIT, Budget, TooMuch, allow, extent
from feste.prompt.operands import MAKING, check_call, check_format, search_steps

__all__ = ["BUDGET", "Filters", "budget_of", "join", "let_count", "printable"]

Filters = tuple[tuple[str, Callable[..., Any]], ...]

#: The name under which a rendering keeps its budget; no template can write it.
BUDGET: Final = " budget"

#: Filters that take all items until one is found for the result.
_LOOKING: Final = frozenset("map reject rejectattr select selectattr unique".split())
#: The position of the attribute among the arguments of filters.
_ATTRIBUTE: Final = {
    **dict.fromkeys("map reject select".split(), 99),
    **dict.fromkeys("groupby rejectattr selectattr sum".split(), 0),
    **dict.fromkeys("join max min unique".split(), 1),
    "sort": 2,
}
#: Filters whose arguments are looked at, beside those.
_CHECKED: Final = frozenset(("format", "replace"))


def budget_of(context: Context) -> Budget:
    """Return the budget of a rendering.

    :param context: the names of its template.
    """
    return context.parent[BUDGET]  # type: ignore[no-any-return]


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
        budget = budget_of(context)
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
        budget = budget_of(context)
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
        budget = budget_of(context)
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
    budget_of(context).take(steps)
    return True


@pass_context
def _weigh(context: Context, value: Any, text: int = 10, items: int = 4) -> Any:
    return budget_of(context).weigh(value, text, items)


@pass_context
def _compare(context: Context, value: Any) -> Any:
    return budget_of(context).compare(value)


@pass_context
def _keep(context: Context, value: Any, place: int) -> Any:
    return budget_of(context).keep(value, place)


@pass_context
def _contain(context: Context, value: Any) -> Any:
    """Count a text in which another may be searched, which is not known here."""
    if isinstance(value, str) and len(value) < 30_000:
        budget_of(context).take(min(len(value) ** 2 >> 15, 100))
    return budget_of(context).compare(value)


@pass_context
def _measure(context: Context, value: Any, items: int = 6, text: int = 64) -> Any:
    return budget_of(context).measure(value, items, text)


@pass_context
def join(context: Context, parts: Any, d: str = "", attribute: Any = None) -> str:
    """Implement the filter ``join``, the method ``join``, and the operator ``~``."""
    if attribute is not None:
        named = {"attribute": attribute}
        parts = context.environment.call_filter("map", parts, [], named, context)
    parts = _gathered(budget_of(context), parts) if hasattr(parts, "__next__") else list(parts)
    between = str(d)
    budget_of(context).spend(len(between) * len(parts) + extent(parts))
    budget_of(context).take(len(parts) >> 4)
    budget_of(context).take(extent([p for p in parts if not isinstance(p, str)]) >> 6)
    return between.join(map(str, parts))


@pass_context
def printable(context: Context, value: Any) -> Any:
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
    budget_of(context).spend(extent(value), 8)
    return value


@pass_context
def _trim(context: Context, value: Any, chars: str | None = None) -> str:
    text = str(value)
    if chars:
        budget_of(context).take(search_steps("strip", text, (chars,), {}))
    return text.strip(chars)


@pass_context
def _tojson(context: Context, value: Any, indent: int | None = None) -> str:
    budget_of(context).measure(value, 4)
    return json.dumps(value, ensure_ascii=False, indent=min(indent, 16) if indent else indent)


@pass_context
def _pprint(context: Context, value: Any) -> str:
    budget_of(context).measure(value, 0)
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


def let_count(made: Environment, filters: Filters) -> None:
    """Let the filters and tests of an environment count, and add what a template calls to count.

    :param made: the environment, with Jinja's own ones.
    :param filters: the user's filters, by name.
    """
    made.filters.update(join=join, pprint=_pprint, tojson=_tojson, trim=_trim)
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
    made.filters.update(counting)  # see feste.prompt.counting
    made.filters.update({"keep!": _keep, "contain!": _contain, "join!": join, "module!": _module})
