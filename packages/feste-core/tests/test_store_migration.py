"""Stores of earlier versions open, and newer tables are made of theirs, or nothing is changed."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from feste.backend import Request, Response, Usage
from feste.draw import Draw
from feste.errors import CallTimeout, JournalError, JournalTooNew
from feste.store import opening, schema
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
from feste.store.repair.verify import verify
from feste.store.rows import Answer, Found, Wanted

STORES = Path(__file__).parent / "stores"
CALLS = 5


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "BALLAST", 1 << 12)


def request(n: int) -> Request:
    body = {"model": "m", "prompt": f"question {n}: Grüße\0"}
    return Request("fake", "chat", "plugin:fake", body, draws=(Draw("main", f"{n:024x}", 0),))


def response(n: int) -> Response:
    payload = {"text": f"answer {n}: \ud800 " + "é" * 400 * n}
    return Response(payload, Usage(n, 3, 1), request_id=f"r-{n}")


def recall(journal: Journal, n: int) -> Found:
    found: list[Found] = ask(journal.recall, [Wanted(request(n).key, request(n).draws[0], True)])
    return found[0]


def fill(path: Path) -> None:
    """Make a store with rows in all tables; this made the committed ones."""
    with closing(Journal(path)) as journal:
        for n in range(CALLS):
            number = ask(journal.intend, request(n), [request(n)], run="night")
            answer = Answer(request(n), response(n))
            ask(journal.record, [answer], number=number, response=response(n))
        late = request(CALLS)
        number = ask(journal.intend, late, [late], run="night", attempt=2)
        ask(journal.finish, number, "unknown", CallTimeout("no answer in 60 s", billed="unknown"))
        moved = {"id": 1, "place": "answers", "row": "[7, 'é']", "found": 1.5}
        journal.run(lambda conn: schema.write(conn, "quarantine", moved))


def rows(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as conn:
        return {
            table: conn.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall()
            for table in ("sessions", "prompts", "requests", "answers", "quarantine")
        }


@pytest.mark.parametrize("version", range(1, schema.VERSION + 1))
def test_a_store_of_an_earlier_version_is_replayed(tmp_path: Path, version: int) -> None:
    """Its rows stay as they are."""
    path = tmp_path / "s.db"
    shutil.copy(STORES / f"v{version}.db", path)
    before = rows(path)
    with closing(Journal(path)) as journal:
        found = [recall(journal, n) for n in range(CALLS + 1)]
    after = rows(path)

    assert [one.response for one in found[:CALLS]] == [response(n) for n in range(CALLS)]
    assert found[CALLS].response is None and found[CALLS].earlier is not None
    assert found[CALLS].earlier.error.startswith("CallTimeout")
    assert verify(path).problems == []
    assert all(before.values())
    assert after.pop("sessions")[:1] == before.pop("sessions")
    assert after == before


# --- how tables are changed ---------------------------------------------------------------------------

PROMPTS = "CREATE TABLE prompts (key TEXT PRIMARY KEY, request TEXT, note TEXT, seal BLOB)"


def add_notes(conn: sqlite3.Connection) -> None:
    """What a next version may do: a new column, with new seals."""
    old = conn.execute("SELECT key, request FROM prompts").fetchall()
    conn.execute("DROP TABLE prompts")
    conn.execute(PROMPTS)
    for key, text in old:
        schema.write(conn, "prompts", {"key": key, "request": text, "note": "old"})


def next_version(
    monkeypatch: pytest.MonkeyPatch, migration: Callable[[sqlite3.Connection], None]
) -> None:
    was = schema.VERSION
    statements = [
        PROMPTS if one.startswith("CREATE TABLE prompts") else one for one in schema.STATEMENTS
    ]
    monkeypatch.setattr(schema, "VERSION", was + 1)
    monkeypatch.setattr(schema, "STATEMENTS", tuple(statements))
    monkeypatch.setattr(schema, "TABLES", {**schema.TABLES, "prompts": ("key", "request", "note")})
    into = "INTO prompts VALUES (?, ?, ?, ?)"
    monkeypatch.setattr(schema, "_INTO", {**schema._INTO, "prompts": into})
    monkeypatch.setattr(schema, "MIGRATIONS", {**schema.MIGRATIONS, was: migration})


@pytest.mark.parametrize("killed", [False, True])
def test_tables_are_brought_to_the_next_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, killed: bool
) -> None:
    """A copy of the store as it was stays beside it, with what was in the log of a killed process."""
    path, old = tmp_path / "s.db", schema.VERSION
    fill(path)
    if killed:
        with closing(sqlite3.connect(path)) as conn:
            conn.execute("UPDATE quarantine SET row = 'in the log'")
            conn.commit()
            log = path.with_name("s.db-wal").read_bytes()
            file = path.read_bytes()
        path.write_bytes(file)
        path.with_name("s.db-wal").write_bytes(log)
    next_version(monkeypatch, add_notes)
    with closing(Journal(path)) as journal:
        assert all(recall(journal, n).response == response(n) for n in range(CALLS))
    copy = tmp_path / f"s.db.tables-{old}"

    assert [row[2] for row in rows(path)["prompts"]] == ["old"] * (CALLS + 1)
    assert [len(row) for row in rows(copy)["prompts"]] == [3] * (CALLS + 1)
    assert rows(copy)["quarantine"][0][2] == ("in the log" if killed else "[7, 'é']")
    assert copy.stat().st_mode & 0o777 == 0o600
    monkeypatch.undo()
    with pytest.raises(JournalTooNew):
        Journal(path)


def test_a_migration_that_fails_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not a byte of the file, and the version before can go on with it."""
    path = tmp_path / "s.db"
    fill(path)
    before = path.read_bytes()

    def fails(conn: sqlite3.Connection) -> None:
        add_notes(conn)
        raise ValueError("a bug in the migration")

    with monkeypatch.context() as context:
        next_version(context, fails)
        with pytest.raises(JournalError, match="a bug in the migration"):
            Journal(path)

    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "s.db",
        "s.db.lock",
        f"s.db.tables-{schema.VERSION}",
    ]
    with closing(Journal(path)) as journal:
        assert recall(journal, 1).response == response(1)
