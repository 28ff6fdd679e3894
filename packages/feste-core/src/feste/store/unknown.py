"""Requests whose answers are not known: what may have been paid for, and lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from feste import draw
from feste.draw import Draw
from feste.store.rows import Earlier, Wanted, draw_of

__all__ = ["UnknownRequests"]


class UnknownRequests:
    """The requests of a store that have no known answer, by the calls that they were sent for.

    Tasks with ``once=True`` that raised are among them: these must not run again either.
    """

    def __init__(self) -> None:
        self._by_key: dict[str, list[Earlier]] = {}
        self._claimed: dict[tuple[int, str, str], Draw] = {}

    def note(self, row: Mapping[str, Any]) -> None:
        """Add a request.

        :param row: its row.
        """
        names = ("id", "plugin", "operation", "model", "sent", "outcome")
        parts = {**{name: row[name] for name in names}, "error": row.get("error") or ""}
        for key, drawn in json.loads(row["calls"]):
            self._by_key.setdefault(key, []).append(Earlier(**parts, key=key, draw=drawn))

    def forget(self, row: Mapping[str, Any]) -> None:
        """Drop a request whose answer came after it was given up.

        :param row: its row.
        """
        for key, _ in json.loads(row["calls"]):
            if key in self._by_key:
                self._by_key[key] = [e for e in self._by_key[key] if e.id != row["id"]]

    def claim(self, call: Wanted) -> Earlier | None:
        """Return the request that was sent for a call, or None; each is given to one call only.

        Without one of its own draw, a call is given one whose draw no node of this process has.

        :param call: the call.
        """
        mine = str(call.draw)
        for earlier in sorted(self._by_key.get(call.key, ()), key=lambda e: e.draw != mine):
            if earlier.draw != mine and draw.is_collected(draw_of(earlier.draw)):
                continue
            name = (earlier.id, earlier.key, earlier.draw)
            if self._claimed.setdefault(name, call.draw) == call.draw:
                return earlier
        return None
