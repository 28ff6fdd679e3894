"""What a backend brings so that `SimServer` can answer in its provider's format.

A *wire* is one class. `SimServer` does everything that has nothing to do with a provider: sockets,
latency, faults, the log and the ledger. The wire turns a request's JSON into a `Plan` (how many
answers, and a function that makes them) and an error into the provider's JSON. The answers come
from `answer`, `embedding` and their like, which tests import too: they are the oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from feste.testing.sim_answers import (
    Prompt,
    answer,
    cut,
    digest,
    embedding,
    json_answer,
    last_user_text,
    minimal,
    pieces,
    tool_answer,
    words,
)

__all__ = [
    "Answer",
    "Call",
    "Item",
    "Plan",
    "Prompt",
    "Refusal",
    "Wire",
    "answer",
    "cut",
    "digest",
    "embedding",
    "json_answer",
    "last_user_text",
    "minimal",
    "pieces",
    "sse",
    "tool_answer",
    "words",
]


class Refusal(Exception):
    """An answer that is an error: the wire raises it, the server sends it.

    :param status: the HTTP status.
    :param message: what is wrong, for the client.
    :param param: the name of the parameter that is wrong.
    :param code: the provider's code of this error.
    :param headers: headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Call:
    """One request as a wire sees it.

    `headers` have lower-case names, `body` is the decoded JSON object (empty for GET), and `draw`
    counts: it gives 0, 1, 2, ... for one prompt on one path, and starts anew after a reset.
    """

    id: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    draw: Callable[[str], int]

    def require_key(self, key: str | None) -> None:
        """Refuse the request unless it carries this key.

        :param key: the bearer token to ask for; None lets everyone in.
        :raises Refusal: with status 401, if the token is missing or another one.
        """
        if key is not None and self.headers.get("authorization") != f"Bearer {key}":
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Read an integer parameter.

        :param name: the name of the parameter.
        :param default: what an absent (or null) parameter means.
        :param low: the smallest value allowed.
        :param high: the greatest value allowed.
        :returns: the value.
        :raises Refusal: with status 400, if it is no integer or out of range.
        """
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            message = f"Invalid value for '{name}': expected an integer from {low} to {high}."
            raise Refusal(400, message, param=name)
        return value

    def samples(self, prompt: Prompt, count: int) -> list[int]:
        """Number the answers to one prompt.

        A GREEDY request (temperature explicitly 0, or a seed) numbers its own answers from 0, so
        that they depend on the request alone. Any other takes numbers that no equal prompt took.

        :param prompt: the prompt or the messages.
        :param count: how many answers are asked for.
        :returns: one `sample_index` an answer.
        """
        temperature = self.body.get("temperature")
        if self.seed is not None or (temperature is not None and temperature == 0):
            return list(range(count))
        key = digest(prompt)
        return [self.draw(key) for _ in range(count)]

    @property
    def seed(self) -> int | None:
        """The seed of the request, or None."""
        return self.body.get("seed")


@dataclass(frozen=True, slots=True)
class Item:
    """One generated answer, as it goes into the ledger (`key` is the prompt's digest)."""

    prompt: str
    answer: str
    key: str
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole reply: a JSON body or, for a stream, its events, and the items it holds."""

    body: object = None
    items: Sequence[Item] = ()
    events: Sequence[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request asks for: `items` answers (the k of T(k)), made by `generate` afterwards."""

    items: int
    generate: Callable[[], Answer]


class Wire(Protocol):
    """A provider's wire format; its constructor takes the `wire_options` of `SimServer`.

    A wire for a provider with one endpoint::

        class EchoWire:
            paths = ("/echo",)

            def plan(self, call: Call) -> Plan:
                text = call.body.get("text")
                if not isinstance(text, str):
                    raise Refusal(400, "'text' must be a string", param="text")
                item = Item(text, answer(text), digest(text))
                return Plan(1, lambda: Answer({"text": item.answer}, [item]))

            def error(self, refusal: Refusal) -> object:
                return {"message": refusal.message}
    """

    @property
    def paths(self) -> Sequence[str]:
        """The paths that belong to this wire, each with everything below it."""

    def plan(self, call: Call) -> Plan:
        """Check a request and say what it asks for.

        :param call: the request; its path is one of `paths` or below one.
        :returns: the plan; its `generate` runs once, after the latency has passed.
        :raises Refusal: if the provider would refuse the request.
        """

    def error(self, refusal: Refusal) -> object:
        """Give the JSON body of an error.

        :param refusal: the error.
        :returns: the body in the provider's format.
        """


def sse(data: object, event: str | None = None) -> bytes:
    """Encode one server-sent event.

    :param data: what to send: a string as it is, anything else as JSON.
    :param event: the event's name.
    :returns: the bytes, with the empty line that ends an event.
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()
