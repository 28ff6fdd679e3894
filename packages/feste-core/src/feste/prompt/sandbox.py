"""The sandbox of templates. This module imports Jinja, so import it on first use only.

Jinja's own sandbox keeps templates from private names and from changing data. This one adds limits:
the work of operators, calls, filters and loops is counted against the budget of one rendering.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterable
from types import FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any, Final

from jinja2 import StrictUndefined
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment, safe_range
from jinja2.utils import Namespace, _PassArg

from feste.prompt.costs import COUNTED, METHODS
from feste.prompt.filters import Filters, budget_of, join, let_count, printable
from feste.prompt.limits import TEXT_LIMIT, VIEWS, Budget, TooMuch
from feste.prompt.operands import check_call, check_format, check_operator, search_steps

__all__ = ["JINJA_NAMES", "sandbox_with", "takes_context"]

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


def takes_context(function: Any) -> bool:
    """Return True if Jinja gives a function all names of the template.

    :param function: a filter, or what a template calls.
    """
    return _PassArg.from_obj(function) is _PassArg.context


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
        budget = budget_of(context)
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
        budget = budget_of(context)
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
                return join(context, args[0], owner)
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


@functools.lru_cache(maxsize=64)
def sandbox_with(filters: Filters) -> SandboxedEnvironment:
    """Return the sandbox with these filters; the only place where sandboxes are made.

    Nothing is folded at compile time (that would bypass the limits), and nothing is loaded: see `including`.

    :param filters: the user's filters, by name.
    """
    made = _Sandbox(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        optimized=False,
        finalize=printable,
    )
    made.globals.clear()
    del made.filters["random"], made.filters["urlize"]
    let_count(made, filters)
    return made
