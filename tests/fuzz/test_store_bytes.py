"""A store file of any bytes, or with any rows: right answers or an error of stores, and nothing else."""

from __future__ import annotations

import contextlib
import io
import random
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feste.backend import Request, Response, Usage
from feste.cli import main
from feste.draw import Draw
from feste.errors import CallTimeout, FesteError, JournalError
from feste.store import opening, schema
from feste.store.contents.purge import purge
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
from feste.store.rows import Answer, Wanted
from tests.fuzz.sizes import cases

CALLS = 6
FILES = ("s.db", "s.db-wal", "s.db-shm", "s.db.lock")
#: Each case reads a store in six ways.
CASES = cases(8, full=250)


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "BALLAST", 1 << 12)


def request(n: int) -> Request:
    body = {"model": "m", "prompt": f"question {n} " + "é" * (900 * (n % 3))}
    return Request("fake", "chat", "plugin:fake", body, draws=(Draw("main", f"{n:024x}", 0),))


def response(n: int) -> Response:
    text = "".join(random.Random(n).choices("abc \n", k=(30, 3000, 9000)[n % 3]))
    return Response({"text": f"answer {n}: {text}"}, Usage(n, 3), request_id=f"r-{n}")


def fill(path: Path) -> dict[str, bytes]:
    """Make a store; return its files as a process leaves them that is killed."""
    with closing(Journal(path)) as journal:
        for n in range(CALLS):
            number = ask(journal.intend, request(n), [request(n)], run="night")
            if n == CALLS - 1:
                ask(journal.finish, number, "unknown", CallTimeout("none", billed="unknown"))
            else:
                ask(journal.record, [Answer(request(n), response(n))], number=number)
        moved = {"id": 1, "place": "answers", "row": "[7]", "found": 1.5}
        journal.run(lambda conn: schema.write(conn, "quarantine", moved))
        return {name: path.with_name(name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return fill(tmp_path_factory.mktemp("killed") / "s.db")


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    fill(path := tmp_path_factory.mktemp("closed") / "s.db")
    return {name: path.with_name(name).read_bytes() for name in ("s.db", "s.db.lock")}


@contextlib.contextmanager
def put(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder) / "s.db"


def read(path: Path) -> list[Response | None]:
    """Read all answers as a run does; only an error of stores may end it."""
    try:
        with closing(Journal(path)) as journal:
            wanted = [Wanted(request(n).key, request(n).draws[0], n % 2 == 0) for n in range(CALLS)]
            return [found.response for found in ask(journal.recall, wanted)]
    except JournalError as error:
        assert str(error)
        return [None] * CALLS


def look(path: Path) -> None:
    """Use everything that looks into a store; each ends with an exit code and shows safe text."""
    for command, *options in (
        ["list"],
        ["show"],
        ["show", "--json"],
        ["verify"],
        ["export", "--out", "-"],
    ):
        shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        told = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told):
            assert main(["store", command, str(path), *options]) in (0, 1)
        text = shown.buffer.getvalue().decode() + told.getvalue()  # type: ignore[attr-defined]
        assert not {c for c in text if not c.isprintable() and c != "\n"}, command
    with contextlib.suppress(FesteError):
        purge(path, model="m", dry_run=True)


# --- bytes --------------------------------------------------------------------------------------------

PLACES = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), PLACES, st.binary(min_size=1, max_size=64)),
        st.tuples(st.just("cut"), PLACES, st.just(b"")),
        st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=5000)),
        st.tuples(st.just("swap"), PLACES, PLACES),
        st.tuples(st.just("copy"), PLACES, PLACES),
        st.tuples(st.just("fill"), PLACES, st.sampled_from([b"\0", b"\xff", b"SQLite format 3\0"])),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[str, float, Any]]) -> bytes:
    """Change a file; pages are swapped, copied and filled as wholes."""
    for kind, place, more in edits:
        at = int(place * len(data))
        page = at - at % schema.PAGE
        if kind == "write":
            data = data[:at] + more + data[at + len(more) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + more + data[at:]
        elif kind == "fill":
            data = data[:page] + (more * schema.PAGE)[: schema.PAGE] + data[page + schema.PAGE :]
        else:
            other = int(more * len(data))
            other -= other % schema.PAGE
            one, two = data[page : page + schema.PAGE], data[other : other + schema.PAGE]
            parts = bytearray(data)
            if len(one) == len(two):
                parts[page : page + schema.PAGE] = two
                if kind == "swap":
                    parts[other : other + schema.PAGE] = one
            data = bytes(parts)
    return data


@pytest.mark.parametrize("state", ["closed", "killed"])
def test_any_damage_gives_right_answers_or_an_error(
    state: str, closed: dict[str, bytes], killed: dict[str, bytes]
) -> None:
    """Bytes written, cut, inserted, pages swapped, in the file, its log, its index and its lock."""
    whole = closed if state == "closed" else killed

    @CASES
    @given(st.dictionaries(st.sampled_from(sorted(whole)), EDITS, min_size=1, max_size=2))
    def holds(edits: dict[str, Any]) -> None:
        files = {n: edited(d, edits[n]) if n in edits else d for n, d in whole.items()}
        with put(files) as path:
            look(path)
            found = read(path)

            assert all(one in (None, response(n)) for n, one in enumerate(found))

    holds()


@pytest.mark.parametrize("n", range(CALLS - 1))
def test_another_word_in_an_answer_is_not_given(n: int, closed: dict[str, bytes]) -> None:
    """It is good JSON in a good file, and its seal alone shows that it is not what was paid for."""
    changed = closed["s.db"].replace(f"answer {n}: ".encode(), b"answer 9: ")
    assert changed != closed["s.db"]
    with put({**closed, "s.db": changed}) as path:
        found = read(path)

        assert found == [None if i in (n, CALLS - 1) else response(i) for i in range(CALLS)]


@CASES
@given(st.binary(max_size=9000), st.binary(max_size=200), st.booleans())
def test_any_bytes_are_no_store(junk: bytes, more: bytes, head: bool) -> None:
    """Neither does a file of other bytes give answers, nor is it changed."""
    data = (b"SQLite format 3\0" if head else b"") + junk + b"."
    with put({"s.db": data, **({"s.db-wal": more} if more else {})}) as path:
        look(path)
        found = read(path)

        assert found == [None] * CALLS
        assert path.read_bytes() == data


# --- tables of others -----------------------------------------------------------------------------------

HOSTILE = {
    "trigger on insert": "CREATE TRIGGER t AFTER INSERT ON requests BEGIN DELETE FROM answers; END",
    "trigger on update": "CREATE TRIGGER t AFTER UPDATE ON requests BEGIN DELETE FROM answers; END",
    "trigger on read": "CREATE VIEW v AS SELECT load_extension('x') FROM answers",
    "view in place": "ALTER TABLE answers RENAME TO a; CREATE VIEW answers AS SELECT * FROM a",
    "endless view": (
        "ALTER TABLE answers RENAME TO a; CREATE VIEW answers AS WITH RECURSIVE n(x) AS (SELECT 1 "
        "UNION ALL SELECT x + 1 FROM n) SELECT x AS id, 'k' AS key, 'd' AS draw, 1 AS request, "
        "'' AS source, 1.0 AS kept, '{}' AS response, x'' AS seal FROM n"
    ),
    "endless index": "CREATE INDEX i ON answers (hex(zeroblob(100000)))",
    "check": "CREATE TABLE more (x CHECK (x > 1))",
    "generated": "ALTER TABLE answers ADD COLUMN g AS (upper(response))",
    "column": "ALTER TABLE answers ADD COLUMN more DEFAULT 'x'",
    "virtual": "CREATE VIRTUAL TABLE f USING fts5(x)",
    "roots swapped": (
        "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = (SELECT 2 + 3 - rootpage "
        "FROM sqlite_master AS m WHERE m.rowid = sqlite_master.rowid) WHERE rootpage IN (2, 3)"
    ),
    "names swapped": (
        "PRAGMA writable_schema = ON; UPDATE sqlite_master SET name = 'x' WHERE name = 'answers'"
    ),
    "kind": (
        "PRAGMA writable_schema = ON; UPDATE sqlite_master SET type = 'view' WHERE name = 'answers'"
    ),
    "no root": "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 9999",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_tables_of_others_are_refused(kind: str, closed: dict[str, bytes]) -> None:
    """Triggers, views, columns and roots that are not ours: an error, at once, and nothing is changed."""
    with put(closed) as path:
        with closing(sqlite3.connect(path)) as conn:
            try:
                conn.executescript(HOSTILE[kind])
            except sqlite3.DatabaseError as error:
                if "no such module" in str(error):
                    pytest.skip("this SQLite has no fts5")
            conn.commit()
        before = path.read_bytes()
        assert before != closed["s.db"]
        look(path)

        assert read(path) == [None] * CALLS
        assert path.read_bytes() == before


VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        [
            *("", "x" * 9_000, "[" * 5000, "null", "[]", "{}", '"x"', "1e999", "NaN", "[1, [2]]"),
            *('{"payload": 1}', '{"payload": {}, "usage": [1]}', '[["k", "d"], []]', '{"k": null}'),
            *("\x1b[2J", "../../x", "-1", "9" * 400, '{"draws": 1, "body": {"model": {}}}'),
        ]
    ),
)


def sealed(conn: sqlite3.Connection, table: str, values: dict[str, Any]) -> None:
    """Change a row as someone does who knows how seals are made: they tell damage, not malice."""
    with contextlib.suppress(sqlite3.Error):
        row = conn.execute(f"SELECT * FROM {table}").fetchone()
        changed = list({**schema.row_of(table, row), **values}.values())
        marks = ",".join("?" * len(row))
        insert = f"INSERT OR REPLACE INTO {table} VALUES ({marks})"
        conn.execute(insert, (*changed, schema._seal(table, changed)))


CHANGES = st.sampled_from(sorted(schema.TABLES)).flatmap(
    lambda table: st.tuples(
        st.just(table),
        st.dictionaries(st.sampled_from(schema.TABLES[table]), VALUES, min_size=1, max_size=3),
    )
)


def test_any_value_in_any_column_is_read_or_refused(closed: dict[str, bytes]) -> None:
    """With a right seal: a row of another form is put aside, and no answer goes to another call."""

    @CASES
    @given(CHANGES)
    def holds(change: tuple[str, dict[str, Any]]) -> None:
        with put(closed) as path:
            with closing(sqlite3.connect(path)) as conn:
                sealed(conn, *change)
                conn.commit()
            look(path)
            found = read(path)
            touched = change[0] == "answers"

            assert sum(one not in (None, response(n)) for n, one in enumerate(found)) <= touched

    holds()
