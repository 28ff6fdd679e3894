"""What is wrong with a store."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feste.errors import JournalError
from feste.store import schema
from feste.store.connection import UNREADABLE, beside, check_end, connect
from feste.store.forms import fits
from feste.store.lock import acknowledged
from feste.store.rows import decode

__all__ = ["Verdict", "problem_of", "verify"]

#: At most this many findings of SQLite, and of each table, are told.
_TOLD = 20


@dataclass(slots=True)
class Verdict:
    """What is wrong with a store.

    :param problems: what is wrong, a text each; empty for a good store.
    :param good: the number of good rows in each table.
    :param bad: the number of rows in each table that are not as they were written.
    :param opens: whether a program may open it: single bad rows do not prevent that, they are left
        out, or moved out of the way, when they are read.
    """

    problems: list[str] = field(default_factory=list)
    good: dict[str, int] = field(default_factory=lambda: dict.fromkeys(schema.TABLES, 0))
    bad: dict[str, int] = field(default_factory=lambda: dict.fromkeys(schema.TABLES, 0))
    opens: bool = True

    @property
    def quarantined(self) -> int:
        """The number of rows that were found bad earlier and moved out of the way."""
        return self.good["quarantine"] + self.bad["quarantine"]


def verify(path: str | Path) -> Verdict:
    """Read all of a store and tell what is wrong with it; nothing is changed.

    Another process may write it meanwhile.

    :param path: the store's file.
    :raises JournalError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise JournalError(f"there is no store {path}")
    log = beside(path, "-wal")
    while True:
        quiet = not log.exists()
        verdict = _verify(path)
        if not (quiet and verdict.problems and log.exists()):  # else a writer came meanwhile
            return verdict


def _verify(path: Path) -> Verdict:
    verdict = Verdict()
    reached = acknowledged(path)  # before the tables are read, which may grow
    try:
        with closing(connect(path)) as conn:
            conn.execute("BEGIN")  # all that follows sees one moment
            version = schema.identify(conn, str(path))
            if version == schema.VERSION:
                _check_file(conn, verdict)
                for table in schema.TABLES:
                    _check_rows(conn, table, verdict)
            check_end(path, reached, schema.last(conn) if version else (0, 0))
    except JournalError as error:
        _refuse(verdict, error.message)
    except UNREADABLE as error:
        _refuse(verdict, f"{path} cannot be read ({error})")
    return verdict


def _refuse(verdict: Verdict, problem: str) -> None:
    verdict.problems.append(problem)
    verdict.opens = False


def _check_file(conn: sqlite3.Connection, verdict: Verdict) -> None:
    for (said,) in conn.execute(f"PRAGMA integrity_check({_TOLD})").fetchall():
        if said != "ok":
            _refuse(verdict, f"SQLite says: {said}")


def _check_rows(conn: sqlite3.Connection, table: str, verdict: Verdict) -> None:
    name: Any = "none"
    try:
        for name, *values in conn.execute(f"SELECT rowid, * FROM {table} ORDER BY rowid"):
            problem = problem_of(table, values)
            counts = verdict.bad if problem else verdict.good
            counts[table] += 1
            if problem and counts[table] <= _TOLD:
                verdict.problems.append(f"row {name} of {table} {problem}")
    except UNREADABLE as error:
        _refuse(verdict, f"{table} cannot be read beyond row {name} ({error})")


def problem_of(table: str, values: Sequence[Any]) -> str:
    """Return what is wrong with a row, or an empty string.

    :param table: its table.
    :param values: all its columns, the seal last.
    """
    if not schema.is_good(table, values):
        return "is not as it was written"
    row = schema.row_of(table, values)
    if table == "prompts" and not isinstance(row["request"], str):
        return "holds no request"
    if table == "prompts" and hashlib.sha256(row["request"].encode()).hexdigest() != row["key"]:
        return "has a key that is not its request's"
    if table == "answers":
        try:
            decode(row["response"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return f"holds no answer ({error})"
    return "" if fits(table, row) else "has values that Feste does not write"
