"""The tables of a store file, their version, and the seal of each row.

A store is a SQLite file. Every row carries a seal, the SHA-256 of its other columns, because
SQLite does not notice a flipped bit in the content of a row.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from feste.errors import JournalDamaged, JournalTooNew
from feste.store.failures import damaged

__all__ = [
    "APPLICATION",
    "PAGE",
    "TABLES",
    "VERSION",
    "create",
    "identify",
    "is_good",
    "last",
    "migrate",
    "row_of",
    "storable",
    "tables",
    "write",
]

#: Identifies the file as Feste's (``PRAGMA application_id``): "FEST" in ASCII.
APPLICATION = 0x46455354
#: The version of the tables (``PRAGMA user_version``).
VERSION = 1
#: Bytes of a page of the file.
PAGE = 4096

#: The columns of each table. The last one, ``seal``, is left out here.
TABLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # one process that had the store open for writing
        "sessions": ("id", "began", "ended", "pid", "host", "program", "feste"),
        # the hashed fields of a request as canonical JSON; its SHA-256 is the key
        "prompts": ("key", "request"),
        # each request that was sent, written before it is sent
        "requests": (
            *("id", "session", "run", "plugin", "operation", "endpoint", "model", "calls"),
            *("attempt", "sent", "ended", "outcome", "billed", "error", "status", "request_id"),
            *("input_tokens", "output_tokens", "raw"),
        ),
        # the answer to each call
        "answers": ("id", "key", "draw", "request", "source", "kept", "response"),
        # rows whose seal was wrong, as text
        "quarantine": ("id", "place", "row", "found"),
    }
)

#: The statements that make the tables.
STATEMENTS = (
    """CREATE TABLE sessions (id INTEGER PRIMARY KEY, began REAL, ended REAL, pid INTEGER,
 host TEXT, program TEXT, feste TEXT, seal BLOB)""",
    "CREATE TABLE prompts (key TEXT PRIMARY KEY, request TEXT, seal BLOB)",
    """CREATE TABLE requests (id INTEGER PRIMARY KEY, session INTEGER, run TEXT, plugin TEXT,
 operation TEXT, endpoint TEXT, model TEXT, calls TEXT, attempt INTEGER, sent REAL, ended REAL,
 outcome TEXT, billed TEXT, error TEXT, status INTEGER, request_id TEXT, input_tokens INTEGER,
 output_tokens INTEGER, raw TEXT, seal BLOB)""",
    """CREATE INDEX requests_open ON requests (id)
 WHERE outcome IN ('sent', 'unknown') OR (plugin = 'task' AND outcome = 'failed')""",
    "CREATE INDEX requests_tasks ON requests (calls) WHERE plugin = 'task'",
    """CREATE TABLE answers (id INTEGER PRIMARY KEY, key TEXT, draw TEXT, request INTEGER,
 source TEXT, kept REAL, response TEXT, seal BLOB, UNIQUE (key, draw))""",
    """CREATE TABLE quarantine (id INTEGER PRIMARY KEY, place TEXT, row TEXT, found REAL,
 seal BLOB)""",
)

_TYPES = {"INTEGER": int, "REAL": float, "TEXT": str}
#: The type of each column, by table and name.
_KINDS: Mapping[tuple[str, str], Callable[[Any], Any]] = {
    (table, name): _TYPES[kind]
    for table in TABLES
    for made in STATEMENTS
    if made.startswith(f"CREATE TABLE {table} ")
    for name, kind in re.findall(r"(\w+) (INTEGER|REAL|TEXT)\b", made)
}
_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), check_circular=False).encode
_INTO = {
    table: f"INTO {table} VALUES ({','.join('?' * (len(columns) + 1))})"
    for table, columns in TABLES.items()
}


def _seal(table: str, values: Sequence[Any]) -> bytes:
    return hashlib.sha256(_encode([table, *values]).encode()).digest()


def write(
    conn: sqlite3.Connection, table: str, row: Mapping[str, Any], *, new: bool = False
) -> None:
    """Write a row with its seal; it replaces one with the same id or the same unique columns.

    :param conn: the connection.
    :param table: the table.
    :param row: the columns by name; one that is missing, or cannot be of its column's type, becomes
        NULL.
    :param new: raise instead of replacing a row.
    """
    statement = f"INSERT {'' if new else 'OR REPLACE '}{_INTO[table]}"
    values = [_as(_KINDS.get((table, name)), row.get(name)) for name in TABLES[table]]
    try:
        conn.execute(statement, (*values, _seal(table, values)))
    except (UnicodeEncodeError, OverflowError):
        values = [storable(value) for value in values]
        conn.execute(statement, (*values, _seal(table, values)))


def _as(kind: Callable[[Any], Any] | None, value: Any) -> Any:
    """Return a value as its column holds it: SQLite would convert it after it is sealed."""
    if value is None or kind is None or type(value) is kind:
        return value
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return None  # what a plugin gave, such as a status that is no number


def storable(value: Any) -> Any:
    """Return a value as SQLite can hold it: what a provider sends in an error may be anything.

    :param value: the value.
    """
    if isinstance(value, str) and not value.isascii():
        return value.encode(errors="backslashreplace").decode()  # halves of surrogate pairs
    if isinstance(value, int):
        return max(-(2**63), min(int(value), 2**63 - 1))
    return value


def is_good(table: str, values: Sequence[Any]) -> bool:
    """Whether a row is as it was written.

    :param table: the table.
    :param values: all its columns, the seal last.
    """
    try:
        return bool(_seal(table, values[:-1]) == values[-1])
    except (TypeError, ValueError):  # damage can turn a text into bytes
        return False


def row_of(table: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return the columns of a row by name, without the seal.

    :param table: the table.
    :param values: all its columns, the seal last.
    """
    return dict(zip(TABLES[table], values[:-1], strict=True))


def create(conn: sqlite3.Connection) -> None:
    """Make the tables in an empty file.

    :param conn: the connection, outside a transaction.
    """
    conn.execute("BEGIN IMMEDIATE")
    conn.execute(f"PRAGMA application_id = {APPLICATION}")
    conn.execute(f"PRAGMA user_version = {VERSION}")
    for statement in STATEMENTS:
        conn.execute(statement)
    conn.execute("COMMIT")


def identify(conn: sqlite3.Connection, path: str) -> int:
    """Return the version of a store's tables; 0 for an empty file.

    The tables must be exactly Feste's: a file from elsewhere could bring triggers of its own.

    :param conn: the connection.
    :param path: the file, for messages.
    :raises JournalDamaged: if it is not a store.
    :raises JournalTooNew: if a newer version of Feste made it.
    """
    (application,) = conn.execute("PRAGMA application_id").fetchone()
    (version,) = conn.execute("PRAGMA user_version").fetchone()
    found = tables(conn)
    if not found and not version and not application:
        return 0
    ours = found == set(STATEMENTS)
    if application != APPLICATION and not ours:
        raise JournalDamaged(f"{path} is not a store of Feste; give another file")
    if version > VERSION:
        raise JournalTooNew(
            f"{path} was made by a newer version of Feste (tables {version}; this one knows "
            f"{VERSION}): update Feste, or give another file"
        )
    if application != APPLICATION or version < 1 or (version == VERSION and not ours):
        raise damaged(Path(path), "its tables are not those of a store")
    return int(version)


def tables(conn: sqlite3.Connection) -> set[str]:
    """Return the statements that made what is in a file.

    :param conn: a connection to it.
    """
    try:
        found = conn.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    except UnicodeDecodeError:  # SQLite names what is malformed, which may be no text
        return {""}
    return {sql for (sql,) in found}


def last(conn: sqlite3.Connection) -> tuple[int, int]:
    """Return the highest ids of the requests and answers that a store holds; 0 for none.

    :param conn: a connection to it.
    """
    row = (
        "SELECT ifnull((SELECT max(id) FROM requests), 0), ifnull((SELECT max(id) FROM answers), 0)"
    )
    requests, answers = conn.execute(row).fetchone()
    return int(requests), int(answers)


#: For each version the function that turns its tables into those of the next.
MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = MappingProxyType({})


def migrate(conn: sqlite3.Connection, version: int) -> None:
    """Bring the tables to this version, in one transaction.

    :param conn: the connection, outside a transaction.
    :param version: the version they have.
    """
    conn.execute("BEGIN IMMEDIATE")
    try:
        for old in range(version, VERSION):
            MIGRATIONS[old](conn)
        conn.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        conn.execute("ROLLBACK")
        raise
    conn.execute("COMMIT")
