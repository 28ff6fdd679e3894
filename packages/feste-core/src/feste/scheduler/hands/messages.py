"""Pickled messages on a socket between this process and its workers; large parts are not copied.

A message is a list of parts: first the pickle, then the buffers of what it holds, such as the data of
arrays. They go from where they are straight into the socket, and from the socket into memory of
their size, where what is unpickled uses them.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Parts", "dumped", "loaded", "receive", "send"]

Parts = list[memoryview]
"""A message; an empty one asks a worker to end."""

_COUNT = struct.Struct("!Q")
#: The most parts that one system call takes everywhere.
_MOST = 512


class _Collector:
    """A file that keeps what is written to it: a pickler passes on large texts and bytes as they are."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def write(self, part: Any) -> int:
        # what may change, or could not grow while it is held here, is copied
        self.parts.append(part if type(part) is bytes else bytes(part))
        return len(part)


def dumped(value: Any, pickler: Callable[..., Any]) -> Parts:
    """Return a value as a message.

    :param value: the value.
    :param pickler: the class of the pickler.
    """
    file = _Collector()
    buffers: list[pickle.PickleBuffer] = []
    pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    own = [memoryview(part).cast("B") for part in file.parts]
    return [_numbers([sum(map(len, own)), *(b.raw().nbytes for b in buffers)]), *own] + [
        b.raw() for b in buffers
    ]


def _numbers(sizes: Sequence[int]) -> memoryview:
    return memoryview(b"".join(map(_COUNT.pack, (len(sizes), *sizes))))


def loaded(parts: Sequence[bytearray]) -> Any:
    """Return the value of a message that was received.

    :param parts: the pickle and its buffers. They must come from the socket of our own parent or child
        process only.
    """
    return pickle.loads(parts[0], buffers=parts[1:])


def send(to: socket.socket, parts: Parts, again: Callable[[], None] | None = None) -> None:
    """Send a message.

    :param to: the socket.
    :param parts: the message.
    :param again: is called each time that the socket's timeout has passed; may raise.
    :raises OSError: if the other side is gone.
    """
    left = [part for part in parts or [_numbers([])] if part.nbytes]
    while left:
        try:
            sent = to.sendmsg(left[:_MOST])
        except TimeoutError:
            if again is None:
                raise
            again()
            continue
        done = 0
        while done < len(left) and sent >= left[done].nbytes:
            sent -= left[done].nbytes
            done += 1
        del left[:done]
        if sent:
            left[0] = left[0][sent:]


def receive(source: socket.socket, again: Callable[[], None] | None = None) -> list[bytearray]:
    """Receive a message; an empty list asks a worker to end.

    :param source: the socket.
    :param again: as for :func:`send`.
    :raises EOFError: if the other side has closed it.
    """
    (count,) = _COUNT.unpack(_exactly(source, _COUNT.size, again))
    head = _exactly(source, count * _COUNT.size, again)
    sizes = [size for (size,) in _COUNT.iter_unpack(head)]
    return [_exactly(source, size, again) for size in sizes]


def _exactly(source: socket.socket, size: int, again: Callable[[], None] | None) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        try:
            got = source.recv_into(rest)
        except TimeoutError:
            if again is None:
                raise
            again()
            continue
        if not got:
            raise EOFError
        rest = rest[got:]
    return data
