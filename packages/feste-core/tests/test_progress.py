"""The progress bar, in a real terminal: when it shows, and that nothing of it stays."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Price, Profile
from feste.context import settings
from feste.report import progress
from feste.report.headway import Course, Headway
from feste.report.progress import shown
from feste.scheduler.admission.held import RATE_LIMIT
from feste.scheduler.states import GATHERED, QUEUED, SENT
from feste.testing import FakeBackend, VirtualClock

LONG = 60.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is POSIX")

PRELUDE = """
import asyncio, os, signal, sys, threading, time
import feste
from feste.backend import Backend, operation
from feste.report import progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # off in what a script runs behind it

class Held(Backend):
    @operation
    def ask(self, prompt: str) -> str:
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.001)
        return prompt

llm = Held()
calls = [llm.ask(str(i)) for i in range(4)]
"""


class Terminal:
    """A program on a terminal of its own.

    :param folder: where its text goes.
    :param code: the program after the prelude.
    :param redirect: shell words that send its streams elsewhere.
    """

    def __init__(self, folder: Path, code: str, redirect: str = "") -> None:
        import pty

        program = folder / "program.py"
        program.write_text(PRELUDE + code)
        self.answer = folder / "answer"
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            words = f'exec "{sys.executable}" "{program}" "{self.answer}" {redirect}'
            os.environ.update(TERM="xterm", COLUMNS="120")
            os.environ.pop("NO_COLOR", None)
            os.execv("/bin/sh", ["sh", "-c", words])
        self.seen = ""

    def read(self, until: str | None = None) -> str:
        """Read until a text was seen, or to the end."""
        deadline = time.monotonic() + LONG
        while time.monotonic() < deadline and (until is None or until not in self.seen):
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    read = os.read(self.fd, 65536)
                except OSError:  # the other side is closed
                    read = b""
                if not read:
                    break
                self.seen += read.decode(errors="replace")
        if until is not None:
            assert until in self.seen
        return self.seen

    def end(self) -> str:
        """Let the answers come, read the rest and see that the program ended well."""
        self.answer.touch()
        self.read()
        os.close(self.fd)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0, self.seen
        return self.seen


@pytest.mark.parametrize("run", ["feste.compute({})", "asyncio.run(feste.acompute({}))"])
def test_it_shows_calls_and_goes(tmp_path: Path, run: str) -> None:
    """``progress=True``: a bar of calls while the run lasts; its line and the cursor are given back."""
    one = Terminal(tmp_path, f'print("values", {run.format("calls, progress=True")}[0])')
    one.read("0/4 calls")
    seen = one.end()

    assert "0/1" not in seen  # not even the first time
    assert "run-1" in seen and "values ['0', '1', '2', '3']" in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1
    last = seen[: seen.index("values")].rpartition("\x1b[?25h")[2]
    assert "\x1b[2K" in last and "calls" not in last
    assert "Traceback" not in seen


def test_auto_shows_a_long_run_on_a_terminal(tmp_path: Path) -> None:
    """The default waits a moment first: a short run shows nothing at all."""
    one = Terminal(
        tmp_path,
        """
feste.task(abs)(-1).compute()
print("quick", flush=True)
progress._PATIENCE = 0.0
feste.compute(calls)
""",
    )
    one.read("0/4 calls")
    seen = one.end()

    assert seen.startswith("quick")


@pytest.mark.parametrize("setting", ["True", "'auto'"])
def test_nothing_where_stderr_is_no_terminal(tmp_path: Path, setting: str) -> None:
    """Output into a file or a pipe holds the program's own words only."""
    log = tmp_path / "log"
    one = Terminal(
        tmp_path,
        f"""
progress._PATIENCE = 0.0
print("values", feste.compute(calls, progress={setting})[0])
""",
        f'2> "{log}"',
    )
    seen = one.end()

    assert seen.replace("\r\n", "\n") == "values ['0', '1', '2', '3']\n"
    assert log.read_text() == ""


def test_nothing_when_it_is_switched_off(tmp_path: Path) -> None:
    """``progress=False`` is quiet on a terminal too."""
    seen = Terminal(
        tmp_path,
        """
progress._PATIENCE = 0.0
print("values", feste.compute(calls, progress=False)[0])
""",
    ).end()

    assert seen.replace("\r\n", "\n") == "values ['0', '1', '2', '3']\n"


def test_a_program_without_calls_counts_nodes(tmp_path: Path) -> None:
    """A run of Python only shows nodes; failed ones are told."""
    one = Terminal(
        tmp_path,
        """
@feste.task
def wait(i):
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.001)

@feste.task
def breaks():
    raise ValueError("broken")

feste.compute(breaks(), [wait(i) for i in range(3)], progress=True, on_error="return")
""",
    )
    one.read("1 failed")
    seen = one.end()

    assert "1/4 nodes" in seen


@pytest.mark.parametrize("stderr", ["None", "io.StringIO()", "Bare()", "closed"])
def test_a_program_may_have_any_stderr(stderr: str) -> None:
    """No stderr, a closed one, or an object that only writes: ``compute`` works, with no bar."""
    code = f"""if True:
        import io, os, sys
        class Bare:
            def write(self, text): pass
            def flush(self): pass
        closed = open(os.devnull, "w")
        closed.close()
        import feste
        sys.stderr = {stderr}
        node = feste.task(abs)
        print(node(-1).compute(), node(-2).compute(progress=True), node(-3).compute(progress=False))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG, check=False
    )

    assert done.stdout == "1 2 3\n"


SAYS = """
@feste.task
def say(values):
    print("[bold]half[/bold]", end="", flush=True)
    print(" of 10 :smile:")

feste.compute(say(calls), progress=True)
"""


def test_what_tasks_print_goes_into_the_file_that_it_is_sent_to(tmp_path: Path) -> None:
    """The bar on the terminal takes nothing from a program whose output is a file."""
    printed = tmp_path / "printed"
    one = Terminal(tmp_path, SAYS, f'> "{printed}"')
    one.read("0/4 calls")
    seen = one.end()

    assert printed.read_text() == "[bold]half[/bold] of 10 :smile:\n"
    assert "half" not in seen


def test_what_tasks_print_on_the_terminal_is_left_as_it_is(tmp_path: Path) -> None:
    """Above the bar, without colours, and nothing in it is taken for markup."""
    one = Terminal(tmp_path, SAYS)
    one.read("0/4 calls")
    seen = one.end()

    assert "[bold]half[/bold]" in seen and " of 10 :smile:" in seen


@pytest.mark.parametrize(
    ("loop", "told"),
    [
        ("feste.map(llm.ask, map(str, range(4)), window=2, progress=True)", "0 items, 2 in flight"),
        ("feste.map(llm.ask, list('0123'), window=2, progress=True)", "0/4 items, 2 in flight"),
        ("feste.as_completed(calls, progress=True)", "0/4 calls, 4 in flight"),
    ],
)
def test_a_loop_shows_how_far_it_is_if_asked(tmp_path: Path, loop: str, told: str) -> None:
    """What the loop prints goes above the bar, and the bar goes when the loop is over."""
    one = Terminal(
        tmp_path,
        f"""
values = []
for value in {loop}:
    print("got", value)
    values.append(value)
print("values", len(values), [t.name for t in threading.enumerate() if "progress" in t.name])
""",
    )
    one.read(told)
    seen = one.end()

    assert seen.count("got") == 4 and "values 4 []" in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1
    assert "Traceback" not in seen


def test_a_loop_shows_nothing_if_not_asked(tmp_path: Path) -> None:
    """It may print, or show a bar of its own."""
    seen = Terminal(
        tmp_path,
        """
progress._PATIENCE = 0.0
print("values", list(feste.map(llm.ask, "01")), len(list(feste.as_completed(calls))))
print("values", "".join(feste.stream(feste.task(str)(7), progress=True)))
""",
    ).end()

    assert seen.replace("\r\n", "\n") == "values ['0', '1'] 4\nvalues 7\n"


@pytest.mark.parametrize(
    "left", ["del loop", "loop.close()", "sys.exit()", "loop = 1 / 0", "loop.end"]
)
def test_the_bar_of_a_loop_that_is_left_goes(tmp_path: Path, left: str) -> None:
    """Also at the end of the program, with the loop still there, and after Ctrl-C; the cursor is back."""
    interrupt = "os.kill(os.getpid(), signal.SIGINT); next(loop)" if left == "loop.end" else left
    one = Terminal(
        tmp_path,
        f"""
loop = feste.map(llm.ask, map(str, range(9)), window=4, progress=True)
print("first", next(loop))
print("shown", progress._terminal.locked())
try:
    {interrupt}
except (ZeroDivisionError, KeyboardInterrupt) as error:
    print("error", type(error).__name__)
""",
    )
    one.read("0 items, 4 in flight")
    seen = one.end()

    assert "first 0" in seen and "shown True" in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1
    assert "Exception" not in seen and "Traceback" not in seen


def test_one_bar_at_a_time(tmp_path: Path) -> None:
    """A run within a loop shows none while that of the loop is there."""
    one = Terminal(
        tmp_path,
        """
for value in feste.map(llm.ask, "0123", window=1, progress=True):
    if value != "3":  # the last, which ends the loop's bar
        feste.compute([llm.ask(f"{value}{i}") for i in range(7)], progress=True)
    time.sleep(0.2)
feste.compute([llm.ask(str(i)) for i in range(5)], feste.task(time.sleep)(0.3), progress=True)
""",
    )
    one.read("0/4 items")
    seen = one.end()

    assert "2/4 items" in seen and "5/5 calls" in seen
    assert "7 calls" not in seen


def watchers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "feste-progress"]


def headway(run: Any) -> Headway:
    return Headway(Course([run]))


def a_run(*nodes: Any) -> Any:
    """A run that was made and never begins."""
    return VirtualClock(FakeBackend().answer).run(*nodes)


def test_it_says_why_nothing_moves() -> None:
    """While a gate is closed it tells until when, else what calls wait for."""
    llm = FakeBackend()
    run = a_run([llm.chat(f"{i}") for i in range(9)])
    look = headway(run).look
    assert look().words == "0/9 calls, 0 in flight"
    run.in_flight = 2
    run.state[:] = bytes([SENT] * 2 + [QUEUED] * 4 + [GATHERED] * 3)
    run.retrying = 1
    waiting = "3 waiting for their batch, 1 waiting to retry"
    assert look().words == f"0/9 calls, 2 in flight, 3 waiting for a slot, {waiting}"
    run.lacks = RATE_LIMIT
    assert "3 waiting for the rate limit" in look().words
    run.resumes_at = time.monotonic() + 99.9
    until = time.strftime("%H:%M:", time.localtime(time.time() + 99.9))
    words = look().words
    assert words.endswith(waiting) and re.search(
        r"flight, rate limit until \d\d:\d\d:\d\d, ", words
    )
    assert until[:2] in words
    run.down_until = time.monotonic() + 99.9
    assert re.search(r"flight, backend down, next try at \d\d:\d\d:\d\d, 3", look().words)
    assert headway(a_run(feste.task(abs)(-1))).look().words == "0/1 node"


def test_dollars_so_far_are_known_or_said_to_be_unknown() -> None:
    """A price that is not known is never zero; beside others it makes "at least"."""
    priced = FakeBackend("a", profile=Profile(price=Price(input=0.0, output=1e6 / 4)))
    wanted = [
        [priced.chat("1")],
        [priced.chat("2"), FakeBackend("b").chat("x")],
        [FakeBackend("b").chat("y")],
    ]
    said = []
    for nodes in wanted:
        clock = VirtualClock(priced.answer)
        run = clock.run(*nodes)
        assert headway(run).look().parts[6] == ""
        clock.tell(0.0, ("submit", run))
        clock.drive()
        said.append(headway(run).look().parts[6])

    assert said == ["$1.00", ">= $1.00", "cost unknown"]


def test_the_time_left_is_learnt_from_what_was_done() -> None:
    """Nothing at first; then at the rate of the last half minute, also when that changes."""
    run = a_run([FakeBackend().chat(f"{i}") for i in range(100)])
    fast = headway(run)
    assert fast.look(0.0).parts[-1] == ""
    run.calls_done = 10
    assert fast.look(1.0).parts[-1] == ""  # too early to say
    assert fast.look(5.0).parts[-1] == "~45 s left"
    run.calls_done = 40
    assert fast.look(20.0).parts[-1] == "~30 s left"
    for second in range(21, 61):
        run.calls_done += second % 10 == 0
        left = fast.look(float(second)).parts[-1]
    assert left == "~9:20 min left"  # 56 to go, 3 in the last 30 seconds
    run.calls_done = 100
    assert fast.look(61.0).parts[-1] == ""


def test_after_the_last_call_the_nodes_that_are_left_count() -> None:
    """Python that is slow after the calls does not look like a run that stands still."""
    llm = FakeBackend()
    run = a_run([feste.task(str.upper)(llm.chat(f"{i}")) for i in range(50)])
    fast = headway(run)
    run.calls_done, run.open = 50, 40
    assert fast.look(0.0).words == "50/50 calls, 60/100 nodes"
    run.open = 20
    look = fast.look(10.0)
    assert (look.done, look.total) == (80, 100)
    assert look.words == "50/50 calls, 80/100 nodes, ~10 s left"
    run.open = 0
    assert fast.look(11.0).words == "50/50 calls, 0 in flight"


def test_a_plugin_without_prices_does_not_end_the_bar() -> None:
    """What raises in a plugin is the report's to tell."""

    class Broken(FakeBackend):
        has_run = False

        def profile(self, model: str) -> Profile:
            if self.has_run:
                raise ValueError("no list of prices")
            return Profile()

    llm = Broken()
    clock = VirtualClock(llm.answer)
    run = clock.run(llm.chat("hello"))
    clock.tell(0.0, ("submit", run))
    clock.drive()
    llm.has_run = True

    assert headway(run).look().words == "1/1 call, 0 in flight, 4 tokens out, cost unknown"


@pytest.mark.parametrize("columns", ["80", "120"])
def test_a_line_is_never_wider_than_the_terminal(tmp_path: Path, columns: str) -> None:
    """Where there is little room, the words that are needed least go first; nothing is cut."""
    one = Terminal(
        tmp_path,
        f"""
from feste.backend import Limits
os.environ["COLUMNS"] = "{columns}"
Held.limits = Limits(concurrency=2)
feste.compute([llm.ask(str(i)) for i in range(1000)], progress=True)
""",
    )
    one.read("998 waiting for a slot")
    seen = one.end()

    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen))
    assert max(map(len, lines)) <= int(columns)
    assert "…" not in seen


def test_a_bar_that_waits_says_so(tmp_path: Path) -> None:
    """A provider that asks to wait: the bar tells it until the calls go on."""
    one = Terminal(
        tmp_path,
        """
from feste.errors import RateLimited

class Limited(Backend):
    refused = False

    @operation
    def ask(self, prompt: str) -> str:
        if not self.refused:
            self.refused = True
            raise RateLimited("slow down", retry_after=0.7)
        return prompt

print("value", feste.compute(Limited().ask("hello"), progress=True)[0])
""",
    )
    one.read("rate limit until ")

    assert "value hello" in one.end()


def test_the_watcher_ends_with_the_block_also_when_it_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No thread stays behind, however the wait ended."""

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Tty())
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    run = a_run()
    with pytest.raises(KeyboardInterrupt), shown(run, "auto"):
        raise KeyboardInterrupt

    assert not watchers()
    with shown(run, settings()["progress"]):
        assert watchers()
    assert not watchers()


def test_a_bar_that_breaks_does_not_break_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that goes away is the bar's trouble only."""

    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError("the terminal is gone")

    told: list[Any] = []
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(threading, "excepthook", told.append)
    value: Callable[[], Any] = feste.task(lambda: 5)().compute

    assert value() == 5
    assert feste.task(lambda: 6)().compute(progress=True) == 6
