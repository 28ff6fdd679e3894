"""Failure: what it costs, what is handed over, and what its errors carry."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cloudpickle
import pytest

import feste
from feste import errors
from feste.backend import Operation
from feste.errors import (
    CallError,
    ContentFiltered,
    FesteError,
    InvalidRequest,
    MalformedResponse,
    NodeError,
    NotStarted,
    RunFailed,
    RunInterrupted,
    UpstreamFailed,
    WorkerLost,
)
from feste.scheduler.driver import driver
from feste.testing import FakeBackend

LONG = 30.0


@feste.task
def share(a: float, b: float) -> float:
    return a / b


@feste.task
def total(*parts: Any) -> Any:
    return sum(parts)


def failed(*args: Any, **settings: Any) -> RunFailed:
    """Compute what must fail; return the error."""
    with pytest.raises(RunFailed) as caught:
        feste.compute(*args, **settings)
    return caught.value


def here(offset: int) -> str:
    """``file:line`` of a line near the caller's."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return f"{__file__}:{frame.f_back.f_lineno + offset}"


# --- raise, return, stop -------------------------------------------------------------------------


def test_raise_finishes_what_is_not_poisoned() -> None:
    """The default: everything that can be computed is, then RunFailed with all of it."""
    good, bad = share(6, 3), share(1, 0)
    needs = total(good, bad)
    error = failed([good, needs], {"bad": bad, "fine": share(9, 3)})

    values, rest = error.partial
    assert values[0] == 2.0 and rest["fine"] == 3.0
    assert isinstance(values[1], UpstreamFailed) and isinstance(rest["bad"], NodeError)
    assert values[1].roots == (rest["bad"],) == error.errors
    assert error.report.states == {"done": 2, "failed": 1, "skipped": 1}


def test_return_puts_the_error_in_its_place() -> None:
    """No exception: the same shape with errors where values would be, and equal to ``partial``."""
    nodes = [share(6, 3), share(1, 0)]
    needs = total(*nodes)

    values, last = feste.compute(nodes, needs, on_error="return")

    assert values[0] == 2.0
    assert isinstance(values[1], NodeError) and isinstance(last, UpstreamFailed)


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


class Point(NamedTuple):
    x: Any
    y: Any


class Names(dict):  # type: ignore[type-arg]
    """A dict of the user's own."""


def test_partial_has_the_shape_that_was_asked_for() -> None:
    """Dicts, dataclasses, named tuples, sets, nested as they were; plain values stay."""
    good, bad = share(6, 3), share(1, 0)
    shape = Pair({"a": [good, (bad, "plain")]}, Names(p=Point(bad, 7)))
    partial, held = failed(shape, {good, bad}).partial

    assert partial.left["a"][0] == 2.0 and partial.left["a"][1][1] == "plain"
    assert isinstance(partial.left["a"][1][0], NodeError)
    assert type(partial.right) is Names and type(partial.right["p"]) is Point
    assert partial.right["p"].y == 7 and partial.right["p"].x is partial.left["a"][1][0]
    assert {type(part) for part in held} == {float, NodeError}


def stopping() -> bool:
    """Wait until a run has begun to stop."""
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        if any(run.stopping for run in list(driver().brain.runs)):
            return True
        time.sleep(0.001)
    return False


def test_stop_starts_nothing_new() -> None:
    """``"stop"``: after the first failure only what is under way ends; its values are handed over."""
    begun: list[int] = []
    first = threading.Event()
    llm = FakeBackend(model="on-error-stop")

    @feste.task
    def under_way() -> str:
        first.set()
        return "drained" if stopping() else "too late"

    @feste.task
    def breaks() -> None:
        first.wait(LONG)
        raise ValueError("broken")

    @feste.task
    def after(x: Any) -> str:
        begun.append(1)
        return "text"

    flying, broken = under_way(), breaks()
    later = after(flying)
    error = failed(flying, broken, later, [llm.chat(later) for _ in range(5)], on_error="stop")

    assert error.partial[0] == "drained"
    assert isinstance(error.partial[1], NodeError)
    assert isinstance(error.partial[2], NotStarted) and "not begun" in str(error.partial[2])
    assert "5 x NotStarted" in str(error)  # of one line: one kind
    assert begun == [] and llm.requests == []
    assert error.report.states == {"done": 1, "failed": 1, "not_started": 6}


def test_stop_keeps_answers_that_are_being_read() -> None:
    """A paid answer that has come but is not parsed yet is not lost when the run stops."""
    parsing, go_on = threading.Event(), threading.Event()

    class Slow(FakeBackend):
        plugin = "slow"

    def parse(backend: Any, response: Any, arguments: Any) -> str:
        parsing.set()
        go_on.wait(LONG)
        return str(response.payload["answers"][0])

    Slow.chat = Operation(  # type: ignore[assignment]
        prepare=FakeBackend._prepare_chat, send=FakeBackend._send, parse=parse
    )
    Slow.chat.__set_name__(Slow, "chat")
    llm = Slow(model="on-error-parse")

    @feste.task
    def breaks() -> None:
        parsing.wait(LONG)
        go_on.set()
        raise ValueError("broken")

    nodes = [llm.chat(f"{i}") for i in range(5)]
    error = failed(nodes, breaks(), on_error="stop")
    answered = [value for value in error.partial[0] if isinstance(value, str)]

    assert len(answered) == len(llm.requests)
    assert feste.compute(nodes)[0] and len(llm.requests) == 5


def test_each_failure_costs_what_needs_it_and_no_more() -> None:
    """In a layered graph, exactly the nodes with a failed ancestor have no value; the counts add up."""

    @feste.task
    def cell(row: int, column: int, *needs: int) -> int:
        if (row, column) in {(0, 0), (2, 7), (5, 3)}:
            raise ValueError(f"cell {row} {column}")
        return 1

    rows, width = 8, 12
    grid: list[list[Any]] = []
    lost: list[list[bool]] = []
    for row in range(rows):
        above = grid[-1] if grid else []
        gone = lost[-1] if lost else []
        line, missing = [], []
        for column in range(width):
            near = [c for c in (column - 1, column, column + 1) if above and 0 <= c < width]
            near = near if row % 3 else near[:1]
            line.append(cell(row, column, *[above[c] for c in near]))
            missing.append((row, column) in {(0, 0), (2, 7), (5, 3)} or any(gone[c] for c in near))
        grid.append(line)
        lost.append(missing)
    got = feste.compute(grid, on_error="return")[0]
    states = feste.last_report().states  # type: ignore[union-attr]

    assert [[isinstance(v, FesteError) for v in line] for line in got] == lost
    assert sum(states.values()) == rows * width
    assert states["done"] == sum(not m for line in lost for m in line)
    for line in got:
        for value in line:
            if isinstance(value, UpstreamFailed):
                assert all(isinstance(root, NodeError) for root in value.roots)


def test_a_poisoned_node_is_never_begun() -> None:
    """What needs a failed node costs nothing: no Python, no request."""
    llm = FakeBackend(model="on-error-poison", fail={"bad": InvalidRequest("refused")})
    ran: list[str] = []
    note = feste.task(lambda text: ran.append(text))
    node: Any = llm.chat("bad")
    for _ in range(20):
        node = llm.chat(node)
    error = failed(node, note(node))

    assert len(llm.requests) == 1 and ran == []
    assert error.report.states == {"failed": 1, "skipped": 21}


def test_it_can_be_computed_again() -> None:
    """A failed node keeps nothing: the next compute tries it anew, and what was paid is not paid again."""
    llm = FakeBackend(model="on-error-again")
    broken = [True]

    @feste.task
    def sometimes(text: str) -> str:
        if broken:
            raise ValueError("not yet")
        return text

    nodes = [sometimes(llm.chat(f"{i}")) for i in range(5)]
    assert len(failed(nodes).errors) == 5
    broken.clear()

    assert len(set(feste.compute(nodes)[0])) == 5
    assert len(llm.requests) == 5


# --- what the errors say -------------------------------------------------------------------------


def test_errors_name_the_users_lines() -> None:
    """Each error carries the ``file:line`` of the call that it belongs to."""
    llm = FakeBackend(model="on-error-lines", fail={"bad": ContentFiltered("filtered")})
    bad = share(1, 0)
    needs = total(bad)
    call = llm.chat("bad")
    lines = [here(-3), here(-2), here(-1)]

    lines = [f"{__file__}:{int(lines[0].rpartition(':')[2]) + k}" for k in range(3)]
    got = feste.compute(bad, needs, call, on_error="return")

    assert [error.origin for error in got] == lines
    assert all(f"(at {line})" in str(error) for error, line in zip(got, lines, strict=True))


def test_run_failed_says_what_happened() -> None:
    """Its text counts and shows the first errors, its cause is the first of them."""
    error = failed([share(i, 0) for i in range(5)])

    assert str(error).startswith("all 5 results failed")
    assert "5 x NodeError: ZeroDivisionError" in str(error)
    assert "at partial[0][0], partial[0][1], partial[0][2] and 2 more" in str(error)
    assert error.__cause__ is error.errors[0]
    assert isinstance(error.errors[0].__cause__, ZeroDivisionError)


def test_the_traceback_of_a_task_begins_with_the_users_function() -> None:
    """Feste's own frames above it say nothing to the user."""
    (error,) = failed(share(1, 0)).errors

    assert isinstance(error, NodeError)
    assert error.cause_type == "ZeroDivisionError"
    first = next(line for line in error.traceback.splitlines() if line.startswith("  File "))
    assert first.startswith(f'  File "{__file__}"') and first.endswith("in share")


class Unprintable(Exception):
    """An exception that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Worse(Exception):
    """An exception that ends the program when it is asked."""

    def __str__(self) -> str:
        raise SystemExit("no words")


@pytest.mark.parametrize("kind", [Unprintable, Worse])
def test_an_exception_that_cannot_be_printed_fails_its_node_only(kind: type[Exception]) -> None:
    """Whatever ``__str__`` does, the node fails with the class's name, and the run goes on."""

    @feste.task
    def breaks() -> None:
        raise kind

    bad, good = feste.compute(breaks(), share(4, 2), on_error="return")

    assert good == 2.0
    assert isinstance(bad, NodeError) and kind.__name__ in str(bad)


@pytest.mark.parametrize("executor", ["thread", "inline"])
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_exits_inside_a_task_fail_its_node(kind: type[BaseException], executor: Any) -> None:
    """A task cannot end Feste's threads: its exit is its node's failure, other nodes go on."""

    @feste.task(executor=executor)
    def leaves() -> None:
        raise kind("enough")

    bad, *good = feste.compute(leaves(), *[share(i, 1) for i in range(20)], on_error="return")

    assert good == [float(i) for i in range(20)]
    assert isinstance(bad, NodeError)
    assert bad.cause_type == kind.__name__ and isinstance(bad.__cause__, kind)


def test_an_error_of_feste_that_a_task_raises_stays_what_it_is() -> None:
    """A failed run inside a task is that task's error, with its own errors inside."""

    @feste.task
    def outer() -> None:
        share(1, 0).compute()

    (error,) = failed(outer()).errors

    assert isinstance(error, RunFailed)
    assert isinstance(error.errors[0], NodeError)


def test_members_of_a_failed_batch_have_errors_of_their_own() -> None:
    """One refused request fails each of its calls with the line of that call."""
    llm = FakeBackend(model="on-error-batch", fail={"bad": MalformedResponse("garbage")})
    calls = [llm.complete("bad a"), llm.complete("bad b"), llm.complete("bad c")]
    got = feste.compute(calls, on_error="return")[0]

    assert len({id(error) for error in got}) == 3
    assert [error.node for error in got] == [call.key for call in calls]
    assert all(type(error) is MalformedResponse for error in got)


# --- errors are plain data -----------------------------------------------------------------------


def every_error() -> list[type[BaseException]]:
    found = [FesteError, RunInterrupted]
    for one in found:
        found += [kind for kind in one.__subclasses__() if kind.__module__ == errors.__name__]
    return list(dict.fromkeys(found))


def made(kind: type[BaseException]) -> BaseException:
    """An error with everything set that it can have."""
    given: dict[str, Any] = {
        "origin": "app.py:3",
        "billed": "unknown",
        "status": 503,
        "code": "busy",
        "request_id": "req-1",
        "retry_after": 1.5,
        "node": "chat-1",
        "cause_type": "ValueError",
        "traceback": "Traceback ...",
        "roots": (InvalidRequest("root", status=400),),
        "partial": ([1, {"a": 2}],),
        "report": {"nodes": 3},
        "errors": (NodeError("inner", node="f-1"),),
    }
    known = inspect.signature(kind).parameters
    error = kind("it broke: ä\n", **{k: v for k, v in given.items() if k in known})
    if isinstance(error, CallError):
        error.node, error.backend, error.model, error.attempts = "chat-1", "openai", "gpt", 4
    return error


def attributes(error: BaseException) -> dict[str, Any]:
    """All that an error says, errors inside it by what they say."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseException):
            return attributes(value)
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    names = sorted(set(vars(error)) | {"billed", "attempts", "origin"})
    told = {name: plain(getattr(error, name, None)) for name in names}
    return {"class": type(error), "args": error.args, "text": str(error), **told}


ROUND_TRIPS: dict[str, Callable[[Any], Any]] = {
    **{f"pickle {p}": lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in (2, 5)},  # type: ignore[misc]
    "cloudpickle": lambda e: pickle.loads(cloudpickle.dumps(e)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@pytest.mark.parametrize("kind", every_error(), ids=lambda k: k.__name__)
def test_every_error_travels(kind: type[BaseException], trip: str) -> None:
    """Errors pickle and copy with all they carry: they cross processes, and are stored."""
    error = made(kind)

    assert attributes(ROUND_TRIPS[trip](error)) == attributes(error)


def test_the_list_of_errors_is_not_empty() -> None:
    """The test above sees the whole tree."""
    assert len(every_error()) > 30
    assert {RunFailed, WorkerLost, RunInterrupted, UpstreamFailed} <= set(every_error())


def test_a_real_failure_travels() -> None:
    """An error of a real run pickles with its partial results and its report."""
    llm = FakeBackend(model="on-error-travel", fail={"bad": InvalidRequest("refused", status=400)})
    error = failed([share(1, 0), llm.chat("bad"), llm.chat("good"), total(llm.chat("bad"))])
    back = pickle.loads(pickle.dumps(error))

    assert str(back) == str(error)
    assert [type(e) for e in back.errors] == [type(e) for e in error.errors]
    assert back.partial[0][2] == error.partial[0][2]
    assert back.report == error.report
