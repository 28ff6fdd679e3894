"""Feste computes wherever a program may be: in any kind of process, on any thread, beside any loop.

Each process is one child; it computes on its main thread, on another, and inside a running event
loop, and tells what it saw.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import pytest

import feste
from feste.testing import FakeBackend, FakeParams

LONG = 60.0
METHODS = [
    m for m in ("fork", "spawn", "forkserver") if m in multiprocessing.get_all_start_methods()
]

# Newer Pythons warn of a fork beside threads; what is tested here is that Feste bears it.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def program() -> list[Any]:
    """Tasks of both kinds, and calls, alone and in a list; the values do not depend on the place."""
    llm = FakeBackend(model="where")
    return [_increment(1), _later(2), llm.chat("a", FakeParams(temperature=0.0)), llm.embed("b")]


@feste.task
def _increment(x: int) -> int:
    return x + 1


@feste.task
async def _later(x: int) -> int:
    await asyncio.sleep(0)
    return x


def computes() -> Any:
    """Compute here and now."""
    return feste.compute(program())[0]


def on_another_thread() -> Any:
    """Compute on a thread that is not the main one."""
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(computes())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LONG)
    return done.result(0)


def in_a_running_loop() -> Any:
    """Await a run in a loop, and compute in that loop, as a cell of a notebook does."""

    async def main() -> Any:
        (awaited,) = await feste.acompute(program())
        ticks: list[int] = []
        asyncio.get_running_loop().call_soon(ticks.append, 1)
        blocked = computes()
        await asyncio.sleep(0)
        assert ticks == [1]  # the loop is as it was
        assert blocked == awaited
        return awaited

    return asyncio.run(main())


PLACES: dict[str, Callable[[], Any]] = {
    "main thread": computes,
    "other thread": on_another_thread,
    "running loop": in_a_running_loop,
}


def strangers(before: set[threading.Thread]) -> list[str]:
    """Threads that were not there before and that Feste does not keep."""
    new = set(threading.enumerate()) - before
    return [thread.name for thread in new if not thread.name.startswith("feste")]


def doubles() -> list[str]:
    """Feste's threads that there are twice: a second brain, loop or place in a pool."""
    names = Counter(thread.name for thread in threading.enumerate())
    return [name for name, times in names.items() if times > 1 and name.startswith("feste")]


def look(place: str) -> dict[str, Any]:
    """Compute three times in a place; tell the values, what was patched, and what is left over."""
    before = set(threading.enumerate())
    kept = {name: getattr(asyncio, name) for name in ("run", "new_event_loop", "get_running_loop")}
    values = [PLACES[place]() for _ in range(3)]
    patched = [name for name, was in kept.items() if getattr(asyncio, name) is not was]
    deadline = time.monotonic() + LONG
    while (left := strangers(before) + doubles()) and time.monotonic() < deadline:
        time.sleep(0.01)  # threads of a loop end with it
    return {
        "values": [[*value[:3], list(value[3])] for value in values],
        "patched": patched,
        "threads": left,
        "pid": os.getpid(),
    }


def child(answer: Connection) -> None:
    """Tell what each place gave, or why it did not."""
    told: Any
    try:
        told = {place: look(place) for place in PLACES}
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"
    answer.send_bytes(json.dumps(told).encode())


def in_a_child(method: str) -> Any:
    """Run them in a child that is started so, and wait for it to end by itself."""
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        assert here.poll(LONG), f"the child that was started by {method} says nothing"
        told = json.loads(here.recv_bytes())
        process.join(LONG)
        assert process.exitcode == 0
        return told
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()


def check(told: Any, wanted: list[Any]) -> None:
    assert isinstance(told, dict), told
    assert list(told) == list(PLACES)
    for place, saw in told.items():
        assert saw["values"] == [wanted] * 3, place
        assert (saw["patched"], saw["threads"]) == ([], []), place


@pytest.mark.parametrize("method", ["here", *METHODS])
def test_it_computes_in_every_process_and_place(method: str) -> None:
    """The same values in all twelve; nothing of asyncio is replaced, no thread is left, and the parent goes on."""
    (first,) = look("main thread")["values"][:1]
    if method == "here":
        told = {place: look(place) for place in PLACES}
    else:
        told = in_a_child(method)
        assert {saw["pid"] for saw in told.values()} != {os.getpid()}

    check(told, first)
    check({place: look(place) for place in PLACES}, first)
    assert first[:2] == [2, 2]
