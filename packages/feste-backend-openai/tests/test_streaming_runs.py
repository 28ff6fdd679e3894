"""Streams and windows over sockets: what is given up is cancelled at the server, and nothing is sent twice."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import feste
from feste.backend import Limits
from feste.backend.openai import OpenAI
from feste.errors import ConnectionLost, RunFailed
from feste.testing import Fault, SimServer

LONG = 30.0


@pytest.fixture
def llm(server: SimServer) -> OpenAI:
    return OpenAI("m", base_url=f"{server.url}/v1", limits=Limits(concurrency=4))


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread or process does."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_a_streamed_chat_is_the_value_that_is_kept(llm: OpenAI, server: SimServer) -> None:
    """The pieces come from the server's events; the answer is kept, so asking again is free."""
    node = llm.chat("REPLY: one two three")

    pieces = list(feste.stream(node))

    assert len(pieces) > 2
    assert "".join(pieces) == node.compute()
    assert len(server.ledger()) == 1
    assert server.requests()[0].body["stream"] is True


def test_only_the_streamed_call_is_streamed(llm: OpenAI, server: SimServer) -> None:
    """What it needs is asked for as ever."""
    first = llm.chat("REPLY: hello")

    list(feste.stream(llm.chat(first)))

    assert [request.body.get("stream") for request in server.requests()] == [None, True]


@pytest.mark.parametrize("how", ["break", "close", "cancel", "as_completed", "map"])
def test_who_leaves_early_leaves_no_request_behind(
    llm: OpenAI, server: SimServer, how: str
) -> None:
    """However a consumer stops, the server sees its connections close, and no further request."""
    drips = how in ("break", "close")
    server.add(Fault(kind="drip" if drips else "hang", pause=0.2, times=None))
    words = "REPLY: " + "word " * 400

    async def cancelled(results: Any) -> None:
        async def read() -> None:
            async for _ in results:
                pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(until, lambda: server.totals().in_flight == count)
        task.cancel()
        await asyncio.wait([task])

    count = 4 if how in ("as_completed", "map") else 1
    if how == "break":
        for _ in feste.stream(llm.chat(words)):
            break
    elif how == "close":
        pieces = feste.stream(llm.chat(words))
        next(pieces)
        pieces.close()
    elif how == "cancel":
        asyncio.run(cancelled(feste.stream(llm.chat(words))))
    elif how == "as_completed":
        asyncio.run(cancelled(feste.as_completed([llm.chat(f"{i}") for i in range(12)])))
    else:
        asyncio.run(cancelled(feste.map(lambda i: llm.chat(f"{i}"), range(1000), window=8)))

    until(lambda: server.totals().in_flight == 0)
    assert len(server.requests()) == count


def test_a_cancelled_acompute_leaves_no_request_behind(llm: OpenAI, server: SimServer) -> None:
    """``asyncio.timeout`` around ``await node`` ends the request at the server, too."""
    server.add(Fault(kind="hang", times=None))

    async def main() -> None:
        task = asyncio.ensure_future(feste.acompute(llm.chat("a")))
        await asyncio.to_thread(until, lambda: server.totals().in_flight == 1)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())

    until(lambda: server.totals().in_flight == 0)
    assert len(server.requests()) == 1


def test_a_stream_that_breaks_off_is_not_sent_again(llm: OpenAI, server: SimServer) -> None:
    """Half an answer was handed out: another one must not follow it."""
    server.add(Fault(kind="truncated"))
    pieces = feste.stream(llm.chat("REPLY: " + "word " * 50))
    got: list[str] = []

    with pytest.raises(RunFailed, match="handed out, so nothing was sent again") as caught:
        for piece in pieces:
            got.append(piece)

    assert isinstance(caught.value.__cause__, ConnectionLost)
    assert "".join(got) and ("word " * 50).startswith("".join(got))
    assert len(server.requests()) == 1


def test_refusals_before_the_first_piece_are_retried(llm: OpenAI, server: SimServer) -> None:
    server.add(Fault(status=500))

    assert "".join(feste.stream(llm.chat("REPLY: one two"))) == "one two"
    assert len(server.requests()) == 2


def test_a_window_over_a_server(llm: OpenAI, server: SimServer) -> None:
    """Each item is asked once, no more at a time than the account takes; embeddings share requests."""
    chats = list(feste.map(lambda i: llm.chat(f"REPLY: {i}"), range(60), window=10))
    asked = len(server.requests())
    vectors = list(feste.map(lambda i: llm.embed(f"text {i}"), range(60), window=20))

    assert chats == [str(i) for i in range(60)]
    assert (asked, server.totals().peak <= 4) == (60, True)
    assert len({tuple(vector) for vector in vectors}) == 60
    assert len(server.requests()) - asked < 20


def test_descriptors_and_threads_stay_as_they_are(llm: OpenAI, server: SimServer) -> None:
    """Two hundred streams, half of them left early."""

    def some(count: int) -> None:
        for i in range(count):
            for _ in feste.stream(llm.chat(f"REPLY: one two {i}")):
                if i % 2:
                    break

    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    some(10)
    until(lambda: server.totals().in_flight == 0)
    descriptors, threads = open_now()
    some(200)
    until(lambda: server.totals().in_flight == 0)

    assert open_now()[0] <= descriptors + 4
    assert open_now()[1] == threads
