"""Send requests through the official SDK, and convert failures into Feste's errors.

This uses ``cohere.core.AsyncClientWrapper``, the exported base of all the SDK's clients, which adds
the SDK's headers and the key and returns the raw HTTP response. The methods of ``AsyncClientV2``,
even with ``with_raw_response``, build a pydantic model of every reply on the event loop (half a
second for 96 vectors) and take twice as long to import.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
from collections.abc import Callable, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

from feste.backend import PerLoop, Request, Response, Secret, redact, redact_record
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
    return httpx.AsyncClient(
        verify=_tls or True,
        trust_env=proxies,
        cookies=cookies,
        follow_redirects=False,
        timeout=httpx.Timeout(None, connect=_CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


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
    if _tls is None:
        await asyncio.to_thread(load)
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
        assembly = Assembly()
        async for line in reply.aiter_lines():
            if not line.startswith("data:"):
                continue
            try:
                piece = assembly.take(json.loads(line[5:]))
            except (ValueError, TypeError, AttributeError):
                return MalformedResponse("an event of the stream is not as promised")
            if piece:
                on_chunk(piece)
    if not assembly.complete:
        return ConnectionLost("the stream ended before the answer did")
    said = secret.blank_json(json.dumps(assembly.payload).encode())
    return _response(json.loads(said), headers, secret)


def _answer(
    status: int, content: bytes, headers: Mapping[str, str], secret: Secret
) -> Response | CallError:
    """Convert an HTTP reply into a response or an error."""
    if not 200 <= status < 300:
        return refusal(status, content, headers, secret)
    content = secret.blank_json(content)  # stores and tracebacks show answers
    try:
        payload = json.loads(content)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        start = redact(content[:2000].decode(errors="replace"), secret, limit=80)
        error = MalformedResponse(f"the reply is no JSON object: {start!r}", status=status)
        error.raw = redact(content[:_RAW].decode(errors="replace"), secret, limit=_RAW)
        return error
    return _response(payload, headers, secret)


def _response(payload: Mapping[str, Any], headers: Mapping[str, str], secret: Secret) -> Response:
    return Response(payload, usage(payload), headers, short(payload.get("id"), secret))
