"""A program that used Feste ends: at once, silently, and it has not grown while it ran."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.errors import InvalidRequest
from feste.testing import FakeBackend

LONG = 60.0

EVERYTHING = """
import asyncio, feste, os, sys, threading, time
from feste.backend import Backend, operation
from feste.plugins import registry
from feste.testing import FakeBackend

class Ear:
    @feste.hookimpl
    def feste_node_finished(self, event):
        heard.append(event)

class Threads(Backend):
    @operation
    def ask(self, prompt: str) -> str:
        return prompt

heard = []
registry().manager.register(Ear())

@feste.task
async def later(x):
    await asyncio.sleep(0)
    return x

@feste.task(executor="process")
def worker(x):
    return x

@feste.task(emits=True)
def emits(x):
    return [later(x), worker(x)]

llm = FakeBackend()

def everything():
    nodes = [llm.chat("a"), llm.embed("b"), Threads().ask("c"), later(1), worker(2), emits(3)]
    values = feste.compute(nodes, progress=True)[0]
    assert values[2:] == ["c", 1, 2, [3, 3]]
    return asyncio.run(feste.acompute(later(5)))[0]
"""


def run(code: str, *options: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a program; it must end by itself."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
        **kwargs,
    )


ENDS = {
    "returns": "",
    "exits": "sys.exit(0)",
    "computes at exit": "import atexit; atexit.register(lambda: print(later(7).compute()))",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_used_everything_ends_silently(end: str) -> None:
    """Loops, pools, processes, observers and the bar go with it: nothing on stderr, no hang.

    Every warning is shown, those of forgotten files, sockets, processes and loops among them.
    """
    done = run(f"{EVERYTHING}\nprint(everything(), len(heard) > 0)\n{ENDS[end]}", "-X", "dev")

    assert done.stdout.splitlines()[0] == "5 True"
    assert done.stdout.splitlines()[1:] == (["7"] if "at exit" in end else [])
    # in this mode asyncio tells what took long, which a busy machine may do
    told = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.returncode, told) == (0, [])


BUSY = {
    "threads": "feste.compute([stuck(i) for i in range(100)])",
    "an async task": "stuck_later().compute()",
    "a request": "Stuck().ask('a').compute()",
    "a request in a thread": "Stuck().ask_in_a_thread('a').compute()",
    "a process": "stuck_worker().compute()",
    "a stubborn task": "stubborn().compute()",
    "many small runs": "while True: begun(); abs_(-1).compute()",
}

STUCK = """
import asyncio, feste, sys, threading, time
from feste.backend import Backend, operation

event = threading.Event()

def begun():
    event.set()

abs_ = feste.task(abs)

@feste.task
def stuck(i):
    begun()
    time.sleep(600)

@feste.task
async def stuck_later():
    begun()
    await asyncio.sleep(600)

@feste.task
async def stubborn():
    begun()
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

@feste.task(executor="process")
def stuck_worker():
    import time
    time.sleep(600)

class Stuck(Backend):
    @operation
    async def ask(self, prompt: str) -> str:
        begun()
        await asyncio.sleep(600)

    @operation
    def ask_in_a_thread(self, prompt: str) -> str:
        begun()
        time.sleep(600)
"""


@pytest.mark.parametrize("busy", BUSY)
def test_a_program_may_end_while_a_daemon_thread_computes(busy: str) -> None:
    """The main thread ends, and the run with it: nobody waits for what it was at."""
    code = f"""{STUCK}
def work():
    {BUSY[busy]}

threading.Thread(target=work, daemon=True).start()
{"event.wait()" if busy != "a process" else "time.sleep(0)"}
print("end", flush=True)
"""
    done = run(code)

    assert done.stdout == "end\n"
    assert done.returncode == 0
    if busy != "a stubborn task":  # asyncio itself tells of a task that refuses to be cancelled
        assert done.stderr == ""


def test_a_run_after_the_end_is_refused_and_does_not_hang() -> None:
    """Who computes in an exit handler that comes after Feste's own is told why it cannot be."""
    done = run(
        """if True:
        import atexit

        def too_late():
            try:
                node.compute()
            except Exception as error:
                print(type(error).__name__, error)

        atexit.register(too_late)
        import feste
        node = feste.task(abs)(-1)
        print(node.compute())
        """
    )

    assert done.stdout.splitlines() == [
        "1",
        "FesteError no run can begin any more: Python is ending",
    ]
    assert done.stderr == ""


def test_a_program_that_only_imports_and_explains_makes_no_thread() -> None:
    """Threads are made when something runs, not before."""
    done = run(
        """if True:
        import threading, feste
        from feste.testing import FakeBackend
        node = FakeBackend().chat("hello")
        str(feste.explain(node))
        print(threading.active_count())
        """
    )

    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_program_whose_output_nobody_reads_ends(tmp_path: Path) -> None:
    """A closed pipe is the program's trouble as ever; Feste adds no hang to it."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(EVERYTHING) + "\neverything()\nprint('x' * 100000)\n")
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        child.stdout.close()
        child.wait(LONG)


# --- growth --------------------------------------------------------------------------------------


def settled(count: Callable[[], int], at_most: int) -> int:
    """Return a count, once it is no more than it should be."""
    deadline = time.monotonic() + 10
    while count() > at_most and time.monotonic() < deadline:
        time.sleep(0.01)
    return count()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc to count descriptors in")
def test_many_runs_leave_no_thread_and_no_descriptor() -> None:
    """Good runs, failed ones, stopped ones, async and nested ones: the process is as it was."""
    llm = FakeBackend(model="clean-exit", fail={"bad": InvalidRequest("refused")})

    @feste.task
    def nested(i: int) -> Any:
        return llm.complete(f"nested {i}").compute()

    @feste.task
    async def later(i: int) -> int:
        await asyncio.sleep(0)
        return i

    @feste.task(emits=True)
    def emits(i: int) -> Any:
        return [later(i), llm.chat(f"emitted {i}")]

    async def stopped(i: int) -> None:
        task = asyncio.ensure_future(feste.acompute(later(i), llm.chat(f"stopped {i}")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def one(i: int) -> None:
        work = [nested(i), later(i), emits(i), llm.chat("bad"), llm.embed(f"{i}")]
        feste.compute(work, on_error="return", progress=i % 20 == 0)
        asyncio.run(stopped(i))

    for i in range(10):
        one(i)
    threads, files = threading.active_count(), descriptors()
    for i in range(100):  # each is at least two runs
        one(i)

    assert settled(threading.active_count, threads + 2) <= threads + 2  # pools grow by need
    assert settled(descriptors, files) <= files


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc to count descriptors in")
def test_workers_are_reused() -> None:
    """Two hundred tasks in processes need no more processes than there are cores."""

    @feste.task(executor="process")
    def pid(i: int) -> int:
        return os.getpid()

    first = set(feste.compute([pid(i) for i in range(8)])[0])
    files = descriptors()
    pids = set(feste.compute([pid(i) for i in range(192)])[0])

    assert len(pids | first) <= max(2, os.cpu_count() or 1)
    assert descriptors() <= files + 2 * (len(pids | first) - len(first))
