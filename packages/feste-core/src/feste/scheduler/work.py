"""Running one piece of Python, wherever the hands are, and describing how it failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from feste.errors import FesteError, NodeError
from feste.node import Deps, fill, holds_nodes, pack
from feste.scheduler.growth import Emission

__all__ = ["describe", "evaluate", "result_of"]


def evaluate(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> Any:
    """Call a function with packed arguments.

    :param fn: the function.
    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: what goes into the slots.
    """
    if not values:
        return fn(*args, **kwargs)
    filled = [fill(a, values) for a in args]
    if not kwargs:
        return fn(*filled)
    return fn(*filled, **{k: fill(v, values) for k, v in kwargs.items()})


def result_of(value: Any) -> Any:
    """Return a result, as an :class:`~feste.scheduler.growth.Emission` if it holds nodes.

    :param value: what a user's function returned.
    """
    if not holds_nodes(value):
        return value
    deps = Deps()
    return Emission(pack(value, deps), deps.nodes)


def describe(error: BaseException) -> FesteError:
    """Return what a piece of Python raised, as an error of Feste.

    :param error: the exception.
    """
    if isinstance(error, FesteError):
        return error
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    try:
        said = str(error)
    except Exception as broken:  # an exception whose __str__ raises
        said = f"<{type(broken).__name__} while printing it>"
    described = NodeError(
        f"{name}: {said}",
        cause_type=name,
        traceback="".join(traceback.format_exception(error)),
    )
    described.__cause__ = error
    return described
