"""Send requests through the official SDK, on aiohttp.

Importing this module imports the SDK (half a second of CPU) and makes the TLS context, which all
backends of the process share because it takes 26 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import logging
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx2
import openai

from feste.backend import (
    ACCEPT_ENCODING,
    BlankedPieces,
    PerLoop,
    Request,
    Response,
    Secret,
    from_json,
    is_deep,
    kept_headers,
    redact_record,
)
from feste.backend.openai.answers import usage_of
from feste.backend.openai.errors import failure, no_answer, short
from feste.backend.openai.pool import Pool, ProxyPool, most
from feste.backend.openai.requests import most_bytes
from feste.backend.openai.streams import Whole
from feste.errors import CallError, ConfigError, MalformedResponse

if TYPE_CHECKING:
    from feste.backend import OnChunk
    from feste.backend.openai.client import OpenAI

__all__ = ["send"]

T = TypeVar("T")

# the SDK looks into httpx once any thread, such as another backend's, has begun to import it, and
# stumbles where it is half made; so it is whole before the first request
with contextlib.suppress(ImportError):
    importlib.import_module("httpx")

# the SDK logs what a provider answers, which may repeat the key
for _name in ("openai._base_client", "httpx2"):
    logging.getLogger(_name).addFilter(redact_record)

_TLS: Final = httpx2.create_ssl_context()

#: Seconds to make a connection; an attempt that fails here has sent nothing.
_CONNECT: Final = 15.0
#: Seconds that an idle connection is kept. Many servers close theirs after 5 (uvicorn does); a
#: request sent on a closing connection is lost in a way that looks as if it might have been billed.
_IDLE: Final = 4.0
#: Practically unlimited, because the gates limit the requests in flight; only through a proxy.
_CONNECTIONS: Final = 10_000
#: The number of bytes of a body that are written at once.
_PIECE: Final = 1 << 18
#: The events of a stream without a part of an answer that are read; there are two or three.
_EMPTY: Final = 1_000
#: Given with each request, because the SDK makes a deep copy of each default, and random bytes to
#: know a request by that it sends again.
_OPTIONS: Final[dict[str, Any]] = {
    "params": {},
    "max_retries": 0,  # Feste retries: it knows the budget, the gate, and what was billed
    "timeout": httpx2.Timeout(None, connect=_CONNECT),  # `send` limits the whole attempt
    "idempotency_key": "",
    "security": {"bearer_auth": True},
}


def _pool(local: bool) -> httpx2.AsyncClient:
    if local or not urllib.request.getproxies():
        return Pool(_TLS, _CONNECT, _IDLE)
    return ProxyPool(
        verify=_TLS,
        limits=httpx2.Limits(
            max_connections=_CONNECTIONS,
            max_keepalive_connections=_CONNECTIONS,
            keepalive_expiry=_IDLE,
        ),
        headers={"Accept-Encoding": ACCEPT_ENCODING},
        follow_redirects=False,  # a redirect would send prompts and key to another server
    )


#: One pool per loop, not per backend: a backend that is garbage-collected must not leave its
#: connections open.
_pools: Final = {
    local: PerLoop(functools.partial(_pool, local), lambda pool: pool.aclose())
    for local in (True, False)
}


def _client(llm: OpenAI) -> openai.AsyncOpenAI:
    client = openai.AsyncOpenAI(
        api_key=llm.key(),
        base_url=llm.endpoint,
        http_client=_pools[llm.is_local].get(),
    )
    # set afterwards: given as None, they would be read from the environment of this moment
    client.organization, client.project = llm.organization, llm.project
    return client


async def _nothing(client: openai.AsyncOpenAI) -> None:
    """Do nothing, because the pool is closed separately."""


def _connected(llm: OpenAI) -> openai.AsyncOpenAI:
    clients = llm.__dict__.get("_clients")
    if clients is None:
        made: PerLoop[openai.AsyncOpenAI] = PerLoop(functools.partial(_client, llm), _nothing)
        clients = llm.__dict__.setdefault("_clients", made)
    client: openai.AsyncOpenAI = clients.get()
    client.api_key = llm.key()  # read for each request, because keys may be rotated
    return client


async def send(llm: OpenAI, request: Request, on_chunk: OnChunk | None = None) -> Response:
    """Send a request and return the whole response.

    :param llm: the backend.
    :param request: the request, single or packed.
    :param on_chunk: receives pieces of a text as they arrive; not for lists and vectors.
    :raises CallError: if it failed; never an exception of the SDK.
    :raises ConfigError: if the request is for another backend.
    """
    if not request.endpoint.startswith(f"{llm.endpoint}/"):  # the key goes to its own server only
        raise ConfigError(f"this client is for {llm.endpoint}, not for {request.endpoint}")
    client = _connected(llm)
    stream = on_chunk is not None and _is_text(request)
    most.set(most_bytes(request, stream=stream))
    error: CallError
    try:
        # one limit from connecting to the last byte: slow bodies would reset a read timeout
        async with asyncio.timeout(request.timeout):
            if stream and on_chunk is not None:
                return await _streamed(llm, client, request, on_chunk)
            return await _whole(llm, client, request)
    except Exception as raised:
        error = failure(raised, url=request.endpoint, timeout=request.timeout, secret=llm._secret)
    raise error  # outside of `except`, where it would keep the SDK's exception and thus the key


def _is_text(request: Request) -> bool:
    return "messages" in request.body or isinstance(request.body.get("prompt"), str)


async def _whole(llm: OpenAI, client: openai.AsyncOpenAI, request: Request) -> Response:
    answer = await client.post(request.endpoint, cast_to=httpx2.Response, **_body(request))
    content = llm._secret.blank_json(answer.content)  # stores and tracebacks show answers
    why = ""
    try:
        payload = from_json(content)  # the SDK's models would cost more than sending
    except ValueError as error:
        payload, why = None, str(error)
    kind = answer.headers.get("content-type", "")
    wrong = no_answer(
        payload, content, kind=kind, why=why, url=request.endpoint, secret=llm._secret
    )
    del content  # it may spell the key in other ways, and a traceback with variables shows it
    if wrong is not None:
        raise wrong
    return _response(payload, answer, llm._secret)


async def _streamed(
    llm: OpenAI, client: openai.AsyncOpenAI, request: Request, on_chunk: OnChunk
) -> Response:
    options = {"include_usage": True, **request.body.get("stream_options", {})}
    stream = await client.post(
        request.endpoint,
        cast_to=object,  # leave events as JSON
        stream=True,
        stream_cls=openai.AsyncStream[object],
        **_body(request, stream=True, stream_options=options),
    )
    whole, shown = Whole(), BlankedPieces(llm._secret, on_chunk)
    async with stream:  # always close it: a half-read connection cannot be reused
        empty = 0
        async for event in stream:
            empty += not (isinstance(event, dict) and event.get("choices"))
            if empty > _EMPTY:
                raise MalformedResponse("the server answered with a stream that brings nothing")
            shown.take(_promised(whole.add, event))
    shown.end()
    payload = _promised(whole.payload)
    if is_deep(payload):
        raise MalformedResponse("the server answered with a stream of JSON that is too deep to use")
    return _response(llm._secret.blank_payload(payload), stream.response, llm._secret)


def _promised(step: Callable[..., T], *given: Any) -> T:
    """Take a step that raises whatever it may where an event has not the form it should have."""
    try:
        return step(*given)
    except (TypeError, ValueError, AttributeError):
        raise MalformedResponse("an event of the stream is not as promised") from None


def _body(request: Request, **more: Any) -> dict[str, Any]:
    """Return the body for the SDK, encoded in ASCII because texts may contain lone surrogates."""
    body = {name: v for name, v in request.body.items() if name != "stream_options"}
    content = json.dumps({**body, **more}, separators=(",", ":"), allow_nan=False).encode()
    if len(content) <= _PIECE:
        return {"content": content, "options": {**_OPTIONS, "headers": {}}}
    headers = {"Content-Length": str(len(content))}  # otherwise the transport would use chunks
    return {"content": _pieces(content), "options": {**_OPTIONS, "headers": headers}}


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    """Yield a large body in pieces: sent at once, it would block the loop."""
    for start in range(0, len(content), _PIECE):
        yield content[start : start + _PIECE]


def _response(payload: dict[str, Any], answer: httpx2.Response, secret: Secret) -> Response:
    headers = kept_headers(answer.headers, secret)  # names are in lower case already
    name = short(headers.get("x-request-id"), secret)
    return Response(payload, usage_of(payload), headers, name)
