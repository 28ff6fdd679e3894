"""A backend without a network: its answers are functions of the request and its draw."""

from __future__ import annotations

import array
import asyncio
import hashlib
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from feste.backend import (
    Backend,
    BatchRule,
    Determinism,
    Limits,
    Message,
    OnChunk,
    Operation,
    Params,
    PrefixRule,
    Profile,
    Reply,
    Request,
    Response,
    SampleRule,
    Usage,
    as_count,
    as_messages,
    as_params,
    as_text,
)
from feste.errors import CallError, CallTimeout, MalformedResponse

__all__ = ["FakeBackend", "FakeParams"]

#: The field of the body that tells the fake's prompt cache about prefixes.
_MARK = "prompt_cache"
#: Characters in each piece of a streamed answer.
_PIECE = 4


class FakeParams(Params):
    """Parameters of the fake operations: those of real ones that tests need."""

    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    n: int | None = None
    model: str | None = None


class FakeBackend(Backend):
    """A backend that answers at once, without a network.

    The answer to a SAMPLE call depends on its request and its ordinal among equal calls; to a
    GREEDY or PURE call on its request only. So the same program gives the same answers lazy, eager
    and distributed, with any optimization and in any order.

    :param model: the model's name, which is part of the answers.
    :param latency: the duration of each request in seconds.
    :param fail: maps a text to the error to raise if the prompt, text or a message contains it, for
        example ``{"poison": InvalidRequest("no")}``.
    :param timeout: the time limit of one attempt in seconds; None is none.
    :param limits: as for any backend.
    :param profile: what :meth:`profile` returns; by default nothing is known.

    >>> llm = FakeBackend()
    >>> a, b = llm.chat("Hi"), llm.chat("Hi")
    >>> import feste
    >>> one, two = feste.compute(a, b)
    >>> one != two, one == a.compute()
    (True, True)
    """

    plugin = "fake"

    def __init__(
        self,
        model: str = "fake-1",
        *,
        latency: float = 0.0,
        fail: Mapping[str, CallError] | None = None,
        timeout: float | None = None,
        limits: Limits | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.model = model
        self.timeout = timeout
        self.latency = latency
        self.fail = dict(fail or {})
        self.limits = Limits.of(limits)
        self._profile = Profile.of(profile)
        self.requests: list[Request] = []
        self.peak = 0
        self._in_flight = 0
        self._lock = threading.Lock()

    def config(self) -> Mapping[str, Any]:
        """Return the configuration of an equal backend."""
        limit = {} if self.timeout is None else {"timeout": self.timeout}
        return {"model": self.model, "latency": self.latency, **limit}

    def profile(self, model: str) -> Profile:
        """Return the profile given to the constructor, for any model."""
        return self._profile

    def _request(self, operation: str, body: dict[str, Any], params: FakeParams) -> Request:
        given = as_params(params, FakeParams, operation).body()
        as_count(given.get("n"), "n")
        return Request(
            plugin=self.plugin,
            operation=operation,
            endpoint=self.endpoint,
            body={"model": self.model, **body, **given},
            client=self.config(),
        )

    def _prepare_chat(
        self, prompt: str | list[Message], params: FakeParams = FakeParams()
    ) -> Request:
        """Answer a conversation."""
        return self._request("chat", {"messages": as_messages(prompt)}, params)

    def _prepare_complete(self, prompt: str, params: FakeParams = FakeParams()) -> Request:
        """Continue a text."""
        return self._request("complete", {"prompt": as_text(prompt, "complete", "prompt")}, params)

    def _prepare_embed(self, text: str, params: FakeParams = FakeParams()) -> Request:
        """Return the vector of a text."""
        body = {"input": as_text(text, "embed", "text")}
        return replace(self._request("embed", body, params), max_output=0)

    async def _send(self, request: Request, on_chunk: OnChunk | None = None) -> Response:
        with self._lock:
            self.requests.append(request)
            self._in_flight += 1
            self.peak = max(self.peak, self._in_flight)
        try:
            if self.timeout is not None and self.latency > self.timeout:
                await asyncio.sleep(self.timeout)
                raise CallTimeout(f"no whole answer within {self.timeout:g} seconds")
            if self.latency:
                await asyncio.sleep(self.latency)
            said = "\n".join(_texts(request.body)) if self.fail else ""
            for text, error in self.fail.items():
                if text in said:
                    raise error.copy()  # each call gets its own error object
            response = self.answer(request)
            if on_chunk is not None and request.operation != "embed" and not request.packed:
                text = self._text(_texts_of(response)[0])
                for start in range(0, len(text), _PIECE):
                    on_chunk(text[start : start + _PIECE])
                    await asyncio.sleep(0)  # as between the events of a real stream
            return response
        finally:
            with self._lock:
                self._in_flight -= 1

    def answer(self, request: Request) -> Response:
        """Return the response to a request. Pure.

        :param request: the request, single or packed.
        """
        if _MARK in request.body:  # no answer depends on it
            body = {name: value for name, value in request.body.items() if name != _MARK}
            request = replace(request, body=body)
        field = "input" if request.operation == "embed" else "prompt"
        given = request.body.get(field)
        items = given if isinstance(given, list) else [given]
        wanted = as_count(request.body.get("n"), "n")
        answers = []
        for i, item in enumerate(items):
            body = {**request.body, field: item} if given is not None else dict(request.body)
            if request.samples > 1 or body.get("n") == 1:
                del body["n"]  # as each of the calls would have been sent alone; 1 is the default
            alone = replace(request, body=body)
            draws = request.draws[i * request.samples : (i + 1) * request.samples]
            seeds = [_digest(alone, draw.n, i + j) for j, draw in enumerate(draws)] or [
                _digest(alone, 0, i)
            ]
            if request.samples == 1 < wanted:
                seeds = [_hash(f"{seeds[0]}.{j}") for j in range(wanted)]
            answers.append(seeds if wanted > 1 else seeds[0])
        made = 0 if request.operation == "embed" else 4 * len(answers) * wanted
        return Response({"answers": answers}, Usage(request.tokens, made))

    def _parse_text(self, response: Response, arguments: Mapping[str, Any]) -> Reply:
        wanted = as_count(arguments["params"].n, "n")
        seeds = _only(response) if wanted > 1 else [_only(response)]
        if not isinstance(seeds, list) or len(seeds) != wanted:
            raise MalformedResponse(f"a fake answer must hold {wanted} texts")
        made: Any = [Reply(self._text(seed), finish_reason="stop") for seed in seeds]
        return made if wanted > 1 else made[0]  # type: ignore[no-any-return]

    def _text(self, seed: Any) -> str:
        return f"{self.model}:{str(seed)[:16]}"

    def _parse_vector(self, response: Response, arguments: Mapping[str, Any]) -> array.array[float]:
        rng = random.Random(str(_only(response)))
        return array.array("f", (rng.uniform(-1, 1) for _ in range(8)))

    @staticmethod
    def _pack(backend: FakeBackend, requests: Sequence[Request]) -> Request:
        field = "input" if requests[0].operation == "embed" else "prompt"
        body = {**requests[0].body, field: [r.body[field] for r in requests]}
        return replace(requests[0], body=body)

    @staticmethod
    def _unpack(backend: FakeBackend, request: Request, response: Response) -> list[Response]:
        return [Response({"answers": [answer]}) for answer in response.payload["answers"]]

    @staticmethod
    def _several(backend: FakeBackend, request: Request, response: Response) -> list[Response]:
        seeds = _only(response)
        return [Response({"answers": [seed]}) for seed in seeds]

    @staticmethod
    def _parts(request: Request) -> list[str]:
        return [f"{m['role']}: {m['content']}" for m in request.body["messages"]]

    @staticmethod
    def _mark(request: Request, key: str | None, ends: Sequence[int]) -> Request:
        return replace(request, body={**request.body, _MARK: {"key": key, "ends": list(ends)}})

    chat = Operation(
        prepare=_prepare_chat,
        send=_send,
        parse=_parse_text,
        samples=SampleRule(_several),
        prefix=PrefixRule(_parts, _mark),
    )
    complete = Operation(
        prepare=_prepare_complete,
        send=_send,
        parse=_parse_text,
        samples=SampleRule(_several),
        batch=BatchRule("prompt", "prompt", 16, pack=_pack, unpack=_unpack),
    )
    embed = Operation(
        prepare=_prepare_embed,
        send=_send,
        parse=_parse_vector,
        determinism=Determinism.PURE,
        batch=BatchRule("text", "input", 96, pack=_pack, unpack=_unpack),
    )


def _digest(request: Request, n: int, position: int) -> str:
    """Return the answer's seed: from request and ordinal for SAMPLE, else from the request only.

    Like a provider, it applies a ``seed`` to a whole request: later answers are others.
    """
    seeded = request.body.get("seed") is not None
    greedy = request.body.get("temperature") == 0 or seeded
    draw = "" if greedy or request.operation == "embed" else f".{n}"
    return _hash(f"{request.key}{draw}{f'+{position}' if seeded and position else ''}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _texts(body: Mapping[str, Any]) -> Iterator[str]:
    """Yield the user's texts in a request: its prompts, or the contents of its messages."""
    stack = [body.get("prompt"), body.get("input")]
    stack += [message.get("content") for message in body.get("messages") or ()]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, (list, Mapping)):
            stack += part.values() if isinstance(part, Mapping) else part


def _texts_of(response: Response) -> Any:
    answer = _only(response)
    return answer if isinstance(answer, list) else [answer]


def _only(response: Response) -> Any:
    try:
        (answer,) = response.payload["answers"]
    except (KeyError, TypeError, ValueError):
        raise MalformedResponse("a fake answer must hold one text") from None
    return answer
