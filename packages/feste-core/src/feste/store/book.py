"""What a journal reads and writes: the rows of a store, and what this process knows of them.

All methods are called on the journal's thread, inside a transaction.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feste.backend import Request, Response
from feste.errors import CallError, FesteError
from feste.store import schema
from feste.store.claims import Claims
from feste.store.failures import damaged
from feste.store.rows import Answer, Found, Wanted, calls_as_json, decode, encode
from feste.store.unknown import UnknownRequests

__all__ = ["Book"]

_OPEN = "outcome IN ('sent', 'unknown') OR (plugin = 'task' AND outcome = 'failed')"


class Book:
    """The rows of an open store.

    :param conn: the connection to it.
    :param path: its file, for messages.
    :param claims: which draws of this process took which answers.
    :param read_only: whether nothing is written.
    """

    def __init__(
        self, conn: sqlite3.Connection, path: Path, claims: Claims, read_only: bool = False
    ) -> None:
        self.conn = conn
        self.path = path
        self.claims = claims
        self.read_only = read_only
        #: The number of the next row of each table.
        self.next: dict[str, int] = {}
        for table in ("sessions", "requests", "answers", "quarantine"):
            (last,) = conn.execute(f"SELECT max(id) FROM {table}").fetchone()
            self.next[table] = (last or 0) + 1
        self.at_open = self.next["answers"] - 1
        #: Requests under way, as they are in the file.
        self.under_way: dict[int, dict[str, Any]] = {}
        self.unknown = UnknownRequests()
        self._session: dict[str, Any] = {}
        #: The tokens of each call of requests for several calls.
        self._shares: dict[int | None, tuple[float, float]] = {}

    def number(self, table: str) -> int:
        """Return the number of a new row.

        :param table: its table.
        """
        number = self.next[table]
        self.next[table] += 1
        return number

    @property
    def session(self) -> int:
        """The number of this process's session; 0 before it begins."""
        return int(self._session.get("id", 0))

    # --- sessions ---------------------------------------------------------------------------------

    def begin_session(self) -> None:
        """Write that this process uses the store, and what is unknown of the sessions before."""
        from feste import __version__

        self._session = {
            "id": self.number("sessions"),
            "began": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "program": Path(sys.argv[0]).name,
            "feste": __version__,
        }
        schema.write(self.conn, "sessions", self._session)
        for values in self.conn.execute(f"SELECT * FROM requests WHERE {_OPEN}").fetchall():
            row = schema.row_of("requests", values)
            if not schema.is_good("requests", values):
                self._quarantine("requests", values)
                continue
            if row["outcome"] == "sent":  # it was under way when its process died
                row["outcome"] = "unknown"
                schema.write(self.conn, "requests", row)
            self.unknown.note(row)

    def end_session(self) -> None:
        """Write that this process has closed the store."""
        schema.write(self.conn, "sessions", {**self._session, "ended": time.time()})

    # --- requests and answers ---------------------------------------------------------------------

    def intend(
        self, request: Request, calls: Sequence[Request], run: str, attempt: int, prompts: bool
    ) -> int:
        """Write that a request will be sent; return its number.

        :param request: the request.
        :param calls: the request of each call that it answers, as it would be sent alone.
        :param run: the name of the run.
        :param attempt: the number of the attempt, from 1.
        :param prompts: whether to keep what the calls ask.
        """
        row: dict[str, Any] = {
            "id": self.number("requests"),
            "session": self.session,
            "run": run,
            "plugin": request.plugin,
            "operation": request.operation,
            "endpoint": request.endpoint,
            "model": request.model,
            "calls": calls_as_json(calls),
            "attempt": attempt,
            "sent": time.time(),
            "outcome": "sent",
            "billed": "unknown",
        }
        schema.write(self.conn, "requests", row)
        if prompts:
            self._keep_prompts(calls)
        self.under_way[row["id"]] = row
        return int(row["id"])

    def record(
        self,
        answers: Sequence[Answer],
        number: int | None,
        response: Response | None,
        prompts: bool,
    ) -> list[int]:
        """Write the answers to calls; return the positions of those that are not JSON.

        :param answers: the answers.
        :param number: the number of the request that they were bought with, or None.
        :param response: its response.
        :param prompts: whether to keep what the calls ask; those of ``number`` are kept already.
        """
        unfit = []
        for position, answer in enumerate(answers):
            try:
                text = encode(answer.response)
            except (TypeError, ValueError):
                unfit.append(position)
                continue
            row = {
                "id": self.number("answers"),
                "key": answer.request.key,
                "draw": str(answer.request.draws[0]),
                "request": number,
                "source": answer.source,
                "kept": time.time(),
                "response": text,
            }
            schema.write(self.conn, "answers", row)
        if number is not None:
            self.end(number, "answered", response)
        elif prompts:
            self._keep_prompts([answer.request for answer in answers])
        return unfit

    def find(self, call: Wanted) -> Found:
        """Look up the answer to a call; it is then taken by the call.

        :param call: the call.
        """
        damaged = 0
        response = values = None
        while response is None and (values := self._candidate(call)) is not None:
            if schema.is_good("answers", values):
                response = decode(values[6])
            else:
                damaged += 1
                self._quarantine("answers", values)
        earlier = self.unknown.claim(call)
        if response is None or values is None:
            return Found(earlier=earlier, damaged=damaged)
        return Found(response, "replayed", self._tokens(response, values[3]), earlier, damaged)

    def _tokens(self, response: Response, request: int | None) -> tuple[float, float]:
        """Return the tokens that an answer cost: its own, or its share of a request for several."""
        if response.usage is not None:
            return response.usage.input, response.usage.output
        if request not in self._shares:
            values = _one(self.conn, "SELECT * FROM requests WHERE id = ?", request)
            good = values is not None and schema.is_good("requests", values)
            row = schema.row_of("requests", values) if good and values else {}
            count = max(1, len(json.loads(row.get("calls") or "[]")))
            read, made = row.get("input_tokens") or 0, row.get("output_tokens") or 0
            self._shares[request] = read / count, made / count
        return self._shares[request]

    def _candidate(self, call: Wanted) -> tuple[Any, ...] | None:
        """Return the row that a call may take, or None; see :class:`Claims`."""
        by_id = "SELECT * FROM answers WHERE id = ? AND key = ?"  # a purge frees numbers
        claims, key, drawn = self.claims, call.key, call.draw
        given = claims.given(key, drawn)
        if given is not None and (row := _one(self.conn, by_id, given, key)) is not None:
            return row  # it is gone if it was damaged
        own = _one(self.conn, "SELECT * FROM answers WHERE key = ? AND draw = ?", key, str(drawn))
        if own is not None and (not call.sample or claims.take_own(own[0], drawn)):
            return own
        if not call.sample:
            return _one(self.conn, "SELECT * FROM answers WHERE key = ? ORDER BY id LIMIT 1", key)
        if not claims.knows(key):
            rows = "SELECT id, draw FROM answers WHERE key = ? AND id <= ? ORDER BY id DESC"
            claims.learn(key, self.conn.execute(rows, (key, self.at_open)).fetchall())
        taken = claims.take(key, drawn)
        return None if taken is None else _one(self.conn, by_id, taken, key)

    def _quarantine(self, table: str, values: Sequence[Any]) -> None:
        """Move a damaged row out of the way, so that it is not used and can still be looked at."""
        if self.read_only:
            raise damaged(self.path, f"a row of {table} is not as it was written")
        row = {
            "id": self.number("quarantine"),
            "place": table,
            "row": ascii(list(values)),
            "found": time.time(),
        }
        schema.write(self.conn, "quarantine", row)
        self.conn.execute(f"DELETE FROM {table} WHERE id = ?", (values[0],))

    def _keep_prompts(self, calls: Sequence[Request]) -> None:
        for call in calls:
            known = self.conn.execute("SELECT 1 FROM prompts WHERE key = ?", (call.key,)).fetchone()
            if known is None:
                schema.write(self.conn, "prompts", {"key": call.key, "request": call.text})

    def end(
        self,
        number: int,
        outcome: str,
        response: Response | None = None,
        error: FesteError | None = None,
    ) -> None:
        """Write that a request has ended.

        :param number: its number.
        :param outcome: how.
        :param response: the response, or None.
        :param error: why it brought nothing to keep, or None.
        """
        row = dict(self.under_way.get(number) or {})
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
        schema.write(self.conn, "requests", row)
        if outcome == "unknown":
            self.under_way[number] = row  # its answer may come yet
        else:
            self.under_way.pop(number, None)
        if outcome == "unknown" or (outcome == "failed" and row["plugin"] == "task"):
            self.unknown.note(row)
        elif outcome == "answered":
            self.unknown.forget(row)


def _one(conn: sqlite3.Connection, query: str, *values: Any) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = conn.execute(query, values).fetchone()
    return row


def _raw(response: Response | None) -> str | None:
    try:
        return None if response is None else encode(response)
    except (TypeError, ValueError):
        return ascii(response.payload) if response is not None else None
