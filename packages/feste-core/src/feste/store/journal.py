"""The journal: the one connection to a store file, on a thread of its own.

Callers queue operations; the thread puts those that wait into one transaction, so that one sync of
the disk serves many answers, and reports each after the commit. So what was reported as written
survives a crash of the process and of the machine.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, TypeVar

from feste import draw
from feste.backend import Request, Response
from feste.errors import CallError, FesteError, JournalDamaged, JournalError, JournalFailed
from feste.store import schema
from feste.store.claims import Claims
from feste.store.forks import fork_lock
from feste.store.lock import Lock
from feste.store.reading import beside, check_end, configure, connect
from feste.store.rows import Answer, Earlier, Found, Wanted, calls_as_json, decode, draw_of, encode

__all__ = ["Journal"]

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]
Then = Callable[[bool, Any], None]
#: How a request ended that brought nothing to keep.
Outcome = Literal["failed", "unknown", "withdrawn"]

#: At most this many operations share a transaction.
_GROUP = 256
#: Bytes reserved beside the store, freed when the disk is full so that answers in hand still fit.
BALLAST = 4 << 20
_OPEN = "outcome IN ('sent', 'unknown') OR (plugin = 'task' AND outcome = 'failed')"


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
    :raises JournalError: if it cannot be used: locked, damaged, too new, not a store.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        wait: float = 0.0,
        read_only: bool = False,
        claims: Claims | None = None,
    ) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self.claims = claims or Claims()
        self.claims.reopen()
        #: Why the store can no longer be written, or None.
        self.failed: JournalError | None = None
        self.session = 0
        self._lock: Lock | None = None
        self._next = {"requests": 1, "answers": 1, "quarantine": 1}
        self._at_open = 0
        #: Requests under way, as they are in the file.
        self._under_way: dict[int, dict[str, Any]] = {}
        self._earlier: dict[str, list[Earlier]] = {}
        #: The tokens of each call of requests for several calls.
        self._shares: dict[int | None, tuple[float, float]] = {}
        self._named: dict[tuple[int, str, str], Any] = {}
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._ended = False
        self._in_sqlite = fork_lock()
        opened: Future[None] = Future()
        name = f"feste-store-{self.path.name}"
        self._thread = threading.Thread(
            target=self._work, args=(wait, opened), name=name, daemon=True
        )
        self._thread.start()
        try:
            opened.result()
        except KeyboardInterrupt:  # while it waits for another process
            self._queue.put(None)
            raise

    # --- from any thread --------------------------------------------------------------------------

    def recall(self, calls: Sequence[Wanted], then: Then) -> None:
        """Look up the answers of calls; each answer that is returned is taken by its call.

        :param calls: the calls.
        :param then: receives True and a :class:`Found` for each call, or False and the error; it is
            called on the journal's thread.
        """
        self._put(lambda conn: [self._find(conn, call) for call in calls], then)

    def intend(
        self,
        request: Request,
        calls: Sequence[Request],
        then: Then,
        *,
        run: str = "",
        attempt: int = 1,
        prompts: bool = True,
    ) -> None:
        """Write that a request will be sent; it must not be sent before ``then`` is called.

        :param request: the request.
        :param calls: the request of each call that it answers, as it would be sent alone.
        :param then: receives True and the request's number, or False and the error.
        :param run: the name of the run.
        :param attempt: the number of the attempt, from 1.
        :param prompts: whether to keep what the calls ask, not only its hash.
        """
        row = {
            "session": self.session,
            "run": run,
            "plugin": request.plugin,
            "operation": request.operation,
            "endpoint": request.endpoint,
            "model": request.model,
            "attempt": attempt,
            "outcome": "sent",
            "billed": "unknown",
        }

        def write(conn: sqlite3.Connection) -> int:
            number = self._number("requests")
            mine = {**row, "id": number, "sent": time.time(), "calls": calls_as_json(calls)}
            schema.write(conn, "requests", mine)
            if prompts:
                self._keep_prompts(conn, calls)
            self._under_way[number] = mine
            return number

        self._put(write, then, spends=True)

    def record(
        self,
        answers: Sequence[Answer],
        then: Then,
        *,
        number: int | None = None,
        response: Response | None = None,
        prompts: bool = True,
    ) -> None:
        """Write the answers to calls; nothing may depend on them before ``then`` is called.

        :param answers: the answers.
        :param then: receives True and the positions of answers that are not JSON and so cannot be
            kept, or False and the error.
        :param number: the number of the request that they were bought with, or None.
        :param response: its response.
        :param prompts: whether to keep what the calls ask; those of ``number`` are kept already.
        """

        def write(conn: sqlite3.Connection) -> list[int]:
            unfit = []
            for position, answer in enumerate(answers):
                try:
                    text = encode(answer.response)
                except (TypeError, ValueError):
                    unfit.append(position)
                    continue
                row = {
                    "id": self._number("answers"),
                    "key": answer.request.key,
                    "draw": str(answer.request.draws[0]),
                    "request": number,
                    "source": answer.source,
                    "kept": time.time(),
                    "response": text,
                }
                schema.write(conn, "answers", row)
            if number is not None:
                self._end(conn, number, "answered", response)
            elif prompts:
                self._keep_prompts(conn, [answer.request for answer in answers])
            return unfit

        self._put(write, then)

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
        self._put(lambda conn: self._end(conn, number, outcome, response, error), then or _ignore)

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

        self._put(operation, then)
        return done.result()

    def close(self) -> None:
        """Write what is queued, fold the write-ahead log into the file, and release the lock.

        A run that still uses it fails.
        """
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_current(self) -> bool:
        """Whether it can be used, and the path still leads to the file that is open."""
        if self.failed is not None or self._ended or not self._thread.is_alive():
            return False
        try:
            return _identity(self.path) == self.file
        except OSError:
            return False

    def _put(self, operation: Operation, then: Then, *, spends: bool = False) -> None:
        self._queue.put(_Item(operation, then, spends))
        if self._ended or not self._thread.is_alive():  # closed, or in a forked child
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        with suppress(Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    told = f"{self.path} was closed while a run used it: run again"
                    item.then(False, JournalFailed(told))

    # --- the thread -------------------------------------------------------------------------------

    def _work(self, wait: float, opened: Future[None]) -> None:
        try:
            if not self.read_only:
                self._take(wait)
            with self._in_sqlite:
                conn = self._open_read_only() if self.read_only else self._open()
            self.file = _identity(self.path)
        except BaseException as error:
            if self._lock is not None:
                self._ballast.unlink(missing_ok=True)
                self._lock.close()
            opened.set_exception(_described(error, self.path))
            return
        opened.set_result(None)
        try:
            while self._turn(conn):
                pass
        finally:
            with self._in_sqlite:
                self._close(conn)
            self._ended = True
            self._refuse_rest()

    def _turn(self, conn: sqlite3.Connection) -> bool:
        """Carry out the operations that wait; return False when the journal is closed."""
        items = [self._queue.get()]
        try:
            while len(items) < _GROUP and items[-1] is not None:
                items.append(self._queue.get_nowait())
        except Empty:
            pass
        wanted = [item for item in items if item is not None]
        with self._in_sqlite:
            outcomes = self._outcomes(conn, wanted)
        with ExitStack() as stack:  # an error in one of them keeps none of the others waiting
            for item, (ok, value) in reversed(list(zip(wanted, outcomes, strict=True))):
                stack.callback(item.then, ok, value)
        return items[-1] is not None

    def _outcomes(self, conn: sqlite3.Connection, items: list[_Item]) -> list[tuple[bool, Any]]:
        if self.failed is None:
            try:
                return self._transaction(conn, items)
            except sqlite3.Error as error:
                self._fail(conn, error)
        return [self._alone(conn, item) for item in items]

    def _alone(self, conn: sqlite3.Connection, item: _Item) -> tuple[bool, Any]:
        """Carry out an operation of a store that failed: answers in hand are still tried."""
        if item.spends:
            return False, self.failed
        try:
            return self._transaction(conn, [item])[0]
        except sqlite3.Error as error:
            _rollback(conn)
            return False, _described(error, self.path)

    def _transaction(self, conn: sqlite3.Connection, items: list[_Item]) -> list[tuple[bool, Any]]:
        if not items:
            return []
        outcomes: list[tuple[bool, Any]] = []
        changes, numbers, under_way = conn.total_changes, self._next.copy(), self._under_way.copy()
        try:
            conn.execute("BEGIN")
            for item in items:
                conn.execute("SAVEPOINT item")
                try:
                    outcomes.append((True, item.operation(conn)))
                except sqlite3.Error:
                    raise
                except Exception as error:  # such as a request that is not JSON: only its call
                    conn.execute("ROLLBACK TO item")
                    outcomes.append((False, error))
                conn.execute("RELEASE item")
            changed = conn.total_changes != changes
            last = schema.last(conn) if changed else (0, 0)
            if changed:
                self._note(last, lower=True)
            conn.execute("COMMIT")
        except sqlite3.Error:
            # what was given and ended is not in the file
            self._next, self._under_way = numbers, under_way
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
            self.failed = _described(error, self.path)

    def _fail(self, conn: sqlite3.Connection, error: sqlite3.Error) -> None:
        """Refuse all further spending, and free the reserved space for the answers in hand."""
        _rollback(conn)
        self.failed = _described(error, self.path)
        if not self.read_only:
            self._ballast.unlink(missing_ok=True)

    def _number(self, table: str) -> int:
        number = self._next[table]
        self._next[table] += 1
        return number

    # --- opening and closing ----------------------------------------------------------------------

    @property
    def _ballast(self) -> Path:
        return self.path.with_name(self.path.name + ".reserve")

    def _take(self, wait: float) -> None:
        if not self.path.parent.exists():
            self.path.parent.mkdir(mode=0o700, parents=True)
        self._lock = Lock(self.path, wait)

    def _open(self) -> sqlite3.Connection:
        assert self._lock is not None, "taken before"
        _make_file(self.path)
        version = self._check(self._lock)
        if 0 < version < schema.VERSION:
            _back_up(self.path, beside(self.path, f".tables-{version}"))
        _reserve(self._ballast)
        conn = sqlite3.connect(self.path, isolation_level=None)
        try:
            configure(conn)
            conn.execute("PRAGMA journal_mode = WAL")  # where refused, a rollback journal serves
            conn.execute("PRAGMA synchronous = FULL")
            if version == 0:
                schema.create(conn)
            elif version < schema.VERSION:
                schema.migrate(conn, version)
            conn.execute("BEGIN")
            self._begin_session(conn)
            self._find_unknown(conn)
            self._note(schema.last(conn), lower=True)
            conn.execute("COMMIT")
        except BaseException:
            conn.close()
            raise
        return conn

    def _check(self, lock: Lock) -> int:
        """Check the file before anything in it may change; return the version of its tables.

        The connection only reads: closing a writing one would fold a damaged log into the file.
        """
        conn = connect(self.path, locked=True)
        try:
            version = schema.identify(conn, str(self.path))
            if version:
                (said,) = conn.execute("PRAGMA integrity_check(1)").fetchone()
                if said != "ok":
                    raise JournalDamaged(_damaged(self.path, said))
                for table in self._next:
                    (last,) = conn.execute(f"SELECT max(id) FROM {table}").fetchone()
                    self._next[table] = (last or 0) + 1
            self._at_open = self._next["answers"] - 1
            check_end(self.path, lock.acknowledged, schema.last(conn) if version else (0, 0))
        finally:
            conn.close()
        return version

    def _open_read_only(self) -> sqlite3.Connection:
        if not self.path.exists():
            raise JournalError(f"there is no {self.path}")
        conn = connect(self.path)
        try:
            version = schema.identify(conn, str(self.path))
            if version < schema.VERSION:
                raise JournalError(
                    f"{self.path} has {'older' if version else 'no'} tables: open it once for writing"
                )
            _, self._at_open = schema.last(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def _begin_session(self, conn: sqlite3.Connection) -> None:
        from feste import __version__

        (last,) = conn.execute("SELECT max(id) FROM sessions").fetchone()
        self.session = (last or 0) + 1
        self._mine = {
            "id": self.session,
            "began": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "program": Path(sys.argv[0]).name,
            "feste": __version__,
        }
        schema.write(conn, "sessions", self._mine)

    def _find_unknown(self, conn: sqlite3.Connection) -> None:
        """Note the requests that were under way when an earlier session died: no one else writes."""
        for values in conn.execute(f"SELECT * FROM requests WHERE {_OPEN}").fetchall():
            row = schema.row_of("requests", values)
            if not schema.is_good("requests", values):
                self._quarantine(conn, "requests", values)
                continue
            if row["outcome"] == "sent":
                row["outcome"] = "unknown"
                schema.write(conn, "requests", row)
            self._note_earlier(row)

    def _close(self, conn: sqlite3.Connection) -> None:
        with ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.close)
                stack.callback(self._ballast.unlink, missing_ok=True)
            stack.callback(conn.close)
            try:
                if not self.read_only:
                    schema.write(conn, "sessions", {**self._mine, "ended": time.time()})
                    conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error:  # the disk is full, say: everything acknowledged is in the log
                _rollback(conn)

    # --- operations -------------------------------------------------------------------------------

    def _find(self, conn: sqlite3.Connection, call: Wanted) -> Found:
        damaged = 0
        response = values = None
        while response is None and (values := self._candidate(conn, call)) is not None:
            if schema.is_good("answers", values):
                response = decode(values[6])
            else:
                damaged += 1
                self._quarantine(conn, "answers", values)
        earlier = self._claim_earlier(call)
        if response is None or values is None:
            return Found(earlier=earlier, damaged=damaged)
        return Found(
            response, "replayed", self._tokens(conn, response, values[3]), earlier, damaged
        )

    def _tokens(
        self, conn: sqlite3.Connection, response: Response, request: int | None
    ) -> tuple[float, float]:
        """Return the tokens that an answer cost: its own, or its share of a request for several."""
        if response.usage is not None:
            return response.usage.input, response.usage.output
        if request not in self._shares:
            values = _one(conn, "SELECT * FROM requests WHERE id = ?", request)
            good = values is not None and schema.is_good("requests", values)
            row = schema.row_of("requests", values) if good and values else {}
            count = max(1, len(json.loads(row.get("calls") or "[]")))
            read, made = row.get("input_tokens") or 0, row.get("output_tokens") or 0
            self._shares[request] = read / count, made / count
        return self._shares[request]

    def _candidate(self, conn: sqlite3.Connection, call: Wanted) -> tuple[Any, ...] | None:
        """Return the row that a call may take, or None; see :class:`Claims`."""
        by_id = "SELECT * FROM answers WHERE id = ? AND key = ?"  # a purge frees numbers
        claims, key, drawn = self.claims, call.key, call.draw
        given = claims.given(key, drawn)
        if given is not None and (row := _one(conn, by_id, given, key)) is not None:
            return row  # it is gone if it was damaged
        own = _one(conn, "SELECT * FROM answers WHERE key = ? AND draw = ?", key, str(drawn))
        if own is not None and (not call.sample or claims.take_own(own[0], drawn)):
            return own
        if not call.sample:
            return _one(conn, "SELECT * FROM answers WHERE key = ? ORDER BY id LIMIT 1", key)
        if not claims.knows(key):
            rows = "SELECT id, draw FROM answers WHERE key = ? AND id <= ? ORDER BY id DESC"
            claims.learn(key, conn.execute(rows, (key, self._at_open)).fetchall())
        taken = claims.take(key, drawn)
        return None if taken is None else _one(conn, by_id, taken, key)

    def _claim_earlier(self, call: Wanted) -> Earlier | None:
        """Return the request for a call whose answer is not known; each is named for one call."""
        known = self._earlier.get(call.key, ())
        mine = str(call.draw)
        for earlier in sorted(known, key=lambda e: e.draw != mine):
            if earlier.draw != mine and draw.is_collected(draw_of(earlier.draw)):
                continue
            name = (earlier.id, earlier.key, earlier.draw)
            if self._named.setdefault(name, call.draw) == call.draw:
                return earlier
        return None

    def _quarantine(self, conn: sqlite3.Connection, table: str, values: Sequence[Any]) -> None:
        """Move a damaged row out of the way, so that it is not used and can still be looked at."""
        if self.read_only:
            raise JournalDamaged(_damaged(self.path, f"a row of {table} is not as it was written"))
        row = {
            "id": self._number("quarantine"),
            "place": table,
            "row": ascii(list(values)),
            "found": time.time(),
        }
        schema.write(conn, "quarantine", row)
        conn.execute(f"DELETE FROM {table} WHERE id = ?", (values[0],))

    def _keep_prompts(self, conn: sqlite3.Connection, calls: Sequence[Request]) -> None:
        for call in calls:
            known = conn.execute("SELECT 1 FROM prompts WHERE key = ?", (call.key,)).fetchone()
            if known is None:
                schema.write(conn, "prompts", {"key": call.key, "request": call.text})

    def _end(
        self,
        conn: sqlite3.Connection,
        number: int,
        outcome: str,
        response: Response | None = None,
        error: FesteError | None = None,
    ) -> None:
        row = dict(self._under_way.get(number) or {})
        if not row:
            return  # recorded before: an answer that came after its request was given up
        usage = response.usage if response is not None else None
        row.update(
            ended=time.time(),
            outcome=outcome,
            billed="yes" if response is not None else getattr(error, "billed", "no"),
            request_id=response.request_id if response is not None else None,
            input_tokens=int(usage.input) if usage is not None else None,
            output_tokens=int(usage.output) if usage is not None else None,
        )
        if outcome != "answered":
            row["raw"] = _raw(response)
        if error is not None:
            row["error"] = f"{type(error).__name__}: {error.message}"
        if isinstance(error, CallError):
            row.update(status=error.status, request_id=row["request_id"] or error.request_id)
        schema.write(conn, "requests", row)
        if outcome == "unknown":
            self._under_way[number] = row  # its answer may come yet
        else:
            self._under_way.pop(number, None)
        if outcome == "unknown" or (outcome == "failed" and row["plugin"] == "task"):
            self._note_earlier(row)
        elif outcome == "answered":
            self._forget_earlier(row)

    def _forget_earlier(self, row: dict[str, Any]) -> None:
        """Drop what was noted of a request whose answer came after it was given up."""
        for key, _ in json.loads(row["calls"]):
            if key in self._earlier:
                self._earlier[key] = [e for e in self._earlier[key] if e.id != row["id"]]

    def _note_earlier(self, row: dict[str, Any]) -> None:
        for key, drawn in json.loads(row["calls"]):
            names = ("id", "plugin", "operation", "model", "sent", "outcome")
            earlier = Earlier(
                **{n: row[n] for n in names}, error=row.get("error") or "", key=key, draw=drawn
            )
            self._earlier.setdefault(key, []).append(earlier)


def _ignore(ok: bool, value: Any) -> None:
    """Receive the outcome of an operation that nothing waits for; a failure is in ``failed``."""


def _one(conn: sqlite3.Connection, query: str, *values: Any) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = conn.execute(query, values).fetchone()
    return row


def _raw(response: Response | None) -> str | None:
    try:
        return None if response is None else encode(response)
    except (TypeError, ValueError):
        return ascii(response.payload) if response is not None else None


def _rollback(conn: sqlite3.Connection) -> None:
    if conn.in_transaction:
        conn.execute("ROLLBACK")


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


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _damaged(path: Path, said: str) -> str:
    return (
        f"{path} is damaged ({said}). Nothing was sent or changed. `feste store salvage {path}` makes a "
        "new store of all that is good in it and keeps the damaged file"
    )


def _described(error: BaseException, path: Path) -> JournalError:
    """Return the Feste error for what stopped the journal."""
    if isinstance(error, JournalError):
        return error
    made: JournalError
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", "")
        if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB") or name.startswith("SQLITE_CORRUPT"):
            made = JournalDamaged(_damaged(path, str(error)))
        else:
            made = JournalFailed(
                f"{path} could not be written ({error}; {name}): nothing more is sent. Make room, then "
                "run the program again: it buys only what is missing"
            )
    elif isinstance(error, OSError):
        made = JournalFailed(f"{path} cannot be used: {error.strerror or error}; nothing was sent")
    else:
        made = JournalError(f"{path} cannot be used: {type(error).__name__}: {error}")
    made.__cause__ = error
    return made
