"""The result of an LLM call: its text, with the provider's further data as attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from feste.backend.request import Usage

__all__ = ["Message", "Reply"]

_CUT_OFF = frozenset(
    ("length", "max_tokens", "MAX_TOKENS")
    + ("timeout", "error", "error_limit", "error_toxic", "user_cancel")
)

Message = Mapping[str, Any]
"""One message of a conversation: a dict with ``role`` and ``content``."""


class Reply(str):
    """The answer of a model: a ``str`` with attributes for the rest of the response.

    :param text: the text; empty if the model only called tools.
    :param message: the assistant's message as a dict, ready to append to a conversation.
    :param finish_reason: why the model stopped: ``"stop"``, ``"length"``, ``"tool_calls"``, ...
    :param usage: the tokens used, or None if the provider counts only whole requests.
    :param logprobs: the provider's log-probabilities, or None.
    :param model: the model that answered, as named by the provider.

    >>> reply = Reply("Once upon a", finish_reason="length")
    >>> reply.upper(), reply.truncated
    ('ONCE UPON A', True)
    """

    message: Message
    finish_reason: str | None
    usage: Usage | None
    logprobs: Any
    model: str

    def __new__(
        cls,
        text: str = "",
        *,
        message: Message | None = None,
        finish_reason: str | None = None,
        usage: Usage | None = None,
        logprobs: Any = None,
        model: str = "",
    ) -> Reply:
        self = super().__new__(cls, text)
        self.message = {"role": "assistant", "content": str(self)} if message is None else message
        self.finish_reason = finish_reason
        self.usage = usage
        self.logprobs = logprobs
        self.model = model
        return self

    @property
    def tool_calls(self) -> Sequence[Any]:
        """The tool calls that the model asks for; empty if none."""
        return self.message.get("tool_calls") or ()

    @property
    def truncated(self) -> bool:
        """Whether the answer is incomplete: it reached the token limit, or the provider stopped."""
        return self.finish_reason in _CUT_OFF

    def __str__(self) -> str:
        return str.__str__(self)

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (str.__str__(self),), dict(self.__dict__)
