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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from feste.backend import Request, Response, Secret
from feste.errors import CallError, FesteError
from feste.store import schema
from feste.store.claims import Claims
from feste.store.lookup import ANY, OWN, Lookup, one, response_in
from feste.store.rows import Answer, Found, Wanted, calls_as_json, encode
from feste.store.unknown import UnknownRequests, earlier_of

__all__ = ["Book"]

_OPEN = "outcome IN ('sent', 'unknown') OR (plugin = 'task' AND outcome = 'failed')"

#: Characters that a key has at least; what is shorter may be a word of an answer, which must stay.
_KEY = 16


class Book:
    """The rows of an open store.

    :param conn: the connection to it.
    :param claims: which draws of this process took which answers.
    :param read_only: whether nothing is written.
    """

    def __init__(self, conn: sqlite3.Connection, claims: Claims, read_only: bool = False) -> None:
        self.claims = claims
        self.read_only = read_only
        #: The number of the next row of each table.
        self.next: dict[str, int] = {}
        for table in ("sessions", "requests", "answers", "quarantine"):
            (last,) = conn.execute(f"SELECT max(id) FROM {table}").fetchone()
            self.next[table] = (last or 0) + 1
        self.lookup = Lookup(conn, claims, None if read_only else self.next["answers"] - 1)
        #: Requests under way, as they are in the file; and those given up, which may be answered yet.
        self.under_way: dict[int, dict[str, Any]] = {}
        self._given_up: dict[int, dict[str, Any]] = {}
        self.unknown = UnknownRequests()
        self._session: dict[str, Any] = {}

    @property
    def conn(self) -> sqlite3.Connection:
        """The connection to the store."""
        return self.lookup.conn

    @conn.setter
    def conn(self, conn: sqlite3.Connection) -> None:
        self.lookup.conn = conn

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
                if not _names_calls(row["calls"]):
                    continue
                row = {"id": row["id"], "calls": row["calls"], "error": "its row was damaged"}
                row.update(plugin="", operation="", model="", sent=0.0, outcome="sent")
            if row["outcome"] == "sent":  # it was under way when its process died
                row["outcome"] = "unknown"
                schema.write(self.conn, "requests", row)
            self.unknown.note(row)

    def end_session(self) -> None:
        """Write that this process has closed the store."""
        schema.write(self.conn, "sessions", {**self._session, "ended": time.time()})

    # --- requests and answers ---------------------------------------------------------------------

    def intend(
        self,
        request: Request,
        calls: Sequence[Request],
        run: str,
        attempt: int,
        prompts: bool,
        secrets: tuple[Secret, ...] = (),
    ) -> int:
        """Write that a request will be sent; return its number.

        :param request: the request.
        :param calls: the request of each call that it answers, as it would be sent alone.
        :param run: the name of the run.
        :param attempt: the number of the attempt, from 1.
        :param prompts: whether to keep what the calls ask.
        :param secrets: keys that are blanked in a response that cannot be used.
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
            # no columns
            "prompts": prompts,
            "secrets": secrets,
        }
        schema.write(self.conn, "requests", row, new=True)
        if prompts:
            self._keep_prompts(calls)
        self.under_way[row["id"]] = row
        return int(row["id"])

    def begin(self, request: Request, run: str, prompts: bool) -> Found | int:
        """Look up a call that must not be made twice; if nothing is known of it, intend it.

        :param request: its request.
        :param run: the name of the run.
        :param prompts: whether to keep what it asks.
        :returns: what is known of it, or the number of the new request.
        """
        found = self.find(Wanted(request.key, request.draws[0], True))
        if found.response is not None or found.earlier is not None:
            return found
        calls = calls_as_json([request])
        for row in self.under_way.values():
            if row["calls"] == calls:
                return Found(earlier=earlier_of(row, request.key, str(request.draws[0])))
        for row in self._without_result(calls):
            row.update(outcome="unknown", error="its result is lost, or was damaged")
            schema.write(self.conn, "requests", row)
            self.unknown.note(row)
            return Found(earlier=earlier_of(row, request.key, str(request.draws[0])))
        return self.intend(request, [request], run, 1, prompts)

    def _without_result(self, calls: str) -> Iterator[dict[str, Any]]:
        """Yield the requests for a call that were answered, and whose answers are gone."""
        query = "SELECT * FROM requests WHERE plugin = 'task' AND calls = ?"
        kept = "SELECT 1 FROM answers WHERE request = ?"
        for values in self.conn.execute(query, (calls,)).fetchall():
            row = schema.row_of("requests", values)
            if row["outcome"] == "answered" and one(self.conn, kept, row["id"]) is None:
                yield row

    def record(
        self,
        answers: Sequence[Answer],
        number: int | None,
        response: Response | None,
        prompts: bool,
        replace: bool = False,
    ) -> list[int]:
        """Write the answers to calls; return the positions of those that are not JSON.

        :param answers: the answers.
        :param number: the number of the request that they were bought with, or None.
        :param response: its response.
        :param prompts: whether to keep what the calls ask; those of ``number`` are kept already.
        :param replace: whether they take the place of answers that the calls have already.
        """
        unfit = []
        spare = False
        for position, answer in enumerate(answers):
            try:
                text = encode(answer.response)
            except (TypeError, ValueError, RecursionError):
                unfit.append(position)
                continue
            for secret in answer.secrets:
                text = secret.blank(text, _KEY)
            spare = not self._record(answer, text, number, replace) or spare
        if number is not None:
            self.end(number, "answered", response, spare=spare)
        elif prompts:
            self._keep_prompts([answer.request for answer in answers])
        return unfit

    def _record(self, answer: Answer, text: str, number: int | None, replace: bool) -> bool:
        """Write an answer; return False if its call has one already."""
        key, drawn = answer.key, str(answer.draw)
        row: dict[str, Any] = {
            "id": self.number("answers"),
            "key": key,
            "draw": drawn,
            "request": number,
            "source": answer.source,
            "kept": time.time(),
            "response": text,
        }
        try:
            schema.write(self.conn, "answers", row, new=not replace)
        except sqlite3.IntegrityError:
            if one(self.conn, OWN, key, drawn) is None:
                raise  # its number is taken, so another process writes the file
            return False
        self.claims.note(row["id"], answer.draw)
        return True

    def find(self, call: Wanted) -> Found:
        """Look up the answer to a call; it is then taken by the call.

        :param call: the call.
        """
        damaged = 0
        response = values = None
        while response is None and (values := self.lookup.candidate(call)) is not None:
            response = response_in(values)
            if response is None:
                damaged += 1
                if self.read_only:
                    break
                self._quarantine("answers", values)
        earlier = self.unknown.claim(call, answered=response is not None)
        if response is None or values is None:
            equal = call.sample and one(self.conn, ANY, call.key) is not None
            return Found(earlier=earlier, damaged=damaged, equal=equal)
        if call.sample:
            self.lookup.hand_over(values, call)
        tokens = self.lookup.tokens(response, values[3])
        return Found(response, "replayed", tokens, earlier, damaged)

    def _quarantine(self, table: str, values: Sequence[Any]) -> None:
        """Move a damaged row out of the way, so that it is not used and can still be looked at."""
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
        *,
        spare: bool = False,
    ) -> None:
        """Write that a request has ended.

        :param number: its number.
        :param outcome: how.
        :param response: the response, or None.
        :param error: why it brought nothing to keep, or None.
        :param spare: whether to keep the response itself, since not all of its answers were kept.
        """
        known = self.under_way.pop(number, None) or self._given_up.pop(number, None)
        if known is None:
            return  # recorded before: an answer that came after its request was given up
        row = dict(known)
        usage = response.usage if response is not None else None
        row.update(
            ended=time.time(),
            outcome=outcome,
            billed="yes" if response is not None else getattr(error, "billed", "no"),
            request_id=response.request_id if response is not None else None,
            input_tokens=int(usage.input) if usage is not None else None,
            output_tokens=int(usage.output) if usage is not None else None,
        )
        if outcome != "answered" or spare:
            row["raw"] = _raw(response, row.get("secrets", ()))
        if error is not None:  # a provider's text may quote the prompt
            told = f": {error.message}" if row.get("prompts", True) else ""
            row["error"] = f"{type(error).__name__}{told}"
        if isinstance(error, CallError):
            row.update(status=error.status, request_id=row["request_id"] or error.request_id)
        schema.write(self.conn, "requests", row)
        if outcome == "unknown":
            self._given_up[number] = row
        if outcome == "unknown" or (outcome == "failed" and row["plugin"] == "task"):
            self.unknown.note(row)
        elif outcome == "answered":
            self.unknown.forget(row)


def _names_calls(text: Any) -> bool:
    """Whether a text is a list of keys and draws, as a request has it."""
    try:
        return all(len(key) == 64 and "/" in drawn for key, drawn in json.loads(text))
    except (TypeError, ValueError):
        return False


def _raw(response: Response | None, secrets: Sequence[Secret]) -> str | None:
    if response is None:
        return None
    try:
        text = encode(response)
    except (TypeError, ValueError, RecursionError):
        text = ascii(response.payload)
    for secret in secrets:
        text = secret.blank(text, _KEY)
    return text
