"""Sends requests through the official SDK, and makes Feste's errors of what goes wrong.

The door is ``cohere.core.AsyncClientWrapper``, the exported class that every client of the SDK is
built on: it adds the SDK's headers and the key to a JSON body and gives the HTTP response as it
came. The methods of ``AsyncClientV2``, ``with_raw_response`` too, would build a pydantic model of
every reply on the event loop, which takes half a second for 96 vectors, and import twice as much.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from feste.backend import Request, Response, Secret, error_for_status, redact
from feste.backend.clients import PerLoop
from feste.backend.cohere.replies import usage
from feste.backend.cohere.stream import Assembly
from feste.errors import (
    CallError,
    CallTimeout,
    ConnectionLost,
    InvalidRequest,
    MalformedResponse,
    QuotaExhausted,
    Rejected,
    ServerError,
    Unreachable,
)

if TYPE_CHECKING:
    import httpx
    from cohere.core import AsyncHttpClient

__all__ = ["send"]

#: Seconds to make a connection. Nothing has been sent by then, so it is always safe to try again.
_CONNECT = 15.0
_HEADERS = {"content-type": "application/json"}

_lock = threading.Lock()
_tls: ssl.SSLContext | None = None


def _load() -> None:
    """Import the SDK and make the process's one TLS context; both take long."""
    global _tls
    with _lock:
        if _tls is None:
            import cohere.core.client_wrapper
            import httpx

            _tls = httpx.create_ssl_context()


def _opened(proxies: bool) -> httpx.AsyncClient:
    import httpx

    return httpx.AsyncClient(
        verify=_tls or True,
        trust_env=proxies,
        follow_redirects=False,
        timeout=httpx.Timeout(None, connect=_CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


#: Connections, shared by all clients on a loop: to loopback never through a proxy, to others maybe.
_POOLS: dict[bool, PerLoop[httpx.AsyncClient]] = {
    True: PerLoop(lambda: _opened(False), lambda pool: pool.aclose()),
    False: PerLoop(lambda: _opened(True), lambda pool: pool.aclose()),
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
    try:
        async with asyncio.timeout(request.timeout):
            if on_chunk is not None and "messages" in request.body:
                return await _stream(request, door, secret, on_chunk)
            reply = await door.request(
                method="POST",
                json=dict(request.body),
                headers=_HEADERS,
                request_options={"max_retries": 0},
            )
        return _answer(reply.status_code, reply.content, dict(reply.headers), secret)
    except TimeoutError:
        return CallTimeout(f"no whole answer within {request.timeout:g} seconds")
    except Exception as error:
        return _failure(error, secret)


async def _stream(
    request: Request, door: AsyncHttpClient, secret: Secret, on_chunk: Callable[[str], None]
) -> Response | CallError:
    body = {**request.body, "stream": True}
    options: Any = {"max_retries": 0}
    async with door.stream(
        method="POST", json=body, headers=_HEADERS, request_options=options
    ) as reply:
        headers = dict(reply.headers)
        if reply.status_code != 200:
            return _answer(reply.status_code, await reply.aread(), headers, secret)
        assembly = Assembly(on_chunk)
        async for line in reply.aiter_lines():
            if line.startswith("data:"):
                assembly.take(json.loads(line[5:]))
    if not assembly.complete:
        return ConnectionLost("the stream ended before the answer did")
    return _response(assembly.payload, headers)


def _answer(
    status: int, content: bytes, headers: Mapping[str, str], secret: Secret
) -> Response | CallError:
    """Make of an HTTP reply what it means."""
    try:
        payload = json.loads(content)
    except ValueError:
        payload = None
    if not 200 <= status < 300:
        return _refusal(status, content, payload, headers, secret)
    if not isinstance(payload, dict):
        start = redact(content[:80].decode(errors="replace"), secret)
        return MalformedResponse(f"the reply is no JSON object: {start!r}", status=status)
    return _response(payload, headers)


def _response(payload: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    name = payload.get("id")
    return Response(payload, usage(payload), headers, name if isinstance(name, str) else None)


def _refusal(
    status: int, content: bytes, payload: Any, headers: Mapping[str, str], secret: Secret
) -> CallError:
    said = payload if isinstance(payload, dict) else {}
    message, name = said.get("message"), said.get("id") or headers.get("x-debug-trace-id")
    error = error_for_status(
        status,
        message if isinstance(message, str) else content.decode(errors="replace"),
        headers=headers,
        request_id=name if isinstance(name, str) else None,
        secret=secret,
    )
    if status == 499:  # "request cancelled", on Cohere's side: it asks to try again
        return _as(ServerError, error)
    if status == 429 and "/ month" in str(error):  # a trial key has used up its month
        return _as(QuotaExhausted, error)
    return error


def _as(kind: type[CallError], error: CallError) -> CallError:
    made = kind(*error.args)
    made.__dict__.update(error.__dict__)
    return made


def _failure(error: Exception, secret: Secret) -> CallError:
    """Make Feste's error of one that the SDK, httpx or the JSON encoder raised."""
    import httpx

    said = redact(f"{type(error).__name__}: {error}".rstrip(": "), secret)
    if isinstance(error, CallError):
        return error
    if isinstance(
        error,
        (
            httpx.ConnectError,
            httpx.ConnectTimeout,
            httpx.PoolTimeout,
            httpx.ProxyError,
            httpx.UnsupportedProtocol,
        ),
    ):
        return Unreachable(f"no connection could be made: {said}")
    if isinstance(error, httpx.TimeoutException):
        return CallTimeout(said)
    if isinstance(error, httpx.TransportError):
        return ConnectionLost(f"the connection broke: {said}")
    if isinstance(error, httpx.DecodingError):
        return MalformedResponse(f"the reply could not be read: {said}")
    if isinstance(error, (ValueError, TypeError)):
        return InvalidRequest(f"the request could not be written as JSON: {said}")
    return Rejected(f"the SDK broke: {said}", billed="unknown")
