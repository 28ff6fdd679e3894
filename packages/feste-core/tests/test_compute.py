"""``compute``: shapes, big graphs, chunks of small tasks, and what a run leaves behind."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

import feste
from feste.errors import (
    ConfigError,
    FesteError,
    NodeError,
    RunFailed,
    StalledError,
    UnknownName,
    UpstreamFailed,
)
from feste.garbage import no_collection
from feste.scheduler.driver import driver
from feste.testing import FakeBackend, FakeParams

MANY = 100_000
LONG = 30.0


def until(what: Callable[[], Any]) -> bool:
    """Wait for something that happens on another thread; False if it never does."""
    deadline = time.monotonic() + LONG
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


@feste.task
def same(x: Any) -> Any:
    return x


@feste.task
def add(a: int, b: int) -> int:
    return a + b


@feste.task
def increment(x: int) -> int:
    return x + 1


# --- shapes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


class Point(NamedTuple):
    x: Any
    y: Any


class Names(dict):  # type: ignore[type-arg]
    """A dict of the user's own."""


def test_each_argument_comes_back_in_its_own_shape() -> None:
    """Lists, tuples, dicts, sets, dataclasses, named tuples and their subclasses keep their class."""
    one, two = same(1), same(2)
    ordered = OrderedDict(b=one, a=[two])
    given = ([one, [two]], (one,), {"k": two}, {one, 3}, frozenset([two]), Pair(one, {"r": two}))
    more = (Point(one, 0), ordered, Names(n=one), 5, "text", None)

    assert feste.compute(*given) == ([1, [2]], (1,), {"k": 2}, {1, 3}, {2}, Pair(1, {"r": 2}))
    got = feste.compute(*more)
    assert got == (Point(1, 0), OrderedDict(b=1, a=[2]), {"n": 1}, 5, "text", None)
    assert [type(part) for part in got[:3]] == [Point, OrderedDict, Names]
    assert list(got[1]) == ["b", "a"]


def test_the_arguments_themselves_are_not_changed() -> None:
    """Values are put into copies: the lists and dataclasses that were given keep their nodes."""
    node = same(1)
    given = [node, {"k": node}]
    pair = Pair(node, given)

    feste.compute(given, pair)
    assert given[0] is node and given[1] == {"k": node} and pair.left is node


def test_plain_values_need_no_run() -> None:
    """Arguments without nodes come back as they are, and no run is made of them."""
    before = feste.last_report()

    assert feste.compute() == ()
    assert feste.compute(1, [2], {"a": {3}}) == (1, [2], {"a": {3}})
    assert feste.last_report() is before


def test_a_node_used_often_runs_once() -> None:
    """One node is one run of its function in a compute, however often it is used."""
    calls: list[int] = []

    @feste.task
    def noted(x: int) -> int:
        calls.append(x)
        return x

    node = noted(1)

    assert feste.compute(node, [node, node], add(node, node)) == (1, [1, 1], 2)
    assert calls == [1]


def test_a_paid_answer_stays_with_its_node() -> None:
    """``keep="paid"``: calls keep their answers while they live, Python tasks run again."""
    llm = FakeBackend(model="compute-keep")
    runs: list[str] = []

    @feste.task
    def shout(text: str) -> str:
        runs.append(text)
        return text.upper()

    call = llm.chat("hello")
    loud = shout(call)

    assert loud.compute() == loud.compute()
    assert (len(llm.requests), len(runs)) == (1, 2)
    assert feste.last_report().states == {"kept": 1, "done": 1}  # type: ignore[union-attr]


@pytest.mark.parametrize(("keep", "requests", "runs"), [("all", 1, 1), ("none", 2, 2)])
def test_keep_says_which_values_stay(keep: str, requests: int, runs: int) -> None:
    """``"all"`` keeps the values of tasks too; ``"none"`` keeps none, so a call is bought again."""
    llm = FakeBackend(model="compute-keep")
    made: list[int] = []

    @feste.task
    def noted(text: str) -> str:
        made.append(1)
        return text

    node = noted(llm.chat("hello"))
    first = node.compute(keep=keep)

    assert node.compute(keep=keep) == first
    assert (len(llm.requests), len(made)) == (requests, runs)


def test_wrong_settings_are_refused_before_anything_runs() -> None:
    """An unknown setting, scheduler or pass, or a wrong value, is an error before the first task."""
    ran: list[int] = []
    node = feste.task(lambda: ran.append(1))()

    with pytest.raises(UnknownName, match="on_error"):
        node.compute(on_eror="return")
    with pytest.raises(ConfigError, match="on_error"):
        node.compute(on_error="ignore")
    with pytest.raises(UnknownName, match="local"):
        node.compute(scheduler="locla")
    with pytest.raises(UnknownName, match="batch"):
        node.compute(optimize={"bacth": False})
    assert ran == []


name: ContextVar[str] = ContextVar("name", default="nobody")


def test_a_task_sees_the_callers_context_and_changes_only_its_own() -> None:
    """Each task runs in its own copy of the context in which ``compute`` was called."""

    @feste.task
    def renamed(to: str) -> str:
        before = name.get()
        name.set(to)
        return before

    token = name.set("caller")
    try:
        seen = feste.compute([renamed(str(i)) for i in range(50)])[0]

        assert seen == ["caller"] * 50
        assert name.get() == "caller"
    finally:
        name.reset(token)


def test_settings_of_the_caller_hold_inside_its_tasks() -> None:
    """A task sees the overlay of the block that computes it."""
    node = feste.task(lambda: feste.context.get("keep"))()

    with feste.context.set(keep="none"):
        assert node.compute() == "none"
    assert node.compute() == "paid"


# --- big graphs ----------------------------------------------------------------------------------


def test_a_hundred_thousand_nodes_side_by_side() -> None:
    """A wide graph runs, and every value is in its place."""
    values = feste.compute([increment(i) for i in range(MANY)])[0]

    assert values == list(range(1, MANY + 1))
    assert feste.last_report().states == {"done": MANY}  # type: ignore[union-attr]


def test_a_chain_of_a_hundred_thousand_nodes() -> None:
    """A chain as long as memory allows runs without recursion."""
    node: Any = 0
    for _ in range(MANY):
        node = increment(node)

    assert node.compute(optimize={"fuse": False}) == MANY
    assert feste.last_report().states == {"done": MANY}  # type: ignore[union-attr]


def test_a_tree_of_a_hundred_thousand_nodes() -> None:
    """A tree that folds its leaves pair by pair runs to its root."""
    level: list[Any] = list(range(MANY + 1))
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        level = [add(a, b) for a, b in zip(level[::2], level[1::2], strict=False)] + odd

    assert level[0].compute(optimize={"fuse": False}) == MANY * (MANY + 1) // 2
    assert feste.last_report().states == {"done": MANY}  # type: ignore[union-attr]


# --- chunks --------------------------------------------------------------------------------------


def test_plans_of_two_threads_leave_the_collector_on() -> None:
    """A plan that begins as another ends does not turn the collector off for good."""
    decided, over = threading.Event(), threading.Event()
    seen: list[int] = []

    def stop_behind_the_decision(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is no_collection.__wrapped__.__code__ and event == "line":
            seen.append(frame.f_lineno)
            if len(seen) == 2:
                decided.set()
                over.wait(30)
        return stop_behind_the_decision

    def plan() -> None:
        sys.settrace(stop_behind_the_decision)
        with no_collection():
            pass

    with no_collection():
        other = threading.Thread(target=plan)
        other.start()
        assert decided.wait(30)
        assert not gc.isenabled()
    over.set()
    other.join()

    assert gc.isenabled()


def test_a_failing_node_inside_a_chunk_costs_only_what_needs_it() -> None:
    """In chains that run as chunks, what comes before the failure and beside it is delivered."""

    @feste.task
    def step(x: int, bad: int) -> int:
        if x == bad:
            raise ValueError(f"no {x}")
        return x + 1

    chains: list[list[Any]] = []
    for begin in range(40):
        chain: list[Any] = [step(1000 * begin, 1000 * begin + 25 if begin % 2 else -1)]
        for _ in range(49):
            chain.append(step(chain[-1], 1000 * begin + 25 if begin % 2 else -1))
        chains.append(chain)
    got = feste.compute(chains, on_error="return")[0]

    for begin, chain in enumerate(got):
        good = 25 if begin % 2 else 50
        assert chain[:good] == [1000 * begin + i + 1 for i in range(good)]
        if begin % 2:
            assert isinstance(chain[25], NodeError) and f"no {1000 * begin + 25}" in str(chain[25])
            assert all(isinstance(rest, UpstreamFailed) for rest in chain[26:])
            assert {rest.roots for rest in chain[26:]} == {(chain[25],)}
    states = feste.last_report().states  # type: ignore[union-attr]
    assert states == {"done": 20 * 50 + 20 * 25, "failed": 20, "skipped": 20 * 24}


def warm(task: Any) -> None:
    """Let the scheduler learn that a task is small, so that many go into one chunk."""
    feste.compute([task(i) for i in range(2000)])


def test_a_slow_task_does_not_hold_back_those_behind_it() -> None:
    """What waits behind a long task in its chunk is taken back and runs elsewhere.

    The first task of the chunk waits for the last one: if the tail stayed with it, neither would end.
    """
    last = threading.Event()

    @feste.task
    def quick(i: int) -> bool:
        if i == -1:
            return last.wait(LONG)
        if i == -2:
            last.set()
        return True

    warm(quick)
    got = feste.compute([quick(-1), *[quick(i) for i in range(30)], quick(-2)])[0]

    assert got == [True] * 32


def test_every_slow_task_of_a_chunk_is_made_up_for() -> None:
    """Several of a chunk may be slow: each time the rest goes on elsewhere."""
    together = threading.Barrier(4)

    @feste.task
    def quick(i: int) -> bool:
        if i < 0:
            together.wait(LONG)
        return True

    warm(quick)
    got = feste.compute([quick(i if i % 10 else -1) for i in range(40)])[0]

    assert got == [True] * 40


def test_values_are_handed_on_before_their_chunk_is_through() -> None:
    """What a chunk has finished is used at once, while one of its tasks still runs."""
    used = threading.Event()

    @feste.task
    def quick(i: int) -> bool:
        return used.wait(LONG) if i == -1 else True

    @feste.task
    def uses(first: bool) -> bool:
        used.set()
        return first

    warm(quick)
    first = quick(0)
    others = [quick(i) for i in range(1, 10)]

    assert feste.compute(first, quick(-1), others, uses(first)) == (True, True, [True] * 9, True)


# --- what a run leaves behind --------------------------------------------------------------------


class Big:
    """Something that can be watched as it goes."""


def test_values_that_nobody_needs_any_more_are_let_go_while_the_run_goes_on() -> None:
    """An intermediate value lives until its last consumer has it, not until the run ends."""
    alive: list[Any] = []

    @feste.task
    def make() -> Big:
        made = Big()
        alive.append(weakref.ref(made))
        return made

    @feste.task
    def forget(big: Big) -> int:
        return 1

    @feste.task
    def gone(_: int) -> bool:
        gc.collect()
        return until(lambda: alive[0]() is None)

    assert gone(forget(make())).compute()


def test_a_run_keeps_no_value_after_its_end() -> None:
    """When the caller drops the results, nothing of Feste holds them: no idle thread, no timer."""

    @feste.task
    def make() -> Big:
        return Big()

    value = make().compute()
    watch = weakref.ref(value)
    del value

    assert until(lambda: gc.collect() is None or watch() is None)


def test_a_failed_run_keeps_nothing_once_its_error_is_dropped() -> None:
    """An error holds frames, these hold values: all go with the error."""
    watched: list[Any] = []

    @feste.task
    def breaks() -> None:
        local = Big()
        watched.append(weakref.ref(local))
        raise ValueError(local)

    try:
        breaks().compute()
    except RunFailed as error:
        assert watched[0]() is not None
        del error

    assert until(lambda: gc.collect() is None or watched[0]() is None)


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit])
def test_a_defect_of_the_scheduler_ends_its_runs_and_no_other(
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the brain breaks, what waits is told so at once; what comes later runs, with its own answers."""
    going, go_on = threading.Event(), threading.Event()
    llm = FakeBackend(model="compute-defect")

    @feste.task
    def waits() -> bool:
        going.set()
        return go_on.wait(LONG)

    def greedy() -> list[str]:
        asked = [llm.chat(f"{i}", FakeParams(temperature=0.0)) for i in range(20)]
        return feste.compute(asked)[0]  # type: ignore[no-any-return]

    answers = greedy()
    brain = driver().brain
    honest = brain.gates.admit

    def broken() -> None:
        if len(brain.runs) == 2 and driver().brain is brain:
            raise kind("a defect")
        honest()

    monkeypatch.setattr(brain.gates, "admit", broken)
    caught: list[BaseException] = []

    def first() -> None:
        try:
            waits().compute()
        except FesteError as error:
            caught.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert going.wait(LONG)
    with pytest.raises(FesteError, match=rf"please report this(.|\n)*{kind.__name__}: a defect"):
        same(1).compute()
    thread.join(LONG)
    assert [type(error) for error in caught] == [StalledError]

    go_on.set()  # the task of the broken run reports to a brain that never heard of it
    assert feste.compute([same(i) for i in range(100)])[0] == list(range(100))
    assert greedy() == answers
