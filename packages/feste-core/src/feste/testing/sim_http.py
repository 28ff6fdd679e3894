"""HTTP/1.1 for the process behind `SimServer`, on a plain `asyncio.Protocol`.

No web framework is used, because faults need the bare connection (a reset, half a body) and the
server of a benchmark must cost little.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any, Protocol, cast
from urllib.parse import unquote

from feste.testing.sim_types import Billed

__all__ = ["Connection", "Handler", "Reply", "Request"]

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_MAX_HEAD = 65_536
#: The bytes that wait to be read by the client of an endless reply, at most about.
_FLOOD = 1 << 20
_SECRETS = frozenset({"authorization", "proxy-authorization", "api-key", "x-api-key", "cookie"})


@dataclass(slots=True)
class Request:
    """One request, with the facts that the log shows."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    id: str = ""
    items: int = 0
    status: int | None = None
    fault: str | None = None
    started: float = 0.0
    finished: float | None = None
    billed: Billed = field(default_factory=Billed)
    dollars: float | None = None
    delivered: bool = False
    left: float | None = None

    def logged(self) -> dict[str, Any]:
        """Return the log entry: everything, without secrets."""
        headers = dict(self.headers)
        for name in _SECRETS & headers.keys():
            headers[name] = "Bearer ***" if headers[name].startswith("Bearer ") else "***"
        known = {name: getattr(self, name) for name in self.__slots__}
        text = self.body.decode(errors="replace")
        return {**known, "headers": headers, "body": text, "billed": asdict(self.billed)}


@dataclass(slots=True)
class Reply:
    """One reply: pieces, a pause in seconds before each, and the announced size (None: chunked).

    `cut` ends the connection after what is there; `delivers` says that it is a whole answer.
    `raw` pieces are all that is sent, the head included; `endless` is repeated after the pieces
    until the client leaves.
    """

    status: int
    pieces: Sequence[bytes]
    headers: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    pause: float = 0.0
    cut: bool = False
    delivers: bool = False
    raw: bool = False
    endless: bytes = b""

    @classmethod
    def whole(cls, status: int, body: bytes, headers: dict[str, str] | None = None) -> Reply:
        """Make a reply of a single piece."""
        return cls(status, [body], headers or {}, size=len(body))

    def head(self) -> bytes:
        """Encode the status line and the headers."""
        if self.raw:
            return b""
        headers = {"content-type": "application/json"}
        headers |= {name.lower(): value for name, value in self.headers.items()}
        if self.size is None:
            headers["transfer-encoding"] = "chunked"
        else:
            headers["content-length"] = str(self.size)
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Status')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def framed(self, piece: bytes) -> bytes:
        """Encode one piece of the body."""
        return piece if self.raw or self.size is not None else b"%x\r\n%b\r\n" % (len(piece), piece)

    def tail(self) -> bytes:
        """Encode the end of the body."""
        whole = self.raw or self.size is not None or self.cut or self.endless
        return b"" if whole else b"0\r\n\r\n"


class Handler(Protocol):
    """The interface of the server behind a `Connection`."""

    def arrive(self, request: Request) -> None:
        """Record the arrival of a request."""

    async def answer(self, request: Request) -> Reply | None:
        """Answer a request; return None if its fault leaves it without a reply."""

    def leave(self, request: Request, *, early: bool = False) -> None:
        """Record that a request ended or its client left early; only the first call counts."""


class Connection(asyncio.Protocol):
    """One client's connection: requests are read and answered one at a time."""

    def __init__(self, handler: Handler, connections: set[Connection]) -> None:
        self.handler, self.connections = handler, connections
        self.data = bytearray()
        self.request: Request | None = None
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Record that the client left; its request is generated all the same."""
        self.connections.discard(self)
        if self.request is not None:
            self.handler.leave(self.request, early=True)
        if not self.lost.done():
            self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Collect bytes until a request is complete."""
        self.data += data
        if self.task is None:
            self.advance()

    def advance(self, done: asyncio.Task[None] | None = None) -> None:
        """Serve the next request, if it has arrived already."""
        self.task = None
        error = done.exception() if done and not done.cancelled() else None
        if error is not None:
            traceback.print_exception(error)
            self.transport.abort()
        if self.transport.is_closing():
            return
        try:
            request = take_request(self.data)
        except (ValueError, IndexError):
            self.write(Reply.whole(400, b'{"error": {"message": "not HTTP/1.1"}}'))
            self.transport.close()
            return
        if request is not None:
            self.task = asyncio.get_running_loop().create_task(self.serve(request))
            self.task.add_done_callback(self.advance)

    async def serve(self, request: Request) -> None:
        """Answer one request."""
        keep = request.headers.get("connection", "").lower() != "close"
        self.request = request
        self.handler.arrive(request)
        try:
            reply = await self.handler.answer(request)
            if reply is not None:
                await self.send(request, reply)
                keep = keep and not reply.cut
            elif request.fault == "hang":
                await self.lost
            else:
                self.reset()
        finally:
            self.handler.leave(request)
            self.request = None
        if not keep:
            self.transport.close()

    async def send(self, request: Request, reply: Reply) -> None:
        """Send a reply: at once, or in pieces if it has a pause."""
        if self.transport.is_closing():
            return
        request.status = reply.status
        if reply.pause <= 0:
            self.write(reply)
            if reply.endless:
                await self.flood(reply.framed(reply.endless))
            request.delivered = reply.delivers
            return
        self.transport.write(reply.head())
        for piece in reply.pieces:
            await asyncio.wait([self.lost], timeout=reply.pause)
            if self.transport.is_closing():
                return
            self.transport.write(reply.framed(piece))
        self.transport.write(reply.tail())
        request.delivered = reply.delivers

    async def flood(self, piece: bytes) -> None:
        """Send a piece again and again, as fast as it is read, until the client leaves."""
        while not self.transport.is_closing():
            waiting = self.transport.get_write_buffer_size() > _FLOOD
            if not waiting:
                self.transport.write(piece)
            await asyncio.wait([self.lost], timeout=0.002 if waiting else 0)

    def write(self, reply: Reply) -> None:
        """Send a whole reply."""
        body = b"".join(map(reply.framed, reply.pieces))
        self.transport.write(reply.head() + body + reply.tail())

    def reset(self) -> None:
        """Close the connection so that the client sees a reset."""
        if self.request is not None:
            self.handler.leave(self.request)
        raw = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def take_request(data: bytearray) -> Request | None:
    """Remove one request from the received bytes and return it.

    :param data: the bytes; those of the request are removed.
    :returns: the request, or None while it is incomplete.
    :raises ValueError: if the bytes are not HTTP/1.1.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > _MAX_HEAD:
            raise ValueError("the head of the request is too long")
        return None
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if "chunked" in headers.get("transfer-encoding", ""):
        body, stop = _unchunked(data, end + 4)
    else:
        stop = end + 4 + int(headers.get("content-length") or 0)
        body = bytes(data[end + 4 : stop]) if len(data) >= stop else None
    if body is None:
        return None
    del data[:stop]
    return Request(method, unquote(target.partition("?")[0]), headers, body)


def _unchunked(data: bytearray, at: int) -> tuple[bytes | None, int]:
    parts = []
    while (line := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line].split(b";")[0], 16)
        if len(data) < line + 2 + size + 2:
            break
        parts.append(bytes(data[line + 2 : line + 2 + size]))
        at = line + 2 + size + 2
        if size == 0:
            return b"".join(parts), at
    return None, at
