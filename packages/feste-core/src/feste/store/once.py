"""Run a ``once=True`` task: at most once for each of its calls, however often the program runs.

Such a call is kept like a paid call: its arguments are the request, its result is the answer. What
differs is the unknown window: a paid call whose answer is unknown is bought again, such a task is
not run again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, NamedTuple

from feste.backend import Request, Response, redact
from feste.backend.request import canonical
from feste.draw import Draw
from feste.errors import ConfigError, NodeError, NotRepeated, PlainDataError
from feste.plain import plain
from feste.store.answers import Answers
from feste.store.journal import Journal, Outcome, outcome_of
from feste.store.rows import Answer, Earlier, Found

__all__ = ["await_once", "request_of", "run_once"]

#: Characters of an exception's text that are kept.
_ERROR = 1000


class _Begun(NamedTuple):
    """A call that has been noted and not ended."""

    store: Journal
    request: Request
    number: int


def request_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], drawn: Draw) -> Request:
    """Return what stands for a call of a task, as a request stands for a call of a backend.

    :param op: the task.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param drawn: its draw.
    :raises ConfigError: if an argument is not plain data, so that a rerun would not recognize it.
    """
    try:
        body = {"args": plain(list(args), "args"), "kwargs": plain(dict(kwargs), "kwargs")}
    except PlainDataError as error:
        raise ConfigError(
            f"{op.name} is a task with once=True, and a rerun knows its calls by their arguments, which "
            f"must be plain data: {error.message}"
        ) from None
    for name, given in body.items():
        canonical(given, name)  # raises for NaN and infinity, which JSON does not have
    return Request("task", op.name, f"task:{op.identity}", body, draws=(drawn,))


def run_once(
    answers: Answers, op: Any, drawn: Draw, args: Sequence[Any], kwargs: Mapping[str, Any], run: str
) -> tuple[Any, bool]:
    """Return the kept result of a call, or run it and keep its result.

    :param answers: the run's store.
    :param op: the task.
    :param drawn: the draw of its node.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param run: the run's name.
    :returns: the result, and whether it was kept before.
    :raises NotRepeated: if it was started before and is not known to have returned.
    """
    known, begun = _begin(answers, op, drawn, args, kwargs, run)
    if begun is None:
        return known, True
    try:
        result = op.fn(*args, **kwargs)
    except BaseException as error:
        _failed(begun, error)
        raise
    return _ended(begun, result), False


async def await_once(
    answers: Answers, op: Any, drawn: Draw, args: Sequence[Any], kwargs: Mapping[str, Any], run: str
) -> tuple[Any, bool]:
    """Do what :func:`run_once` does for an ``async def`` task; parameters are the same.

    :param answers: the run's store.
    """
    noted = asyncio.ensure_future(asyncio.to_thread(_begin, answers, op, drawn, args, kwargs, run))
    try:
        known, begun = await asyncio.shield(noted)
    except asyncio.CancelledError:
        noted.add_done_callback(_withdraw)
        raise
    if begun is None:
        return known, True
    try:
        result = await op.fn(*args, **kwargs)
    except BaseException as error:
        _failed(begun, error)
        raise
    return await asyncio.to_thread(_ended, begun, result), False


def _begin(
    answers: Answers, op: Any, drawn: Draw, args: Sequence[Any], kwargs: Mapping[str, Any], run: str
) -> tuple[Any, _Begun | None]:
    store = answers.store
    assert store is not None, "checked before the run"
    request = request_of(op, args, kwargs, drawn)
    known: Found | int = outcome_of(store.begin, request, run=run, prompts=answers.prompts)
    if isinstance(known, int):
        return None, _Begun(store, request, known)
    if known.response is not None:
        return known.response.payload, None
    assert known.earlier is not None
    raise _not_repeated(store, op, known.earlier)


def _withdraw(noted: asyncio.Future[tuple[Any, _Begun | None]]) -> None:
    """Take back the note of a call that was cancelled before it began."""
    begun = None if noted.cancelled() or noted.exception() else noted.result()[1]
    if begun is not None:
        begun.store.finish(begun.number, "withdrawn")


def _ended(begun: _Begun, result: Any) -> Any:
    """Keep the result; it is what JSON keeps of it, so that a rerun gives the same."""
    try:
        value = json.loads(json.dumps(result))
    except (TypeError, ValueError) as error:
        wrong = ConfigError(
            f"{begun.request.operation} has run, but its result cannot be kept: {error}. A task with "
            "once=True returns JSON data"
        )
        _failed(begun, wrong)
        raise wrong from None
    response = Response(value)
    kept = [Answer(begun.request, response)]
    outcome_of(begun.store.record, kept, number=begun.number, response=response)
    return value


def _failed(begun: _Begun, error: BaseException) -> None:
    """Keep that the task raised; where it was interrupted nobody knows how far it got."""
    told = NodeError(redact(f"{type(error).__name__}: {error}", limit=_ERROR))
    outcome: Outcome = "failed" if isinstance(error, Exception) else "unknown"
    outcome_of(begun.store.finish, begun.number, outcome, told)


def _not_repeated(store: Journal, op: Any, earlier: Earlier) -> NotRepeated:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(earlier.sent))
    if earlier.outcome == "sent":
        return NotRepeated(
            f"{op.name} was started at {when} and still runs in this process; with once=True it is not "
            "run again. Compute it again when it has ended",
            key=earlier.key,
        )
    ended = f"raised {earlier.error.removeprefix('NodeError: ')}"
    if earlier.outcome == "unknown" and earlier.error.startswith("NodeError: "):
        ended = "was interrupted"
    elif earlier.outcome == "unknown":
        ended = f"did not return{f' ({earlier.error})' if earlier.error else ''}"
    which = f"--key {earlier.key} --tasks {earlier.outcome}"
    return NotRepeated(
        f"{op.name} was started at {when} and {ended}; with once=True it is not run again. Look whether "
        f"it has done its work. To let it run again: feste store purge {quote(str(store.path))} {which}",
        key=earlier.key,
    )
