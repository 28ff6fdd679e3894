"""The interface through which a backend teaches `SimServer` its provider's format.

A *wire* is one class. `SimServer` does everything that is common to all providers: sockets,
latency, faults, the log, the ledger and the prompt cache. The wire turns a request's JSON into a `Plan` (how many
answers, and a function that makes them) and an error into the provider's JSON. The answers come
from `answer`, `embedding` and similar functions, which tests import too, as their oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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
    message_text,
    minimal,
    pieces,
    tool_answer,
    words,
)
from feste.testing.sim_cache import PromptPart, prompt_parts
from feste.testing.sim_limits import Remaining
from feste.testing.sim_lists import arranged
from feste.testing.sim_types import Billed

__all__ = [
    "Answer",
    "Billed",
    "Call",
    "Item",
    "Plan",
    "Prompt",
    "PromptPart",
    "Reader",
    "Refusal",
    "Remaining",
    "Wire",
    "answer",
    "arranged",
    "cut",
    "digest",
    "embedding",
    "json_answer",
    "last_user_text",
    "message_text",
    "minimal",
    "pieces",
    "prompt_parts",
    "sse",
    "tool_answer",
    "words",
]


class Refusal(Exception):
    """An answer that is an error: raised by the wire, sent by the server.

    :param status: the HTTP status.
    :param message: the message for the client.
    :param param: the name of the wrong parameter.
    :param code: the provider's code for this error.
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


class Reader(Protocol):
    """How a wire has the server's prompt cache read a prompt."""

    def __call__(
        self, scope: Hashable, parts: Sequence[PromptPart], *, explicit: bool = False
    ) -> Billed:
        """Read a prompt; the server writes it to the cache after the generation.

        :param scope: prompts of different scopes share nothing; at least the model.
        :param parts: the whole prompt.
        :param explicit: look up and write prefixes that end at breakpoints only.
        :returns: the bill of the input, without output.
        """


@dataclass(frozen=True, slots=True)
class Call:
    """One request as a wire sees it.

    `headers` have lower-case names, `body` is the decoded JSON object (empty for GET), and `draw`
    is a counter: it returns 0, 1, 2, ... for each prompt and path, and restarts after a reset.
    `read` reads a prompt through the prompt cache; call it in `Wire.plan`, since a provider looks
    when the request arrives, and only for a request that is not refused.
    """

    id: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    draw: Callable[[str], int]
    read: Reader

    def require_key(self, key: str | None) -> None:
        """Refuse the request unless it carries this key.

        :param key: the required bearer token; None accepts any request.
        :raises Refusal: with status 401, if the token is missing or different.
        """
        if key is not None and self.headers.get("authorization") != f"Bearer {key}":
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    def refuse_poison(self, poison: str | None, texts: Iterable[str]) -> None:
        """Refuse the request if one of its texts contains the poison, without saying which.

        :param poison: the text that the provider refuses; None accepts any text.
        :param texts: all texts of the request.
        :raises Refusal: with status 400.
        """
        if poison is not None and any(poison in text for text in texts):
            raise Refusal(400, "The request was refused because of its content.")

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Read an integer parameter.

        :param name: the name of the parameter.
        :param default: the value if the parameter is absent or null.
        :param low: the smallest allowed value.
        :param high: the largest allowed value.
        :returns: the value.
        :raises Refusal: with status 400, if it is not an integer or out of range.
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
        that they depend on the request only. Any other request gets numbers not yet used for that
        prompt.

        :param prompt: the prompt or the messages.
        :param count: the number of answers asked for.
        :returns: a `sample_index` for each answer.
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
    """One generated answer, as recorded in the ledger (`key` is the prompt's digest)."""

    prompt: str
    answer: str
    key: str
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole reply: a JSON body or, for a stream, its events; the items it contains; the bill."""

    body: object = None
    items: Sequence[Item] = ()
    events: Sequence[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    billed: Billed = field(default_factory=Billed)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request will bring.

    :param items: the number of answers (the k of T(k)).
    :param generate: makes them, later.
    :param tokens: what the provider's limits reserve: the tokens of the prompts, and the most that
        the request lets each answer have.
    """

    items: int
    generate: Callable[[], Answer]
    tokens: int = 0


class Wire(Protocol):
    """A provider's wire format; its constructor takes the `wire_options` of `SimServer`.

    A wire of a provider that tells its limits in headers has a third method,
    ``limit_headers(status, requests, tokens)``: of the status of a reply and two `Remaining`, each
    None without such a limit, it makes the headers.

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
        """The paths of this wire, each including all paths below it."""

    def plan(self, call: Call) -> Plan:
        """Check a request and plan its answers.

        :param call: the request; its path is one of `paths` or below one.
        :returns: the plan; its `generate` runs once, after the latency has passed.
        :raises Refusal: if the provider would refuse the request.
        """

    def error(self, refusal: Refusal) -> object:
        """Return the JSON body of an error.

        :param refusal: the error.
        :returns: the body in the provider's format.
        """


def sse(data: object, event: str | None = None) -> bytes:
    """Encode one server-sent event.

    :param data: the data: a string is sent unchanged, anything else as JSON.
    :param event: the event's name.
    :returns: the bytes, including the empty line that ends an event.
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()
