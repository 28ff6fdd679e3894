"""Running one piece of Python, wherever the hands are, and describing how it failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from types import TracebackType
from typing import Any

from feste.errors import FesteError, NodeError
from feste.packing import Deps, fresh, holds_nodes, pack
from feste.scheduler.executor import PyTask
from feste.scheduler.growth import Emission
from feste.scheduler.run import around

__all__ = ["arguments", "context_of", "describe", "evaluate", "result_of", "run_task"]

_ATOMS = frozenset((str, int, float, bool, type(None)))


def context_of(task: PyTask) -> Context:
    """Return the context that a task runs in: its own copy of its run's, which knows the task.

    :param task: the task.
    """
    run = task.run
    copied = run.context.copy()
    copied.run(around.set, (run.name, task.index, run.around))
    return copied


def arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return what a user's function is called with, which is its own to change.

    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: what goes into the slots.
    """
    given = [a if type(a) in _ATOMS else fresh(a, values) for a in args]
    return given, {k: fresh(v, values) for k, v in kwargs.items()} if kwargs else {}


def evaluate(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> Any:
    """Call a function with packed arguments.

    :param fn: the function.
    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: what goes into the slots.
    """
    given, named = arguments(args, kwargs, values)
    return fn(*given, **named)


def run_task(task: PyTask) -> Any:
    """Run a task: a user's function, or a half of an operation, which changes no argument.

    :param task: the task.
    """
    if task.stage == "run":
        return evaluate(task.fn, task.args, task.kwargs, task.values)
    return task.fn(*task.args)


def result_of(value: Any) -> Any:
    """Return a result, as an :class:`~feste.scheduler.growth.Emission` if it holds nodes.

    :param value: what a user's function returned.
    """
    if not holds_nodes(value):
        return value
    deps = Deps()
    return Emission(pack(value, deps), deps.nodes)


def _from_the_users(error: BaseException) -> TracebackType | None:
    """The traceback from the first frame on that is not Feste's own; all of it if there is none."""
    begin = error.__traceback__
    while begin is not None and _is_ours(begin):
        begin = begin.tb_next
    return begin or error.__traceback__


def _is_ours(step: TracebackType) -> bool:
    return str(step.tb_frame.f_globals.get("__name__", "")).startswith("feste.scheduler.")


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
    except BaseException as broken:  # an exception whose __str__ raises, or wants to end it all
        said = f"<{type(broken).__name__} while printing it>"
    described = NodeError(
        f"{name}: {said}",
        cause_type=name,
        traceback="".join(traceback.format_exception(kind, error, _from_the_users(error))),
    )
    described.__cause__ = error
    return described
