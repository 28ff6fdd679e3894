"""Find the stored answer that a call takes, and give it to the call."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from feste.backend import Response
from feste.store import schema
from feste.store.claims import Claims
from feste.store.rows import Wanted, decode, encode

__all__ = ["ANY", "OWN", "Lookup", "one", "response_in"]

#: The answer that was bought for a draw, or given to it; and any answer to the same request.
OWN = "SELECT * FROM answers WHERE key = ? AND draw = ?"
ANY = "SELECT * FROM answers WHERE key = ? ORDER BY id LIMIT 1"
#: Above the number of every answer.
_ALL = 1 << 62


class Lookup:
    """The answers of a store, as calls look for them.

    :param conn: the connection to it.
    :param claims: which draws of this process took which answers.
    :param last: the last answer that may be free, since later ones are of draws of this process; None
        for a store that is only read.
    """

    def __init__(self, conn: sqlite3.Connection, claims: Claims, last: int | None) -> None:
        self.conn = conn
        self.claims = claims
        self.last = last
        #: The tokens of each call of requests for several calls.
        self._shares: dict[int | None, tuple[float, float]] = {}

    def claim_twins(self, known: Sequence[tuple[Wanted, Response]]) -> None:
        """Take the answers that calls have from elsewhere, so that they serve no other call.

        :param known: the calls and their answers.
        """
        twins = "SELECT * FROM answers WHERE key = ? AND response = ? ORDER BY id"
        for call, response in known:
            text = encode(response)
            own = one(self.conn, OWN, call.key, str(call.draw))
            has_own = own is not None and own[6] == text
            rows = [own] if has_own else self.conn.execute(twins, (call.key, text)).fetchall()
            for row in rows:
                if row is not None and self.claims.give(row[0], call.key, call.draw):
                    if own is None and schema.is_good("answers", row):
                        self.hand_over(row, call)
                    break

    def hand_over(self, values: Sequence[Any], call: Wanted) -> None:
        """Write that an answer is a draw's now, so that the next run of its program finds it too.

        :param values: its row.
        :param call: the call of the draw.
        """
        if values[2] != str(call.draw) and self.last is not None:
            row = {**schema.row_of("answers", values), "draw": str(call.draw)}
            schema.write(self.conn, "answers", row)

    def tokens(self, response: Response, request: int | None) -> tuple[float, float]:
        """Return the tokens that an answer cost: its own, or its share of a request for several.

        :param response: the answer.
        :param request: the number of its request, or None.
        """
        if response.usage is not None:
            return response.usage.input, response.usage.output
        if request not in self._shares:
            values = one(self.conn, "SELECT * FROM requests WHERE id = ?", request)
            good = values is not None and schema.is_good("requests", values)
            row = schema.row_of("requests", values) if good and values else {}
            count = max(1, len(json.loads(row.get("calls") or "[]")))
            read, made = row.get("input_tokens") or 0, row.get("output_tokens") or 0
            self._shares[request] = read / count, made / count
        return self._shares[request]

    def candidate(self, call: Wanted) -> tuple[Any, ...] | None:
        """Return the row that a call may take, or None; see :class:`Claims`.

        :param call: the call.
        """
        by_id = "SELECT * FROM answers WHERE id = ? AND key = ?"  # a purge frees numbers
        claims, key, drawn = self.claims, call.key, call.draw
        given = claims.given(key, drawn)
        if given is not None and (row := one(self.conn, by_id, given, key)) is not None:
            return row  # it is gone if it was damaged
        own = one(self.conn, OWN, key, str(drawn))
        if own is not None and (not call.sample or claims.take_own(own[0], drawn)):
            return own
        if call.own:
            return None
        if not call.sample:
            return one(self.conn, ANY, key)
        if not claims.knows(key):
            rows = "SELECT id, draw FROM answers WHERE key = ? AND id <= ? ORDER BY id DESC"
            last = _ALL if self.last is None else self.last
            claims.learn(key, self.conn.execute(rows, (key, last)).fetchall())
        taken = claims.take(key, drawn)
        return None if taken is None else one(self.conn, by_id, taken, key)


def one(conn: sqlite3.Connection, query: str, *values: Any) -> tuple[Any, ...] | None:
    """Return the first row of a query, or None.

    :param conn: the connection.
    :param query: the query.
    :param values: its parameters.
    """
    row: tuple[Any, ...] | None = conn.execute(query, values).fetchone()
    return row


def response_in(values: Sequence[Any]) -> Response | None:
    """Return the response in a row of answers; None if the row is not as Feste wrote it.

    :param values: the row.
    """
    try:
        return decode(values[6]) if schema.is_good("answers", values) else None
    except (TypeError, ValueError, RecursionError):
        return None
