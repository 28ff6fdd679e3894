"""What OpenAI's prompt cache compares of a chat, and how a request marks a reusable prefix; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from feste.backend import Request, canonical

__all__ = ["mark", "parts"]

#: Fields that are written into the prompt before its first message, so that another value of one
#: shares no prefix.
_HEAD: Final = (
    ("tools", "functions", "response_format", "reasoning_effort", "verbosity")
    + ("chat_template_kwargs",)  # of servers that show the prompt's template
)
_MARK: Final = "prompt_cache_breakpoint"
_EXPLICIT: Final = {"mode": "explicit"}


def parts(request: Request) -> list[str]:
    """Return what the cache compares: one text of tools and formats, if any, then each message.

    :param request: the request of a chat.
    """
    return [*_head(request), *map(_text, request.body["messages"])]


def mark(request: Request, key: str | None, ends: Sequence[int]) -> Request:
    """Return the request with the cache's key, and with a mark where each reusable prefix ends.

    The mark is put on a block of text, since tools, for one, cannot carry it. A request is returned
    as it is if the user has set options of the cache or marks.

    :param request: the request of a chat; it is not changed.
    :param key: the key, or None; the user's own goes first.
    :param ends: for each mark the number of parts before it; a provider takes up to four.
    """
    body = request.body
    messages = body["messages"]
    if "prompt_cache_options" in body or any(map(_is_marked, messages)):
        return request
    more: dict[str, Any] = {}
    if key is not None and "prompt_cache_key" not in body:
        more["prompt_cache_key"] = key
    head = len(_head(request))
    marked = {end - head - 1 for end in ends}
    shown = [_marked(m) if i in marked else None for i, m in enumerate(messages)]
    if any(shown):
        more["messages"] = [made or m for made, m in zip(shown, messages, strict=True)]
        more["prompt_cache_options"] = _EXPLICIT  # otherwise the rest is written, and paid, as well
    return replace(request, body={**body, **more}) if more else request


def _head(request: Request) -> list[str]:
    head = {name: request.body[name] for name in _HEAD if name in request.body}
    return [canonical(head)] if head else []


def _text(message: Mapping[str, Any]) -> str:
    """A text whose beginnings are those of the message, as far as it is plain text."""
    content = message.get("content")
    if message.keys() == {"role", "content"} and isinstance(content, str):
        return f"{message['role']}\n{content}"
    rest = {name: value for name, value in message.items() if name != "role"}
    return f"{message['role']} {canonical(rest)}"


def _is_marked(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(b, dict) and _MARK in b for b in content)


def _marked(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a message whose last block carries the mark; None if it does not end with a text."""
    content = message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not blocks or message["role"] == "function":
        return None
    last = blocks[-1]
    if not isinstance(last, dict) or last.get("type") != "text" or not last.get("text"):
        return None
    return {**message, "content": [*blocks[:-1], {**last, _MARK: _EXPLICIT}]}
