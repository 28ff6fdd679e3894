"""Puts the events of a streamed chat together to the reply that would have come at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Assembly"]


class Assembly:
    """The reply of a stream, as far as it has come.

    :param on_chunk: gets the pieces of the text.

    >>> pieces = []
    >>> reply = Assembly(pieces.append)
    >>> reply.take({"type": "content-start", "index": 0,
    ...             "delta": {"message": {"content": {"type": "text", "text": ""}}}})
    >>> for text in ("Hel", "lo"):
    ...     reply.take({"type": "content-delta", "index": 0,
    ...                 "delta": {"message": {"content": {"text": text}}}})
    >>> pieces, reply.complete, reply.payload["message"]["content"]
    (['Hel', 'lo'], False, [{'type': 'text', 'text': 'Hello'}])
    """

    def __init__(self, on_chunk: Callable[[str], None]) -> None:
        self._on_chunk = on_chunk
        self._parts: dict[Any, dict[str, Any]] = {}
        self._calls: dict[Any, dict[str, Any]] = {}
        self._logprobs: list[Any] = []
        self._message: dict[str, Any] = {}
        self._whole: dict[str, Any] = {}
        self.complete = False

    def take(self, event: Mapping[str, Any]) -> None:
        """Take the next event; those of unknown types are passed over.

        :param event: the event's data.
        """
        delta = event.get("delta") or {}
        message = delta.get("message") or {}
        kind, index = event.get("type"), event.get("index")
        if kind == "message-start":
            self._whole["id"] = event.get("id")
            self._message["role"] = message.get("role", "assistant")
        elif kind in ("content-start", "content-delta"):
            self._content(self._parts.setdefault(index, {}), message.get("content") or {})
            if event.get("logprobs"):
                self._logprobs.append(event["logprobs"])
        elif kind == "tool-plan-delta":
            plan = self._message.get("tool_plan", "")
            self._message["tool_plan"] = plan + message.get("tool_plan", "")
        elif kind == "tool-call-start":
            self._calls[index] = dict(message.get("tool_calls") or {})
        elif kind == "tool-call-delta":
            self._arguments(index, message.get("tool_calls") or {})
        elif kind == "citation-start":
            self._message.setdefault("citations", []).append(message.get("citations"))
        elif kind == "message-end":
            self._whole.update(delta)
            self.complete = True

    def _content(self, part: dict[str, Any], content: Mapping[str, Any]) -> None:
        if "type" in content:
            part["type"] = content["type"]
        for name in ("text", "thinking"):
            piece = content.get(name)
            if piece is not None:
                part.setdefault("type", name)
                part[name] = part.get(name, "") + piece
        if content.get("text"):
            self._on_chunk(content["text"])

    def _arguments(self, index: Any, call: Mapping[str, Any]) -> None:
        known = self._calls.setdefault(index, {})
        function = dict(known.get("function") or {})
        piece = (call.get("function") or {}).get("arguments", "")
        known["function"] = {**function, "arguments": function.get("arguments", "") + piece}

    @property
    def payload(self) -> dict[str, Any]:
        """The reply."""
        message = dict(self._message)
        if self._parts:
            message["content"] = list(self._parts.values())
        if self._calls:
            message["tool_calls"] = list(self._calls.values())
        whole = {**self._whole, "message": message}
        return {**whole, "logprobs": self._logprobs} if self._logprobs else whole
