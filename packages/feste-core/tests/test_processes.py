"""Process tasks: other processes, work by value, lost workers, and no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.errors import ConfigError, FesteError, NodeError, RunFailed, WorkerLost
from feste.testing import FakeBackend

LONG = 60.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process tasks need POSIX")


def until(what: Callable[[], Any]) -> bool:
    """Wait for something that happens elsewhere; False if it never does."""
    deadline = time.monotonic() + LONG
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    here = Path(f"/proc/{pid}")
    try:
        running = (here / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return running or len(os.listdir(here / "task")) > 1  # its other threads are still ending
    except FileNotFoundError:
        return not Path("/proc").exists()


def script(tmp_path: Path, text: str) -> list[str]:
    """Write a program of a user's and return the command that runs it."""
    path = tmp_path / "program.py"
    path.write_text("if True:\n" + text)
    return [sys.executable, str(path)]


def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LONG, check=False, **kwargs
    )


def process(fn: Callable[..., Any]) -> Any:
    return feste.task(executor="process")(fn)


def refused(node: Any) -> FesteError:
    with pytest.raises(RunFailed) as caught:
        node.compute()
    return caught.value.errors[0]


# --- by value ------------------------------------------------------------------------------------


def test_a_process_task_runs_in_another_process() -> None:
    """Its interpreter is not ours; equal tasks share workers."""

    @process
    def where() -> int:
        return os.getpid()

    pids = set(feste.compute([where() for _ in range(8)])[0])

    assert os.getpid() not in pids
    assert len(pids) <= len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else "1234")


@dataclass
class Box:
    content: Any


def test_lambdas_closures_and_their_values_travel() -> None:
    """Work is sent by value: what a function refers to goes with it, and values come back whole."""
    factor = 3

    def times(x: int) -> int:
        return x * factor

    node = process(lambda x, box: Box([times(x), *box.content]))

    assert node(process(times)(2), Box([(1, 2), {"a"}])).compute() == Box([18, (1, 2), {"a"}])


def test_a_whole_graph_mixes_threads_processes_and_requests() -> None:
    """Values go between them in both directions."""
    llm = FakeBackend(model="processes")
    upper = process(lambda text: (text.upper(), os.getpid()))
    text = llm.chat("hello")
    there = upper(text)

    assert feste.compute(text, there[0].lower(), there[1] == os.getpid()) == (
        text.compute(),
        text.compute(),
        False,
    )


def test_functions_of_main_travel_by_value_and_main_is_not_run_again(tmp_path: Path) -> None:
    """A script needs no ``if __name__ == "__main__"``: no worker imports it, so it prints once."""
    command = script(
        tmp_path,
        """
        import feste, os
        print("once")
        FACTOR = 5

        class Thing:
            def __init__(self, value): self.value = value

        def helper(x): return Thing(x * FACTOR)

        @feste.task(executor="process")
        def work(thing): return os.getpid(), helper(thing.value)

        made = feste.compute([work(Thing(i)) for i in range(6)])[0]
        print([thing.value for _, thing in made])
        print({type(thing) is Thing for _, thing in made}, os.getpid() in {pid for pid, _ in made})
        """,
    )
    done = run(command)

    assert done.stdout.splitlines() == ["once", "[0, 5, 10, 15, 20, 25]", "{True} False"]
    assert done.stderr == ""


def test_workers_find_the_modules_beside_the_script_and_no_others(tmp_path: Path) -> None:
    """A worker imports what its parent could import: not what merely lies in the working folder."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "mine.py").write_text("def triple(x): return 3 * x\n")
    (tmp_path / "select.py").write_text("raise RuntimeError('a module that shadows another')\n")
    command = script(
        tmp_path / "app",
        """
        import feste, mine
        print(feste.task(executor="process")(mine.triple)(2).compute())
        """,
    )
    done = run(command, cwd=tmp_path)

    assert (done.stdout, done.stderr) == ("6\n", "")


def test_what_a_worker_prints_appears_at_once(tmp_path: Path) -> None:
    """Output of a worker goes where the parent's goes, as soon as its task is through."""
    command = script(
        tmp_path,
        """
        import feste, os, signal, sys

        @feste.task(executor="process")
        def says(text):
            print("out", text)
            print("err", text, file=sys.stderr)
            return os.getpid()

        pid = says("hello").compute()
        print("back", flush=True)
        os.kill(pid, signal.SIGKILL)
        """,
    )
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = run(command, env=buffered)

    assert done.stdout.splitlines() == ["out hello", "back"]
    assert done.stderr == "err hello\n"


# --- what cannot travel --------------------------------------------------------------------------


def test_an_argument_that_cannot_be_sent_is_refused_before_any_request() -> None:
    """What is known to be wrong costs nothing: no request is sent, no task is begun."""
    llm = FakeBackend(model="processes-refuse")
    node = process(lambda lock, text: text)(threading.Lock(), llm.chat("hello"))

    with pytest.raises(ConfigError, match=r"cannot be sent there.*pickle.*plain data") as caught:
        feste.compute(node, llm.chat("other"))

    assert "test_processes.py:" in caught.value.origin
    assert llm.requests == []


def test_a_value_that_turns_out_not_to_travel_fails_its_node() -> None:
    """A value made during the run cannot be known before: only that node fails."""
    lock = feste.task(threading.Lock)()
    good = process(lambda x: x + 1)(1)
    bad = process(lambda x: 1)(lock)

    with pytest.raises(RunFailed) as caught:
        feste.compute(good, bad)

    assert caught.value.partial[0] == 2
    assert isinstance(caught.value.errors[0], ConfigError)


def test_a_result_that_cannot_be_sent_back_fails_its_node() -> None:
    """The error says that it was the result, and the worker goes on."""
    pid = process(lambda: os.getpid())
    first = pid().compute()
    error = refused(process(lambda: __import__("threading").Lock())())

    assert isinstance(error, NodeError)
    assert "the result cannot be sent back" in str(error)
    assert until(lambda: pid().compute() == first)


class Fussy:
    """Comes to life nowhere but where it was made."""

    def __init__(self, home: int) -> None:
        self.home = home

    def __setstate__(self, state: dict[str, Any]) -> None:
        if os.getpid() != state["home"]:
            raise EOFError("not at home")


def test_a_result_that_does_not_come_to_life_here_is_no_lost_worker(tmp_path: Path) -> None:
    """Whatever unpickling raises, the worker lives and the work is not begun again."""
    marks = tmp_path / "marks"

    @process
    def makes(path: str) -> Any:
        with open(path, "a") as file:
            file.write("begun\n")
        return Fussy(os.getpid())

    error = refused(makes(str(marks)))

    assert isinstance(error, NodeError) and "EOFError: not at home" in str(error)
    assert marks.read_text() == "begun\n"


def test_an_exception_comes_back_as_text_with_its_traceback() -> None:
    """The user's exception is named, with the lines of the user's code, also if it cannot travel."""

    class Odd(Exception):
        def __init__(self, lock: Any) -> None:
            super().__init__("odd")
            self.lock = lock

    @process
    def breaks() -> None:
        raise Odd(__import__("threading").Lock())

    error = refused(breaks())

    assert isinstance(error, NodeError)
    assert "Odd: odd" in str(error) and error.cause_type.endswith("Odd")
    assert error.traceback.splitlines()[1].endswith("in breaks")
    assert "test_processes.py:" in error.origin


@pytest.mark.parametrize("leaves", ["raise SystemExit(3)", "raise KeyboardInterrupt"])
def test_a_task_cannot_end_its_worker_by_raising(leaves: str) -> None:
    """``SystemExit`` inside a worker fails the task; the worker goes on."""
    pid = process(lambda: os.getpid())
    before = pid().compute()

    @process
    def raises(how: str) -> None:
        if how == "raise SystemExit(3)":
            raise SystemExit(3)
        raise KeyboardInterrupt

    error = refused(raises(leaves))

    assert isinstance(error, NodeError)
    assert error.cause_type in leaves
    assert until(lambda: pid().compute() == before)


# --- lost workers --------------------------------------------------------------------------------


def test_work_of_a_killed_worker_is_begun_once_more(tmp_path: Path) -> None:
    """A worker that dies is replaced, and what it was at starts again."""

    @process
    def dies_once(path: str) -> int:
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        if len(Path(path).read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    marks = tmp_path / "marks"
    got = dies_once(str(marks)).compute()
    first, second = (int(line) for line in marks.read_text().splitlines())

    assert got == second != first


def test_work_that_kills_two_workers_is_lost(tmp_path: Path) -> None:
    """The second death is the work's fault: WorkerLost, with the exit code; other tasks go on."""
    marks = tmp_path / "marks"

    @process
    def dies(path: str) -> None:
        with open(path, "a") as file:
            file.write("begun\n")
        os._exit(13)

    with pytest.raises(RunFailed) as caught:
        feste.compute(dies(str(marks)), [process(lambda x: x * x)(i) for i in range(6)])
    (error,) = caught.value.errors

    assert isinstance(error, WorkerLost)
    assert "exit code 13" in str(error) and "test_processes.py:" in error.origin
    assert error.billed == "no"
    assert caught.value.partial[1] == [0, 1, 4, 9, 16, 25]
    assert marks.read_text().splitlines() == ["begun", "begun"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_dead_workers_leave_no_process_and_no_descriptor() -> None:
    """However many die, by a signal or by themselves."""

    @process
    def dies(how: int) -> None:
        if how % 2:
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)

    def left() -> tuple[int, int]:
        held, children = len(os.listdir("/proc/self/fd")), Path("/proc/self/task")
        born = [pid for t in children.iterdir() for pid in (t / "children").read_text().split()]
        return held, sum(not alive(int(pid)) for pid in born)

    feste.compute([process(abs)(-i) for i in range(8)])
    before, _ = left()
    failed = feste.compute([dies(i) for i in range(6)], on_error="return")[0]
    assert [type(error) for error in failed] == [WorkerLost] * 6
    after, zombies = left()
    assert after <= before and zombies == 0


def test_a_worker_that_dies_in_the_middle_of_its_answer_is_lost_too(tmp_path: Path) -> None:
    """Half an answer is no answer: the work is begun once more."""
    marks = tmp_path / "marks"

    @process
    def answers_half(path: str) -> bytes:
        def kill() -> None:
            while True:  # as soon as the answer, more than a socket holds, is being written
                for frame in sys._current_frames().values():
                    inner: Any = frame
                    while inner is not None:
                        if inner.f_code.co_name == "send":
                            os.kill(os.getpid(), signal.SIGKILL)
                        inner = inner.f_back

        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        if len(Path(path).read_text().splitlines()) == 1:
            threading.Thread(target=kill, daemon=True).start()
        return b"x" * 50_000_000

    assert len(answers_half(str(marks)).compute()) == 50_000_000
    assert len(marks.read_text().splitlines()) == 2


def test_a_worker_that_dies_while_idle_costs_no_try(tmp_path: Path) -> None:
    """A worker found dead is replaced before work is given to it."""
    marks = tmp_path / "marks"
    pids = set(feste.compute([process(lambda i: os.getpid())(i) for i in range(8)])[0])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: not any(alive(pid) for pid in pids))

    @process
    def dies_once(path: str) -> str:
        with open(path, "a") as file:
            file.write("begun\n")
        if len(Path(path).read_text().splitlines()) == 1:
            os._exit(1)
        return "done"

    assert dies_once(str(marks)).compute() == "done"


def test_when_no_process_can_be_started_the_node_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gives no process gives an error, not a run that hangs."""
    pids = set(feste.compute([process(lambda i: os.getpid())(i) for i in range(8)])[0])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: not any(alive(pid) for pid in pids))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    error = refused(process(lambda: 1)())

    assert isinstance(error, NodeError) and "/nowhere/python" in str(error)
    monkeypatch.undo()
    assert process(lambda: 1)().compute() == 1


def test_a_stopped_run_kills_its_workers(tmp_path: Path) -> None:
    """A task in a process can be stopped, so it is: nothing works on for a run that is over."""
    mark = tmp_path / "mark"

    @process
    def forever(path: str) -> None:
        Path(path).write_text(str(os.getpid()))
        while True:
            time.sleep(1)

    async def main() -> None:
        task = asyncio.ensure_future(feste.acompute(forever(str(mark))))
        assert await asyncio.to_thread(until, lambda: mark.exists() and mark.read_text())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())

    assert until(lambda: not alive(int(mark.read_text())))
    assert process(lambda: 5)().compute() == 5


# --- the end of the parent -----------------------------------------------------------------------

ENDINGS = {
    "returns": "pass",
    "exits": "os._exit(0)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_idle_workers_end_with_their_parent(tmp_path: Path, ending: str) -> None:
    """However the parent ends, no worker stays."""
    command = script(
        tmp_path,
        f"""
        import feste, os, signal

        @feste.task(executor="process")
        def worker(i): return os.getpid()

        print(*set(feste.compute([worker(i) for i in range(4)])[0]), flush=True)
        {ENDINGS[ending]}
        """,
    )
    pids = [int(word) for word in run(command).stdout.split()]

    assert pids
    assert until(lambda: not any(alive(pid) for pid in pids))


BUSY = {
    "in Python": "while True: time.sleep(60)",
    "in another thread too": "threading.Thread(target=time.sleep, args=(600,)).start(); time.sleep(600)",
}


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("ending", ["returns", "is killed"])
def test_busy_workers_end_with_their_parent(tmp_path: Path, busy: str, ending: str) -> None:
    """Also one in the middle of a task that never ends, or with threads of its own."""
    command = script(
        tmp_path,
        f"""
        import feste, os, pathlib, signal, sys, threading, time

        @feste.task(executor="process")
        def worker(path):
            pathlib.Path(path + ".part").write_text(str(os.getpid()))
            os.rename(path + ".part", path)
            {BUSY[busy]}

        path = sys.argv[1]
        node = worker(path)
        threading.Thread(target=node.compute, daemon=True).start()
        while not os.path.exists(path): time.sleep(0.01)
        {ENDINGS[ending]}
        """,
    )
    mark = tmp_path / "mark"
    done = run([*command, str(mark)])

    assert until(lambda: not alive(int(mark.read_text())))
    assert done.stderr == ""


def test_ctrl_c_is_the_parents_to_handle() -> None:
    """A terminal sends the signal to all processes: workers do not die of it."""

    @process
    def interrupts_itself() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return os.getpid()

    pid = interrupts_itself().compute()

    assert alive(pid)


def test_a_dead_worker_is_noticed_while_its_child_lives(tmp_path: Path) -> None:
    """A process that a task forked holds the worker's socket open: the worker is looked at itself."""
    pid_file = tmp_path / "pid"

    @feste.task(executor="process")
    def orphan(path: str) -> None:
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        with open(path, "a") as file:
            file.write(f"{pid}\n")
        os._exit(9)

    try:
        (error,) = feste.compute(orphan(str(pid_file)), on_error="return")
    finally:
        for pid in pid_file.read_text().split():
            os.kill(int(pid), signal.SIGKILL)

    assert isinstance(error, WorkerLost)
