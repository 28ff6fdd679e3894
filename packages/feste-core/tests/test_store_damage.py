"""A damaged store gives right answers or none, tells what is wrong, and what is good can be kept.

``CHAOS=full`` runs the long form: 500 cases of each kind.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from feste.backend import Request, Response, Usage
from feste.draw import Draw
from feste.errors import JournalDamaged, JournalError, JournalLocked, JournalTooNew
from feste.store import opening, schema
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
from feste.store.repair import carve, wal
from feste.store.repair.salvage import salvage
from feste.store.repair.verify import verify
from feste.store.rows import Answer, Found, Wanted

FULL = os.environ.get("CHAOS") == "full"
CASES = 500 if FULL else 60
CALLS = 24
TABLES = ("prompts", "requests", "answers")

pytestmark = pytest.mark.timeout(1200 if FULL else 120)


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "BALLAST", 1 << 12)


def request(n: int) -> Request:
    """Some requests are longer than a page."""
    prompt = f"question {n} " + "é" * (3 if n % 5 else 900 * (n % 4))
    body = {"model": "m", "prompt": prompt}
    return Request("fake", "chat", "plugin:fake", body, draws=(Draw("main", f"{n:024x}", 0),))


def response(n: int) -> Response:
    """Some answers are longer than several pages."""
    rng = random.Random(n)
    text = "".join(rng.choices("abc L\n", k=rng.choice([20, 300, 600, 5000, 20000])))
    return Response({"text": f"answer {n}: {text}"}, Usage(n, 3), request_id=f"r-{n}")


def buy(journal: Journal, n: int) -> None:
    number = ask(journal.intend, request(n), [request(n)], run="night")
    answer = Answer(request(n), response(n))
    ask(journal.record, [answer], number=number, response=answer.response)


def recall(journal: Journal, n: int) -> Found:
    found: list[Found] = ask(journal.recall, [Wanted(request(n).key, request(n).draws[0], True)])
    return found[0]


def known(path: Path) -> set[int]:
    """Return the calls whose answers a store has; none may be wrong."""
    with closing(Journal(path)) as journal:
        found = {n: recall(journal, n).response for n in range(CALLS)}

    assert all(one is None or one == response(n) for n, one in found.items())
    return {n for n, one in found.items() if one is not None}


def rows(path: Path) -> dict[tuple[str, Any], tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as conn:
        return {
            (table, row[0]): row
            for table in TABLES
            for row in conn.execute(f"SELECT * FROM {table}")
        }


class Files(NamedTuple):
    """A store at one moment."""

    file: bytes
    log: bytes
    lock: bytes

    @classmethod
    def of(cls, path: Path) -> Files:
        log = path.with_name("s.db-wal")
        lock = path.with_name("s.db.lock").read_bytes()
        return cls(path.read_bytes(), log.read_bytes() if log.exists() else b"", lock)

    def put(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "s.db"
        path.write_bytes(self.file)
        path.with_name("s.db.lock").write_bytes(self.lock)
        if self.log:
            path.with_name("s.db-wal").write_bytes(self.log)
        return path


class Moments(NamedTuple):
    """A store that was written step by step."""

    closed: Files
    #: The store of a process that was killed: after each acknowledgement, and the log's length.
    killed: list[tuple[Files, int]]
    #: All rows.
    rows: dict[tuple[str, Any], tuple[Any, ...]]


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Moments:
    """A third of it is in the file; its log begins anew, over frames of before."""
    path = tmp_path_factory.mktemp("store") / "s.db"
    killed = []
    with closing(Journal(path)) as journal:
        for n in range(CALLS):
            if n == CALLS // 3:
                with closing(sqlite3.connect(path)) as conn:
                    assert conn.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
            buy(journal, n)
            with closing(wal.File(path.with_name("s.db-wal"))) as log:
                length = 32 + len(list(wal.frames(log))) * (24 + schema.PAGE)
            killed.append((Files.of(path), length))
    return Moments(Files.of(path), killed, rows(path))


# --- what the log loses -------------------------------------------------------------------------------


def test_a_log_that_was_cut_off_keeps_what_was_acknowledged(
    moments: Moments, tmp_path: Path
) -> None:
    """Whatever a power failure leaves of the log after the last sync: the store opens."""
    rng = random.Random(11)
    last, _ = moments.killed[-1]
    steps = list(enumerate(moments.killed))[CALLS // 3 :]
    for case in range(2 * CASES):
        cut = rng.randrange(steps[0][1][1], len(last.log) + 1)
        done, (then, _) = [step for step in steps if step[1][1] <= cut][-1]
        junk = rng.randbytes(rng.randrange(9000)) if case % 2 else b""
        path = Files(last.file, last.log[:cut] + junk, then.lock).put(tmp_path / "s")

        assert known(path) >= set(range(done + 1)), f"case {case}, cut {cut}"


def test_a_log_that_lost_acknowledged_answers_is_noticed(moments: Moments, tmp_path: Path) -> None:
    """Then salvage keeps all that is left."""
    rng = random.Random(12)
    last, end = moments.killed[-1]
    steps = list(enumerate(moments.killed))[CALLS // 3 :]
    for case in range(max(10, CASES // 3)):
        cut = rng.randrange(steps[0][1][1], end)
        done = [step for step in steps if step[1][1] <= cut][-1][0]
        junk = rng.randbytes(rng.randrange(9000)) if case % 2 else b""
        path = Files(last.file, last.log[:cut] + junk, last.lock).put(tmp_path / "s")

        if done < CALLS - 1:
            with pytest.raises(JournalDamaged, match=r"salvage|lacks"):
                Journal(path)
        assert salvage(path).lost["answers"] <= CALLS - 1 - done, f"case {case}, cut {cut}"
        assert known(path) >= set(range(done + 1)), f"case {case}, cut {cut}"


# --- flipped bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["closed", "file", "log"])
def test_a_flipped_bit_is_noticed_and_costs_one_row(
    moments: Moments, tmp_path: Path, part: str
) -> None:
    """No answer is wrong, and no row is lost but the one that the bit is in."""
    rng = random.Random(f"flip {part}")
    whole = moments.closed if part == "closed" else moments.killed[-1][0]
    name = "log" if part == "log" else "file"
    for case in range(CASES if part == "closed" else CASES // 2):
        data = bytearray(getattr(whole, name))
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        path = whole._replace(**{name: bytes(data)}).put(tmp_path / "s")
        told = f"case {case}, byte {bit // 8}, bit {bit % 8}"
        damaged = verify(path)
        try:
            Journal(path).close()
        except (JournalDamaged, JournalTooNew):
            assert not damaged.opens, told
            done = salvage(path)
            left = rows(path)
            # a request may be there as it was before it ended
            lost = [one for one, row in moments.rows.items() if left.get(one) != row]

            assert len(lost) <= 1, f"{told}: {lost}"
            assert all(done.lost[one[0]] >= 1 for one in lost if one not in left), told
            assert not verify(path).problems, told
        else:
            assert damaged.opens, told

        assert len(known(path)) >= CALLS - 1, told


def test_salvage_reads_a_log_beyond_damage(moments: Moments, tmp_path: Path) -> None:
    """SQLite drops all frames after the first with a wrong checksum; salvage does not."""
    whole, _ = moments.killed[-1]
    log = bytearray(whole.log)
    log[40] ^= 1
    path = whole._replace(log=bytes(log)).put(tmp_path / "s")
    with pytest.raises(JournalDamaged, match="lacks"):
        Journal(path)
    salvage(path)

    assert len(known(path)) >= CALLS - 1


def test_salvage_needs_no_tree(moments: Moments, tmp_path: Path) -> None:
    """Without the first page, which leads to all tables, every row is found."""
    path = moments.closed._replace(file=bytes(4096) + moments.closed.file[4096:]).put(
        tmp_path / "s"
    )
    done = salvage(path)

    assert done.kept["answers"] == CALLS
    assert sum(done.lost.values()) == 0
    assert rows(path) == moments.rows


def test_salvage_reads_numbers_that_sqlite_stores_shorter(tmp_path: Path) -> None:
    """A whole number is stored as an integer, in a column of floats as well."""
    path = tmp_path / "s.db"
    row = {"id": 1, "place": "answers", "row": "[]", "found": 2.0}
    with closing(Journal(path)) as journal:
        journal.run(lambda conn: schema.write(conn, "quarantine", row))
    path.write_bytes(bytes(4096) + path.read_bytes()[4096:])

    assert salvage(path).kept["quarantine"] == 1


def framed(whole: Files) -> tuple[list[bytes], int]:
    """Return the frames of a log, also those of before, and how many are of now."""
    size = 24 + schema.PAGE
    slots = [whole.log[at : at + size] for at in range(32, len(whole.log), size)]
    return slots, sum(slot[8:16] == whole.log[16:24] for slot in slots)


def carved(whole: Files, frames: list[bytes], folder: Path) -> set[tuple[str, Any]]:
    """Return the rows that are found with other frames in the log."""
    path = whole._replace(log=whole.log[:32] + b"".join(frames)).put(folder)
    found = carve.rows(path, path.with_name("s.db-wal"))
    return {(row.table, row.values[0]) for row in found if row.table in TABLES}


def test_frames_of_before_do_not_count(moments: Moments, tmp_path: Path) -> None:
    """Those of now do, though their checksum or their salts are damaged."""
    whole, _ = moments.killed[CALLS // 3 + 1]
    slots, count = framed(whole)

    def numbers() -> list[bool]:
        log = whole.log[:32] + b"".join(slots)
        path = whole._replace(log=log).put(tmp_path / "s").with_name("s.db-wal")
        with closing(wal.File(path)) as file:
            return [frame.sound for frame in wal.frames(file)]

    assert len(slots) > count
    assert numbers() == [True] * count
    slots[3] = slots[3][:9] + b"x" + slots[3][10:]
    assert numbers() == [True] * count
    slots[5] = slots[5][:99] + b"x" + slots[5][100:]
    assert numbers() == [n != 5 for n in range(count)]


def test_a_frame_with_another_frames_number_hides_no_row(moments: Moments, tmp_path: Path) -> None:
    """What is wrong in one frame costs the row that is in it."""
    whole, _ = moments.killed[-1]
    slots, count = framed(whole)
    # overflow pages begin with the number of the next one, other pages with their kind
    parts = [n for n in range(count) if slots[n][24] == 0]
    assert len(parts) > 4
    for one, other in zip(parts, [*parts[3:], *parts[:3]], strict=True):
        damaged = slots[:]
        damaged[one] = slots[other][:4] + slots[one][4:]
        lost = moments.rows.keys() - carved(whole, damaged, tmp_path / "s")

        assert len(lost) <= 1, f"frames {one} and {other}: {lost}"


def test_salvage_prefers_the_version_that_ended_last(moments: Moments, tmp_path: Path) -> None:
    """Rewritten pages hold requests as they were before they ended, wherever they stand."""
    whole, _ = moments.killed[-1]
    slots, count = framed(whole)
    for frames in (slots, [*slots[:count][::-1], *slots[count:]]):
        log = whole.log[:32] + b"".join(frames)
        path = whole._replace(file=whole.file[:100], log=log).put(tmp_path / "s")
        salvage(path)
        outcomes = {row[11] for (table, _), row in rows(path).items() if table == "requests"}

        assert outcomes == {"answered"}


def test_salvage_changes_nothing_without_need(moments: Moments, tmp_path: Path) -> None:
    """It says so."""
    path = moments.closed.put(tmp_path / "s")
    done = salvage(path)

    assert done.lines == [f"There is nothing wrong with {path}; nothing was changed."]
    assert done.kept["answers"] == CALLS
    assert path.read_bytes() == moments.closed.file
    assert sorted(p.name for p in path.parent.iterdir()) == ["s.db", "s.db.lock"]


def test_salvage_of_a_part_does_not_claim_to_have_all(moments: Moments, tmp_path: Path) -> None:
    """Of a file that was cut off, without the note of how far it had got, it says so."""
    half = moments.closed.file[: len(moments.closed.file) // 2]
    noted = salvage(moments.closed._replace(file=half).put(tmp_path / "noted"))
    alone = moments.closed._replace(file=half).put(tmp_path / "alone")
    alone.with_name("s.db.lock").unlink()
    done = salvage(alone)

    assert noted.lost["answers"] > 0 and "answers" not in noted.unsure
    assert done.lost["answers"] < CALLS - done.kept["answers"]
    assert {"answers", "requests", "prompts"} <= {*done.unsure}
    assert any("more may be lost of" in line and "answers" in line for line in done.lines)


def test_salvage_keeps_the_damaged_files(moments: Moments, tmp_path: Path) -> None:
    """A second salvage in the same second, too."""
    whole, _ = moments.killed[-1]
    log = b"x" * 40 + whole.log[40:]
    broken = whole._replace(file=b"x" * 4096 + whole.file[4096:], log=log)
    path = broken.put(tmp_path / "s")
    first = salvage(path)
    path.write_bytes(broken.file)
    second = salvage(path)

    assert first.folder and second.folder and first.folder != second.folder
    assert (first.folder / "s.db").read_bytes() == broken.file
    assert (first.folder / "s.db-wal").read_bytes() == broken.log
    assert (second.folder / "s.db").read_bytes() == broken.file
    assert path.stat().st_mode & 0o777 == 0o600
    assert first.lines[-1] == f"The damaged files are in {first.folder}"


@pytest.mark.parametrize("step", range(1, 4))
def test_a_salvage_that_is_killed_loses_nothing(
    moments: Moments, tmp_path: Path, step: int
) -> None:
    """Before each of its changes: the store is the damaged one, or noticed, and nothing is gone."""
    whole, _ = moments.killed[-1]
    log = whole.log[:99] + b"x" + whole.log[100:]
    path = whole._replace(log=log).put(tmp_path / "s")
    script = f"""
import os, sys
from feste.store.repair.salvage import salvage
steps = []
def watch(event, args):
    if event in ("os.link", "os.rename"):
        steps.append(event)
        if len(steps) == {step}:
            os._exit(9)
sys.addaudithook(watch)
salvage({str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 9
    with pytest.raises(JournalDamaged, match="lacks"):
        Journal(path)
    (folder,) = path.parent.glob("*.damaged-*")
    left = folder if step > 2 else path.parent
    assert (left / "s.db").read_bytes() == whole.file
    assert (left / "s.db-wal").read_bytes() == log
    (left / "s.db.lock").write_bytes(whole.lock)

    assert salvage(left / "s.db").kept["answers"] >= CALLS - 1
    assert len(known(left / "s.db")) >= CALLS - 1


def test_salvage_waits_for_no_writer(tmp_path: Path) -> None:
    """A store that is being written is left alone, by the writer's own process as well."""
    path = tmp_path / "s.db"
    with closing(Journal(path)):
        with pytest.raises(JournalLocked) as locked:
            salvage(path)
        assert locked.value.pid == os.getpid()
        with pytest.raises(JournalLocked):
            Journal(path)
        told = other_process("salvage(path)", path)

    assert told == f"JournalLocked {os.getpid()}"


def test_verify_reads_beside_a_writer(tmp_path: Path) -> None:
    """And sees what was acknowledged."""
    path = tmp_path / "s.db"
    with closing(Journal(path)) as journal:
        buy(journal, 1)
        mine = verify(path)
        told = other_process("print(verify(path).good['answers'], verify(path).problems)", path)
        buy(journal, 2)
        locked = other_process("salvage(path)", path)  # verify has not freed the lock

    assert mine.good["answers"] == 1
    assert told == "1 []"
    assert locked == f"JournalLocked {os.getpid()}"


def other_process(statement: str, path: Path) -> str:
    """Return what a statement about a store prints or raises in a process of its own."""
    script = f"""
from pathlib import Path
from feste.errors import JournalLocked
from feste.store.repair.salvage import salvage
from feste.store.repair.verify import verify
path = Path({str(path)!r})
try:
    {statement}
except JournalLocked as error:
    print("JournalLocked", error.pid)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


# --- what is no store ---------------------------------------------------------------------------------


def spoiled(kind: str, whole: Files, folder: Path) -> Path:
    path = whole.put(folder)
    if kind == "text":
        path.write_text("My notes.\n" * 500)
    elif kind == "truncated":
        path.write_bytes(whole.file[: len(whole.file) // 2])
    elif kind == "malformed":  # SQLite names the table, which is no text
        named = whole.file.replace(b"tablesessions", b"tables\xe1ssions")
        path.write_bytes(named.replace(b"began REAL", b'began R"AL'))
    elif kind in ("empty", "emptied"):
        path.write_bytes(b"")
        if kind == "emptied":
            path.with_name("s.db-wal").write_bytes(b"\0" * 5000)
    elif kind == "foreign":
        path.unlink()
        with closing(sqlite3.connect(path)) as conn:
            conn.execute("CREATE TABLE notes (text)")
    else:
        statement = {
            "trigger": "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM prompts; END",
            "view": "CREATE VIEW v AS SELECT * FROM answers",
            "newer": f"PRAGMA user_version = {schema.VERSION + 1}",
            "no number": "PRAGMA user_version = 0",
        }[kind]
        with closing(sqlite3.connect(path)) as conn:
            conn.execute(statement)
            if kind == "newer":
                conn.execute("CREATE TABLE more (x)")
            conn.commit()
    for beside in ("s.db-shm", "s.db-wal"):
        if kind != "emptied":
            path.with_name(beside).unlink(missing_ok=True)
    return path


@pytest.mark.parametrize(
    "kind, told, kept",
    [
        ("text", "not a database", None),
        ("foreign", "not a store of Feste", None),
        ("newer", "newer version", None),
        ("empty", "lacks", None),
        ("emptied", "is empty", None),
        ("truncated", "malformed", 1),
        ("malformed", "not those of a store", CALLS),
        ("trigger", "not those of a store", CALLS),
        ("view", "not those of a store", CALLS),
        ("no number", "not those of a store", CALLS),
    ],
)
def test_what_is_no_store_is_left_as_it_is(
    moments: Moments, tmp_path: Path, kind: str, told: str, kept: int | None
) -> None:
    """Opening says what it is; salvage makes a store of it only if there are rows of one."""
    path = spoiled(kind, moments.closed, tmp_path / "s")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.name != "s.db.lock"}
    expected = JournalTooNew if kind == "newer" else JournalDamaged
    verdict = verify(path)

    assert not verdict.opens and any(told in problem for problem in verdict.problems)
    with pytest.raises(expected, match=told):
        Journal(path)
    if kept is None:
        with pytest.raises(expected):
            salvage(path)
    assert {
        p.name: p.read_bytes() for p in path.parent.iterdir() if p.name != "s.db.lock"
    } == before
    if kept is not None:
        assert salvage(path).kept["answers"] >= kept
        assert len(known(path)) >= kept


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    """If nothing is known of what was in it."""
    path = tmp_path / "s.db"
    path.touch()

    assert known(path) == set()
    assert verify(path).opens


# --- planted and damaged rows -------------------------------------------------------------------------

PICKLES = """
import os, pickle, shutil, sqlite3, sys
from contextlib import closing, suppress
from pathlib import Path
from feste.errors import JournalError
from feste.store import schema
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
from feste.store.repair.salvage import salvage
from feste.store.repair.verify import verify

class Evil:
    def __reduce__(self):
        return print, ("the pickle ran",)

planted = pickle.dumps(Evil(), 0)
def watch(event, args):
    if event in ("pickle.find_class", "marshal.loads", "os.system"):
        print("loaded", event, args)
        os._exit(3)
whole, path = map(Path, sys.argv[1:])
shutil.copy(whole, path)
Journal(path).close()
salvage(path)
sys.addaudithook(watch)
count = 0
for table, columns in schema.TABLES.items():
    for column in (*columns, "seal"):
        for value in (planted, planted.decode()):
            for old in path.parent.glob("p.db*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            shutil.copy(whole, path)
            with closing(sqlite3.connect(path)) as conn:
                try:
                    conn.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = 1", (value,))
                except sqlite3.IntegrityError:  # a number
                    continue
                conn.commit()
            count += 1
            found = verify(path)
            assert found.bad[table] == 1, (table, column)
            with suppress(JournalError), closing(Journal(path)) as journal:
                for key, drawn in WANTED:
                    journal.recall([Wanted(key, drawn, True)], lambda ok, value: None)
            done = salvage(path)
            assert done.problems or table != "quarantine", (table, column)
print(count)
"""


def test_a_pickle_in_a_store_never_runs(moments: Moments, tmp_path: Path) -> None:
    """Whatever column of whatever table it is planted in, it is noticed."""
    path = moments.closed.put(tmp_path / "s")
    quarantined = {"id": 1, "place": "answers", "row": "[]", "found": 1.5}
    with closing(Journal(path)) as journal:
        journal.run(lambda conn: schema.write(conn, "quarantine", quarantined))
    wanted = [(request(n).key, tuple(request(n).draws[0])) for n in range(3)]
    head = "from feste.draw import Draw\nfrom feste.store.rows import Wanted\n"
    head += f"WANTED = [(key, Draw(*drawn)) for key, drawn in {wanted!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", head + PICKLES, str(path), str(tmp_path / "p.db")],
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 2 * sum(map(len, schema.TABLES.values()))


def damage(path: Path, n: int) -> None:
    """Change a letter of an answer."""
    with closing(sqlite3.connect(path)) as conn:
        change = "UPDATE answers SET response = replace(response, 'answer', 'Answer') WHERE key = ?"
        assert conn.execute(change, (request(n).key,)).rowcount == 1
        conn.commit()


@pytest.mark.parametrize("n", [3, CALLS - 1])
def test_a_damaged_answer_is_moved_to_quarantine(moments: Moments, tmp_path: Path, n: int) -> None:
    """It is counted and can be bought again; the newest answer, too, which is noted beside the store."""
    path = moments.closed.put(tmp_path / "s")
    damage(path, n)
    verdict = verify(path)
    with closing(Journal(path)) as journal:
        found = recall(journal, n)
    with closing(Journal(path)) as journal:
        again = recall(journal, n)
        buy(journal, n)
        bought = recall(journal, n)

    assert (verdict.opens, verdict.bad["answers"], verdict.quarantined) == (True, 1, 0)
    assert (found.response, found.damaged) == (None, 1)
    assert (again.response, again.damaged) == (None, 0)
    assert bought.response == response(n)
    assert verify(path).quarantined == 1
    assert verify(path).problems == []
    assert known(path) == set(range(CALLS))


def test_a_damaged_request_at_the_end_is_no_loss(tmp_path: Path) -> None:
    """It is moved to quarantine when the store is opened, and not missed the next time."""
    path = tmp_path / "s.db"
    with closing(Journal(path)) as journal:
        buy(journal, 1)
        ask(journal.intend, request(2), [request(2)])
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("UPDATE requests SET model = 'n' WHERE id = 2")
        conn.commit()
    Journal(path).close()

    assert known(path) == {1}
    assert verify(path).quarantined == 1
    assert verify(path).problems == []


def test_rows_at_the_end_may_be_deleted(tmp_path: Path) -> None:
    """What is noted beside the store is lowered before: a crash in between looks like no damage."""
    path = tmp_path / "s.db"
    notes: dict[str, bytes] = {}

    def delete(conn: sqlite3.Connection) -> None:
        conn.set_trace_callback(
            lambda text: notes.setdefault(text, path.with_name("s.db.lock").read_bytes())
        )
        conn.execute("DELETE FROM answers WHERE id = 2")

    with closing(Journal(path)) as journal:
        buy(journal, 1)
        buy(journal, 2)
        journal.run(delete)

    assert b"answers 1\n" in notes["COMMIT"]
    assert known(path) == {1}


def test_an_operation_that_raises_leaves_nothing(tmp_path: Path) -> None:
    """Not in the tables, and not in what is noted beside them."""
    path = tmp_path / "s.db"

    def raises(conn: sqlite3.Connection) -> None:
        schema.write(conn, "answers", {"id": 99, "key": "k", "draw": "d"})
        raise ValueError("no")

    with closing(Journal(path)) as journal:
        with pytest.raises(JournalError, match="no"):
            journal.run(raises)
        buy(journal, 1)

    assert known(path) == {1}
    assert verify(path).good["answers"] == 1
    assert verify(path).problems == []


def test_texts_that_sqlite_cannot_hold_are_written(tmp_path: Path) -> None:
    """A provider may send half a surrogate pair in an error, and any number of tokens."""
    path = tmp_path / "s.db"
    with closing(Journal(path)) as journal:
        number = ask(journal.intend, request(1), [request(1)])
        answer = Response({"text": "\ud800"}, Usage(10**30, 1), request_id="\udfff")
        ask(journal.record, [Answer(request(1), answer)], number=number, response=answer)
        found = recall(journal, 1)

    assert found.response == answer
    assert verify(path).problems == []


def test_a_closed_store_refuses(tmp_path: Path) -> None:
    """Nothing waits for ever."""
    journal = Journal(tmp_path / "s.db")
    journal.close()

    with pytest.raises(JournalError, match="closed"):
        journal.run(lambda conn: None)


def test_a_crash_in_a_rollback_journal_is_undone(moments: Moments, tmp_path: Path) -> None:
    """Some file systems have no write-ahead log."""
    path = moments.closed.put(tmp_path / "s")
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA journal_mode = DELETE")
        conn.execute("PRAGMA cache_size = 2")
        conn.execute("BEGIN")
        conn.execute("UPDATE answers SET response = 'x' || response")
        copies = {p.name: p.read_bytes() for p in path.parent.iterdir()}
        conn.execute("ROLLBACK")
    other = tmp_path / "crashed"
    other.mkdir()
    for name, content in copies.items():
        (other / name).write_bytes(content)

    assert "s.db-journal" in copies
    assert known(other / "s.db") == set(range(CALLS))


@pytest.fixture(autouse=True)
def no_file_stays_open(tmp_path: Path) -> Iterator[None]:
    """Every descriptor of a store is closed again; those of threads that others have left do not count."""
    yield
    links = Path("/proc/self/fd")
    for link in links.iterdir() if links.exists() else ():
        with suppress(FileNotFoundError):  # that of the listing itself
            assert not os.readlink(link).startswith(str(tmp_path)), os.readlink(link)
