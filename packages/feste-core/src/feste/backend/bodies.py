"""Read what a server sends, up to what an answer can be: its size, its lines, its parts, its depth.

A server that sends without end, or a small reply that unpacks to gigabytes, would take the memory
of the run and all its other answers along. So would one of empty objects: each is 3 bytes on the
wire and 80 in memory.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterable, Iterator
from typing import Any, Final, NoReturn

from feste.errors import MalformedResponse

__all__ = [
    "ACCEPT_ENCODING",
    "ERROR_BYTES",
    "MOST_BYTES",
    "Body",
    "from_json",
    "is_deep",
    "read_body",
]

#: The bytes of a reply, unpacked, that are read by default.
MOST_BYTES: Final = 16 << 20
#: The bytes that are read of a reply that is an error by its status.
ERROR_BYTES: Final = 65_536
#: The levels of lists and objects in each other that a reply may have.
MOST_DEPTH: Final = 100
#: What :class:`Body` can unpack: the value of the header of that name, which a client sends.
ACCEPT_ENCODING: Final = "gzip, deflate"

#: Of a stream: the lines that the longest answers have several times over, and the bytes of one.
_LINES: Final = 500_000
_LINE: Final = 4 << 20
#: For how many of the bytes that a reply may have it may have a list or object, whole or as a stream,
#: and a comma. A vector has one for 24 bytes, a logprob of 512 two objects and ten commas.
_PER_OBJECT: Final = 64
_PER_STREAMED: Final = 32
_PER_COMMA: Final = 16
#: The packed bytes of a stream that are unpacked at once, to at most 1,032 times as many.
_STEP: Final = 2048
#: The bytes that are kept of a body that cannot be used.
_RAW: Final = 65_536
_GZIP: Final = zlib.MAX_WBITS | 16


class Body:
    """The body of one reply, which is given piece by piece as it comes from the socket.

    :param encoding: the header ``Content-Encoding``.
    :param most: the most bytes that it may have, unpacked.
    :param answers: for a stream of events, how many answers it has; None for a body that is no
        stream.
    :raises MalformedResponse: if it is packed in a way that nobody asked for.

    >>> Body("gzip", most=1000).take(zlib.compress(b"x" * 1001, wbits=31))
    Traceback (most recent call last):
    feste.errors.MalformedResponse: the reply is longer than the 1,000 bytes that it may have, so the rest was not read
    """

    def __init__(
        self, encoding: str = "", *, most: int = MOST_BYTES, answers: int | None = None
    ) -> None:
        self._most = self._left = most
        self._lines = None if answers is None else _LINES * answers
        self._objects = most // (_PER_OBJECT if answers is None else _PER_STREAMED)
        self._commas = most // _PER_COMMA
        self._open = 0  # the bytes of the line that has not ended
        kind = encoding.strip().lower()
        if kind not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise MalformedResponse(
                f"the reply is packed as {kind[:40]!r}, which was not asked for; is there a proxy "
                "that changes replies?"
            )
        self._packed = kind not in ("", "identity")
        self._unpacker = zlib.decompressobj(_GZIP if "gzip" in kind else zlib.MAX_WBITS)
        self._begun = False

    def take(self, data: bytes) -> bytes:
        """Return what a piece from the socket brings of the body.

        :param data: the piece.
        :raises MalformedResponse: if the body becomes too long, has too many parts, or cannot be
            unpacked.
        """
        if self._packed:
            data = self._unpacked(data)
        self._left -= len(data)
        if self._left < 0:
            raise MalformedResponse(
                f"the reply is longer than the {self._most:,} bytes that it may have, so the rest was "
                "not read"
            )
        self._objects -= data.count(b"{") + data.count(b"[")
        self._commas -= data.count(b",")
        if self._objects < 0 or self._commas < 0:
            raise MalformedResponse(
                "the reply has more lists, objects or items than an answer to this request, so it was "
                "not read"
            )
        if self._lines is not None:
            self._count(data)
        return data

    def parts(self, data: bytes) -> Iterator[bytes]:
        """Yield what a piece of a stream brings, in parts that fit into memory however they unpack.

        :param data: the piece from the socket.
        :raises MalformedResponse: if the body becomes too long, or cannot be unpacked.
        """
        step = _STEP if self._packed else max(1, len(data))
        for start in range(0, len(data), step):
            yield self.take(data[start : start + step])

    def _count(self, data: bytes) -> None:
        assert self._lines is not None
        self._lines -= data.count(b"\n")
        last = data.rfind(b"\n")
        self._open = self._open + len(data) if last < 0 else len(data) - last - 1
        if self._lines < 0 or self._open > _LINE:
            raise MalformedResponse(
                "the stream has more lines, or a longer one, than an answer has, so the rest was not "
                "read"
            )

    def _unpacked(self, data: bytes) -> bytes:
        found = bytearray()
        most = self._left
        try:
            while data:
                if self._unpacker.eof:  # another one follows
                    self._unpacker = zlib.decompressobj(_GZIP)
                found += self._inflated(data, most - len(found) + 1)
                if len(found) > most:
                    self._left = -1
                    return b""
                data = self._unpacker.unused_data
        except zlib.error as error:
            raise MalformedResponse(f"the reply cannot be unpacked: {error}") from None
        return bytes(found)

    def _inflated(self, data: bytes, most: int) -> bytes:
        try:
            return self._unpacker.decompress(data, most)
        except zlib.error:
            if self._begun:
                raise
            self._unpacker = zlib.decompressobj(-zlib.MAX_WBITS)  # some leave the head of zlib out
            return self._unpacker.decompress(data, most)
        finally:
            self._begun = True

    @property
    def is_whole(self) -> bool:
        """Whether the packed data has come to its end."""
        return not self._packed or self._unpacker.eof or not self._begun


async def read_body(
    pieces: AsyncIterable[bytes], encoding: str = "", *, most: int = MOST_BYTES
) -> bytes:
    """Read a body to its end.

    :param pieces: its pieces as they come from the socket, not unpacked.
    :param encoding: the header ``Content-Encoding``.
    :param most: the most bytes that it may have, unpacked.
    :raises MalformedResponse: if it has more, or cannot be unpacked; ``raw`` is its beginning, from
        which the backend has to take its key.
    """
    body, whole, piece = Body(encoding, most=most), bytearray(), b""
    try:
        async for piece in pieces:
            whole += body.take(piece)
        if not body.is_whole:
            raise MalformedResponse("the reply cannot be unpacked: its end is missing")
    except MalformedResponse as error:
        whole += b"" if encoding else piece  # the one that was too much
        error.raw = whole[:_RAW].decode(errors="replace")
        raise
    return bytes(whole)


def from_json(content: bytes) -> Any:
    """Return the JSON of a reply: as in the standard, so without NaN, and no deeper than 100 levels.

    :param content: the body.
    :raises ValueError: if it is no such JSON.

    >>> from_json(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> from_json(b"[" * 101 + b"]" * 101)
    Traceback (most recent call last):
    ValueError: it has more than 100 levels
    """
    try:
        found = _decode(content.decode("utf-8-sig"))
    except RecursionError:
        deep = True
    else:  # most replies have so few lists and objects that none is looked at
        deep = content.count(b"[") + content.count(b"{") > MOST_DEPTH and is_deep(found)
    if deep:
        raise ValueError(f"it has more than {MOST_DEPTH} levels")
    return found


def is_deep(value: Any) -> bool:
    """Return whether a value has more than 100 levels of lists and objects.

    :param value: what JSON can hold.
    """
    level: list[Any] = [value] if isinstance(value, (list, dict)) else []
    for _ in range(MOST_DEPTH):
        found: list[Any] = []
        for one in level:
            items = one.values() if isinstance(one, dict) else one
            if not _FLAT.issuperset(map(type, items)):  # so long lists of numbers cost little
                found += [item for item in items if type(item) in (list, dict)]
        if not found:
            return False
        level = found
    return True


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode
_FLAT: Final = frozenset((str, int, float, bool, type(None)))
