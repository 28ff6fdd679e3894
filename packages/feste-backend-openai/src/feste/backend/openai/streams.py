"""Assemble the pieces of a streamed answer into the JSON of an unstreamed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from feste.errors import ConnectionLost, MalformedResponse

__all__ = ["Whole"]

#: Text fields that arrive complete; all others arrive in pieces.
_WHOLE: Final = frozenset({"id", "type", "role", "name", "finish_reason"})
#: The choices of an answer, and the tool calls of a choice, that are read; 128 may be asked for.
_MOST: Final = 10_000


class Whole:
    """An answer of ``chat`` or ``complete``, assembled event by event.

    >>> whole = Whole()
    >>> [whole.add({"choices": [{"index": 0, "delta": {"content": t}}]}) for t in ("Hel", "lo")]
    ['Hel', 'lo']
    >>> _ = whole.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    >>> whole.payload()["choices"][0]["message"]
    {'content': 'Hello'}
    """

    def __init__(self) -> None:
        self._base: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, event: Any) -> str:
        """Add one event and return its piece of text; of several choices, the first one's.

        :param event: the event's JSON.
        """
        if not isinstance(event, dict):
            return ""
        self._base.update({k: v for k, v in event.items() if k != "choices" and v is not None})
        text = ""
        for choice in event.get("choices") or ():
            index = choice.get("index") or 0
            piece = {"message" if k == "delta" else k: v for k, v in choice.items()}
            _grow(_numbered(self._choices, index, {"index": index}), piece)
            said = (choice.get("delta") or choice).get("content") or choice.get("text")
            text += said if index == 0 and isinstance(said, str) else ""
        return text

    def payload(self) -> dict[str, Any]:
        """Return the assembled answer.

        :raises ConnectionLost: if the stream ended before the answer did.
        :raises MalformedResponse: if the stream contained no answer.
        """
        if not self._choices:
            raise MalformedResponse("the server answered with a stream in which there is no answer")
        choices = [self._choices[i] for i in sorted(self._choices)]
        if any(choice.get("finish_reason") is None for choice in choices):
            raise ConnectionLost("the stream ended before the answer did")
        for choice in choices:
            message = choice.get("message", {})
            if isinstance(message.get("tool_calls"), dict):
                message["tool_calls"] = list(message["tool_calls"].values())
            for made in message.get("tool_calls") or ():
                made.pop("index", None)
                message["content"] = message.get("content") or None  # streams start with ""
        kind = str(self._base.get("object", "")).removesuffix(".chunk")
        return {**self._base, "object": kind, "choices": choices}


def _grow(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for name, value in piece.items():
        known: Any = whole.get(name)
        if name == "tool_calls" and isinstance(value, (list, dict)):
            whole[name] = known = known or {}
            # in parallel: each piece has the number of its call; one dict instead fails here
            for call in value:
                _grow(_numbered(known, call.get("index"), {}), call)
        elif isinstance(value, dict):
            if not isinstance(known, dict):
                whole[name] = {}
            _grow(whole[name], value)
        elif value is None or value == "":
            whole.setdefault(name, value)
        elif isinstance(value, list):
            whole[name] = known = known if isinstance(known, list) else []
            known += value
        elif isinstance(value, str) and isinstance(known, str) and name not in _WHOLE:
            whole[name] = None  # a text that nothing else holds grows in place
            known += value
            whole[name] = known
        else:
            whole[name] = value


def _numbered(known: dict[Any, dict[str, Any]], number: Any, new: dict[str, Any]) -> dict[str, Any]:
    """Return what has a number, from now on the given one if there is none."""
    found = known.setdefault(number, new)
    if len(known) > _MOST:
        raise MalformedResponse(
            "the server answered with a stream of too many choices or tool calls"
        )
    return found
