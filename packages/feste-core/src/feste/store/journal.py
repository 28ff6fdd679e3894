"""The journal: the one connection to a store file, on a thread of its own.

Callers queue operations; the thread puts those that wait into one transaction, so that one sync of
the disk serves many answers, and reports each after the commit. So what was reported as written
survives a crash of the process and of the machine.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, TypeVar

from feste.backend import Request, Response, Secret
from feste.errors import FesteError, JournalFailed
from feste.store import schema
from feste.store.book import Book
from feste.store.claims import Claims
from feste.store.failures import described, gone
from feste.store.forks import fork_lock
from feste.store.lock import Lock
from feste.store.opening import (
    identity,
    open_for_reading,
    open_for_writing,
    refuse_foreign,
    reserve_of,
)
from feste.store.rows import Answer, Wanted

__all__ = ["Journal"]

T = TypeVar("T")
Operation = Callable[[Book], Any]
Then = Callable[[bool, Any], None]
#: How a request ended that brought nothing to keep.
Outcome = Literal["failed", "unknown", "withdrawn"]

#: Seconds that a thread gets to take its first step.
_START = 2.0
#: At most this many operations share a transaction.
_GROUP = 256


class _Item(NamedTuple):
    operation: Operation
    then: Then
    #: Whether it comes before spending money: refused once the store cannot be written.
    spends: bool


class Journal:
    """An open store.

    :param path: the file; it is made if it does not exist.
    :param wait: seconds to wait for another process that is writing it.
    :param read_only: whether nothing is written; then other processes may write it meanwhile.
    :param claims: which draws took which answers, when the file was open before in this process.
    :param start: whether to open it now; else :meth:`open` does.
    :raises JournalError: if it cannot be used: locked, damaged, too new, not a store.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        wait: float = 0.0,
        read_only: bool = False,
        claims: Claims | None = None,
        start: bool = True,
    ) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self.claims = claims or Claims()
        self.claims.reopen()
        #: Why the store can no longer be written, or None.
        self.failed: FesteError | None = None
        #: The number of this session in the store.
        self.session = 0
        self._lock: Lock | None = None
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._closing = self._ended = False
        self._in_sqlite = fork_lock()
        self._begun = threading.Event()
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(wait,), name=f"feste-store-{self.path.name}", daemon=True
        )
        if start:
            try:
                self.open()
            except BaseException:  # also Ctrl-C while it waits for another process
                self._queue.put(None)
                raise

    def open(self) -> None:
        """Wait until the store is open; may be called again after it was interrupted.

        :raises JournalError: if it cannot be used.
        """
        self.start()
        self._opened.result()

    def start(self) -> None:
        """Begin to open the store."""
        if not self._begun.is_set():
            self._thread.start()
            self._begun.wait()

    # --- from any thread --------------------------------------------------------------------------

    def recall(self, calls: Sequence[Wanted], then: Then) -> None:
        """Look up the answers of calls; each answer that is returned is taken by its call.

        :param calls: the calls.
        :param then: receives True and a :class:`Found` for each call, or False and the error; it is
            called on the journal's thread.
        """
        self._put(lambda book: [book.find(call) for call in calls], then)

    def intend(
        self,
        request: Request,
        calls: Sequence[Request],
        then: Then,
        *,
        run: str = "",
        attempt: int = 1,
        prompts: bool = True,
        secrets: tuple[Secret, ...] = (),
    ) -> None:
        """Write that a request will be sent; it must not be sent before ``then`` is called.

        :param request: the request.
        :param calls: the request of each call that it answers, as it would be sent alone.
        :param then: receives True and the request's number, or False and the error.
        :param run: the name of the run.
        :param attempt: the number of the attempt, from 1.
        :param prompts: whether to keep what the calls ask, not only its hash.
        :param secrets: keys that are blanked in a response that cannot be used.
        """
        self._put(
            lambda book: book.intend(request, calls, run, attempt, prompts, secrets),
            then,
            spends=True,
        )

    def begin(self, request: Request, then: Then, *, run: str = "", prompts: bool = True) -> None:
        """Look up a call that must not be made twice, and intend it if nothing is known of it.

        :param request: its request.
        :param then: receives True and a :class:`Found` or the request's number, or False and the
            error.
        :param run: the name of the run.
        :param prompts: whether to keep what it asks, not only its hash.
        """
        self._put(lambda book: book.begin(request, run, prompts), then, spends=True)

    def claim_twins(self, known: Sequence[tuple[Wanted, Response]]) -> None:
        """Take the answers that calls have from another store, so that they serve no other call.

        :param known: the calls and their answers.
        """
        self._put(lambda book: book.claim_twins(known), _ignore)

    def record(
        self,
        answers: Sequence[Answer],
        then: Then,
        *,
        number: int | None = None,
        response: Response | None = None,
        prompts: bool = True,
        replace: bool = False,
    ) -> None:
        """Write the answers to calls; nothing may depend on them before ``then`` is called.

        :param answers: the answers.
        :param then: receives True and the positions of answers that are not JSON and so cannot be
            kept, or False and the error.
        :param number: the number of the request that they were bought with, or None.
        :param response: its response.
        :param prompts: whether to keep what the calls ask; those of ``number`` are kept already.
        :param replace: whether they take the place of answers that the calls have already.
        """
        self._put(lambda book: book.record(answers, number, response, prompts, replace), then)

    def finish(
        self,
        number: int,
        outcome: Outcome,
        error: FesteError | None = None,
        response: Response | None = None,
        then: Then | None = None,
    ) -> None:
        """Write that a request ended without an answer to keep; nothing waits for it.

        :param number: the request's number.
        :param outcome: ``"failed"``, ``"unknown"`` if it may have been billed, or ``"withdrawn"`` if
            it was not sent after all.
        :param error: why, or None.
        :param response: the response, if one came that could not be used.
        :param then: receives whether it was written, and the error if not; None ignores it.
        """
        self._put(lambda book: book.end(number, outcome, response, error), then or _ignore)

    def run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run an operation in a transaction, and wait until it is committed.

        :param operation: gets the connection.
        :raises JournalError: if the store could not be read or written.
        """
        done: Future[T] = Future()

        def then(ok: bool, value: Any) -> None:
            if ok:
                done.set_result(value)
            else:
                done.set_exception(value)

        self._put(lambda book: operation(book.conn), then)
        return done.result()

    def close(self) -> None:
        """Write what is queued, fold the write-ahead log into the file, and release the lock.

        A run that still uses it fails.
        """
        self._closing = True
        self._queue.put(None)
        # an interrupt may have come between starting the thread and its first step
        if self._begun.wait(_START) and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_current(self) -> bool:
        """Whether it can be used, and the path still leads to what is open."""
        if not self._opened.done():
            return self._begun.is_set() and not self._closing
        if self.failed is not None or self._closing or not self._thread.is_alive():
            return False
        return self._is_there()

    def _is_there(self) -> bool:
        """Whether the file, and the lock, are still those that were opened."""
        try:
            if identity(self.path, changes=self.read_only) != self.file:
                return False
        except OSError:
            return False
        return self._lock is None or self._lock.is_current

    def _put(self, operation: Operation, then: Then, *, spends: bool = False) -> None:
        self._queue.put(_Item(operation, then, spends))
        if self._ended or not self._thread.is_alive():  # closed, failed, or in a forked child
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        with suppress(Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    told = f"{self.path} was closed while a run used it: run again"
                    item.then(False, JournalFailed(told))

    # --- the thread -------------------------------------------------------------------------------

    def _work(self, wait: float) -> None:
        self._begun.set()
        try:
            if not self.read_only:
                refuse_foreign(self.path)
                if not self.path.parent.exists():
                    self.path.parent.mkdir(mode=0o700, parents=True)
                self._lock = Lock(self.path, wait)
            with self._in_sqlite:
                book = self._open()
            self.file = identity(self.path, changes=self.read_only)
        except BaseException as error:
            if self._lock is not None:
                self._free_reserve()
                self._lock.close()
            self._ended = True
            self._opened.set_exception(described(error, self.path))
            return
        self._opened.set_result(None)
        try:
            while self._turn(book):
                pass
        finally:
            try:
                with self._in_sqlite:
                    self._close(book)
            finally:
                self._ended = True
                self._refuse_rest()

    def _open(self) -> Book:
        if self._lock is None:
            return Book(open_for_reading(self.path), self.path, self.claims, read_only=True)
        conn = open_for_writing(self.path, self._lock)
        try:
            book = Book(conn, self.path, self.claims)
            conn.execute("BEGIN")
            book.begin_session()
            self.session = book.session
            self._note(schema.last(conn), lower=True)
            conn.execute("COMMIT")
        except BaseException:
            conn.close()
            raise
        return book

    def _close(self, book: Book) -> None:
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

    def _turn(self, book: Book) -> bool:
        """Carry out the operations that wait; return False when the journal is closed."""
        items = [self._queue.get()]
        try:
            while len(items) < _GROUP and items[-1] is not None:
                items.append(self._queue.get_nowait())
        except Empty:
            pass
        wanted = [item for item in items if item is not None]
        with self._in_sqlite:
            outcomes = self._outcomes(book, wanted)
        with ExitStack() as stack:  # an error in one of them keeps none of the others waiting
            for item, (ok, value) in reversed(list(zip(wanted, outcomes, strict=True))):
                stack.callback(item.then, ok, value)
        return items[-1] is not None

    def _outcomes(self, book: Book, items: list[_Item]) -> list[tuple[bool, Any]]:
        if self.failed is None and self._lock is not None and not self._is_there():
            self._fail(book.conn, gone(self.path))
        if self.failed is None:
            try:
                return self._transaction(book, items)
            except sqlite3.Error as error:
                self._fail(book.conn, error)
        return [self._alone(book, item) for item in items]

    def _alone(self, book: Book, item: _Item) -> tuple[bool, Any]:
        """Carry out an operation of a store that failed: answers in hand are still tried."""
        if item.spends or not self._is_there():
            return False, self.failed
        try:
            return self._transaction(book, [item])[0]
        except sqlite3.Error as error:
            _rollback(book.conn)
            return False, described(error, self.path)

    def _transaction(self, book: Book, items: list[_Item]) -> list[tuple[bool, Any]]:
        if not items:
            return []
        conn = book.conn
        outcomes: list[tuple[bool, Any]] = []
        changes, numbers, under_way = conn.total_changes, book.next.copy(), book.under_way.copy()
        try:
            # a transaction that reads first could not wait for another program when it writes then
            conn.execute("BEGIN" if self.read_only else "BEGIN IMMEDIATE")
            for item in items:
                conn.execute("SAVEPOINT item")
                try:
                    outcomes.append((True, item.operation(book)))
                except sqlite3.Error:
                    raise
                except Exception as error:  # such as a request that is not JSON: only its call
                    conn.execute("ROLLBACK TO item")
                    outcomes.append((False, described(error, self.path)))
                conn.execute("RELEASE item")
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

    def _fail(self, conn: sqlite3.Connection, error: Exception) -> None:
        """Refuse all further spending, and free the reserved space for the answers in hand."""
        _rollback(conn)
        self.failed = described(error, self.path)
        self._free_reserve()

    def _free_reserve(self) -> None:
        if self._lock is not None:
            with suppress(OSError):  # a file system that has become read-only
                reserve_of(self.path).unlink(missing_ok=True)


def _ignore(ok: bool, value: Any) -> None:
    """Receive the outcome of an operation that nothing waits for; a failure is in ``failed``."""


def _rollback(conn: sqlite3.Connection) -> None:
    if conn.in_transaction:
        with suppress(sqlite3.Error):  # SQLite has rolled back by itself, or the next BEGIN tells
            conn.execute("ROLLBACK")
