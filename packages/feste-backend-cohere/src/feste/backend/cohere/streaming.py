"""Assemble the events of a streamed chat into the reply of an unstreamed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Assembly"]


class Assembly:
    """The reply of a stream, assembled event by event.

    >>> reply = Assembly()
    >>> for text in ("Hel", "lo"):
    ...     reply.take({"type": "content-delta", "index": 0,
    ...                 "delta": {"message": {"content": {"text": text}}}})
    'Hel'
    'lo'
    >>> reply.complete, reply.payload["message"]["content"]
    (False, [{'type': 'text', 'text': 'Hello'}])
    """

    def __init__(self) -> None:
        self._parts: dict[Any, dict[str, Any]] = {}
        self._calls: dict[Any, dict[str, Any]] = {}
        self._arguments: dict[Any, list[str]] = {}
        self._plan: list[str] = []
        self._logprobs: list[Any] = []
        self._message: dict[str, Any] = {"role": "assistant"}
        self._whole: dict[str, Any] = {}
        self.complete = False

    def take(self, event: Mapping[str, Any]) -> str:
        """Add the next event and return its piece of text, often empty; unknown ones are ignored.

        :param event: the event's data.
        """
        delta = event.get("delta") or {}
        message = delta.get("message") or {}
        kind, index = event.get("type"), event.get("index")
        if kind == "message-start":
            self._whole["id"] = event.get("id")
        elif kind in ("content-start", "content-delta"):
            if event.get("logprobs"):
                self._logprobs.append(event["logprobs"])
            return self._content(self._parts.setdefault(index, {}), message.get("content") or {})
        elif kind == "tool-plan-delta":
            self._plan.append(_text(message.get("tool_plan", "")))
        elif kind in ("tool-call-start", "tool-call-delta"):
            call = dict(message.get("tool_calls") or {})
            function = dict(call.get("function") or {})
            piece = _text(function.get("arguments") or "")
            if kind == "tool-call-start" or index not in self._calls:
                self._calls[index], self._arguments[index] = {**call, "function": function}, []
            self._arguments[index].append(piece)
        elif kind == "citation-start":
            self._message.setdefault("citations", []).append(message.get("citations"))
        elif kind == "message-end":
            self._whole.update(delta)
            self.complete = True
        return ""

    def _content(self, part: dict[str, Any], content: Mapping[str, Any]) -> str:
        if "type" in content:
            part["type"] = _text(content["type"])
        for name in ("text", "thinking"):
            piece = content.get(name)
            if piece is not None:
                part.setdefault("type", name)
                part.setdefault(name, []).append(_text(piece))
        return content.get("text") or ""

    @property
    def payload(self) -> dict[str, Any]:
        """The reply assembled so far."""
        message = dict(self._message)
        if self._plan:
            message["tool_plan"] = "".join(self._plan)
        if self._parts:
            message["content"] = [
                {name: "".join(v) if isinstance(v, list) else v for name, v in part.items()}
                for part in self._parts.values()
            ]
        if self._calls:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": "".join(pieces)}}
                for call, pieces in zip(self._calls.values(), self._arguments.values(), strict=True)
            ]
        whole = {**self._whole, "message": message}
        return {**whole, "logprobs": self._logprobs} if self._logprobs else whole


def _text(piece: Any) -> str:
    """Return a piece of a text; pieces are joined at the end, so that long texts cost little."""
    if not isinstance(piece, str):
        raise TypeError(f"{type(piece).__name__} is no text")
    return piece
