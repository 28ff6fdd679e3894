"""A long program of the chaos suite: it streams answers, and looks at itself while it does.

    python -W error -m tests.chaos.streamer '{"url": ..., "shape": "flat", "calls": 10000, ...}'

It keeps of each answer a string, and no node. What it tells is what :mod:`tests.chaos.program` tells,
with what it saw each thousand answers, and before and after.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import sys
import threading
import time
from typing import Any

import feste
from feste import context
from tests.chaos.program import ROOM, acknowledge, client, left_over, outcome
from tests.chaos.work import make

__all__: list[str] = []

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LIBC = ctypes.CDLL(None)


def look(answers: int) -> dict[str, Any]:
    """Return what this process has open, holds and runs."""
    gc.collect()
    _LIBC.malloc_trim(0)  # give back what was freed, or big replies would look like a leak
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    tasks = [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]
    return {
        "answers": answers,
        "files": len(os.listdir("/proc/self/fd")) - 1,  # the listing has one of its own
        "bytes": pages * _PAGE,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": sorted(str(task.get_coro().__qualname__) for task in tasks),  # type: ignore[union-attr]
    }


def settled(before: dict[str, Any], answers: int) -> dict[str, Any]:
    """Look until nothing is left to close; the deadline only ends a test that is broken."""
    deadline = time.monotonic() + 30
    while True:
        seen = look(answers)
        idle = not seen["tasks"] and seen["files"] <= before["files"] + 8
        if idle or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


def main() -> None:
    """Do what the first argument says."""
    todo = json.loads(sys.argv[1])
    context.set(progress=False)
    steps = make(todo["shape"], todo["calls"], todo["seed"], **todo.get("work", {}))
    llm = client(todo)
    values: list[Any] = [None] * len(steps)
    seen = [look(0)]
    results = feste.map(
        lambda step: llm.chat(step.text, ROOM),
        steps,
        window=4 * todo["concurrency"],
        ordered=False,
        keep="none",
        on_error="return",
    )
    for answers, (i, value) in enumerate(results, 1):
        values[i] = value
        if isinstance(value, str):
            values[i] = str(value)
            acknowledge(todo["side"], todo["run"], i, value)
        if answers % todo["every"] == 0:
            seen.append(look(answers))
    told = outcome(values, [])
    del results
    told.update(left_over(), run=todo["run"])
    told["seen"] = [*seen, settled(seen[0], len(values))]
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
