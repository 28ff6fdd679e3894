"""The HTTP client below the SDK: connections, and nothing that the SDK does itself.

Through the SDK's own client on aiohttp, a call parses its URL three times, copies its headers seven
times, and passes redirects, cookies and authentication that nobody uses here: 0.42 ms of CPU. This
one gives to aiohttp what the SDK has built, as it is: 0.25 ms; aiohttp alone takes 0.09.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import aiohttp
import httpx2
import openai

from feste.backend import ACCEPT_ENCODING, ERROR_BYTES, MOST_BYTES, Body, read_body
from feste.errors import MalformedResponse

__all__ = ["Pool", "ProxyPool", "most"]

#: The bytes that the reply to the request of this task may have, and for a stream the answers in it.
most: ContextVar[tuple[int, int]] = ContextVar("most", default=(MOST_BYTES, 1))

#: The name under which a request carries what aiohttp will send.
_SENT = "feste"


class Pool(httpx2.AsyncClient):
    """Send what the SDK asks for: through no proxy, following no redirect, keeping no cookie.

    Errors of aiohttp pass through the SDK as they are. There is no limit on the time of a request.

    :param tls: the TLS context.
    :param connect: the seconds that making a connection may take.
    :param idle: the seconds that an unused connection is kept.
    """

    def __init__(self, tls: ssl.SSLContext, connect: float, idle: float) -> None:
        super().__init__(transport=httpx2.AsyncBaseTransport())  # it is never used
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=idle),
            cookie_jar=aiohttp.DummyCookieJar(),  # accounts share connections, but no cookies
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect),
            headers={"Accept-Encoding": ACCEPT_ENCODING},
            auto_decompress=False,  # `read_body` unpacks, and stops in time
        )

    def build_request(self, method: str, url: Any, **given: Any) -> httpx2.Request:
        """Return a request that carries what will be sent; it is neither checked nor completed.

        :param method: the HTTP method.
        :param url: the whole URL.
        :param given: as for the base class, of which ``headers`` and ``content`` count.
        """
        sent = {"url": url, "headers": given.get("headers"), "data": given.get("content")}
        empty = httpx2.ByteStream(b"")
        return httpx2.Request(method, _parsed(url), stream=empty, extensions={_SENT: sent})

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, **given: Any
    ) -> httpx2.Response:
        """Send a request, and return the answer, whole or, for a stream, as its headers have come.

        :param request: what :meth:`build_request` has made.
        :param stream: whether the body is read later.
        :param given: ignored.
        :raises aiohttp.ClientError: if there is no answer.
        """
        answer = await self._session.request(
            request.method, allow_redirects=False, **request.extensions[_SENT]
        )
        raw = answer.content.iter_any()
        kind = answer.headers.get("Content-Encoding", "")
        close = answer.close  # a connection whose answer is whole is back in the pool already
        body = await _bounded(raw, kind, close, status=answer.status, stream=stream)
        headers = answer.raw_headers
        if kind:
            headers = tuple(h for h in headers if h[0].lower() != b"content-encoding")
        return httpx2.Response(answer.status, headers=headers, request=request, **body)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()
        await super().aclose()


class ProxyPool(openai.DefaultAioHttpClient):
    """The SDK's own client, which knows proxies, with the same limits for answers."""

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, **given: Any
    ) -> httpx2.Response:
        """Send a request, and return the answer, whole or, for a stream, as its headers have come.

        :param request: the request.
        :param stream: whether the body is read later.
        :param given: as for the base class.
        """
        answer = await super().send(request, stream=True, **given)
        raw, kind = answer.aiter_raw(), answer.headers.get("content-encoding", "")
        body = await _bounded(raw, kind, answer.aclose, status=answer.status_code, stream=stream)
        headers = [h for h in answer.headers.raw if h[0].lower() != b"content-encoding"]
        return httpx2.Response(answer.status_code, headers=headers, request=request, **body)


async def _bounded(
    raw: AsyncIterable[bytes],
    encoding: str,
    close: Callable[[], Awaitable[None] | None],
    *,
    status: int,
    stream: bool,
) -> dict[str, Any]:
    """Return the body of an answer as httpx takes it, and read no more than an answer can have."""
    allowed, answers = most.get()
    is_error = not 200 <= status < 300
    try:
        if stream and status == 200:
            return {"stream": _Pieces(raw, Body(encoding, most=allowed, answers=answers), close)}
        size = ERROR_BYTES if is_error else allowed
        return {"content": await read_body(raw, encoding, most=size)}
    except BaseException as error:
        await _closed(close)
        if is_error and isinstance(error, MalformedResponse):
            return {"content": (error.raw or "").encode()}  # the status says more
        raise


async def _closed(close: Callable[[], Awaitable[None] | None]) -> None:
    waiting = close()
    if waiting is not None:
        await waiting


class _Pieces(httpx2.AsyncByteStream):
    """The body of an answer as it arrives."""

    def __init__(
        self, raw: AsyncIterable[bytes], body: Body, close: Callable[[], Awaitable[None] | None]
    ) -> None:
        self._raw, self._body, self._close = raw, body, close

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._raw:
            for part in self._body.parts(piece):
                yield part

    async def aclose(self) -> None:
        await _closed(self._close)


@functools.lru_cache(maxsize=256)  # parsing takes as long as sending, and the URLs are few
def _parsed(url: str) -> httpx2.URL:
    return httpx2.URL(url)
