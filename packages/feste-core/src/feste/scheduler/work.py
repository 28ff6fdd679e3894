"""Run one piece of Python, in any executor, and turn exceptions into Feste errors."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from types import TracebackType
from typing import Any

from feste import context, draw
from feste.errors import FesteError, NodeError
from feste.fused import Fused, Halted, StepFailed, watched
from feste.packing import Deps, fill, fresh, holds_nodes, pack
from feste.scheduler.emission import Emission
from feste.scheduler.executor import PyTask
from feste.scheduler.run import around
from feste.store.once import await_once, run_once
from feste.wording import class_name

__all__ = [
    "arguments",
    "await_task",
    "cause_of",
    "context_of",
    "describe",
    "evaluate",
    "guard",
    "result_of",
    "run_task",
]

#: A coroutine cannot wait for a call, so there is no eager mode in it: its calls are nodes.
_LAZY = context.Layer({"eager": False})
#: Modules whose frames surround those of a user's function.
_OURS = ("feste.scheduler.", "feste.fused")


def context_of(task: PyTask) -> Context:
    """Return the context a task runs in: a copy of its run's, which also identifies the task.

    :param task: the task.
    """
    copied = task.run.context.copy()
    copied.run(_enter, task)
    return copied


def _enter(task: PyTask) -> None:
    run, drawn = task.run, task.node.draw
    around.set((run.name, task.index, run.around))
    if drawn is not None and task.stage == "run":
        draw.enter(drawn, run.scopes)
        if getattr(task.node.op, "is_async", False):
            context.enter(_LAZY)
        if type(task.node.op) is Fused:
            watched.set(run)


def arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments for a user's function, copied so that the function may change them.

    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: the values for the slots.
    """
    given = [fresh(a, values) for a in args]
    return given, {k: fresh(v, values) for k, v in kwargs.items()} if kwargs else {}


def evaluate(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> Any:
    """Call a function with packed arguments.

    :param fn: the function.
    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: the values for the slots.
    """
    given, named = arguments(args, kwargs, values)
    return fn(*given, **named)


def run_task(task: PyTask) -> Any:
    """Run a task; only users' functions get copies of their arguments, halves do not.

    :param task: the task.
    """
    if task.stage != "run":
        return task.fn(*task.args)
    if task.node.op.kind == "task":
        return evaluate(task.fn, task.args, task.kwargs, task.values)
    given = [fill(a, task.values) for a in task.args]
    return task.fn(*given, **{k: fill(v, task.values) for k, v in task.kwargs.items()})


async def await_task(task: PyTask) -> Any:
    """Await an ``async def`` task.

    :param task: the task.
    """
    given, named = arguments(task.args, task.kwargs, task.values)
    return await task.fn(*given, **named)


def guard(task: PyTask) -> None:
    """Give a task with ``once=True`` a function that runs at most once, whatever executor calls it.

    :param task: the task.
    """
    op: Any = task.node.op
    answers, drawn = task.run.answers, task.node.draw
    assert answers is not None and drawn is not None, "checked before the run"

    def run(*args: Any, **kwargs: Any) -> Any:
        value, task.replayed = run_once(answers, op, drawn, args, kwargs, task.run.name)
        return value

    async def wait(*args: Any, **kwargs: Any) -> Any:
        value, task.replayed = await await_once(answers, op, drawn, args, kwargs, task.run.name)
        return value

    task.fn = wait if op.is_async else run


def result_of(value: Any) -> Any:
    """Wrap a result in an :class:`~feste.scheduler.emission.Emission` if it contains nodes.

    :param value: what a user's function returned, or a fused node.
    """
    at, returned = (value.at, value.value) if type(value) is Halted else (-1, value)
    if not holds_nodes(returned):
        return value
    deps = Deps()
    return Emission(pack(returned, deps), deps.nodes, at)


def _from_the_users(error: BaseException) -> TracebackType | None:
    """Return the traceback without Feste's leading frames, or all of it if there are no others."""
    begin = error.__traceback__
    while begin is not None and _is_ours(begin):
        begin = begin.tb_next
    return begin or error.__traceback__


def _is_ours(step: TracebackType) -> bool:
    return str(step.tb_frame.f_globals.get("__name__", "")).startswith(_OURS)


def describe(error: BaseException) -> FesteError:
    """Turn any exception into a Feste error.

    :param error: the exception.
    """
    if type(error) is StepFailed:
        if error.error is None and error.__cause__ is not None:
            error.error = describe(error.__cause__)
            error.__cause__ = error.error.__cause__
        return error
    if isinstance(error, FesteError):
        return error
    kind = type(error)
    name = class_name(kind)
    try:
        said = str(error)
    except BaseException as broken:  # __str__ itself raised, perhaps even SystemExit
        said = f"<{type(broken).__name__} while printing it>"
    described = NodeError(
        f"{name}: {said}",
        cause_type=name,
        traceback="".join(traceback.format_exception(kind, error, _from_the_users(error))),
    )
    described.__cause__ = error
    return described


def cause_of(error: FesteError, kind: type[FesteError] | None = None) -> FesteError:
    """Return the original error if a half of an operation raised one of Feste's errors.

    :param error: the error, as described by the executor.
    :param kind: wraps an error that is none of Feste's; None returns it as it is.
    """
    cause = error.__cause__ if isinstance(error, NodeError) else error
    if isinstance(cause, FesteError):
        return cause
    if kind is not None:
        wrapped = kind(f"the answer could not be read: {error.args[0]}")
        wrapped.__cause__ = cause
        return wrapped
    return error
