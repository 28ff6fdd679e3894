"""Ctrl-C, in programs of their own: first a stop with grace, then an end at once, never a hang."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Backend, Operation, operation
from feste.errors import FesteError, RunInterrupted
from feste.scheduler.driver import driver
from feste.testing import FakeBackend

LONG = 60.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX here")

PRELUDE = """
import asyncio, os, sys, threading, time
import signal
import feste, feste._compute
signal.signal(signal.SIGINT, signal.default_int_handler)
from feste.backend import Backend, Limits, operation
from feste.errors import RunInterrupted
from feste.scheduler.driver import driver

def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # a line at once

class Held(Backend):
    limits = Limits(concurrency=2)

    @operation
    async def ask(self, prompt: str) -> str:
        say("sent", prompt)
        while not os.path.exists(sys.argv[1]):
            await asyncio.sleep(0.001)
        return f"answer {prompt}"

def watch():
    while not any(run.stopping for run in driver().brain.runs):
        time.sleep(0.001)
    say("stopping")

threading.Thread(target=watch, daemon=True).start()
llm = Held()
nodes = [llm.ask(str(i)) for i in range(6)]

def shown(values):
    return [str(v) if isinstance(v, str) else type(v).__name__ for v in values]
"""

COMPUTE = """
try:
    try:
        feste.compute(nodes)
    except Exception:
        say("an Exception")
except RunInterrupted as stop:
    say("partial", shown(stop.partial[0]))
    say("report", stop.report.states, stop.report.cancelled, len(stop.report.requests))
    say("message", stop)
"""


@pytest.fixture
def program(start: Any) -> Any:
    """A function that starts a program which begins with the prelude."""
    return lambda text: start(PRELUDE + text)


def test_the_first_ctrl_c_starts_nothing_new_and_lets_answers_land(program: Any) -> None:
    """Calls in flight may still be answered for a moment; no other is sent; all of it is handed over.

    What was answered is paid, so it stays with its nodes: computing again asks only for the rest.
    """
    one = program(
        COMPUTE
        + """
say("again")
say("values", shown(feste.compute(nodes)[0]))
"""
    )
    one.until("sent", "sent")
    one.interrupt()
    one.until("stopping")
    one.answer.touch()
    lines = one.end()

    partial = ["answer 0", "answer 1"] + ["NotStarted"] * 4
    assert [line for line in lines if not line.startswith(("sent", "message"))] == [
        "stopping",
        f"partial {partial}",
        "report {'done': 2, 'not_started': 4} True 2",
        "again",
        f"values {[f'answer {i}' for i in range(6)]}",
    ]
    assert [line for line in lines if line.startswith("sent")] == [f"sent {i}" for i in range(6)]
    assert "message interrupted after 2 of 6 nodes; what was finished is in .partial" in lines
    assert (one.process.returncode, one.errors) == (0, "")


def test_when_the_grace_is_over_what_is_in_flight_is_given_up(program: Any) -> None:
    """Answers that do not come in time cost the run no more than the grace; the report counts them."""
    one = program("feste._compute.steps.GRACE = 0.1\n" + COMPUTE)
    one.until("sent", "sent")
    one.interrupt()
    lines = one.end()

    partial = ["Interrupted"] * 2 + ["NotStarted"] * 4
    assert f"partial {partial}" in lines
    assert "report {'interrupted': 2, 'not_started': 4} True 2" in lines
    assert (one.process.returncode, one.errors) == (0, "")


def test_the_second_ctrl_c_ends_at_once(program: Any) -> None:
    """However long the grace, a second Ctrl-C does not wait for it."""
    one = program("feste._compute.steps.GRACE = 3600.0\n" + COMPUTE)
    one.until("sent", "sent")
    one.interrupt()
    one.until("stopping")
    one.interrupt()
    lines = one.end()

    assert f"partial {['Interrupted'] * 2 + ['NotStarted'] * 4}" in lines
    assert (one.process.returncode, one.errors) == (0, "")


def test_it_is_a_keyboard_interrupt_to_whoever_does_not_catch_it(program: Any) -> None:
    """``except Exception`` lets it by, and the program ends with its traceback."""
    one = program(
        """
feste._compute.steps.GRACE = 0.1
try:
    feste.compute(nodes)
except Exception:
    say("an Exception")
finally:
    say("cleaned up")
say("not reached")
"""
    )
    one.until("sent", "sent")
    one.interrupt()
    lines = one.end()

    assert lines[-1] == "cleaned up"
    assert one.process.returncode != 0
    assert "feste.errors.RunInterrupted: interrupted after 0 of 6 nodes" in one.errors
    assert "During handling of the above" not in one.errors


STUCK = {
    "thread": "",
    "inline": "executor='inline'",
    "process": "executor='process'",
}


@pytest.mark.parametrize("where", STUCK)
def test_tasks_that_never_end_do_not_keep_the_program(program: Any, where: str) -> None:
    """Python in a thread cannot be stopped, and an inline task blocks the brain: it ends all the same."""
    one = program(
        f"""
feste._compute.steps.GRACE = 0.1

@feste.task({STUCK[where]})
def stuck():
    import os, time
    os.write(1, b"begun\\n")
    while True:
        time.sleep(1)

quick = feste.task(abs)(-5)
quick.compute(keep="all")
try:
    feste.compute(quick, [stuck(), stuck()])
except RunInterrupted as stop:
    say("partial", stop.partial[0], shown(stop.partial[1]))
    say("report", sum(stop.report.states.values()), stop.report.nodes)
"""
    )
    one.until("begun")
    one.interrupt()
    lines = one.end()

    assert "partial 5 ['Interrupted', 'Interrupted']" in lines or (
        "partial 5 ['Interrupted', 'NotStarted']" in lines
    )
    assert "report 3 3" in lines
    assert (one.process.returncode, one.errors) == (0, "")


def test_stuck_threads_do_not_hold_up_later_runs(program: Any) -> None:
    """Who gave up a run that filled all threads can go on: others take their places."""
    one = program(
        """
feste._compute.steps.GRACE = 0.1

@feste.task
def stuck(i):
    say("begun")
    time.sleep(3600)

try:
    feste.compute([stuck(i) for i in range(40)])
except RunInterrupted as stop:
    say("stopped", stop.report.states)
say("next", feste.compute(feste.task(abs)(-5)))
"""
    )
    one.until("begun")
    one.interrupt()
    lines = one.end()

    assert any("'interrupted'" in line for line in lines)
    assert lines[-1] == "next (5,)"


def test_stuck_parsers_do_not_hold_up_later_calls(program: Any) -> None:
    """Validators and parsers are users' code too: a thread that one of them holds is replaced."""
    one = program(
        """
from feste.backend import Operation, Request, Response
from feste.testing import FakeBackend
feste._compute.steps.GRACE = 0.1

class Stuck(Backend):
    def _prepare(self, x: int):
        return Request(self.plugin, "ask", self.endpoint, {"x": x})
    async def _send(self, request, on_chunk=None):
        return Response(1)
    def _parse(self, response, arguments):
        say("begun")
        time.sleep(3600)
    ask = Operation(prepare=_prepare, send=_send, parse=_parse)

try:
    feste.compute([Stuck().ask(i) for i in range(40)])
except RunInterrupted as stop:
    say("stopped")
say("next", FakeBackend().chat("hello").compute())
"""
    )
    one.until("begun")
    one.interrupt()

    assert one.end()[-1].startswith("next fake-1:")


def test_ctrl_c_is_one_also_where_values_do_not_fit(program: Any) -> None:
    """Vectors do not go into a set: what was computed is handed over one after the other."""
    one = program(
        """
from feste.testing import FakeBackend
feste._compute.steps.GRACE = 0.1
vectors = FakeBackend()
try:
    feste.compute({vectors.embed("a"), vectors.embed("b")}, llm.ask("slow"))
except RunInterrupted as stop:
    say("partial", len(stop.partial))
"""
    )
    one.until("sent")
    one.interrupt()

    assert one.end()[-1] == "partial 3"


def test_an_eager_call_is_interrupted_likewise(program: Any) -> None:
    """Eager calls wait for their answers too."""
    one = program(
        """
feste._compute.steps.GRACE = 0.1
try:
    with feste.context.set(eager=True):
        llm.ask("eager")
except RunInterrupted as stop:
    say("partial", shown(stop.partial))
"""
    )
    one.until("sent")
    one.interrupt()

    assert one.end()[-1] == "partial ['Interrupted']"
    assert (one.process.returncode, one.errors) == (0, "")


def test_in_a_loop_of_the_users_it_is_a_cancellation(program: Any) -> None:
    """``asyncio.run`` cancels its main task on Ctrl-C: the run is given up, and the loop ends."""
    one = program(
        """
try:
    asyncio.run(feste.acompute(nodes))
except KeyboardInterrupt:
    say("interrupted")
while driver().brain.runs:
    time.sleep(0.001)
say("no run left")
"""
    )
    one.until("sent", "sent")
    one.interrupt()
    lines = [line for line in one.end() if line != "stopping"]

    assert lines == ["sent 0", "sent 1", "interrupted", "no run left"]
    assert (one.process.returncode, one.errors) == (0, "")


@pytest.mark.parametrize(
    "waits",
    ["feste.acompute(nodes)", "asyncio.sleep(0, [n async for n in feste.as_completed(nodes)])"],
)
def test_what_was_paid_before_a_cancellation_is_kept(program: Any, waits: str) -> None:
    """The same nodes, computed again, send only what has no answer yet."""
    one = program(
        f"""
class Half(Backend):
    limits = Limits(concurrency=2)
    asked = 0

    @operation
    async def ask(self, prompt: str) -> str:
        self.asked += 1
        while self.asked > 3 and not os.path.exists(sys.argv[1]):
            await asyncio.sleep(0.001)
        return f"answer {{prompt}}"

llm = Half()
nodes = [llm.ask(str(i)) for i in range(6)]

def cut():
    while not llm.asked > 4:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

async def main():
    threading.Thread(target=cut).start()
    try:
        await {waits}
    except asyncio.CancelledError:
        say("cancelled")
        raise

try:
    asyncio.run(main())
except KeyboardInterrupt as stop:
    say(type(stop).__name__, hasattr(stop, "partial"))
open(sys.argv[1], "w").close()
before = llm.asked
feste.compute(nodes)
say("sent", llm.asked - before)
"""
    )
    lines = [line for line in one.end() if line != "stopping"]

    assert lines == ["cancelled", "KeyboardInterrupt False", "sent 3"]
    assert (one.process.returncode, one.errors) == (0, "")


@pytest.mark.parametrize(
    "blocks",
    ["feste.compute(nodes)", "list(feste.map(llm.ask, '012345'))", "list(feste.stream(nodes[0]))"],
)
def test_in_a_loop_that_stands_still_it_is_seen_too(program: Any, blocks: str) -> None:
    """``asyncio.run`` could cancel its task only when the run is over; the waiting thread looks itself."""
    one = program(
        f"""
feste._compute.steps.GRACE = 0.1
async def main():
    {blocks}
try:
    asyncio.run(main())
except RunInterrupted as stop:
    say("partial")
"""
    )
    one.until("sent")
    one.interrupt()

    assert one.end()[-1] == "partial"
    assert (one.process.returncode, one.errors) == (0, "")


def test_at_a_terminal_with_a_progress_bar_and_workers(tmp_path: Path) -> None:
    """Ctrl-C typed at a terminal reaches all processes: the bar goes, and all of them end."""
    import pty

    path = tmp_path / "program.py"
    path.write_text(
        PRELUDE
        + """
feste._compute.steps.GRACE = 0.1

@feste.task(executor="process")
def stuck():
    import os, time
    os.write(1, f"worker {os.getpid()}\\n".encode())  # at once: the bar writes there too
    time.sleep(600)

try:
    feste.compute(nodes, stuck(), progress=True)
except RunInterrupted:
    say("interrupted")
"""
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(path), str(tmp_path / "answer")])
    seen = b""
    typed = False
    deadline = time.monotonic() + LONG
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    read = os.read(terminal, 65536)
                except OSError:  # Linux says so when the other side is closed
                    break
                if not read:
                    break
                seen += read
            if not typed and b"worker " in seen and seen.count(b"sent ") == 2 and b"calls" in seen:
                os.write(terminal, b"\x03")
                typed = True
        code = exit_code(pid, deadline)
    finally:
        os.close(terminal)

    assert typed
    assert b"interrupted" in seen
    assert b"\x1b[2K" in seen and seen.rfind(b"\x1b[2K") > seen.rfind(b" calls")
    assert b"Traceback" not in seen
    assert code == 0
    worker = re.search(rb"worker (\d+)", seen)
    assert worker is not None
    assert gone(int(worker[1]))


def exit_code(pid: int, deadline: float) -> int:
    """Wait for a child; one that does not end is killed."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def gone(pid: int) -> bool:
    """Whether a process ends."""
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


# --- other signals, in this process --------------------------------------------------------------


class Signals(Backend):
    """Sends this process a signal while a call is in flight."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cancelled = threading.Event()

    @operation
    async def ask(self, prompt: str) -> str:
        os.kill(os.getpid(), self.number)
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return prompt


def test_a_signal_handler_that_raises_stops_the_run() -> None:
    """Whatever takes the caller out of ``compute``, nobody waits any more: nothing is bought in vain."""

    def handler(*_: Any) -> None:
        raise TimeoutError("the caller's own limit")

    before = signal.signal(signal.SIGUSR1, handler)
    llm = Signals(signal.SIGUSR1)
    try:
        with pytest.raises(TimeoutError, match="the caller's own limit"):
            llm.ask("hello").compute()
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert llm.cancelled.wait(LONG)
    deadline = time.monotonic() + LONG
    while driver().brain.runs and time.monotonic() < deadline:
        time.sleep(0.001)
    assert driver().brain.runs == []
    assert feste.task(abs)(-1).compute() == 1


def test_it_is_no_error_of_feste() -> None:
    """``RunInterrupted`` is a ``KeyboardInterrupt``, so neither family of errors swallows it."""
    stop = RunInterrupted("stopped", partial=(1, 2), report="a report")

    assert isinstance(stop, KeyboardInterrupt)
    assert not isinstance(stop, (Exception, FesteError))
    assert (stop.partial, stop.report) == ((1, 2), "a report")


@feste.task
def chain(llm: FakeBackend, links: int) -> str:
    said = llm.chat("Begin")
    for _ in range(links - 1):
        said = llm.chat(said)
    return str(said.compute())


@feste.task
def loop(llm: FakeBackend, turns: int) -> list[Any]:
    return [llm.chat(f"{i}").compute() for i in range(turns)]


@feste.task
def eagerly(llm: FakeBackend, turns: int) -> list[Any]:
    with feste.context.set(eager=True):
        return [llm.chat(f"{i}") for i in range(turns)]


class Gated(FakeBackend):
    """Answers when a test lets it, and says when it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.opened = threading.Event(), threading.Event()

    async def _send(self, request: Any, on_chunk: Any = None) -> Any:
        self.asked.set()
        while not self.opened.is_set():
            await asyncio.sleep(0.001)
        return await super()._send(request, on_chunk)

    chat = Operation(prepare=FakeBackend._prepare_chat, send=_send, parse=FakeBackend._parse_text)


def settled() -> None:
    """Wait until nothing is under way."""
    deadline = time.monotonic() + LONG
    while driver().brain.runs or driver().brain.dispatcher.chunks:
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def read(pairs: Any, values: list[Any]) -> None:
    """Read results until they end, or their run is stopped."""
    with suppress(FesteError):
        values.extend(value for _, value in pairs)


@pytest.mark.parametrize("task", [chain, loop, eagerly])
@pytest.mark.parametrize("grace", [0.0, LONG])
def test_tasks_of_a_stopped_run_ask_no_model_any_more(task: Any, grace: float) -> None:
    """What a task computes by itself is stopped with its run, at once or after what is in flight."""
    llm = Gated()
    pairs = feste.as_completed([task(llm, 5)])
    reader = threading.Thread(target=read, args=(pairs, []))
    reader.start()
    assert llm.asked.wait(LONG)
    (run,) = [run for run in driver().brain.runs if run.around is None]
    driver().stop(run, grace)
    while not run.stopping:
        threading.Event().wait(0.001)
    llm.opened.set()
    settled()
    pairs.close()
    reader.join(LONG)

    assert len(llm.requests) <= 1


def test_what_a_task_asked_before_may_still_end_it() -> None:
    """In the time of grace an answer lands, and with it the task's own value."""
    llm = Gated()
    values: list[Any] = []
    pairs = feste.as_completed([chain(llm, 1)])
    reader = threading.Thread(target=read, args=(pairs, values))
    reader.start()
    assert llm.asked.wait(LONG)
    (run,) = [run for run in driver().brain.runs if run.around is None]
    driver().stop(run, LONG)
    while not run.stopping:
        threading.Event().wait(0.001)
    llm.opened.set()
    reader.join(LONG)

    assert len(values) == 1


def test_a_task_that_another_run_waits_for_goes_on_asking() -> None:
    """Its run is stopped, and its calls are made all the same."""
    llm = Gated()
    node = chain(llm, 3)
    pairs = feste.as_completed([node])
    reader = threading.Thread(target=read, args=(pairs, []))
    reader.start()
    assert llm.asked.wait(LONG)
    values: list[Any] = []
    other = threading.Thread(target=lambda: values.append(node.compute()))
    other.start()
    while not any(len(who) > 1 for who in list(driver().brain.joins.under_way.values())):
        threading.Event().wait(0.001)
    pairs.close()
    llm.opened.set()
    other.join(LONG)
    reader.join(LONG)

    assert len(values) == 1 and len(llm.requests) == 3
