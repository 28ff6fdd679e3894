"""Executors and schedulers of others: what they are given, and what their own errors cost."""

from __future__ import annotations

from typing import Any

import feste
from feste.scheduler import LocalExecutor, Scheduler


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
