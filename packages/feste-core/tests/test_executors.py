"""Executors and schedulers of others: what they are given, and what their own errors cost."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import feste
from feste.context import Setting
from feste.errors import PluginError, RunFailed
from feste.plugins import registry
from feste.scheduler import LocalExecutor, PyTask, Scheduler
from feste.scheduler.driver import driver


def test_an_executor_whose_place_raises_fails_the_node_only() -> None:
    """What an executor's own code raises when it is asked for a place is the node's error."""

    class Picky(LocalExecutor):
        def place(self, task: Any) -> str:
            if task.name == "bad":
                raise KeyError("nowhere")
            return super().place(task)

    @feste.task
    def bad(x: int) -> int:
        return x

    good = feste.task(abs)
    first, second, third = feste.compute(
        bad(1),
        good(-2),
        bad(good(-3)),
        scheduler=Picky,
        on_error="return",
        optimize={"fuse": False},
    )

    assert second == 2
    assert "nowhere" in str(first) and "nowhere" in str(third)


def test_a_scheduler_gets_the_settings_of_the_run() -> None:
    """Keywords of compute too, and the settings that plugins declare."""
    seen = []

    class Own(Scheduler):
        def run(self, graph: Any, keys: Any, settings: Any) -> Any:
            from dask.local import get_sync

            seen.append((settings["keep"], settings["strict"]))
            return get_sync(dict(graph), list(keys))

    assert feste.compute(feste.task(abs)(-1), scheduler=Own, keep="all", strict=True) == (1,)
    assert seen == [("all", True)]


class Far(LocalExecutor):
    """An executor with four places far away: up to 20 ms of work go there together."""

    def __init__(self, target: Any = None) -> None:
        super().__init__(target)
        self.chunks: list[list[str]] = []

    def capacity(self, where: str) -> int:
        return 4 if where == "thread" else super().capacity(where)

    def chunk_seconds(self, where: str) -> float:
        return 0.02 if where == "thread" else super().chunk_seconds(where)

    def call(self, where: str, chunk: list[PyTask]) -> None:
        if where == "thread":
            self.chunks.append([task.name for task in chunk])
        super().call(where, chunk)


@pytest.mark.parametrize(
    ("seconds", "count", "first"),
    [
        (0.005, 40, 4),  # as many as make 20 ms
        (0.005, 8, 2),  # each place its share
        (0.005, 3, 1),
        (1e-6, 40, 40),  # not worth spreading
        (None, 40, 1),  # not known to be short
    ],
)
def test_short_tasks_share_a_chunk_as_far_as_the_executor_says(
    seconds: float | None, count: int, first: int
) -> None:
    """Work up to a limit goes together, but what takes milliseconds is spread over free places."""
    hands = Far()

    @feste.task
    def far_away(x: int) -> int:
        return x

    costs = driver().brain.dispatcher.cost
    costs.pop("far_away", None)
    if seconds is not None:
        costs["far_away"] = seconds
    values = feste.compute([far_away(i) for i in range(count)], scheduler=hands)[0]

    assert values == list(range(count))
    assert len(hands.chunks[0]) == first


def test_a_chain_shares_a_chunk_as_far_as_the_executor_says() -> None:
    """What waits only for a task of the chunk goes along, until the chunk is full."""
    hands = Far()

    @feste.task
    def far_link(x: int) -> int:
        return x + 1

    driver().brain.dispatcher.cost["far_link"] = 0.005
    node = far_link(0)
    for _ in range(5):
        node = far_link(node)
    assert node.compute(scheduler=hands, optimize=False) == 6
    assert len(hands.chunks[0]) == 4


class Slow(LocalExecutor):
    """An executor that is started, and stale, when a test says so."""

    def __init__(self, target: Any = None) -> None:
        super().__init__(target)
        self.starts = threading.Event()
        self.may_start = threading.Event()
        self.is_stale = self.is_closed = False

    def start(self, report: Any) -> None:
        self.starts.set()
        assert self.may_start.wait(60)
        super().start(report)

    @property
    def stale(self) -> bool:
        return self.is_stale

    def close(self) -> None:
        self.is_closed = True
        super().close()


def test_others_do_not_wait_while_an_executor_starts() -> None:
    """A cluster may take a minute, or never answer."""
    slow = Slow()
    node = feste.task(abs)(-1)
    with ThreadPoolExecutor() as pool:
        there = [pool.submit(feste.compute, node, scheduler=slow) for _ in range(2)]
        try:
            assert slow.starts.wait(60)
            here = pool.submit(feste.compute, feste.task(abs)(-2), scheduler="local")
            assert here.result(60) == (2,)
            assert not any(future.done() for future in there)
        finally:
            slow.may_start.set()
        assert [future.result(60) for future in there] == [(1,), (1,)]
    slow.is_stale = True


def test_a_stale_executor_is_closed_when_its_last_run_has_ended() -> None:
    """So what it has started ends with it, and a run under way goes on."""
    old = Slow()
    old.may_start.set()
    begun, goes_on = threading.Event(), threading.Event()

    @feste.task
    def wait() -> str:
        begun.set()
        assert goes_on.wait(60)
        return "done"

    with ThreadPoolExecutor() as pool:
        running = pool.submit(feste.compute, wait(), scheduler=old)
        assert begun.wait(60)
        old.is_stale = True
        assert feste.compute(feste.task(abs)(-1)) == (1,)
        assert not old.is_closed
        goes_on.set()
        assert running.result(60) == ("done",)
    assert feste.compute(feste.task(abs)(-2)) == (2,)
    assert old.is_closed
    old.is_stale = False
    assert feste.compute(feste.task(abs)(-3), scheduler=old) == (3,)  # it is started again
    old.is_stale = True


def test_an_option_may_be_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values have one executor, whatever their type; others one of their own."""
    made: list[Any] = []

    class Crew(LocalExecutor):
        options = ("crew_names",)

        def __init__(self, target: Any = None, *, crew_names: Any) -> None:
            super().__init__(target)
            made.append(crew_names)

    own = {**registry().settings, "crew_names": Setting(None, list | None, "who works")}
    monkeypatch.setattr(registry(), "settings", own)
    for names in (["ada"], ["ada"], ["ada", "bob"], None, ["ada"]):
        assert feste.compute(feste.task(abs)(-1), scheduler=Crew, crew_names=names) == (1,)

    assert made == [["ada"], ["ada", "bob"], None]


RETURNS: dict[str, tuple[Any, str]] = {
    "none": (None, "returned NoneType, not a list of values"),
    "text": ("12", "returned str, not a list of values"),
    "by key": ({"a": 1, "b": 2}, "returned dict, not a list of values"),
    "too few": ([1], "returned 1 value for 2 keys: it takes one for each, in order"),
    "too many": ([1, 2, 3], "returned 3 values for 2 keys: it takes one for each, in order"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_a_scheduler_that_does_not_return_a_value_for_each_key(name: str) -> None:
    """A `get` function or a whole scheduler is named, with what it returned."""
    values, said = RETURNS[name]

    def my_get(dsk: Any, keys: Any) -> Any:
        return values

    class Mine(Scheduler):
        def run(self, graph: Any, keys: Any, settings: Any) -> Any:
            return values

    two = [feste.task(abs)(-1), feste.task(abs)(-2)]
    for scheduler, called in ((my_get, "my_get"), (Mine, "Mine.run")):
        with pytest.raises(RunFailed) as failed:
            feste.compute(two, scheduler=scheduler)
        (error,) = failed.value.errors
        assert type(error) is PluginError
        assert error.message.startswith("the scheduler ") and f"{called} {said}" in error.message


def test_a_scheduler_may_return_its_values_one_by_one() -> None:
    """Any iterable in order will do."""

    def get(dsk: Any, keys: Any) -> Any:
        from dask.local import get_sync

        return iter(get_sync(dsk, keys))

    assert feste.compute([feste.task(abs)(-1), 5], scheduler=get) == ([1, 5],)
