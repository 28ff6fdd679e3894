"""Stores of killed programs are cut off and damaged: answers are right or gone, and that is told."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from feste.backend import Response
from feste.errors import JournalDamaged, JournalTooNew
from feste.store import opening, schema
from feste.store.journal import Journal, outcome_of
from feste.store.lock import acknowledged
from feste.store.repair import wal
from feste.store.repair.salvage import salvage
from feste.store.repair.verify import verify
from feste.store.rows import Found, Wanted, decode, draw_of
from tests.chaos.checker import rows
from tests.chaos.driver import Chaos

pytestmark = pytest.mark.timeout(900)

WINDOW = 8
FRAME = 24 + schema.PAGE
Call = tuple[str, str]


class Files(NamedTuple):
    """The files of a killed program's store."""

    file: bytes
    log: bytes
    lock: bytes

    @classmethod
    def of(cls, path: Path) -> Files:
        beside = (path.with_name(path.name + end) for end in ("-wal", ".lock"))
        return cls(path.read_bytes(), *(one.read_bytes() for one in beside))

    def put(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "s.db"
        path.write_bytes(self.file)
        path.with_name("s.db-wal").write_bytes(self.log)
        path.with_name("s.db.lock").write_bytes(self.lock)
        return path


class Killed(NamedTuple):
    """What a killed program left."""

    files: Files
    #: The answer to each call.
    answers: dict[Call, Response]
    #: The calls whose answers were acknowledged: those of the last transaction perhaps were not.
    acknowledged: set[Call]
    #: For the end of each transaction in the log: the answers that the store has until there.
    commits: dict[int, set[Call]]


def calls_of(path: Path) -> dict[Call, Response]:
    """Return the answers of a store as SQLite reads them."""
    query = "SELECT key, draw, response FROM answers"
    return {(key, drawn): decode(text) for key, drawn, text in rows(path, query)}


@pytest.fixture
def killed(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Killed:
    """A program that was killed at two thirds; its log is long."""
    work = tmp_path / "work"
    work.mkdir()
    with Chaos(work, "flat", 150, seed=seed, window=WINDOW) as chaos:
        chaos.stop_at(100)
        assert chaos.store is not None
        files = Files.of(chaos.store)
        answers = calls_of(chaos.store)
        last = acknowledged(chaos.store)[1]
        query = f"SELECT key, draw FROM answers WHERE id <= {last}"
        known = set(rows(chaos.store, query))
        made = {(entry["prompt"], entry["answer"]) for entry in chaos.server.ledger()}
        noted = {json.loads(line)[2] for line in chaos.side.read_text().splitlines()}
    texts = {c["message"]["content"] for r in answers.values() for c in _choices(r)}
    assert noted <= texts <= {answer for _, answer in made}
    commits = {}
    with closing(wal.File(files.put(tmp_path / "s").with_name("s.db-wal"))) as log:
        count = len(list(wal.frames(log)))
    for n in range(count):
        end = 32 + (n + 1) * FRAME
        if files.log[end - FRAME + 4 : end - FRAME + 8] != bytes(4):  # the last of a transaction
            cut = files._replace(log=files.log[:end]).put(tmp_path / "s")
            commits[end] = set(calls_of(cut)) if n > 4 else set()
    monkeypatch.setattr(opening, "BALLAST", 1 << 12)
    return Killed(files, answers, known, commits)


def _choices(response: Response) -> list[dict[str, dict[str, str]]]:
    choices: list[dict[str, dict[str, str]]] = response.payload["choices"]
    return choices


def recalled(path: Path, answers: dict[Call, Response]) -> tuple[set[Call], int]:
    """Return the calls that a store answers, rightly, and how many damaged answers it met."""
    wanted = [Wanted(key, draw_of(drawn), True, own=True) for key, drawn in answers]
    with closing(Journal(path)) as journal:
        found: list[Found] = outcome_of(journal.recall, wanted)
    pairs = list(zip(answers.items(), found, strict=True))

    assert all(one.response in (None, right) for (_, right), one in pairs)
    got = {call for (call, _), one in pairs if one.response is not None}
    return got, sum(one.damaged for one in found)


def opens(path: Path) -> bool:
    """Open a store; if it is damaged, make a new one of what is good."""
    try:
        Journal(path).close()
    except (JournalDamaged, JournalTooNew):
        salvage(path)
        return False
    return True


def test_a_log_that_was_cut_off(
    killed: Killed,
    tmp_path: Path,
    seed: int,
    amount: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    """All answers before the cut are there, right; that others are missing is told."""
    rng = random.Random(seed)
    times = amount(60, 340)
    whole = killed.files
    ends = [end for end, before in killed.commits.items() if before]
    for case in range(times):
        cut = rng.randrange(ends[0], len(whole.log) + 1)
        junk = rng.randbytes(rng.randrange(1, 9_000)) if case % 2 else b""
        before = killed.commits[max(end for end in ends if end <= cut)]
        path = whole._replace(log=whole.log[:cut] + junk).put(tmp_path / "s")
        opened = opens(path)
        there, _ = recalled(path, killed.answers)

        told = f"case {case}: cut at {cut}, {len(junk)} bytes of junk"
        assert there >= before, told
        assert not opened or there >= killed.acknowledged, told
        assert not verify(path).problems, told
    tally(**{"damaged stores": times})


@pytest.mark.parametrize("part", ["file", "log"])
def test_a_flipped_bit(
    part: str,
    killed: Killed,
    tmp_path: Path,
    seed: int,
    amount: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    """No answer is wrong; at most one is gone, which is told."""
    rng = random.Random(f"{part} {seed}")
    times = amount(30, 90)
    for case in range(times):
        data = bytearray(getattr(killed.files, part))
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        path = killed.files._replace(**{part: bytes(data)}).put(tmp_path / "s")
        opened = opens(path)
        there, damaged = recalled(path, killed.answers)

        told = f"case {case}: byte {bit // 8}, bit {bit % 8}"
        lost = killed.acknowledged - there
        assert len(lost) <= 1, told
        assert not lost or damaged or not opened, told
    tally(**{"damaged stores": times})


def test_a_run_on_a_damaged_store(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Killed, damaged, and run again, some times: bought again is what was damaged or in flight."""
    rng = random.Random(seed)
    times = amount(2, 10)
    calls = 60 * (times + 1)
    with Chaos(tmp_path, "flat", calls, seed=seed, window=WINDOW) as chaos:
        store = chaos.store
        assert store is not None
        for n in range(times):
            chaos.stop_at(max(50 * (n + 1), chaos.ledger.made() + 1), spoiled=n)
            part = store if n % 2 else store.with_name("runs.db-wal")
            data = bytearray(part.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            part.write_bytes(data)
            opens(store)
        evidence = chaos.check(chaos.run(), spoiled=times)

    assert evidence.delivered == calls
    tally(evidence, **{"damaged stores": times})
