"""After a fork the child computes with a brain of its own, and the parent goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pytest

import feste
from feste import draw, lowering
from feste._compute import through_dask
from feste.backend import Backend, Limits, operation
from feste.errors import FesteError
from feste.scheduler.driver import driver
from feste.testing import FakeBackend, FakeParams

LONG = 30.0

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    # Newer Pythons warn of a fork beside threads; what is tested here is that Feste bears it.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@feste.task
def increment(x: int) -> int:
    return x + 1


def until(what: Callable[[], Any]) -> bool:
    """Wait for something that happens elsewhere; False if it never does."""
    deadline = time.monotonic() + LONG
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def exit_code_of(pid: int) -> int:
    """Wait for a child; one that hangs is killed, and its code is that of the signal."""
    deadline = time.monotonic() + LONG
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.005)


def in_a_child(what: Callable[[], bool]) -> int:
    """Fork; return the child's exit code: 0 if ``what`` is true there."""
    pid = os.fork()
    if pid:
        return exit_code_of(pid)
    code = 2
    try:
        code = 0 if what() else 1
    finally:
        os._exit(code)


def test_a_forked_child_computes() -> None:
    """Threads do not survive a fork: the child makes its own driver, loops and pools."""
    llm = FakeBackend(model="fork")
    parents = driver()
    greedy = FakeParams(temperature=0.0)

    @feste.task
    async def later(x: int) -> int:
        return x

    def everything() -> list[Any]:
        return feste.compute([increment(1), later(2), llm.chat("a", greedy), llm.embed("b")])[0]  # type: ignore[no-any-return]

    before = everything()

    assert in_a_child(lambda: everything() == before and driver() is not parents) == 0
    assert everything() == before
    assert driver() is parents


def test_results_one_by_one_around_a_fork() -> None:
    """A child begins its own iterations; one that the parent has begun is refused, and goes on there."""
    llm = FakeBackend(model="fork")
    begun = feste.map(increment, range(100), window=4)
    assert next(begun) == 1

    def child() -> bool:
        try:
            next(begun)
        except FesteError as error:
            refused = "belong to the process that was forked" in str(error)
        begun.close()
        mapped = list(feste.map(increment, range(5), window=2)) == [1, 2, 3, 4, 5]
        return refused and mapped and len(list(feste.stream(llm.chat("a")))) > 1

    assert in_a_child(child) == 0
    assert list(begun) == list(range(2, 101))


def test_results_that_had_not_begun_begin_in_the_child() -> None:
    llm = FakeBackend()
    assert increment(1).compute() == 2
    forms: list[Any] = [
        feste.stream(llm.chat("a")),
        feste.map(increment, range(9), window=2),
        feste.as_completed([increment(1), increment(increment(1))]),
    ]

    def child() -> bool:
        return all(len(list(results)) > 1 for results in forms)

    assert in_a_child(child) == 0
    assert child()


def test_a_child_can_be_forked_before_the_first_run() -> None:
    """Nothing is shared by a child that was forked before Feste began to work."""
    code = """if True:
        import os, feste
        one = feste.task(abs)(-1)
        pid = os.fork()
        value = one.compute()
        if pid == 0:
            os._exit(value + 6)
        print(value, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG, check=False
    )

    assert (done.stdout, done.stderr) == ("1 7\n", "")


def test_a_process_of_multiprocessing_computes() -> None:
    """``multiprocessing`` with the fork method, in a child and in a pool of children."""
    increment(0).compute()
    forking = multiprocessing.get_context("fork")

    with forking.Pool(2) as pool:
        assert pool.map(_in_the_pool, range(8)) == [x + 1 for x in range(8)]
    assert increment(1).compute() == 2


def _in_the_pool(x: int) -> int:
    return increment(x).compute()


@pytest.mark.parametrize("where", ["thread", "inline", "async"])
def test_a_task_may_fork(where: str) -> None:
    """The child's one thread is its main thread, whatever it was in the parent: it may wait there."""

    def forks() -> int:
        return in_a_child(lambda: increment(1).compute() == 2)

    async def forks_later() -> int:
        return forks()

    made = feste.task(forks_later) if where == "async" else feste.task(executor=where)(forks)
    node = made()

    assert node.compute() == 0
    assert increment(1).compute() == 2


class Held(Backend):
    """Answers when it is told to."""

    limits = Limits(concurrency=1)

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()

    @operation
    def say(self, prompt: str) -> str:
        self.asked.set()
        assert self.answer.wait(LONG)
        return prompt


def test_a_fork_in_the_middle_of_a_run() -> None:
    """A request in flight is the parent's: it comes back there; the child has its own gate."""
    llm = Held()
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.append(llm.say("parent").compute()))
    thread.start()
    assert llm.asked.wait(LONG)

    def child() -> bool:
        llm.answer.set()  # the child's copy
        return llm.say("child").compute() == "child"

    assert in_a_child(child) == 0
    assert got == []
    llm.answer.set()
    thread.join(LONG)
    assert got == ["parent"]


def test_workers_of_the_parent_are_not_the_childs(tmp_path: Path) -> None:
    """The child has process workers of its own; the parent's still serve the parent."""

    @feste.task(executor="process")
    def worker() -> int:
        return os.getpid()

    first = worker().compute()
    seen = tmp_path / "seen"

    def child() -> bool:
        seen.write_text(str(worker().compute()))
        driver().close()
        return True

    assert in_a_child(child) == 0
    assert int(seen.read_text()) != first
    assert until(lambda: worker().compute() == first)


def test_a_child_that_lives_on_does_not_hold_the_parents_workers(tmp_path: Path) -> None:
    """A worker ends with its parent, though a forked child of that parent lives on."""
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import os, signal, sys, time
        import feste

        @feste.task(executor="process")
        def worker():
            import os
            return os.getpid()

        pid = worker().compute()
        if os.fork() == 0:
            sys.stdin.read()  # until the test is through
            os._exit(0)
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())

        gone = ends(pid)

    assert gone


def ends(pid: int) -> bool:
    """Whether a process that is not our child ends."""
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # it waits for whoever took it over
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


def test_locks_held_by_other_threads_do_not_stop_the_child() -> None:
    """A fork copies locks as they are: one that another thread held is free in the child."""
    held, release = threading.Event(), threading.Event()

    def holds() -> None:
        with draw._lock, feste.context._lock, lowering._lock, through_dask._locking:
            held.set()
            release.wait(LONG)

    thread = threading.Thread(target=holds)
    thread.start()
    assert held.wait(LONG)
    try:
        assert in_a_child(lambda: increment(1).compute() == 2) == 0
        by_dask = lambda: dask.compute(increment(1), scheduler="sync") == (2,)  # type: ignore[attr-defined] # noqa: E731
        assert in_a_child(by_dask) == 0
    finally:
        release.set()
        thread.join(LONG)
