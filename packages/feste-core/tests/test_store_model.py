"""A store does what a dict does, whatever happens to its process, its file and its disk.

``CHAOS=full`` runs the long form: 200 stores, 50 steps each.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from feste.backend import Request, Response
from feste.draw import Draw
from feste.errors import CallError, JournalDamaged, JournalFailed, JournalLocked, JournalTooNew
from feste.store import opening, schema
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
from feste.store.repair import wal
from feste.store.repair.salvage import salvage
from feste.store.repair.verify import verify
from feste.store.rows import Answer, Found, Wanted

FULL = os.environ.get("CHAOS") == "full"
RUNS, STEPS = (200, 50) if FULL else (12, 20)

pytestmark = pytest.mark.timeout(1200 if FULL else 120)

calls = st.integers(0, 11)
sizes = st.sampled_from([5, 200, 3000, 20000])
places = st.floats(0, 1, exclude_max=True)


def request(n: int) -> Request:
    body = {"model": "m", "prompt": f"question {n}"}
    return Request("fake", "chat", "plugin:fake", body, draws=(Draw("main", f"{n:x}", 0),))


class Store(RuleBasedStateMachine):
    """A store that is written, killed, damaged and filled, and what must be in it."""

    @initialize()
    def make(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="feste-store-"))
        self.path = self.folder / "s.db"
        self.journal = Journal(self.path)
        #: The answer to each call; one that is bought again does not replace it.
        self.paid: dict[int, str] = {}
        #: All answers that there ever were: salvage may bring back an older one.
        self.ever: set[tuple[int, str]] = set()
        #: The calls that were sent and whose outcome is not known.
        self.unknown: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
            shutil.rmtree(self.folder)

    def recall(self, n: int) -> Found:
        found: list[Found] = ask(
            self.journal.recall, [Wanted(request(n).key, request(n).draws[0], True)]
        )
        return found[0]

    def text(self, n: int) -> str | None:
        answer = self.recall(n).response
        return None if answer is None else answer.payload

    def intend(self, n: int) -> int:
        number: int = ask(self.journal.intend, request(n), [request(n)], run="night")
        return number

    @rule(n=calls, size=sizes)
    def buy(self, n: int, size: int) -> None:
        text = f"{n} {len(self.ever)} " + "x" * size
        answer = Answer(request(n), Response(text))
        number = self.intend(n)
        ask(self.journal.record, [answer], number=number, response=answer.response)
        self.paid.setdefault(n, text)
        self.ever.add((n, text))

    @rule(n=calls, outcome=st.sampled_from(["failed", "unknown", "withdrawn"]))
    def fail(self, n: int, outcome: Any) -> None:
        number = self.intend(n)
        ask(self.journal.finish, number, outcome, CallError("no"))
        if outcome == "unknown":
            self.unknown.add(n)

    @rule(n=calls)
    def look(self, n: int) -> None:
        assert self.text(n) == self.paid.get(n)

    @rule(n=calls)
    def leave_out(self, n: int) -> None:
        """Delete an answer; the highest number may go."""
        key = request(n).key
        self.journal.run(lambda conn: conn.execute("DELETE FROM answers WHERE key = ?", (key,)))
        self.paid.pop(n, None)

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.journal = Journal(self.path)

    def kill(self, place: float, junk: bytes) -> None:
        """End the process; what the log holds beyond what was acknowledged is cut off somewhere."""
        log = self.path.with_name("s.db-wal")
        with closing(wal.File(log)) as file:
            length = 32 + len(list(wal.frames(file))) * (24 + schema.PAGE)
        left = log.read_bytes()
        copies = {p: p.read_bytes() for p in (self.path, self.path.with_name("s.db.lock"))}
        copies[log] = left[: length + int((len(left) - length + 1) * place)] + junk
        self.journal.close()
        for file, content in copies.items():
            file.write_bytes(content)

    @rule(place=places, junk=st.binary(max_size=50))
    def crash(self, place: float, junk: bytes) -> None:
        self.kill(place, junk)
        self.journal = Journal(self.path)

    @rule(place=places, bit=st.integers(0, 7), killed=st.booleans(), log=st.booleans())
    def flip(self, place: float, bit: int, killed: bool, log: bool) -> None:
        """Flip a bit of the file or the log: one answer may go, and an older one may be found."""
        if killed:
            self.kill(0, b"")
        else:
            self.journal.close()
        flipped = self.path.with_name("s.db-wal") if killed and log else self.path
        data = bytearray(flipped.read_bytes())
        data[int(len(data) * place)] ^= 1 << bit
        flipped.write_bytes(data)
        try:
            self.journal = Journal(self.path)
        except (JournalDamaged, JournalTooNew):
            before = dict(self.paid)
            salvage(self.path)
            assert not verify(self.path).problems
            self.journal = Journal(self.path)
            for n in range(12):  # what was deleted may have come back
                text = self.text(n)
                assert text is None or (n, text) in self.ever
                if text is not None and n not in before:
                    self.paid[n] = text
        self.lose()

    def lose(self) -> None:
        """At most one answer has gone."""
        texts = {n: self.text(n) for n in self.paid}
        wrong = {n for n, text in texts.items() if text != self.paid[n]}
        assert len(wrong) <= 1
        for n in wrong:
            text = texts[n]
            assert text is None or (n, text) in self.ever
            if text is None:
                del self.paid[n]
            else:
                self.paid[n] = text

    @rule(n=calls)
    def fill(self, n: int) -> None:
        """The disk becomes full: nothing more is sent, and all that was acknowledged is there."""

        def limit(conn: sqlite3.Connection) -> None:
            (pages,) = conn.execute("PRAGMA page_count").fetchone()
            conn.execute(f"PRAGMA max_page_count = {pages + 3}")

        self.journal.run(limit)
        with pytest.raises(JournalFailed):
            for pages in range(1, 40):
                self.buy(n, 20000 * pages)
        with pytest.raises(JournalFailed):
            self.intend(n)
        self.holds()
        assert not self.journal.is_current
        self.reopen()

    @rule(process=st.integers(0, 19))
    def open_twice(self, process: int) -> None:
        """One process writes; a real other one is asked rarely, because it takes time to start."""
        with pytest.raises(JournalLocked):
            Journal(self.path)
        if process != 13:
            return
        script = f"""
from feste.errors import JournalLocked
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
try:
    Journal({str(self.path)!r})
except JournalLocked as error:
    print(error.pid)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout == f"{os.getpid()}\n"

    @invariant()
    def holds(self) -> None:
        """Every answer that was acknowledged is there."""
        if hasattr(self, "journal"):
            assert {n: self.text(n) for n in self.paid} == self.paid


def test_a_store_is_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that were acknowledged are recalled right, through crashes, damage and full disks."""
    monkeypatch.setattr(opening, "BALLAST", 1 << 12)
    Store.TestCase.settings = settings(
        max_examples=RUNS,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case = Store.TestCase("runTest")
    case.runTest()  # raises with the steps and how to repeat them
