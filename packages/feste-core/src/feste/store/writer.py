"""Open a store, carry out operations on it in transactions, and close it.

A journal's thread does all of this. One transaction serves many operations, because each commit
waits for the disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from feste.errors import FesteError
from feste.store import schema
from feste.store.book import Book
from feste.store.claims import Claims
from feste.store.connection import connect_for_writing
from feste.store.failures import described, gone
from feste.store.lock import Lock
from feste.store.opening import (
    identity,
    open_for_reading,
    open_for_writing,
    refuse_foreign,
    reserve_of,
)

__all__ = ["Operation", "Task", "Writer"]

Operation = Callable[[Book], Any]


class Task(NamedTuple):
    """An operation, and who is told of its outcome.

    :param operation: gets the book.
    :param then: receives whether it was carried out, and its value or the error.
    :param spends: whether it comes before spending money: refused once the store cannot be written.
    """

    operation: Operation
    then: Callable[[bool, Any], None]
    spends: bool = False


class Writer:
    """The connection to a store, and what is done with it.

    :param path: the store's file.
    :param claims: which draws of this process took which answers.
    :param read_only: whether nothing is written.
    """

    def __init__(self, path: Path, claims: Claims, read_only: bool) -> None:
        self.path = path
        self.claims = claims
        self.read_only = read_only
        #: Why the store can no longer be written, or None.
        self.failed: FesteError | None = None
        self.book: Book
        #: Whether there is a connection: not before it is opened, and not after a fork.
        self._connected = False
        self._lock: Lock | None = None
        self._file: tuple[int, ...] = ()

    @property
    def is_there(self) -> bool:
        """Whether the file, and the lock, are still those that were opened."""
        try:
            if identity(self.path, changes=self.read_only) != self._file:
                return False
        except OSError:
            return False
        return self._lock is None or self._lock.is_current

    # --- opening and closing ----------------------------------------------------------------------

    def lock(self, wait: float) -> None:
        """Take the store's lock, unless it is only read.

        :param wait: seconds to wait for another process.
        """
        if self.read_only:
            return
        refuse_foreign(self.path)
        if not self.path.parent.exists():
            self.path.parent.mkdir(mode=0o700, parents=True)
        self._lock = Lock(self.path, wait)

    def open(self) -> None:
        """Open the store."""
        self.book = self._open()
        self._file = identity(self.path, changes=self.read_only)
        self._connected = True

    def park(self) -> None:
        """Close the connection before a fork; the next operation opens it again."""
        if self._connected:
            self._connected = False
            with suppress(sqlite3.Error):
                self.book.conn.close()

    def _resume(self) -> None:
        """Connect again after a fork, or if a store that is only read was changed."""
        try:
            if self.read_only:
                if not self.is_there:
                    self.park()
                if not self._connected:
                    self.open()
                    self.claims.reopen()
            elif not self._connected and self.is_there:  # else it would make an empty file
                self.book.conn = connect_for_writing(self.path)
                self._connected = True
        except (sqlite3.Error, OSError, FesteError) as error:
            self._fail(error)

    def give_up(self) -> None:
        """Release what was taken before opening failed."""
        if self._lock is not None:
            self._free_reserve()
            self._lock.close()

    def _open(self) -> Book:
        if self._lock is None:
            return Book(open_for_reading(self.path), self.claims, read_only=True)
        conn = open_for_writing(self.path, self._lock)
        try:
            book = Book(conn, self.claims)
            conn.execute("BEGIN")
            book.begin_session()
            self._note(schema.last(conn), lower=True)
            conn.execute("COMMIT")
        except BaseException:
            conn.close()
            raise
        return book

    def close(self) -> None:
        """Fold the write-ahead log into the file, and release the lock."""
        self._resume()
        book = self.book
        with ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.close)
                stack.callback(self._free_reserve)
            stack.callback(book.conn.close)
            try:
                if self._lock is not None:
                    book.end_session()
                    book.conn.execute("PRAGMA busy_timeout = 0")  # who reads it is not waited for
                    book.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error:  # the disk is full, say: everything acknowledged is in the log
                _rollback(book.conn)

    # --- transactions -----------------------------------------------------------------------------

    def carry_out(self, tasks: list[Task]) -> list[tuple[bool, Any]]:
        """Carry out operations together, and return for each whether it is committed, and its value.

        :param tasks: the operations.
        """
        if self.failed is None and self._lock is not None and not self.is_there:
            self._fail(gone(self.path))
        self._resume()
        if not self._connected:
            return [(False, self.failed)] * len(tasks)
        if self.failed is None:
            try:
                return self._transaction(tasks)
            except sqlite3.Error as error:
                self._fail(error)
        return [self._alone(task) for task in tasks]

    def _alone(self, task: Task) -> tuple[bool, Any]:
        """Carry out an operation of a store that failed: answers in hand are still tried."""
        if task.spends or not self.is_there:
            return False, self.failed
        try:
            return self._transaction([task])[0]
        except sqlite3.Error as error:
            _rollback(self.book.conn)
            return False, described(error, self.path)

    def _transaction(self, tasks: list[Task]) -> list[tuple[bool, Any]]:
        if not tasks:
            return []
        book, conn = self.book, self.book.conn
        outcomes: list[tuple[bool, Any]] = []
        changes, numbers, under_way = conn.total_changes, book.next.copy(), book.under_way.copy()
        try:
            # a transaction that reads first could not wait for another program when it writes then
            conn.execute("BEGIN" if self.read_only else "BEGIN IMMEDIATE")
            for task in tasks:
                conn.execute("SAVEPOINT task")
                try:
                    outcomes.append((True, task.operation(book)))
                except sqlite3.Error:
                    raise
                except Exception as error:  # such as a request that is not JSON: only its call
                    conn.execute("ROLLBACK TO task")
                    outcomes.append((False, described(error, self.path)))
                conn.execute("RELEASE task")
            changed = conn.total_changes != changes
            last = schema.last(conn) if changed else (0, 0)
            if changed:
                self._note(last, lower=True)
            conn.execute("COMMIT")
        except sqlite3.Error:
            # what was given and ended is not in the file
            book.next, book.under_way = numbers, under_way
            raise
        if changed:
            self._note(last)
        return outcomes

    def _note(self, last: tuple[int, int], *, lower: bool = False) -> None:
        """Note how far the store has got; only where that is less, before rows are deleted."""
        if self._lock is None:
            return
        noted = self._lock.acknowledged
        if lower:
            last = min(last[0], noted[0]), min(last[1], noted[1])
        try:
            if last != noted:
                self._lock.note(*last)
        except OSError as error:  # what is committed stays committed, but no more is spent
            self.failed = described(error, self.path)

    def _fail(self, error: Exception) -> None:
        """Refuse all further spending, and free the reserved space for the answers in hand."""
        _rollback(self.book.conn)
        self.failed = described(error, self.path)
        self._free_reserve()

    def _free_reserve(self) -> None:
        if self._lock is not None:
            with suppress(OSError):  # a file system that has become read-only
                reserve_of(self.path).unlink(missing_ok=True)


def _rollback(conn: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):  # SQLite has rolled back by itself, or the next BEGIN tells
        if conn.in_transaction:
            conn.execute("ROLLBACK")
