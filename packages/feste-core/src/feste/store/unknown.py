"""Requests whose answers are not known: what may have been paid for, and lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from feste import draw
from feste.store.rows import Earlier, Wanted, draw_of

__all__ = ["UnknownRequests", "earlier_of"]


def earlier_of(row: Mapping[str, Any], key: str, drawn: str) -> Earlier:
    """Return what is told of a request that was sent for a call.

    :param row: the request's row.
    :param key: the call's key.
    :param drawn: the call's draw, as text.
    """
    names = ("id", "plugin", "operation", "model", "sent", "outcome")
    parts = {name: row[name] for name in names}
    return Earlier(**parts, error=row.get("error") or "", key=key, draw=drawn)


class UnknownRequests:
    """The requests of a store that have no known answer, by the calls that they were sent for.

    Tasks with ``once=True`` that raised are among them: these must not run again either.
    """

    def __init__(self) -> None:
        self._of_call: dict[tuple[str, str], Earlier] = {}
        self._claimed: set[tuple[int, str, str]] = set()
        #: For each key the requests that a call of another draw may still be given.
        self._free: dict[str, list[Earlier]] = {}

    def note(self, row: Mapping[str, Any]) -> None:
        """Add a request.

        :param row: its row.
        """
        for key, drawn in json.loads(row["calls"]):
            earlier = earlier_of(row, key, drawn)
            self._of_call[key, drawn] = earlier
            self._free.setdefault(key, []).append(earlier)

    def forget(self, row: Mapping[str, Any]) -> None:
        """Drop a request whose answer came after it was given up.

        :param row: its row.
        """
        for key, drawn in json.loads(row["calls"]):
            earlier = self._of_call.get((key, drawn))
            if earlier is not None and earlier.id == row["id"]:
                del self._of_call[key, drawn]

    def claim(self, call: Wanted, *, answered: bool) -> Earlier | None:
        """Return the request that was sent for a call, or None; each is given to one call only.

        Without one of its own draw, a call that has no answer either is given one whose draw no
        node of this process has.

        :param call: the call.
        :param answered: whether the call has an answer.
        """
        mine = (call.key, str(call.draw))
        own = self._of_call.get(mine)
        if own is not None:
            self._claimed.add((own.id, *mine))
        if own is not None or answered:
            return own
        free = self._free.get(call.key, [])
        while free:
            earlier = free.pop()
            its = (earlier.key, earlier.draw)
            known = self._of_call.get(its) is earlier and (earlier.id, *its) not in self._claimed
            if known and not draw.is_collected(draw_of(earlier.draw)):
                del self._of_call[its]
                self._of_call[mine] = earlier
                return earlier
        return None
