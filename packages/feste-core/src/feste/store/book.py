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
from feste.store.rows import Answer, Found, Wanted, calls_as_json, decode, encode
from feste.store.unknown import UnknownRequests, earlier_of

__all__ = ["Book"]

_OWN = "SELECT * FROM answers WHERE key = ? AND draw = ?"
_OPEN = "outcome IN ('sent', 'unknown') OR (plugin = 'task' AND outcome = 'failed')"

#: Characters that a key has at least; what is shorter may be a word of an answer, which must stay.
_KEY = 16


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
        #: The last answer that may be free: later ones are of draws of this process.
        self.at_open = (1 << 62) if read_only else self.next["answers"] - 1
        #: Requests under way, as they are in the file; and those given up, which may be answered yet.
        self.under_way: dict[int, dict[str, Any]] = {}
        self._given_up: dict[int, dict[str, Any]] = {}
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
            if row["calls"] == calls and row["outcome"] == "sent":
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
            if row["outcome"] == "answered" and _one(self.conn, kept, row["id"]) is None:
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
        row = {
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
            has = "SELECT 1 FROM answers WHERE key = ? AND draw = ?"
            if _one(self.conn, has, key, drawn) is None:
                raise  # its number is taken, so another process writes the file
            return False
        self.claims.note(int(row["id"]), answer.draw)  # type: ignore[call-overload]
        return True

    def find(self, call: Wanted) -> Found:
        """Look up the answer to a call; it is then taken by the call.

        :param call: the call.
        """
        damaged = 0
        response = values = None
        while response is None and (values := self._candidate(call)) is not None:
            response = _response(values)
            if response is None:
                damaged += 1
                if self.read_only:
                    break
                self._quarantine("answers", values)
        earlier = self.unknown.claim(call, answered=response is not None)
        if response is None or values is None:
            taken = "SELECT 1 FROM answers WHERE key = ? LIMIT 1"
            equal = call.sample and _one(self.conn, taken, call.key) is not None
            return Found(earlier=earlier, damaged=damaged, equal=equal)
        if call.sample:
            self._hand_over(values, call)
        return Found(response, "replayed", self._tokens(response, values[3]), earlier, damaged)

    def claim_twins(self, known: Sequence[tuple[Wanted, Response]]) -> None:
        """Take the answers that calls have from elsewhere, so that they serve no other call.

        :param known: the calls and their answers.
        """
        twins = "SELECT * FROM answers WHERE key = ? AND response = ? ORDER BY id"
        for call, response in known:
            text = encode(response)
            own = _one(self.conn, _OWN, call.key, str(call.draw))
            has_own = own is not None and own[6] == text
            rows = [own] if has_own else self.conn.execute(twins, (call.key, text)).fetchall()
            for row in rows:
                if row is not None and self.claims.give(row[0], call.key, call.draw):
                    if own is None and schema.is_good("answers", row):
                        self._hand_over(row, call)
                    break

    def _hand_over(self, values: Sequence[Any], call: Wanted) -> None:
        """Write that an answer is a draw's now, so that the next run of its program finds it too."""
        if values[2] != str(call.draw) and not self.read_only:
            row = {**schema.row_of("answers", values), "draw": str(call.draw)}
            schema.write(self.conn, "answers", row)

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
        own = _one(self.conn, _OWN, key, str(drawn))
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


def _one(conn: sqlite3.Connection, query: str, *values: Any) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = conn.execute(query, values).fetchone()
    return row


def _response(values: Sequence[Any]) -> Response | None:
    """Return the response in a row of answers; None if the row is not as Feste wrote it."""
    try:
        return decode(values[6]) if schema.is_good("answers", values) else None
    except (TypeError, ValueError, RecursionError):
        return None


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
