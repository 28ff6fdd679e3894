"""Whether a row has the form that Feste gives to rows of its table.

A seal tells that a row was damaged, not who made it: a store from elsewhere may hold rows whose
seals are right, and whose values nothing here could show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from feste.store.rows import decode

__all__ = ["fits"]

#: The last second of the year 9999; beyond, there are no dates.
_LAST = 253_402_300_799.0
#: The highest number that a system can be asked for a process.
_LAST_PID = 2**31 - 1


def fits(table: str, row: Mapping[str, Any]) -> bool:
    """Return whether a row can be shown, exported and salvaged.

    :param table: its table.
    :param row: its columns by name.

    >>> fits("quarantine", {"id": 1, "place": "answers", "row": "[]", "found": float("inf")})
    False
    """
    try:
        return all(check(row[column]) for column, check in _CHECKS[table].items())
    except (ValueError, TypeError, KeyError, RecursionError):  # of a text that is not its JSON
        return False


def _time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LAST


def _end(value: Any) -> bool:
    return value is None or _time(value)


def _pid(value: Any) -> bool:
    return _whole(value) and 0 < value <= _LAST_PID


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return value is None or _whole(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _words(value: Any) -> bool:
    return value is None or _text(value)


def _request(value: Any) -> bool:
    parts = json.loads(value)
    return isinstance(parts, list) and len(parts) == 5 and all(map(_text, parts[:3]))


def _calls(value: Any) -> bool:
    calls = json.loads(value)
    return isinstance(calls, list) and all(
        isinstance(call, list) and len(call) == 2 and all(map(_text, call)) for call in calls
    )


def _response(value: Any) -> bool:
    return decode(value) is not None


_CHECKS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "sessions": {
            "id": _whole,
            "began": _time,
            "ended": _end,
            "pid": _pid,
            "host": _words,
            "program": _text,
            "feste": _words,
        },
        "prompts": {"key": _text, "request": _request},
        "requests": {
            "id": _whole,
            "session": _number,
            "run": _words,
            "plugin": _text,
            "operation": _text,
            "endpoint": _words,
            "model": _text,
            "calls": _calls,
            "attempt": _number,
            "sent": _time,
            "ended": _end,
            "outcome": _text,
            "billed": _words,
            "error": _words,
            "request_id": _words,
            "raw": _words,
            "input_tokens": _number,
            "output_tokens": _number,
        },
        "answers": {
            "id": _whole,
            "key": _text,
            "draw": _text,
            "request": _number,
            "source": _words,
            "kept": _time,
            "response": _response,
        },
        "quarantine": {"id": _whole, "place": _text, "row": _words, "found": _time},
    }
)
