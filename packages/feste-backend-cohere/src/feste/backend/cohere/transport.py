"""Sends requests through the official SDK, and makes Feste's errors of what goes wrong.

The door is ``cohere.core.AsyncClientWrapper``, the exported class that every client of the SDK is
built on: it adds the SDK's headers and the key to a body and gives the HTTP response as it came.
The methods of ``AsyncClientV2``, those of ``with_raw_response`` too, build a pydantic model of every
reply on the event loop: half a second for 96 vectors. They also take twice as long to import.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

from feste.backend import PerLoop, Request, Response, Secret, redact
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

#: Seconds to make a connection. Nothing has been sent by then, so it is always safe to try again.
_CONNECT = 15.0

_lock = threading.Lock()
_tls: ssl.SSLContext | None = None


def _load() -> None:
    """Import the SDK and make the process's one TLS context; both take long."""
    global _tls
    with _lock:
        if _tls is None:
            import httpx
            from cohere.core import AsyncClientWrapper  # noqa: F401

            _tls = httpx.create_ssl_context()


def _opened(*, proxies: bool) -> httpx.AsyncClient:
    import httpx

    # connections are shared by accounts: no cookie of one may go with a request of another
    cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    return httpx.AsyncClient(
        verify=_tls or True,
        trust_env=proxies,
        cookies=cookies,
        follow_redirects=False,
        timeout=httpx.Timeout(None, connect=_CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


#: Connections, shared by all clients on a loop: to this machine never through a proxy.
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

    :param request: the request; its endpoint is the whole URL.
    :param token: gives the key.
    :param secret: the key's name, to blank it in texts of others.
    :param local: whether the server is on this machine.
    :param on_chunk: gets pieces of a chat's text as they come.
    :returns: the answer.
    :raises CallError: if it failed.
    """
    if _tls is None:
        await asyncio.to_thread(_load)
    # raised outside of any `except`: an SDK's exception holds the request, and so the key
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
        # in ASCII: a text may hold half of a character, which would spoil all that share a request
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
    return _response(assembly.payload, headers, secret)


def _answer(
    status: int, content: bytes, headers: Mapping[str, str], secret: Secret
) -> Response | CallError:
    """Make of an HTTP reply what it means."""
    if not 200 <= status < 300:
        return refusal(status, content, headers, secret)
    try:
        payload = json.loads(content)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        start = redact(content[:80].decode(errors="replace"), secret)
        return MalformedResponse(f"the reply is no JSON object: {start!r}", status=status)
    return _response(payload, headers, secret)


def _response(payload: Mapping[str, Any], headers: Mapping[str, str], secret: Secret) -> Response:
    return Response(payload, usage(payload), headers, short(payload.get("id"), secret))
