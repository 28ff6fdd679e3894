"""Messages between processes: what is large is not copied, and none is read in part."""

from __future__ import annotations

import pickle
import socket
import sys
import threading
from typing import Any

import pytest

import feste
from feste.errors import ConfigError, NodeError, RunFailed
from feste.scheduler.hands.messages import dumped, loaded, receive, send

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process tasks need POSIX")

#: More than a socket holds.
MANY = 3_000_000

process = feste.task(executor="process")


class Block:
    """Something with a buffer, as an array has."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (Block, (pickle.PickleBuffer(self.data),))


def through(value: Any) -> Any:
    """Send a value through a socket."""
    one, other = socket.socketpair()
    with one, other:
        thread = threading.Thread(target=send, args=(one, dumped(value, pickle.Pickler)))
        thread.start()
        parts = receive(other)
        thread.join()
    return loaded(parts)


@pytest.mark.parametrize("size", [0, 1, MANY])
def test_a_value_arrives_as_it_was(size: int) -> None:
    """Whatever its size, and with any number of buffers."""
    value = {"bytes": b"a" * size, "text": "ü" * size, "array": bytearray(b"b" * size)}
    assert through(value) == value
    blocks = through([Block(bytearray(b"c" * size)) for _ in range(3)])
    assert [bytes(block.data) for block in blocks] == [b"c" * size] * 3
    assert len(through([Block(bytearray(b"d")) for _ in range(2000)])) == 2000


def test_large_parts_are_sent_from_where_they_are_and_used_where_they_arrive() -> None:
    """No copy on either side: the data of arrays, and texts of bytes on the way out."""
    data, text = bytearray(MANY), b"x" * MANY
    parts = dumped((Block(data), text), pickle.Pickler)
    data[0] = 7
    assert parts[-1][0] == 7
    assert any(part.obj is text for part in parts)
    received = [bytearray(part) for part in (b"".join(parts[1:-1]), parts[-1])]
    block, _ = loaded(received)
    received[1][1] = 9
    assert block.data[1] == 9


def test_what_may_still_change_is_copied() -> None:
    """A bytearray could not grow while a message holds on to it."""
    data = bytearray(MANY)
    parts = dumped(data, pickle.Pickler)
    data.extend(b"more")
    assert sum(part.nbytes for part in parts) > MANY


def test_a_message_that_breaks_off_is_none() -> None:
    """As is one that does not begin."""
    for begun in (b"", b"\0" * 3, bytes(dumped([1], pickle.Pickler)[0])):
        one, other = socket.socketpair()
        with one, other:
            one.sendall(begun)
            one.close()
            with pytest.raises(EOFError):
                receive(other)


def test_waiting_can_be_given_up() -> None:
    """A socket with a timeout asks each time, also in the middle of a message."""

    def stop() -> None:
        raise EOFError("dead")

    one, other = socket.socketpair()
    with one, other:
        one.settimeout(0.001)
        other.settimeout(0.001)
        with pytest.raises(EOFError, match="dead"):
            receive(other, stop)
        with pytest.raises(EOFError, match="dead"):
            send(one, dumped(b"x" * MANY, pickle.Pickler), stop)
        with pytest.raises(EOFError, match="dead"):  # what came is not all of it
            receive(other, stop)


class Chain:
    """What pickle follows link by link."""

    def __init__(self, rest: Any) -> None:
        self.rest = rest


def test_objects_that_are_too_deep_are_refused_and_said_to_be() -> None:
    """As an argument before anything runs, as a result by its node."""
    deep: Any = None
    for _ in range(3000):
        deep = Chain(deep)
    with pytest.raises(ConfigError, match="recursion"):
        process(lambda chain: 1)(deep).compute()

    def grow() -> Any:
        made: Any = None
        for _ in range(3000):
            made = [made]
        return made

    with pytest.raises(RunFailed) as failed:
        process(grow)().compute()
    (error,) = failed.value.errors
    assert isinstance(error, NodeError) and "recursion" in str(error)
