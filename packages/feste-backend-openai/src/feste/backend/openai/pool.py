"""The HTTP client below the SDK: connections, and nothing that the SDK does itself.

Through the SDK's own client on aiohttp, a call parses its URL three times, copies its headers seven
times, and passes redirects, cookies and authentication that nobody uses here: 0.42 ms of CPU. This
one gives to aiohttp what the SDK has built, as it is: 0.25 ms; aiohttp alone takes 0.09.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import httpx2

__all__ = ["Pool"]

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
        body: Any = {"stream": _Pieces(answer)} if stream else {"content": await answer.read()}
        headers = answer.raw_headers
        if "Content-Encoding" in answer.headers:  # aiohttp has decoded it
            headers = tuple(h for h in headers if h[0].lower() != b"content-encoding")
        return httpx2.Response(answer.status, headers=headers, request=request, **body)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()
        await super().aclose()


class _Pieces(httpx2.AsyncByteStream):
    """The body of an answer as it arrives."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._answer.content.iter_any():
            yield piece

    async def aclose(self) -> None:
        self._answer.close()  # a connection whose answer is whole is back in the pool already


@functools.lru_cache(maxsize=256)  # parsing takes as long as sending, and the URLs are few
def _parsed(url: str) -> httpx2.URL:
    return httpx2.URL(url)
