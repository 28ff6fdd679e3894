"""Connections to a store: one that writes it, and those that check it or look into it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from feste.errors import JournalDamaged
from feste.store import schema
from feste.store.failures import BUSY, damaged

__all__ = [
    "UNREADABLE",
    "beside",
    "check_end",
    "configure",
    "connect",
    "connect_for_writing",
    "has_log",
]

#: What reading a damaged file raises; SQLite's message may name something that is no text.
UNREADABLE = (sqlite3.Error, UnicodeDecodeError)


def beside(path: Path, end: str) -> Path:
    """Return the path of a file that belongs to a store.

    :param path: the store's file.
    :param end: what is added to its name.

    >>> beside(Path("a/store.db"), "-wal").name
    'store.db-wal'
    """
    return path.with_name(path.name + end)


def has_log(path: Path) -> bool:
    """Whether a store has something in its write-ahead log.

    :param path: the store's file.
    """
    log = beside(path, "-wal")
    return log.exists() and log.stat().st_size > 0


def connect(path: Path, *, locked: bool = False, shared: bool = False) -> sqlite3.Connection:
    """Open a store for reading; nothing in it or beside it changes while no one writes it.

    :param path: the file.
    :param locked: whether the caller holds the store's lock; then a transaction that a crash cut off
        in a rollback journal is undone, without which the file cannot be read.
    :param shared: whether a writer may come while it is read; then SQLite puts an empty log beside it,
        which the next writer removes.
    :raises JournalDamaged: if the file is empty and its log is not.
    """
    log = beside(path, "-wal")
    if has_log(path) and not path.stat().st_size:  # SQLite would delete the log
        raise damaged(path, f"it is empty, but {log.name} beside it is not")
    options = "mode=ro"
    if locked and beside(path, "-journal").exists():
        options = "mode=rw"
    elif not log.exists() and not shared:
        # nobody is writing, and SQLite then needs no files beside it
        options += "&immutable=1"
    uri = f"{path.absolute().as_uri()}?{options}"
    # a fork closes it from its own thread
    conn = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        configure(conn)
    except BaseException:
        conn.close()
        raise
    return conn


def connect_for_writing(path: Path) -> sqlite3.Connection:
    """Connect to a store that was checked.

    :param path: its file.
    """
    # a fork closes it from its own thread
    conn = sqlite3.connect(path, isolation_level=None, timeout=BUSY, check_same_thread=False)
    try:
        configure(conn)
        conn.execute("PRAGMA journal_mode = WAL")  # where it is refused, a rollback journal serves
        conn.execute("PRAGMA synchronous = FULL")
    except BaseException:
        conn.close()
        raise
    return conn


def check_end(path: Path, acknowledged: tuple[int, int], last: tuple[int, int]) -> None:
    """Check that a store has all rows at its end that were acknowledged.

    :param path: its file, for messages.
    :param acknowledged: the highest request and answer that were.
    :param last: the highest ones that it has.
    :raises JournalDamaged: if it lacks some.
    """
    lost = sum(max(0, was - now) for was, now in zip(acknowledged, last, strict=True))
    if lost:
        raise JournalDamaged(
            f"{path} lacks {lost:,} rows at its end that were written before: was it cut off, or "
            f"replaced by an older copy? `feste store salvage {path}` makes a new file of what is "
            f"there; to go on with the file as it is, delete {path}.lock"
        )


def configure(conn: sqlite3.Connection) -> None:
    """Set what every connection to a store needs.

    :param conn: the connection.
    """
    conn.execute(f"PRAGMA page_size = {schema.PAGE}")
    conn.execute("PRAGMA trusted_schema = OFF")
    conn.execute("PRAGMA cell_size_check = ON")
    conn.text_factory = _text


def _text(data: bytes) -> str | bytes:
    """Return a TEXT value; damage may have made it invalid, which its seal then tells."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
