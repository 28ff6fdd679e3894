"""Several processes and one store: one writes it at a time, the others are told who; forks too.

``CHAOS=full`` runs the long form: 20 rounds of a race.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from feste.store.journal import Journal

LONG = 60.0
RACERS = 8
ROUNDS = 20 if os.environ.get("CHAOS") == "full" else RACERS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and forks are POSIX here")

PROGRAM = """
import os, sys
import feste
from feste.errors import JournalLocked
from feste.testing import FakeBackend

store, wait = sys.argv[1], float(sys.argv[2])
llm = FakeBackend()

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def attempt(text, **settings):
    try:
        feste.compute(llm.chat(text), store=store, progress=False, **settings)
        return "has it"
    except JournalLocked as locked:
        return f"locked by {locked.pid}"
"""

#: Tries to get the store each time it is told to, and says whether it has it.
TRY = """
say("ready")
for line in sys.stdin:
    if line == "close\\n":
        feste.store.close()
        say("closed")
    else:
        say(attempt(f"call of {os.getpid()}", store_wait=wait))
"""

#: Forks while the store is open.
FORK = """
say(attempt("before"))
pid = os.fork()
if pid == 0:
    say("child", attempt("in the child"))
    feste.store.close()
    sys.exit(7)
say("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
say(attempt("after"))
sys.stdin.readline()
"""

#: Forks, and gives the store to its child.
HAND_OVER = """
say(attempt("of the parent"))
pid = os.fork()
if pid == 0:
    say("child", attempt("of the child", store_wait=60.0))
    os.kill(os.getpid(), 9)
feste.store.close()
say("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
say(attempt("of the parent, later"))
"""


class Program:
    """A program that uses the store."""

    def __init__(self, store: Path, text: str, wait: float = 0.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM + text, str(store), str(wait)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def hears(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=LONG)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Program] = []

    def begin(text: str, wait: float = 0.0) -> Program:
        started.append(Program(tmp_path / "runs.db", text, wait))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


def asked(store: Path) -> list[str]:
    """The calls that the store has answers for, in order."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as conn:
        (said,) = conn.execute("PRAGMA integrity_check").fetchone()
        assert said == "ok"
        query = "SELECT prompts.request FROM answers JOIN prompts USING (key) ORDER BY id"
        return [text.split('"content":"')[1].split('"')[0] for (text,) in conn.execute(query)]


def test_one_process_writes_at_a_time(start: Any, tmp_path: Path) -> None:
    """Of those that race for a store one gets it; when it is killed, the next one can."""
    waiting = [start(TRY) for _ in range(RACERS)]
    assert {program.says() for program in waiting} == {"ready"}
    winners = []
    for n in range(ROUNDS):
        for program in waiting:
            program.hears("try")
        said = {program: program.says() for program in waiting}
        (winner,) = [program for program, what in said.items() if what == "has it"]
        del said[winner]

        assert set(said.values()) <= {f"locked by {winner.pid}"}
        winner.kill()
        waiting.remove(winner)
        winners.append(winner.pid)
        if n + RACERS < ROUNDS:
            waiting.append(start(TRY))
            assert waiting[-1].says() == "ready"
    assert asked(tmp_path / "runs.db") == [f"call of {pid}" for pid in winners]


def test_waiting_for_the_store(start: Any) -> None:
    """``store_wait`` waits until it is free, or the time is over."""
    first, patient, hasty = start(TRY), start(TRY, 60.0), start(TRY, 0.2)
    assert {program.says() for program in (first, patient, hasty)} == {"ready"}
    first.hears("try")
    assert first.says() == "has it"
    patient.hears("try")
    hasty.hears("try")

    assert hasty.says() == f"locked by {first.pid}"  # the patient one has waited as long by now
    first.hears("close")
    assert (first.says(), patient.says()) == ("closed", "has it")


def test_a_fork_leaves_its_parents_store_alone(start: Any, tmp_path: Path) -> None:
    """A child neither uses nor closes it, and is told who has it; the parent goes on."""
    parent = start(FORK)
    said = [parent.says() for _ in range(4)]
    other = start(TRY)
    other.says()
    other.hears("try")

    assert said == [
        "has it",
        f"child locked by {parent.pid}",
        "child ended with 7",
        "has it",
    ]
    assert other.says() == f"locked by {parent.pid}"  # the child's end did not free the lock
    parent.hears("end")
    parent.process.communicate(timeout=LONG)
    assert not os.path.exists(tmp_path / "runs.db-wal")  # closed in order
    assert asked(tmp_path / "runs.db") == ["before", "after"]


def test_a_fork_can_take_over_the_store(start: Any, tmp_path: Path) -> None:
    """A child opens what its parent has closed; what it wrote before it was killed is there."""
    parent = start(HAND_OVER)
    said = [parent.says() for _ in range(4)]

    assert said == ["has it", "child has it", "child ended with -9", "has it"]
    parent.process.communicate(timeout=LONG)
    texts = ["of the parent", "of the child", "of the parent, later"]
    assert asked(tmp_path / "runs.db") == texts


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_waits_for_sqlite(tmp_path: Path) -> None:
    """A child that was forked inside SQLite would find its locks taken for ever."""
    journal = Journal(tmp_path / "runs.db")
    began, done = threading.Event(), []

    def work(conn: sqlite3.Connection) -> None:
        began.set()
        time.sleep(0.2)
        done.append(True)

    thread = threading.Thread(target=journal.run, args=(work,))
    thread.start()
    began.wait(LONG)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if done else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    thread.join()
    journal.close()

    assert code == 0
