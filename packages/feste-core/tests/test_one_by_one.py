"""``feste.as_completed`` and ``feste.map``: the same values as ``compute``, one by one, and no more work."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import draw
from feste.backend import Backend, Limits, operation
from feste.context import Settings
from feste.errors import (
    BlockingCallError,
    ConfigError,
    FesteError,
    GraphError,
    InvalidRequest,
    NodeError,
    NotStarted,
    RunFailed,
    UpstreamFailed,
)
from feste.graph import FesteGraph
from feste.node import Node
from feste.scheduler.driver import driver
from feste.scheduler.executor import Scheduler
from feste.scheduler.handing import Outlet
from feste.testing import FakeBackend, FakeParams, VirtualClock, random_graph

LONG = 30.0
PROGRAMS = 40


@feste.task
def double(x: Any) -> Any:
    return 2 * x


@feste.task
def broken(x: Any) -> Any:
    raise ValueError(x)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that Feste's threads do."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


class Held(Backend):
    """Answers when a test lets it; counts what it was asked and what was cancelled."""

    plugin = "held"

    def __init__(self) -> None:
        self.holds: set[str] = set()
        self.asked: list[str] = []
        self.cancelled: list[str] = []

    @operation
    async def ask(self, prompt: str) -> str:
        self.asked.append(prompt)
        try:
            while prompt in self.holds or "all" in self.holds:
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        return f"answer {prompt}"


def texts(value: Any) -> Any:
    """Values to compare: errors by their kind and root."""
    if isinstance(value, (list, tuple)):
        return [texts(v) for v in value]
    if isinstance(value, UpstreamFailed):
        return ["upstream", *sorted({type(root).__name__ for root in value.roots})]
    return type(value).__name__ if isinstance(value, FesteError) else value


# --- the same as compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_programs_give_the_same_one_by_one(seed: int, restart: Callable[[], None]) -> None:
    """As many values as nodes, equal to those of ``compute``, and the same requests were needed."""

    def program() -> tuple[list[Any], Any]:
        restart()
        example = random_graph(seed)
        shape = example.wanted
        nodes = shape if isinstance(shape, list) else [shape["first"], *shape["others"]]
        FesteGraph.collect(*nodes)  # all at once, so that all draws are counted alike
        return nodes, example.effects

    wanted, log = program()
    expected = [texts(v) for v in feste.compute(wanted, on_error="return")[0]]
    effects = sorted(map(repr, log.entries))

    nodes, log = program()
    at = {id(node): i for i, node in enumerate(nodes)}
    pairs = list(feste.as_completed(nodes, on_error="return"))
    by_position = {at[id(node)]: texts(value) for node, value in pairs}
    assert [by_position[i] for i in range(len(nodes))] == expected
    assert sorted(map(repr, log.entries)) == effects

    nodes, log = program()
    window = random.Random(seed).choice([1, 2, 3, 1000])
    mapped = feste.map(lambda node: node, nodes, window=window, on_error="return")
    assert [texts(v) for v in mapped] == expected
    assert sorted(map(repr, log.entries)) == effects


def test_eager_programs_run_unchanged(restart: Callable[[], None]) -> None:
    """The same lines, lazy and eager, give the same values."""

    def program() -> tuple[Any, ...]:
        restart()
        llm = FakeBackend()
        calls = [llm.chat(f"q {i % 3}") for i in range(6)]
        completed = sorted(value for _, value in feste.as_completed(calls))
        mapped = list(feste.map(lambda i: double(llm.chat(f"m {i}")), range(5), window=2))
        pieces = "".join(feste.stream(llm.chat("tell")))
        pairs = sorted(feste.map(lambda i: [llm.chat("x"), i], range(4), ordered=False))
        return completed, mapped, pieces, pairs

    lazy = program()
    with feste.context.set(eager=True):
        eager = program()

    assert lazy == eager


# --- as_completed -----------------------------------------------------------------------------------


def test_pairs_come_in_the_order_of_finishing() -> None:
    """A value is handed out while others are still under way; plain values come first."""
    llm = Held()
    llm.holds = {"slow"}
    slow, quick = llm.ask("slow"), llm.ask("quick")
    pairs = feste.as_completed([slow, quick, 7, quick])

    assert next(pairs) == (7, 7)
    assert [next(pairs)[1], next(pairs)[1]] == ["answer quick"] * 2
    llm.holds.clear()
    node, value = next(pairs)
    assert (node is slow, value) == (True, "answer slow")
    assert list(pairs) == []
    assert llm.asked.count("quick") == 1


def test_containers_come_when_all_in_them_has_ended() -> None:
    nodes = {"a": double(1), "b": [double(2)]}

    ((node, value),) = feste.as_completed([nodes])

    assert node is nodes
    assert value == {"a": 2, "b": [4]}


def test_good_ones_come_before_the_error() -> None:
    """``raise`` leaves failed ones out, and raises at the end; ``return`` gives the errors."""
    nodes = [double(1), broken(2), double(broken(3)), double(4)]
    got = []

    with pytest.raises(RunFailed, match="2 results failed; the others were handed out") as caught:
        for _, value in feste.as_completed(nodes):
            got.append(value)
    assert sorted(got) == [2, 8]
    assert sorted(str(e.args[0]) for e in caught.value.errors) == ["ValueError: 2", "ValueError: 3"]
    assert caught.value.report.states == {"done": 2, "failed": 2, "skipped": 1}

    returned = {id(node): value for node, value in feste.as_completed(nodes, on_error="return")}
    assert [type(returned[id(n)]).__name__ for n in nodes] == [
        "int",
        "NodeError",
        "UpstreamFailed",
        "int",
    ]


def test_on_error_stop_starts_nothing_new() -> None:
    llm = Held()
    chain = broken(llm.ask("first"))
    later = [llm.ask(double(chain)) for _ in range(3)]
    with pytest.raises(RunFailed):
        list(feste.as_completed([chain, *later], on_error="stop"))

    assert llm.asked == ["first"]


def test_leaving_the_loop_stops_the_run() -> None:
    """What is under way is cancelled, and nothing else is asked."""
    llm = Held()
    llm.holds = {"slow", "latelate"}

    for _, value in feste.as_completed(
        [llm.ask("slow"), llm.ask("quick"), llm.ask(double("late"))]
    ):
        assert value == "answer quick"
        break

    until(lambda: not driver().brain.runs)
    until(lambda: llm.cancelled == [name for name in llm.asked if name != "quick"])


def test_leaving_the_loop_leaves_a_report() -> None:
    """What was sent until then is told, but not later instead of a newer report."""
    llm = Held()
    llm.holds = {"slow"}
    for _ in feste.as_completed([llm.ask("slow"), llm.ask("quick")]):
        break
    report = feste.last_report()

    assert report is not None
    assert report.states == {"done": 1, "interrupted": 1}

    knot: list[Any] = [feste.as_completed([llm.ask("slow"), llm.ask("quick")])]
    next(knot[0])
    knot.append(knot)
    feste.compute(double(1))
    newer = feste.last_report()
    del knot
    gc.collect()
    assert feste.last_report() is newer


def test_closing_spares_what_others_wait_for() -> None:
    llm = Held()
    llm.holds = {"shared", "own"}
    shared = llm.ask("shared")
    pairs = feste.as_completed([shared, llm.ask("own"), 1])
    next(pairs)
    reader = threading.Thread(target=lambda: [None for _ in pairs])
    reader.start()
    until(lambda: len(llm.asked) == 2)
    values: list[Any] = []
    other = threading.Thread(target=lambda: values.append(shared.compute()))
    other.start()
    until(lambda: any(len(r) > 1 for r in list(driver().brain.joins.under_way.values())))

    pairs.close()
    until(lambda: llm.cancelled == ["own"])
    llm.holds.clear()
    other.join(LONG)
    reader.join(LONG)

    assert values == ["answer shared"]
    assert llm.asked.count("shared") == 1


def test_a_cancelled_task_cancels_what_is_under_way() -> None:
    llm = Held()
    llm.holds = {"all"}

    async def read(results: Any) -> None:
        async for _ in results:
            pass

    async def cancel(make: Callable[[], Any], asked: int) -> None:
        task = asyncio.create_task(read(make()))
        await asyncio.to_thread(until, lambda: len(llm.asked) == asked)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(cancel(lambda: feste.as_completed([llm.ask("a"), llm.ask("b")]), 2))
    asyncio.run(cancel(lambda: feste.map(llm.ask, "cde", window=2), 4))

    until(lambda: len(llm.cancelled) == 4)
    assert llm.asked == ["a", "b", "c", "d"]


# --- map --------------------------------------------------------------------------------------------


def test_endless_sources_and_a_window() -> None:
    """No more items are taken than the window holds; others follow as these are handed out."""
    llm = Held()
    llm.holds = {"all"}
    taken = itertools.count()
    results = feste.map(lambda i: llm.ask(f"{next(taken)} {i}"), itertools.count(), window=8)
    reader = threading.Thread(target=lambda: first.extend(itertools.islice(results, 100)))
    first: list[Any] = []
    reader.start()
    until(lambda: len(llm.asked) == 8)
    assert next(taken) == 8
    llm.holds.clear()
    reader.join(LONG)
    results.close()

    assert first[:2] == ["answer 0 0", "answer 1 1"]
    assert len(first) == 100
    assert next(taken) <= 120


def test_unordered_values_do_not_wait_for_a_slow_one() -> None:
    llm = Held()
    llm.holds = {"0"}
    results = feste.map(lambda i: llm.ask(str(i)), range(50), window=5, ordered=False)

    quick = [next(results)[0] for _ in range(49)]
    llm.holds.clear()

    assert sorted(quick) == list(range(1, 50))
    assert list(results) == [(0, "answer 0")]


def test_items_share_requests() -> None:
    """Those taken together fill lists; as a list is handed out, the next one is taken."""
    llm = FakeBackend()

    values = list(feste.map(lambda i: llm.complete(f"{i}"), range(320), window=64))

    assert len(set(values)) == 320
    assert len(llm.requests) <= 24  # 20, if each has the most, 16


def test_failed_items_cost_only_themselves() -> None:
    llm = FakeBackend(fail={"bad": InvalidRequest("no")})

    def ask(i: int) -> Any:
        return llm.chat(f"bad {i}" if i % 5 == 0 else f"good {i}", FakeParams(temperature=0))

    results = feste.map(ask, range(20), window=3)
    good = []
    with pytest.raises(RunFailed, match="4 results failed") as caught:
        for value in results:
            good.append(value)
    returned = list(feste.map(ask, range(20), window=3, on_error="return"))

    assert len(good) == 16
    assert len(caught.value.errors) == 4
    assert [isinstance(value, InvalidRequest) for value in returned] == [
        i % 5 == 0 for i in range(20)
    ]


@pytest.mark.parametrize("where", ["source", "function"])
def test_what_is_under_way_comes_before_an_error_of_the_source(where: str) -> None:
    def source() -> Iterator[int]:
        yield from range(7)
        if where == "source":
            raise OSError("the disk is gone")
        yield 7

    def ask(i: int) -> Any:
        if i == 7:
            raise OSError("the disk is gone")
        return double(i)

    got = []
    with pytest.raises(OSError, match="the disk is gone"):
        for value in feste.map(ask, source(), window=3):
            got.append(value)

    assert got == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("stop", [StopIteration, StopAsyncIteration])
def test_a_function_that_ends_some_other_loop_does_not_end_the_map(stop: type[Exception]) -> None:
    """As in a generator, it is an error; otherwise the rest of the items would be lost in silence."""

    def ask(i: int) -> Any:
        if i == 2:
            raise stop
        return double(i)

    with pytest.raises(RuntimeError, match="raised Stop"):
        list(feste.map(ask, range(5)))


def test_a_slow_source_does_not_hold_results_up() -> None:
    """What is ready is handed out although the window is not full and the source does not end."""
    step = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        yield 1
        step.wait(LONG)
        yield 2

    results = feste.map(lambda i: i if i == 1 else double(i), source(), ordered=False)
    values = [next(results)]
    step.set()
    values += results

    assert values[0] == (1, 1)
    assert sorted(values) == [(0, 0), (1, 1), (2, 4)]


def test_nodes_that_items_share_run_once() -> None:
    """A task that was made before the items is run once, however many windows need it."""
    ran = []

    @feste.task
    def load() -> str:
        ran.append(1)
        return "table"

    table = load()
    copied = double(table)

    for window in (2, 50, 1000):
        values = list(feste.map(lambda i: [double(i), copied, table], range(600), window=window))

        assert values[599] == [1198, "tabletable", "table"]
    assert len(ran) == 3  # once in each map


def test_a_step_of_an_early_item_is_there_for_a_later_one() -> None:
    """What one item needs inside of a chain, another one may want by itself: it ran once."""
    ran = []

    @feste.task
    def load() -> str:
        ran.append(1)
        return "table"

    table = load()
    values = list(feste.map(lambda i: table if i == 2 else double(table), range(4), window=1))

    assert values == ["tabletable", "tabletable", "table", "tabletable"]
    assert len(ran) == 1


def test_on_error_stop_takes_no_more_items() -> None:
    """The first failure ends an endless map, though one item that was begun keeps its run open."""
    taken: list[int] = []
    begun, may_end = threading.Event(), threading.Event()

    @feste.task
    def slow(i: int) -> int:
        begun.set()
        may_end.wait(0.5)
        return i

    @feste.task
    def breaks(i: int) -> int:
        begun.wait(LONG)
        raise ValueError(i)

    def ask(i: int) -> Any:
        taken.append(i)
        if i == 100:  # it goes on and on
            may_end.set()
        return slow(i) if i == 4 else breaks(i) if i == 5 else double(i)

    with pytest.raises(RunFailed, match="ValueError: 5"):
        for _ in feste.map(ask, itertools.count(), window=4, ordered=False, on_error="stop"):
            pass

    assert len(taken) < 100


def test_a_failure_stops_a_map_also_where_later_items_are_in_another_run() -> None:
    """A long map is a chain of runs; what a late call of an early one decides holds for all."""
    asked: list[int] = []

    class Late(Backend):
        @operation
        async def ask(self, i: int) -> int:
            asked.append(i)
            while i == 5 and len(asked) < 600:
                await asyncio.sleep(0)
            if i == 5:
                raise InvalidRequest("no")
            return i

    llm = Late()
    with pytest.raises(RunFailed) as caught:
        for _ in feste.map(llm.ask, range(5000), window=200, on_error="stop", ordered=False):
            pass

    assert isinstance(caught.value.errors[0], InvalidRequest)
    assert 600 <= len(asked) < 2000


def test_failures_of_a_map_are_counted_together() -> None:
    """The limit is that of the whole map, whatever its window, and the error tells of it."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no")})

    def ask(i: int) -> Any:
        return llm.chat(f"{'good' if i % 50 else 'bad'} {i}")

    with pytest.raises(RunFailed, match=r"stopped: 30 calls failed \(max_failures=30\)"):
        for _ in feste.map(ask, range(3000), window=100, max_failures=30):
            pass

    assert len(llm.requests) < 1700
    assert len(list(feste.map(ask, range(3000), max_failures=0.1, on_error="return"))) == 3000


def test_tasks_may_return_nodes_and_items_may_be_empty() -> None:
    llm = FakeBackend()

    @feste.task(emits=True)
    def agent(i: int) -> Any:
        return [llm.chat(f"{i}"), llm.chat(f"{i}")]

    values = list(feste.map(lambda i: agent(i) if i % 2 else [], range(6), window=2))

    assert [len(v) for v in values] == [0, 2, 0, 2, 0, 2]
    assert list(feste.map(agent, [])) == []


def test_draws_are_counted_in_the_order_of_items(
    tmp_path: Path, restart: Callable[[], None]
) -> None:
    """Whatever finishes first, the same program finds its own answers in a store, in any window."""
    llm = FakeBackend()

    def program(window: int, ordered: bool) -> list[Any]:
        restart()
        settings: Any = {"store": tmp_path / "runs.db", "window": window, "ordered": ordered}
        return sorted(feste.map(lambda i: llm.chat(f"{i % 4}"), range(40), **settings))

    first = program(7, True)
    second = program(3, True)
    third = [value for _, value in program(1000, False)]

    assert first == second == sorted(third)
    assert len(set(first)) == 40
    assert sum(r.samples for r in llm.requests) == 40


def test_what_was_handed_out_is_freed() -> None:
    """Nodes of items do not stay: there are never many more than two windows hold."""
    most = 0
    for i, _ in enumerate(feste.map(lambda i: double(double(i)), range(3000), window=50)):
        if i % 500 == 499:
            gc.collect()
            most = max(most, sum(type(o) is Node for o in gc.get_objects()))

    assert most < 2500


class Big:
    """A value that is seen to be freed."""


def test_values_that_were_handed_out_are_freed_while_the_run_goes_on() -> None:
    """Ten thousand answers need not be in memory at once."""
    llm = Held()
    llm.holds = {"slow"}

    @feste.task
    def make() -> Big:
        return Big()

    nodes = [make(), llm.ask("slow")]
    pairs = feste.as_completed(nodes)
    value = weakref.ref(next(pairs)[1])
    until(lambda: gc.collect() >= 0 and value() is None)  # a thread may still be at its last step
    llm.holds.clear()

    assert [v for _, v in pairs] == ["answer slow"]


def test_what_is_added_to_a_stopped_run_is_told_so() -> None:
    """A run may be stopped while more is on its way to it: no result is left out."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    got: list[Any] = []
    run, more = clock.run(llm.chat("a")), clock.run(llm.chat("b"))
    run.outlet = Outlet(got.append, run.program, ["first"], is_open=True)
    clock.tell(0.0, ("submit", run))
    clock.tell(5.0, ("stop", run, 0.0))
    clock.tell(6.0, ("added", run, more.program, ["late"]))

    clock.drive()

    assert [(tokens, ok) for tokens, ok, _ in got] == [(["first"], True), (["late"], False)]
    assert isinstance(got[1][2], NotStarted)
    assert len(clock.sent) == 1


def test_the_report_counts_all_items() -> None:
    llm = FakeBackend()
    list(feste.map(lambda i: llm.chat(f"{i}", FakeParams(temperature=0)), range(700), window=20))

    report = feste.last_report()

    assert report is not None
    assert (report.nodes, report.states) == (700, {"done": 700})
    assert (report.operations[0].calls, len(report.requests)) == (700, 700)


def test_wrong_windows_and_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="window=0"):
        feste.map(double, [1], window=0)
    with pytest.raises(TypeError):
        feste.map(double, 3)  # type: ignore[arg-type]


# --- everywhere -------------------------------------------------------------------------------------


def test_in_an_event_loop() -> None:
    """Async, several at once; and blocking, which stops the loop but works."""
    llm = FakeBackend()

    async def some(name: str) -> list[Any]:
        results = feste.map(lambda i: llm.chat(f"{name} {i}"), range(30), window=4)
        return [value async for value in results]

    async def main() -> tuple[list[Any], list[Any]]:
        several = await asyncio.gather(*[some(name) for name in "abc"])
        return several, [value for _, value in feste.as_completed([double(1)])]

    several, blocking = asyncio.run(main())

    assert [len(set(values)) for values in several] == [30] * 3
    assert blocking == [2]


def test_blocking_forms_are_refused_where_they_would_stop_feste() -> None:
    @feste.task
    async def wrong() -> Any:
        return list(feste.map(double, [1]))

    @feste.task(executor="inline")
    def inline() -> Any:
        return list(feste.as_completed([double(1)]))

    @feste.task
    async def right() -> Any:
        return [value async for value in feste.map(double, [1, 2])]

    for node in (wrong(), inline()):
        with pytest.raises(RunFailed) as caught:
            node.compute()
        assert isinstance(caught.value.__cause__, BlockingCallError)
    assert right().compute() == [2, 4]


def test_other_schedulers() -> None:
    """A plain ``get`` and a whole scheduler run everything, though not one by one."""
    import dask

    class InOrder(Scheduler):
        def run(self, graph: Any, keys: Any, settings: Settings) -> Any:
            return dask.get(dict(graph), list(keys))  # type: ignore[attr-defined]

    for scheduler in (dask.get, InOrder()):  # type: ignore[attr-defined]
        assert list(feste.map(double, range(5), window=2, scheduler=scheduler)) == [0, 2, 4, 6, 8]
        pairs = feste.as_completed([double(1), double(2)], scheduler=scheduler)
        assert sorted(v for _, v in pairs) == [2, 4]
        assert list(feste.stream(feste.task(str)("a"), scheduler=scheduler)) == ["a"]


def test_errors_of_containers_are_the_items_own() -> None:
    """Vectors do not go into a set: that item fails, the others come."""
    llm = FakeBackend()

    values = list(
        feste.map(lambda i: {llm.embed("a")} if i == 1 else double(i), range(3), on_error="return")
    )

    assert (values[0], type(values[1]), values[2]) == (0, NodeError, 4)


def test_draws_of_the_main_program_go_on(restart: Callable[[], None]) -> None:
    """A map takes part in the counting of the program around it."""
    llm = FakeBackend()
    before = llm.chat("q").compute()
    mapped = list(feste.map(lambda i: llm.chat("q"), range(3), window=1))
    after = llm.chat("q").compute()
    restart()
    again = feste.compute([llm.chat("q") for _ in range(5)])[0]

    assert again == [before, *mapped, after]
    assert draw.scope() == draw.MAIN


def test_what_was_left_is_reported() -> None:
    """After an early end the report tells what was asked and what was given up."""
    llm = FakeBackend(latency=0.02, limits=Limits(concurrency=1))
    results = feste.as_completed([llm.chat(f"{i}") for i in range(20)])
    next(results)
    results.close()
    report = feste.last_report()

    assert report is not None and report.cancelled
    assert 1 <= len(report.requests) < 20
    assert report.states["done"] >= 1
    assert sum(report.states.values()) == 20


@pytest.mark.parametrize("window", ["5", 1.5, 0, True, None])
def test_a_window_is_a_whole_number(window: Any) -> None:
    """Nothing else says how many items may be under way."""
    with pytest.raises(ConfigError, match=r"window=.*: it is a whole number of items, at least 1"):
        feste.map(double, "ab", window=window)


def test_a_map_takes_no_async_function() -> None:
    """Its coroutines would be handed out as values, which nobody awaits; a task is fine."""

    async def shout(text: str) -> str:
        return text.upper()

    with pytest.raises(
        ConfigError, match=r"feste\.map: shout is async def, .* make it a @feste\.task"
    ):
        feste.map(shout, "ab")
    made: list[Any] = []
    with pytest.raises(
        GraphError, match=r"a coroutine is no value: make its function a @feste\.task"
    ):
        list(feste.map(lambda text: made.append(shout(text)) or made[-1], "ab"))
    made[0].close()
    assert list(feste.map(feste.task(shout), "ab")) == ["A", "B"]
