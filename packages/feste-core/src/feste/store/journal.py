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
from typing import Any, Literal, TypeVar

from feste.backend import Request, Response, Secret
from feste.errors import FesteError, JournalFailed
from feste.store.claims import Claims
from feste.store.failures import described
from feste.store.forks import fork_lock
from feste.store.rows import Answer, Wanted
from feste.store.writer import Operation, Task, Writer

__all__ = ["Journal", "outcome_of"]

T = TypeVar("T")
Then = Callable[[bool, Any], None]
#: How a request ended that brought nothing to keep.
Outcome = Literal["failed", "unknown", "withdrawn"]

#: Seconds that a thread gets to take its first step.
_START = 2.0
#: At most this many operations share a transaction.
_GROUP = 256


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
        self.claims = claims or Claims()
        self.claims.reopen()
        self._writer = Writer(self.path, self.claims, read_only)
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._closing = self._ended = False
        self._in_sqlite = fork_lock(self._writer.park)
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
        self._put(lambda book: book.lookup.claim_twins(known), _ignore)

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
        done: T = outcome_of(self._put, lambda book: operation(book.conn))
        return done

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
    def session(self) -> int:
        """The number of this session in the store."""
        return self._writer.book.session

    @property
    def is_current(self) -> bool:
        """Whether it can be used, and the path still leads to what is open."""
        if not self._opened.done():
            return self._begun.is_set() and not self._closing
        if self._writer.failed is not None or self._closing or not self._thread.is_alive():
            return False
        return self._writer.read_only or self._writer.is_there  # one that is only read looks again

    def _put(self, operation: Operation, then: Then, *, spends: bool = False) -> None:
        self._queue.put(Task(operation, then, spends))
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
            self._writer.lock(wait)
            with self._in_sqlite:
                self._writer.open()
        except BaseException as error:
            self._writer.give_up()
            self._ended = True
            self._opened.set_exception(described(error, self.path))
            return
        self._opened.set_result(None)
        try:
            while self._turn():
                pass
        finally:
            try:
                with self._in_sqlite:
                    self._writer.close()
            finally:
                self._ended = True
                self._refuse_rest()

    def _turn(self) -> bool:
        """Carry out the operations that wait; return False when the journal is closed."""
        items = [self._queue.get()]
        try:
            while len(items) < _GROUP and items[-1] is not None:
                items.append(self._queue.get_nowait())
        except Empty:
            pass
        wanted = [item for item in items if item is not None]
        with self._in_sqlite:
            outcomes = self._writer.carry_out(wanted)
        with ExitStack() as stack:  # an error in one of them keeps none of the others waiting
            for item, (ok, value) in reversed(list(zip(wanted, outcomes, strict=True))):
                stack.callback(item.then, ok, value)
        return items[-1] is not None


def outcome_of(question: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
    """Ask a journal something, wait until it tells, and return what it tells.

    :param question: one of a journal's methods that take ``then``.
    :param args: its arguments, without ``then``.
    :param kwargs: likewise.
    :raises JournalError: if the store could not be read or written.
    """
    told: Future[Any] = Future()

    def then(ok: bool, value: Any) -> None:
        if ok:
            told.set_result(value)
        else:
            told.set_exception(value)

    question(*args, then=then, **kwargs)
    return told.result()


def _ignore(ok: bool, value: Any) -> None:
    """Receive the outcome of an operation that nothing waits for; a failure is in ``failed``."""
