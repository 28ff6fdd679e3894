"""A new store of all that is good in a damaged one.

The rows are read straight from the pages (:mod:`feste.store.repair.carve`). That may also find older versions
of a row, in pages that were rewritten or freed: of a session or a request the version that ended last
is kept, and of several answers to a draw the newest. A row that was deleted comes back if nothing has
overwritten it.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from feste.errors import JournalDamaged, JournalError, JournalFailed, JournalTooNew
from feste.store import schema
from feste.store.connection import UNREADABLE, beside, connect
from feste.store.lock import Lock
from feste.store.repair import carve
from feste.store.repair.verify import problem_of, verify

__all__ = ["Salvaged", "salvage"]

#: What SQLite keeps beside a store and reads when it opens it.
_BESIDE = ("-wal", "-shm", "-journal")
#: Which rows there may be before, so that the one at hand is not kept: a later version of it.
_LATER = {
    "sessions": "id = :id AND ifnull(ended, 0) >= ifnull(:ended, 0)",
    "requests": "id = :id AND ifnull(ended, 0) >= ifnull(:ended, 0)",
    "answers": "(id = :id OR (key = :key AND draw = :draw)) AND kept >= :kept",
}


@dataclass(slots=True)
class Salvaged:
    """What became of a damaged store.

    :param path: the store's file.
    :param problems: what was wrong, a text each; empty if nothing was, and then nothing was changed.
    :param kept: the number of rows of each table in the new store.
    :param lost: the number of rows of each table that could not be read; where parts of the file
        are missing it is an upper bound.
    :param unsure: the tables that may have lost more, because nothing tells how many rows they had.
    :param folder: the folder with the damaged files, or None.
    """

    path: Path
    problems: list[str]
    kept: dict[str, int]
    lost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(schema.TABLES, 0))
    unsure: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def lines(self) -> list[str]:
        """What happened, for the user to read."""
        if self.folder is None:
            return [f"There is nothing wrong with {self.path}; nothing was changed."]
        counts = [
            f"  {table}: kept {self.kept[table]:,}, lost {self.lost[table]:,}"
            for table in schema.TABLES
        ]
        if self.unsure:
            counts.append(
                f"  more may be lost of {', '.join(self.unsure)}: nothing tells how many there were"
            )
        return [
            f"{self.path} is a new store now, of all that was good in the damaged one:",
            *counts,
            f"The damaged files are in {self.folder}",
        ]


def salvage(path: str | Path) -> Salvaged:
    """Make a new store of all good rows of a damaged one, in its place, and keep the damaged files.

    Nothing is changed if nothing is wrong.

    :param path: the store's file.
    :raises JournalLocked: if a program has it open for writing.
    :raises JournalTooNew: if a newer version of Feste made it.
    :raises JournalDamaged: if no row of a store is in it.
    :raises JournalFailed: if the new store cannot be written.
    """
    path = Path(path)
    if path.is_symlink() or not path.is_file():
        raise JournalError(f"there is no store {path}, or it is a symbolic link")
    with closing(Lock(path)) as lock:
        verdict = verify(path)
        if not verdict.problems:
            return Salvaged(path, [], verdict.good)
        _check_version(path)
        try:
            return _renew(path, lock, verdict.problems)
        except (OSError, sqlite3.Error) as error:
            raise JournalFailed(f"no new store could be made of {path}: {error}") from error


def _check_version(path: Path) -> None:
    """Leave a store alone whose tables this version does not know."""
    with suppress(*UNREADABLE, JournalDamaged), closing(connect(path)) as conn:
        try:
            schema.identify(conn, str(path))
        except JournalTooNew:
            if schema.tables(conn) != set(schema.STATEMENTS):  # else the number is damaged
                raise


def _renew(path: Path, lock: Lock, problems: list[str]) -> Salvaged:
    good: dict[str, set[int]] = {table: set() for table in schema.TABLES}
    with _temporary(path) as new:
        with closing(sqlite3.connect(new, isolation_level=None)) as conn:
            conn.execute(f"PRAGMA page_size = {schema.PAGE}")
            conn.execute("PRAGMA journal_mode = OFF")  # if this fails, the file is thrown away
            schema.create(conn)
            conn.execute("BEGIN")
            for row in carve.rows(path, beside(path, "-wal")):
                if problem_of(row.table, row.values):  # else the new store would have it too
                    continue
                good[row.table].add(row.id)
                _keep(conn, row)
            conn.execute("COMMIT")
            kept = {t: conn.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in good}
            last = schema.last(conn)
        if not any(good.values()):
            raise JournalDamaged(f"{path} holds no good row of a store; nothing was changed")
        lost, unsure = _lost(path, good, lock.acknowledged)
        folder = _exchange(path, new)
    lock.note(*last)
    return Salvaged(path, problems, kept, lost, unsure, folder)


def _keep(conn: sqlite3.Connection, row: carve.Row) -> None:
    """Write a row into the new store, if that has no later version of it."""
    columns = schema.row_of(row.table, row.values)
    if row.table in _LATER:
        later = f"SELECT 1 FROM {row.table} WHERE {_LATER[row.table]}"
        if conn.execute(later, columns).fetchone():
            return
    schema.write(conn, row.table, columns)


def _lost(
    path: Path, good: dict[str, set[int]], acknowledged: tuple[int, int]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return how many rows of each table the damaged store had besides the good ones.

    :returns: the numbers, and the tables that may have had more.
    """
    reached = dict(zip(("requests", "answers"), acknowledged, strict=True))
    conn = None
    with suppress(*UNREADABLE, JournalDamaged):
        conn = connect(path)
    try:
        lost, unsure = {}, []
        for table, ids in good.items():
            top = max(reached.get(table, 0), max(ids, default=0))
            listed, ends = _listed(conn, table, top)
            lost[table] = len(listed - ids)
            if not (ends or reached.get(table)):
                unsure.append(table)
        return lost, tuple(unsure)
    finally:
        if conn is not None:
            conn.close()


def _listed(conn: sqlite3.Connection | None, table: str, top: int) -> tuple[set[int], bool]:
    """Return the row numbers of a table; where it cannot be read, all that it could have there.

    :returns: the numbers, and whether the last one was read.
    """
    found: set[int] = set()
    low, high = 0, top + 1
    ends = False
    if conn is not None:
        numbers = f"SELECT rowid FROM {table} ORDER BY rowid"
        try:
            for (low,) in conn.execute(numbers):
                found.add(low)
            ends = True
        except UNREADABLE:
            with suppress(*UNREADABLE):
                for (high,) in conn.execute(f"{numbers} DESC"):
                    found.add(high)
                    ends = True
    return found.union(range(low + 1, min(high, top + 1))), ends


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Make an empty file beside a store, for its owner alone; it is removed if it is left there."""
    file, name = tempfile.mkstemp(prefix=f"{path.name}.salvage-", dir=path.parent)
    os.close(file)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _exchange(path: Path, new: Path) -> Path:
    """Put a new file in the place of a store; return the folder that its files were moved to.

    At every moment the store is the damaged one or the new one. Its log goes before, because SQLite
    would apply it to the new one. Should the process die in between, the note in the lock file tells
    that rows are missing, and the folder has the whole damaged store.
    """
    _sync(new)
    folder = _folder(path)
    try:
        os.link(path, folder / path.name)
    except OSError:  # a file system without links
        os.rename(path, folder / path.name)
    for end in _BESIDE:
        if beside(path, end).exists():
            os.rename(beside(path, end), folder / beside(path, end).name)
    _sync(folder)
    os.replace(new, path)
    _sync(path.parent)
    return folder


def _folder(path: Path) -> Path:
    name = f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    for n in range(1, 1000):
        folder = path.with_name(name if n == 1 else f"{name}-{n}")
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            return folder
    raise JournalError(f"there are too many folders {name}; move them away")


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
