"""Open a store: check it before anything in it may change, then bring its tables up to date."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import warnings
from contextlib import closing
from pathlib import Path

from feste.errors import FesteWarning, JournalDamaged, JournalError
from feste.store import schema
from feste.store.connection import beside, check_end, connect, connect_for_writing, has_log
from feste.store.failures import damaged
from feste.store.lock import Lock

__all__ = [
    "identity",
    "open_for_reading",
    "open_for_writing",
    "refuse_foreign",
    "reserve_of",
]

#: Bytes reserved beside the store, freed when the disk is full so that answers in hand still fit.
BALLAST = 4 << 20
_MAGIC = b"SQLite format 3\0"


def refuse_foreign(path: Path) -> None:
    """Refuse a file that was never a store, before anything is put beside it.

    :param path: the file.
    :raises JournalDamaged: if it is no SQLite file, and no lock of a store is beside it.
    """
    if path.is_file() and not beside(path, ".lock").exists():
        with path.open("rb") as file:
            begins = file.read(len(_MAGIC))
        if begins and begins != _MAGIC:
            raise JournalDamaged(
                f"{path} is not a store of Feste; give another file, or, if it was a store once, call "
                f"`feste store salvage {path}`"
            )


def open_for_writing(path: Path, lock: Lock) -> sqlite3.Connection:
    """Open a store for writing; make it if there is none.

    :param path: its file.
    :param lock: its lock, held.
    :raises JournalError: if it cannot be used; it is unchanged then.
    """
    if lock.acknowledged != (0, 0) and not path.exists() and not has_log(path):
        told = f"{path} was deleted since it was last used: it begins empty"
        warnings.warn(told, FesteWarning, stacklevel=2)
        lock.note(0, 0)
    _make_file(path)
    version = _check(path, lock)
    if 0 < version < schema.VERSION:
        _back_up(path, beside(path, f".tables-{version}"))
    _reserve(reserve_of(path))
    conn = connect_for_writing(path)
    try:
        if version == 0:
            schema.create(conn)
        elif version < schema.VERSION:
            schema.migrate(conn, version)
    except BaseException:
        conn.close()
        raise
    return conn


def _check(path: Path, lock: Lock) -> int:
    """Check a store before anything in it may change; return the version of its tables.

    The connection only reads: closing a writing one would fold a damaged log into the file.
    """
    with closing(connect(path, locked=True)) as conn:
        version = schema.identify(conn, str(path))
        if version:
            (said,) = conn.execute("PRAGMA integrity_check(1)").fetchone()
            if said != "ok":
                raise damaged(path, said)
        check_end(path, lock.acknowledged, schema.last(conn) if version else (0, 0))
    return version


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a store that nothing is written to.

    :param path: its file.
    :raises JournalError: if it cannot be used.
    """
    if not path.exists():
        raise JournalError(
            f"there is no {path}: a cache that is only read must be made before, by a run with "
            'cache_mode="replay"'
        )
    conn = connect(path)
    try:
        version = schema.identify(conn, str(path))
        if version < schema.VERSION:
            raise JournalError(
                f"{path} has {'older' if version else 'no'} tables: open it once for writing"
            )
    except BaseException:
        conn.close()
        raise
    return conn


def reserve_of(path: Path) -> Path:
    """Return the file that reserves space on the disk for a store.

    :param path: the store's file.
    """
    return beside(path, ".reserve")


def _make_file(path: Path) -> None:
    """Make the file, for its owner alone, if it does not exist; a symbolic link is refused."""
    if path.is_symlink():
        raise JournalError(f"{path} is a symbolic link: give the path that it leads to")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(path, flags, 0o600))


def _back_up(path: Path, backup: Path) -> None:
    """Copy a store with what is in its log, or not at all."""
    file, name = tempfile.mkstemp(prefix=f"{backup.name}-", dir=path.parent)
    os.close(file)
    try:
        with closing(connect(path, locked=True)) as conn, closing(sqlite3.connect(name)) as copy:
            conn.backup(copy)
        os.replace(name, backup)
    finally:
        Path(name).unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Reserve space on the disk for the answers in hand when it becomes full."""
    if path.exists() and path.stat().st_size >= BALLAST:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    file = os.open(path, flags, 0o600)
    try:
        left = BALLAST
        while left:  # a disk that becomes full takes a part first, and raises then
            left -= os.write(file, bytes(min(left, 1 << 18)))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def identity(path: Path, *, changes: bool = False) -> tuple[int, ...]:
    """Return what tells a file from another that was put in its place.

    :param path: the file.
    :param changes: whether it also differs when the file was written, or is being written.
    """
    status = path.stat()
    same = status.st_dev, status.st_ino
    if not changes:
        return same
    return *same, status.st_mtime_ns, status.st_size, beside(path, "-wal").exists()
