"""Delete answers and what belongs to them, so that their text is gone from the files."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from feste.errors import ConfigError, JournalFailed
from feste.store import schema
from feste.store.connection import configure
from feste.store.contents.choice import Choice, Tasks, choose, delete
from feste.store.contents.reader import Reader
from feste.store.journal import Journal
from feste.store.lock import Lock

__all__ = ["Purged", "Tasks", "purge"]


@dataclass(frozen=True, slots=True)
class Purged:
    """What was deleted, or would be.

    :param answers: the number of answers.
    :param prompts: the number of prompts: texts of requests.
    :param requests: the number of requests, with starts of tasks.
    :param quarantine: the number of damaged rows.
    :param tasks_left: the starts of ``once=True`` tasks that were left although they fit.
    :param copies: older copies of the store beside it, which were not touched.
    """

    answers: int
    prompts: int
    requests: int
    quarantine: int
    tasks_left: int = 0
    copies: tuple[Path, ...] = ()


def purge(
    path: str | Path,
    *,
    before: float | None = None,
    session: int | None = None,
    model: str | None = None,
    key: str | None = None,
    tasks: Tasks | None = None,
    prompts_only: bool = False,
    everything: bool = False,
    dry_run: bool = False,
) -> Purged:
    """Delete the answers that fit all that is given, and the prompts and requests only they need.

    What is deleted is bought again if a program asks for it. Requests without an answer go if they
    fit; ``once=True`` tasks are left, so that none runs twice by mistake, unless ``tasks``, ``key`` or
    ``everything`` names them. Damaged rows in quarantine always go: they cannot tell what they were.
    Copies that file systems and backups keep are out of reach.

    :param path: the store; it must not be open in this process.
    :param before: only what was kept, or sent, before this moment, in seconds since 1970.
    :param session: only what this session bought.
    :param model: only what was asked of this model.
    :param key: only the answers to this request.
    :param tasks: only the ``once=True`` tasks that ended so, which then may run again.
    :param prompts_only: whether only prompts are deleted.
    :param everything: whether all is deleted; nothing else may be given.
    :param dry_run: whether to count only; this works beside a running program.
    :returns: how many rows were deleted, or would be.
    :raises ConfigError: if nothing is chosen.
    :raises JournalLocked: if a program is writing the store.
    :raises JournalError: if the store cannot be used.
    """
    model, key = schema.storable(model), schema.storable(key)
    choice = Choice(before, session, model, key, tasks, prompts_only, everything)
    narrowed = any(value is not None for value in (before, session, model, key, tasks))
    if everything and (narrowed or prompts_only):
        raise ConfigError("everything=True takes no other choice")
    if not (everything or narrowed or prompts_only):
        raise ConfigError("nothing is chosen: give before=, session=, ..., or everything=True")
    if tasks is not None and prompts_only:
        raise ConfigError("tasks= and prompts_only=True exclude each other")
    path = Path(path)
    with Reader(path) as reader:
        if dry_run:
            with reader.explained():
                return _counted(reader.conn, choice, path)
    journal = Journal(path)  # it checks the file
    journal.close()
    lock = Lock(path)
    try:
        return _purge(path, choice, lock, journal.session)
    finally:
        lock.close()


def _counted(conn: sqlite3.Connection, choice: Choice, path: Path) -> Purged:
    """Choose the rows, and look for other files that may hold the same texts."""
    counts, left = choose(conn, choice)
    mine = [path.with_name(path.name + ending) for ending in (".lock", ".reserve")]
    copies = [p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.")]
    return Purged(**counts, tasks_left=left, copies=tuple(sorted({*copies} - {*mine})))


def _purge(path: Path, choice: Choice, lock: Lock, session: int) -> Purged:
    conn = sqlite3.connect(path, isolation_level=None)
    said = "nothing was deleted"
    try:
        configure(conn)
        conn.execute("PRAGMA secure_delete = ON")
        conn.execute("BEGIN IMMEDIATE")
        purged = _counted(conn, choice, path)
        delete(conn, choice)
        # the session of the check bought nothing
        conn.execute("DELETE FROM sessions WHERE id = ?", (session,))
        lock.note(0, 0)  # from here on fewer rows are no loss
        conn.execute("COMMIT")
        said = "the rows are deleted, but their text may still be in the file: purge again"
        conn.execute("VACUUM")
        (busy, *_) = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise sqlite3.OperationalError("another program is reading it")
        lock.note(*schema.last(conn))
    except sqlite3.Error as error:
        raise JournalFailed(f"{path} could not be rewritten ({error}); {said}") from error
    finally:
        conn.close()
    return purged
