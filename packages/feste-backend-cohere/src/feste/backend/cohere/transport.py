"""Send requests through the official SDK, and convert failures into Feste's errors.

This uses ``cohere.core.AsyncClientWrapper``, the exported base of all the SDK's clients, which adds
the SDK's headers and the key and returns the raw HTTP response. The methods of ``AsyncClientV2``,
even with ``with_raw_response``, build a pydantic model of every reply on the event loop (half a
second for 96 vectors) and take twice as long to import.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

from feste.backend import (
    ACCEPT_ENCODING,
    ERROR_BYTES,
    MOST_BYTES,
    BlankedPieces,
    Body,
    PerLoop,
    Request,
    Response,
    Secret,
    from_json,
    is_deep,
    kept_headers,
    read_body,
    redact,
    redact_record,
)
from feste.backend.cohere.failures import failure, refusal, short
from feste.backend.cohere.replies import usage
from feste.backend.cohere.streaming import Assembly
from feste.errors import (
    CallError,
    CallTimeout,
    ConnectionLost,
    InvalidRequest,
    MalformedResponse,
)

if TYPE_CHECKING:
    import httpx
    from cohere.core import AsyncHttpClient

__all__ = ["send"]

#: Seconds to make a connection. Nothing has been sent by then, so retrying is always safe.
_CONNECT = 15.0

#: How many bytes of a body that is no answer are kept.
_RAW = 65_536

#: The events of a stream without a part of an answer that are read; there are a few: of the start,
#: and of the ends of contents, tool calls and citations.
_EMPTY = 10_000

#: The bytes that the reply to the request of this task may have.
_most: ContextVar[int] = ContextVar("most", default=MOST_BYTES)

_lock = threading.Lock()
_tls: ssl.SSLContext | None = None


def load() -> None:
    """Import the SDK and make the TLS context of the process; both are slow."""
    global _tls
    with _lock:
        if _tls is None:
            import httpx
            from cohere.core import AsyncClientWrapper  # noqa: F401

            # they log what a provider answers, which may repeat the key
            for name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
                logging.getLogger(name).addFilter(redact_record)
            _tls = httpx.create_ssl_context()


def _opened(*, proxies: bool) -> httpx.AsyncClient:
    import httpx

    # accounts share connections, so no account's cookie may be sent with another's request
    cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    return _bounded_client()(
        verify=_tls or True,
        trust_env=proxies,
        cookies=cookies,
        headers={"Accept-Encoding": ACCEPT_ENCODING},
        follow_redirects=False,
        timeout=httpx.Timeout(None, connect=_CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


@functools.cache
def _bounded_client() -> type[httpx.AsyncClient]:
    """Return a client that reads no more of a reply than an answer can have."""
    import httpx

    class Pieces(httpx.AsyncByteStream):
        """The body of a streamed reply as it arrives."""

        def __init__(self, reply: httpx.Response, body: Body) -> None:
            self.reply, self.body = reply, body

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for piece in self.reply.aiter_raw():
                for part in self.body.parts(piece):
                    yield part

        async def aclose(self) -> None:
            await self.reply.aclose()

    class Client(httpx.AsyncClient):
        async def send(
            self, request: httpx.Request, *, stream: bool = False, **given: Any
        ) -> httpx.Response:
            reply = await super().send(request, stream=True, **given)
            kind = reply.headers.get("content-encoding", "")
            most = _most.get() if reply.is_success else ERROR_BYTES
            body: Any
            try:
                if stream and reply.is_success:
                    body = {"stream": Pieces(reply, Body(kind, most=most, answers=1))}
                else:
                    body = {"content": await read_body(reply.aiter_raw(), kind, most=most)}
                    await reply.aclose()
            except BaseException as error:
                await reply.aclose()
                if reply.is_success or not isinstance(error, MalformedResponse):
                    raise
                body = {"content": (error.raw or "").encode()}  # the status says more
            headers = [h for h in reply.headers.raw if h[0].lower() != b"content-encoding"]
            return httpx.Response(reply.status_code, headers=headers, request=request, **body)

    return Client


#: Connections by "is local", shared by all backends on a loop; local ones never use a proxy.
_POOLS: dict[bool, PerLoop[httpx.AsyncClient]] = {
    True: PerLoop(lambda: _opened(proxies=False), lambda pool: pool.aclose()),
    False: PerLoop(lambda: _opened(proxies=True), lambda pool: pool.aclose()),
}


async def send(
    request: Request,
    *,
    token: Callable[[], str],
    secret: Secret,
    local: bool,
    on_chunk: Callable[[str], None] | None = None,
) -> Response:
    """Send a request once.

    :param request: the request; its endpoint is the full URL.
    :param token: returns the key.
    :param secret: the key to redact in texts from outside.
    :param local: whether the server is on this machine.
    :param on_chunk: receives pieces of a chat's text as they arrive.
    :returns: the response.
    :raises CallError: if it failed.
    """
    load()  # at once, after `warm_up`
    # raised outside of any `except`, because the SDK's exception holds the request and the key
    outcome = await _attempt(request, _door(request, token, local), secret, on_chunk)
    if isinstance(outcome, CallError):
        raise outcome
    return outcome


def _door(request: Request, token: Callable[[], str], local: bool) -> AsyncHttpClient:
    from cohere.core import AsyncClientWrapper

    wrapper = AsyncClientWrapper(
        token=token,
        base_url=request.endpoint,
        max_retries=0,
        httpx_client=_POOLS[local].get(),
    )
    return wrapper.httpx_client


async def _attempt(
    request: Request,
    door: AsyncHttpClient,
    secret: Secret,
    on_chunk: Callable[[str], None] | None,
) -> Response | CallError:
    stream = on_chunk is not None and "messages" in request.body
    body = {**request.body, "stream": True} if stream else request.body
    try:
        # in ASCII, because a lone surrogate in one text would spoil the whole shared request
        text = json.dumps(body, allow_nan=False, separators=(",", ":"))
        sent: dict[str, Any] = {
            "method": "POST",
            "content": text.encode(),
            "headers": {"content-type": "application/json"},
        }
    except (TypeError, ValueError) as error:
        return InvalidRequest(f"the request is no JSON: {redact(str(error), secret)}")
    _most.set(_most_bytes(body, stream=stream))
    try:
        async with asyncio.timeout(request.timeout):
            if stream and on_chunk is not None:
                return await _streamed(door, sent, secret, on_chunk)
            reply = await door.request(**sent)
            return _answer(reply.status_code, reply.content, dict(reply.headers), secret)
    except TimeoutError:
        return CallTimeout(f"no whole answer within {request.timeout} seconds")
    except Exception as error:
        return failure(error, secret)


def _most_bytes(body: Mapping[str, Any], *, stream: bool) -> int:
    """Return the most bytes of a reply; what is asked for decides, since a refused one is paid too."""
    if "texts" in body:  # 24 characters for a number, of each kind
        size = body.get("output_dimension")
        each = 24 * max(1_536, size if type(size) is int else 0)
        return MOST_BYTES + each * len(body["texts"]) * len(body.get("embedding_types") or ())
    scale = 16 if body.get("logprobs") or body.get("return_likelihoods") else 4 if stream else 1
    return scale * (MOST_BYTES + int(body.get("num_generations") or 0) * MOST_BYTES // 16)


async def _streamed(
    door: AsyncHttpClient,
    sent: Mapping[str, Any],
    secret: Secret,
    on_chunk: Callable[[str], None],
) -> Response | CallError:
    async with door.stream(**sent) as reply:
        headers = dict(reply.headers)
        if not reply.is_success:
            return _answer(reply.status_code, await reply.aread(), headers, secret)
        assembly, event, empty = Assembly(), None, 0
        shown = BlankedPieces(secret, on_chunk)
        async for line in reply.aiter_lines():
            if not line.startswith("data:"):
                continue
            try:
                event = json.loads(line[5:])
                piece = assembly.take(event)
                empty += not event.get("delta")
            except (ValueError, TypeError, AttributeError, RecursionError):
                return MalformedResponse("an event of the stream is not as promised")
            if empty > _EMPTY:
                return MalformedResponse("the reply is a stream that brings nothing")
            shown.take(piece)
    shown.end()
    if event is None:
        return MalformedResponse("the reply is no stream of events: there is none in it")
    if not assembly.complete:
        return ConnectionLost("the stream ended before the answer did")
    payload = assembly.payload
    if is_deep(payload):
        return MalformedResponse("the reply is a stream of JSON that is too deep to use")
    return _response(secret.blank_payload(payload), headers, secret)


def _answer(
    status: int, content: bytes, headers: Mapping[str, str], secret: Secret
) -> Response | CallError:
    """Convert an HTTP reply into a response or an error."""
    if not 200 <= status < 300:
        return refusal(status, content, headers, secret)
    content = secret.blank_json(content)  # stores and tracebacks show answers
    why = ""
    try:
        payload = from_json(content)
    except ValueError as wrong:
        payload, why = None, f" ({str(wrong)[:100]})"
    if not isinstance(payload, dict):
        start = redact(content[:2000].decode(errors="replace"), secret, limit=80)
        error = MalformedResponse(f"the reply is no JSON object{why}: {start!r}", status=status)
        error.raw = redact(content[:_RAW].decode(errors="replace"), secret, limit=_RAW)
        return error
    return _response(payload, headers, secret)


def _response(payload: Mapping[str, Any], headers: Mapping[str, str], secret: Secret) -> Response:
    name = short(payload.get("id"), secret)
    return Response(payload, usage(payload), kept_headers(headers, secret), name)
