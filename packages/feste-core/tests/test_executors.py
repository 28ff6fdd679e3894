"""Executors and schedulers of others: what they are given, and what their own errors cost."""

from __future__ import annotations

from typing import Any

import pytest

import feste
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
