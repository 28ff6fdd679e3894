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
            plan = self._message.get("tool_plan", "")
            self._message["tool_plan"] = plan + message.get("tool_plan", "")
        elif kind == "tool-call-start":
            self._calls[index] = dict(message.get("tool_calls") or {})
        elif kind == "tool-call-delta":
            self._arguments(self._calls.setdefault(index, {}), message.get("tool_calls") or {})
        elif kind == "citation-start":
            self._message.setdefault("citations", []).append(message.get("citations"))
        elif kind == "message-end":
            self._whole.update(delta)
            self.complete = True
        return ""

    def _content(self, part: dict[str, Any], content: Mapping[str, Any]) -> str:
        if "type" in content:
            part["type"] = content["type"]
        for name in ("text", "thinking"):
            piece = content.get(name)
            if piece is not None:
                part.setdefault("type", name)
                part[name] = part.get(name, "") + piece
        return content.get("text") or ""

    def _arguments(self, call: dict[str, Any], more: Mapping[str, Any]) -> None:
        function = dict(call.get("function") or {})
        piece = (more.get("function") or {}).get("arguments", "")
        call["function"] = {**function, "arguments": function.get("arguments", "") + piece}

    @property
    def payload(self) -> dict[str, Any]:
        """The reply assembled so far."""
        message = dict(self._message)
        if self._parts:
            message["content"] = list(self._parts.values())
        if self._calls:
            message["tool_calls"] = list(self._calls.values())
        whole = {**self._whole, "message": message}
        return {**whole, "logprobs": self._logprobs} if self._logprobs else whole
