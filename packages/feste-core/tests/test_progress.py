"""The progress bar, in a real terminal: when it shows, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import io
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import feste
from feste.backend import Price, Profile
from feste.context import settings
from feste.errors import InvalidRequest
from feste.report import progress
from feste.report.headway import Course, Headway
from feste.report.progress import Line, shown
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


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """A test that fails leaves no program behind that waits for an answer."""
    yield
    while Terminal.running:
        os.kill(Terminal.running[-1], signal.SIGKILL)
        os.waitpid(Terminal.running.pop(), 0)


class Terminal:
    """A program on a terminal of its own.

    :param folder: where its text goes.
    :param code: the program after the prelude.
    :param redirect: shell words that send its streams elsewhere.
    """

    running: ClassVar[list[int]] = []

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
        self.running.append(self.pid)
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
        status = os.waitpid(self.pid, 0)[1]
        self.running.remove(self.pid)
        assert os.waitstatus_to_exitcode(status) == 0, self.seen
        return self.seen


def screen(written: str) -> list[str]:
    """The lines that a terminal of any width shows after it was written to, as far as we use it."""
    rows, column = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", written):
        if part == "\n":
            rows.append("")
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            rows[-1] = rows[-1][:column]
        elif part == "\x1b[2K":
            rows[-1] = ""
        elif part[0] != "\x1b":
            rows[-1] = rows[-1][:column].ljust(column) + part + rows[-1][column + 1 :]
            column += 1
    return [row.rstrip() for row in rows if row.strip()]


@pytest.mark.parametrize("run", ["feste.compute({})", "asyncio.run(feste.acompute({}))"])
def test_it_shows_calls_and_goes(tmp_path: Path, run: str) -> None:
    """``progress=True``: a bar of calls while the run lasts; its line is given back."""
    one = Terminal(tmp_path, f'print("values", {run.format("calls, progress=True")}[0])')
    one.read("0/4 calls")
    seen = one.end()

    assert "0/1" not in seen  # not even the first time
    assert "run-1 " in seen
    assert screen(seen) == ["values ['0', '1', '2', '3']"]


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


LOGS = """
import logging

class ToStderr(logging.StreamHandler):
    stream = property(lambda self: sys.stderr, lambda self, stream: None)

logging.basicConfig(handlers=[ToStderr()])

@feste.task
def log(text):
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.001)
    logging.warning("a line of %s", text)
    return text

feste.compute(llm.ask("0"), log("its own"), progress=True)
"""


def test_a_log_line_stands_alone_if_its_handler_looks_the_stream_up(tmp_path: Path) -> None:
    """It begins where the bar was taken away, and not behind it."""
    one = Terminal(tmp_path, LOGS)
    one.read("0/1 call")
    seen = one.end()

    before = seen[: seen.index("WARNING:root:a line of its own")]
    assert re.search(r"(\x1b\[2K|\r|\n)$", before), seen


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
print("values", len(values))
""",
    )
    one.read(told)
    seen = one.end()

    assert [line.split()[0] for line in screen(seen)] == ["got"] * 4 + ["values"]


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


LEFT = """
loop = feste.map(llm.ask, map(str, range(9)), window=4, progress=True)
print("first", next(loop))
try:
    next(loop)
    {leave}
except (ZeroDivisionError, KeyboardInterrupt) as error:
    print("error", type(error).__name__)
time.sleep(progress._EVERY * 5)
os.write(2, b"no bar here")
"""


@pytest.mark.parametrize(
    "leave", ["del loop", "loop.close()", "loop = 1 / 0", "os.kill(os.getpid(), signal.SIGINT)"]
)
def test_the_bar_of_a_loop_that_is_left_goes(tmp_path: Path, leave: str) -> None:
    """Long before the program ends, and without a trace."""
    if "loop" not in leave or "/" in leave:
        leave = f"progress._IDLE = 0.0; {leave}; next(loop)"  # nobody asks it for more
    one = Terminal(tmp_path, LEFT.format(leave=leave))
    one.read("0 items, 4 in flight")
    shown = screen(one.end())

    assert shown[0] == "first 0" and shown[-1] == "no bar here"
    assert not [line for line in shown if "items" in line]


def test_a_program_may_end_in_the_middle_of_a_loop(tmp_path: Path) -> None:
    """The bar of a loop that is still there goes with it."""
    one = Terminal(
        tmp_path,
        """
loop = feste.map(llm.ask, map(str, range(9)), window=4, progress=True)
print("first", next(loop))
""",
    )
    one.read("0 items, 4 in flight")

    assert screen(one.end()) == ["first 0"]


def test_a_loop_may_be_collected_anywhere(tmp_path: Path) -> None:
    """Also in the thread of the bar, and while the terminal is written to: nothing waits for itself."""
    one = Terminal(
        tmp_path,
        """
import contextlib, gc
one = feste.task(lambda i: i)

class Knot:
    pass

def closing():
    with contextlib.closing(feste.map(one, range(99), window=2, progress=True)) as loop:
        yield from loop

gc.disable()
for make in (closing, lambda: feste.map(one, range(99), window=2, progress=True)):
    for _ in range(10):
        knot = Knot()
        knot.itself, knot.loop = knot, make()
        next(knot.loop)
        time.sleep(progress._EVERY)
        del knot
        gc.set_threshold(1)
        gc.enable()
        time.sleep(progress._EVERY)  # this thread makes nothing that could be collected
        gc.disable()
feste.compute(calls, progress=True)
print("end")
""",
    )
    one.read("0/4 calls")

    assert screen(one.end()) == ["end"]


def test_a_loop_may_send_what_it_prints_elsewhere(tmp_path: Path) -> None:
    """Whoever replaces ``sys.stdout`` while the bar is there gets the text, and puts back what was."""
    one = Terminal(
        tmp_path,
        """
import contextlib, io
before, out = sys.stdout, io.StringIO()
loop = feste.map(llm.ask, "0123", window=1, progress=True)
print("first", next(loop))
assert sys.stdout is not before
with contextlib.redirect_stdout(out):
    for value in loop:
        print("got", value)
print([out.getvalue()], file=before)
kept = sys.stdout
feste.compute(feste.task(time.sleep)(progress._EVERY * 3), progress=True)
print(sys.stdout is before, kept.fileno())
""",
    )
    one.read("0/4 items")

    assert screen(one.end()) == ["first 0", "['got 1\\ngot 2\\ngot 3\\n']", "True 1"]


def test_what_is_printed_stays_as_it_is(tmp_path: Path) -> None:
    """Long lines, controls, parts of lines and lists of lines come as they were written."""
    one = Terminal(
        tmp_path,
        r"""
long = "x" * 300
loop = feste.map(llm.ask, "0123", window=1, progress=True)
print("first", next(loop))
sys.stdout.write(f"{long}\n\x1b[31mred\x1b[0m\t")
time.sleep(progress._EVERY * 3)
sys.stdout.writelines(["one\n", "two\n"])
sys.stderr.write("three\n")
list(loop)
""",
    )
    one.read("0/4 items")
    seen = one.end()

    printed = "".join(seen.split("first 0\r\n")[1:])
    assert f"{'x' * 300}\r\n\x1b[31mred\x1b[0m\tone\r\ntwo\r\n" in printed
    assert "three\r\n" in printed


@pytest.mark.parametrize("run", ["map", "compute"])
def test_a_question_of_the_program_stays_where_it_is(tmp_path: Path, run: str) -> None:
    """Who asks for the number of the stream, as ``input`` does, has the line until it is ended."""
    loop = """
for value in feste.map(llm.ask, "0123", window=1, progress=True):
    if value == "0":
        ask(value)
"""
    one = Terminal(
        tmp_path,
        """
@feste.task
def ask(_):
    told = input("name? ")
    time.sleep(progress._EVERY * 3)
    print("told", told)
    return told
"""
        + (loop.replace("ask(value)", "ask.fn(value)") if run == "map" else "")
        + ("feste.compute(ask(calls), progress=True)" if run == "compute" else ""),
    )
    one.read("0/4")
    one.answer.touch()
    one.read("name? ")
    time.sleep(0.5)
    os.write(one.fd, b"ann\n")
    shown = screen(one.end())

    assert shown == ["name? ann", "told ann"]


def test_the_width_is_that_of_the_terminal_of_the_bar(tmp_path: Path) -> None:
    """Though stdout is a file, and no terminal to ask."""
    import fcntl
    import struct
    import termios

    one = Terminal(
        tmp_path,
        """
del os.environ["COLUMNS"]
while os.get_terminal_size(2).columns != 47:
    time.sleep(0.001)
feste.compute([llm.ask(str(i)) for i in range(40)], progress=True)
""",
        "> /dev/null",
    )
    fcntl.ioctl(one.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 47, 0, 0))
    one.read("0/40 calls 0:00:01")
    seen = one.end()

    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen))
    assert max(map(len, lines)) <= 47


def test_the_terminal_of_stdout_may_be_another_one(tmp_path: Path) -> None:
    """The bar is on that of stderr, and what is printed on the other."""
    import pty
    import tty

    main, other = pty.openpty()
    tty.setraw(other)
    one = Terminal(
        tmp_path,
        """
for value in feste.map(llm.ask, "0123", window=1, progress=True):
    print("got", value)
""",
        f"> {os.ttyname(other)}",
    )
    try:
        one.read("0/4 items")
        assert screen(one.end()) == []
        assert os.read(main, 4096) == b"got 0\ngot 1\ngot 2\ngot 3\n"
    finally:
        os.close(main)
        os.close(other)


def test_a_forked_child_has_no_bar_of_its_parent(tmp_path: Path) -> None:
    """It prints, and shows its own."""
    one = Terminal(
        tmp_path,
        """
loop = feste.map(llm.ask, map(str, range(4)), window=1, progress=True)
next(loop)
print("shown", sys.stdout is not sys.__stdout__)
pid = os.fork()
if not pid:
    print("child", sys.stdout is sys.__stdout__)
    feste.compute(feste.task(time.sleep)(progress._EVERY * 5), progress=True)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
list(loop)
print("end")
""",
    )
    one.read("0 items")
    seen = one.end()

    assert "shown True" in seen and "child True" in seen and "end" in seen
    assert "0/1 node" in seen


class Tty(io.StringIO):
    """Something that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_coroutine_waits_for_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for one that cannot be drawn: a loop with many runs would stand still."""
    monkeypatch.setattr(sys, "stderr", Tty())
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with progress._display._bar.lock:
            entered.set()
            leave.wait(LONG)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(LONG)

    async def main() -> list[Any]:
        node = feste.task(lambda: 5)()
        (value,) = await feste.acompute(node, progress=True)
        return [value, *[v async for v in feste.map(feste.task(abs), [-6, -7], progress=True)]]

    try:
        assert asyncio.run(main()) == [5, 6, 7]
    finally:
        leave.set()
        holder.join()


def test_a_line_is_shown_while_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins only then, and stays for a moment while the body of its loop runs."""
    monkeypatch.setattr(sys, "stderr", Tty())
    monkeypatch.setattr(progress, "_display", progress._Display())
    line = Line(Course([a_run(feste.task(abs)(-1))]), True)
    line.begin()
    now = time.monotonic()
    assert line.is_due(now)
    line.idle(True)
    assert not line.is_due(now + 0.5)
    assert line.is_due(now + 0.5, is_shown=True)
    assert not line.is_due(now + 2.0, is_shown=True)
    line.idle(False)
    assert line.is_due(now + 9.0)
    line.end()
    assert not line.is_due(now + 9.0)

    patient = Line(Course([a_run(feste.task(abs)(-1))]), "auto")
    patient.begin()
    now = time.monotonic()
    assert not patient.is_due(now + 0.4) and patient.is_due(now + 0.6)
    patient.end()


def test_the_runs_of_a_map_are_counted_together() -> None:
    """Items, tokens, dollars and failures of those that have ended, too."""
    price = Price(input=0.0, output=1e6 / 4)  # a dollar for each answer
    llm = FakeBackend("map", profile=Profile(price=price), fail={"7": InvalidRequest("no")})
    loop = feste.map(lambda i: llm.chat(str(i)), iter(range(600)), window=100, on_error="return")
    assert len(list(loop)) == 600
    course = loop._course
    look = Headway(course).look()

    assert len(course.runs) == 0 and (look.done, look.total) == (600, 600)
    assert look.outcome == "600/600 items, 1,944 tokens out, $486.00, 114 failed"
    assert (course.calls, course.nodes, course.failed) == (600, 600, 114)


class Counted:
    """Items whose number is asked for, or cannot be told."""

    def __init__(self, told: int | None = 3) -> None:
        self.asked = 0
        self.told = told

    def __iter__(self) -> Any:
        return iter([-1, -2, -3])

    def __len__(self) -> int:
        self.asked += 1
        if self.told is None:
            raise RuntimeError("a query that fails")
        return self.told


def test_the_number_of_items_is_asked_for_only_if_it_is_shown() -> None:
    """It may cost much; and no item is lost where it is wrong, or an error."""
    quiet, shown_, fewer, broken = Counted(), Counted(), Counted(2), Counted(None)
    double = feste.task(abs)
    assert list(feste.map(double, quiet)) == [1, 2, 3]
    loop = feste.map(double, shown_, progress=True)
    assert (quiet.asked, shown_.asked) == (0, 0)
    for items in (fewer, broken):
        assert list(feste.map(double, items, progress=True)) == [1, 2, 3]
    assert list(loop) == [1, 2, 3]
    assert shown_.asked == 1

    look = Headway(Course(in_items=True, items=3, of=2)).look()
    assert (look.total, look.parts[0]) == (None, "3 items")


def test_a_map_without_calls_has_none_in_flight() -> None:
    run = a_run([feste.task(abs)(-i) for i in range(3)])
    course = Course([run], in_items=True, items=1, of=3)

    assert Headway(course).look().words == "1/3 items"


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
class Narrow(Held):
    limits = Limits(concurrency=2)

llm = Narrow()
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


def test_the_bar_goes_with_the_block_also_when_it_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However the wait ended, the terminal is given back at once."""
    terminal = Tty()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)

    def wait(run: Any) -> None:
        with shown(run, settings()["progress"]):
            deadline = time.monotonic() + LONG
            while "0/1 node" not in terminal.getvalue() and time.monotonic() < deadline:
                time.sleep(0.001)
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            wait(a_run(feste.task(abs)(-1)))
        assert screen(terminal.getvalue()) == [] and "0/1 node" in terminal.getvalue()
        assert sys.stderr is terminal
        terminal.truncate(0)


def test_a_stderr_that_cannot_tell_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(io.StringIO):
        def isatty(self) -> bool:
            raise io.UnsupportedOperation("isatty")

    monkeypatch.setattr(sys, "stderr", Odd())

    assert feste.task(lambda: 5)().compute(progress=True) == 5


def test_a_line_that_breaks_is_told_and_the_next_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in it costs no run."""
    told: list[Any] = []
    terminal = Tty()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))
    wait = feste.task(lambda: time.sleep(progress._EVERY * 3) or 5)
    with monkeypatch.context() as broken:
        broken.setattr(Headway, "look", lambda self, now: 1 / 0)
        assert wait().compute(progress=True) == 5
    assert told == [ZeroDivisionError]
    assert wait().compute(progress=True) == 5
    assert "0/1 node" in terminal.getvalue()


def test_a_bar_that_breaks_does_not_break_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that goes away is the bar's trouble only."""

    class Gone(Tty):
        def write(self, text: str) -> int:
            raise OSError("the terminal is gone")

    told: list[Any] = []
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(threading, "excepthook", told.append)
    value: Callable[[], Any] = feste.task(lambda: 5)().compute

    assert value() == 5
    wait = feste.task(lambda: time.sleep(progress._EVERY * 3) or 6)
    assert wait().compute(progress=True) == 6
    assert told == []
