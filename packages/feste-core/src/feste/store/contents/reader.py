"""Look into a store without changing it, also while another process writes it.

Rows whose seal is wrong are left out and named in :attr:`Reader.damaged`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from feste.errors import JournalError
from feste.store import schema
from feste.store.connection import connect, has_log
from feste.store.failures import damaged, is_damage
from feste.store.forms import fits
from feste.store.opening import refuse_foreign

__all__ = ["Kept", "Reader", "Row"]

Row = dict[str, Any]
#: Answers that are read at once. Between two reads the writer can shorten its write-ahead log.
_AT_ONCE = 100


class Kept(NamedTuple):
    """An answer with what belongs to it.

    :param answer: the row of the answer.
    :param asked: ``[plugin, operation, endpoint, parser, body]``, or None if prompts are not kept.
    :param request: the row of the request that bought it, or None.
    """

    answer: Row
    asked: list[Any] | None
    request: Row | None


class Reader:
    """A store, open for reading.

    SQLite leaves empty ``-wal`` and ``-shm`` files beside it, which the next writer removes.

    :param path: the file.
    :raises JournalError: if there is no such store.
    :raises JournalDamaged: if it is not a store, or unreadable.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        #: The damaged rows that were met, as table and id.
        self.damaged: set[tuple[str, Any]] = set()
        if not self.path.is_file():
            there = "is not a file" if self.path.exists() else "does not exist"
            raise JournalError(f"there is no store: {self.path} {there}")
        with self.explained():
            self.conn = self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.conn.close()

    def _connect(self) -> sqlite3.Connection:
        try:
            return self._identified(shared=True)
        except sqlite3.OperationalError:
            if has_log(self.path):
                raise
            return self._identified(shared=False)  # the folder is read-only, for example

    def _identified(self, *, shared: bool) -> sqlite3.Connection:
        conn = connect(self.path, shared=shared)
        try:
            version = schema.identify(conn, str(self.path))
            if version == 0:
                raise JournalError(f"{self.path} is empty: nothing has been stored in it yet")
            if version < schema.VERSION:
                raise JournalError(f"{self.path} has older tables: open it once for writing")
        except BaseException:
            conn.close()
            raise
        return conn

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn errors of SQLite into Feste's inside a ``with`` block."""
        try:
            yield
        except sqlite3.Error as error:
            refuse_foreign(self.path)
            if is_damage(error):
                raise damaged(self.path, str(error)) from error
            raise JournalError(f"{self.path} cannot be read: {error}") from error

    def good(self, table: str, query: str, *values: Any) -> Iterator[Row]:
        """Yield the good rows of a query, and note the damaged ones.

        :param table: the table.
        :param query: SQL that selects all its columns.
        :param values: its parameters.
        """
        with self.explained():
            for found in self.conn.execute(query, values):
                if _is_good(table, found):
                    yield schema.row_of(table, found)
                else:
                    self.damaged.add((table, found[0]))

    def one(self, table: str, query: str, *values: Any) -> Row | None:
        """Return the first good row of a query, or None; the parameters are those of :meth:`good`."""
        return next(iter(list(self.good(table, query, *values))), None)

    def count(self, table: Literal["answers", "prompts"]) -> int:
        """Return the number of rows of a table, whether they are good or not.

        :param table: the table.
        """
        with self.explained():
            (number,) = self.conn.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(number)

    def quarantine(self) -> list[Row]:
        """Return the rows that were moved out of the way because they were damaged."""
        return list(self.good("quarantine", "SELECT * FROM quarantine ORDER BY id"))

    def check_session(self, session: int) -> None:
        """Raise if there is no such session.

        :param session: its number.
        :raises JournalError: if it is not there.
        """
        if self.one("sessions", "SELECT * FROM sessions WHERE id = ?", session) is None:
            said = f"{self.path} has no session {session}: `feste store list` shows those it has"
            raise JournalError(said)

    def answers(self, session: int | None = None) -> Iterator[Kept]:
        """Yield the answers that are there now, oldest first, in constant memory.

        :param session: the number of the session that bought them, or None for all.
        :raises JournalError: if there is no such session, or the store cannot be read.
        """
        if session is not None:
            self.check_session(session)
        with self.explained():
            (last,) = self.conn.execute("SELECT max(id) FROM answers").fetchone()
        bought = ""
        more: tuple[int, ...] = ()
        if session is not None:
            bought, more = "AND request IN (SELECT id FROM requests WHERE session = ?)", (session,)
        query = (
            f"SELECT * FROM answers WHERE id > ? AND id <= ? {bought} ORDER BY id LIMIT {_AT_ONCE}"
        )
        request: Row | None = None
        after = 0
        while True:
            with self.explained():
                found = self.conn.execute(query, (after, last or 0, *more)).fetchall()
            if not found:
                return
            for values in found:
                after = values[0]
                if not _is_good("answers", values):
                    self.damaged.add(("answers", after))
                    continue
                answer = schema.row_of("answers", values)
                if request is None or request["id"] != answer["request"]:  # a list has many answers
                    by_id = "SELECT * FROM requests WHERE id = ?"
                    request = self.one("requests", by_id, answer["request"])
                yield Kept(answer, self.asked(answer["key"]), request)

    def asked(self, key: str) -> list[Any] | None:
        """Return what a call asks, as in :class:`Kept`.

        :param key: its key.
        """
        prompt = self.one("prompts", "SELECT * FROM prompts WHERE key = ?", key)
        return None if prompt is None else list(json.loads(prompt["request"]))


def _is_good(table: str, values: Sequence[Any]) -> bool:
    return schema.is_good(table, values) and fits(table, schema.row_of(table, values))
