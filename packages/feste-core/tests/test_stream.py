"""``feste.stream``: the pieces make up the value, and none is sent twice or by an orphan."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Backend, OnChunk, Operation, Request, Response
from feste.errors import (
    BlockingCallError,
    ConnectionLost,
    FesteError,
    InvalidRequest,
    ParameterError,
    RunFailed,
)
from feste.scheduler.driver import driver
from feste.scheduler.run import Run
from feste.testing import FakeBackend, FakeParams

LONG = 30.0


class Teller(Backend):
    """A backend that tells a story word by word, as a test lets it."""

    plugin = "teller"

    def __init__(self, words: int = 3, breaks: int = 0, after: int = 0) -> None:
        self.words, self.breaks, self.after = words, breaks, after
        self.holds = False
        self.sent = 0
        self.cancelled = threading.Event()
        self.begun = threading.Event()

    def _prepare(self, prompt: str) -> Request:
        return Request(self.plugin, "tell", "plugin:teller", {"prompt": prompt})

    async def _send(self, request: Request, on_chunk: OnChunk | None = None) -> Response:
        self.sent += 1
        try:
            for i in range(self.words):
                if self.sent <= self.breaks and i == self.after:
                    raise ConnectionLost("the line broke")
                if on_chunk is not None:
                    on_chunk(f"{request.body['prompt']}{i} ")
                self.begun.set()
                while self.holds:
                    await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Response({"words": self.words, "of": request.body["prompt"]})

    def _parse(self, response: Response, arguments: Any) -> str:
        return "".join(f"{response.payload['of']}{i} " for i in range(response.payload["words"]))

    tell = Operation(prepare=_prepare, send=_send, parse=_parse)


@feste.task
def shout(text: str) -> str:
    return text.upper()


def test_the_pieces_make_up_the_value() -> None:
    """A call is handed out while it is written; what it needs runs first, and it is bought once."""
    llm = Teller()
    node = llm.tell(shout(llm.tell("a")))

    pieces = list(feste.stream(node))

    assert len(pieces) == 3
    assert "".join(pieces) == node.compute()
    assert llm.sent == 2


def test_async_iteration() -> None:
    """The same object works with ``async for``."""

    async def read() -> list[str]:
        return [piece async for piece in feste.stream(Teller().tell("a"))]

    pieces = asyncio.run(read())

    assert pieces == ["a0 ", "a1 ", "a2 "]


def test_texts_that_are_known_come_at_once(tmp_path: Path) -> None:
    """Plain values, kept answers, answers of a store and texts of tasks are one piece."""
    llm = FakeBackend()
    node = llm.chat("Hi")
    with feste.context.set(eager=True):
        eager = llm.chat("Hello")
    value = node.compute()

    assert list(feste.stream("plain")) == ["plain"]
    assert list(feste.stream("")) == []
    assert list(feste.stream(eager)) == [eager]
    assert list(feste.stream(node)) == [value]
    assert list(feste.stream(shout(node))) == [value.upper()]


def test_an_answer_of_a_store_is_replayed(tmp_path: Path, restart: Callable[[], None]) -> None:
    """Run again, a streamed call gives the same text, and nothing is bought."""
    llm = FakeBackend()
    first = list(feste.stream(llm.chat("Hi"), store=tmp_path / "runs.db"))
    restart()

    second = list(feste.stream(llm.chat("Hi"), store=tmp_path / "runs.db"))

    assert len(first) > 1
    assert second == ["".join(first)]
    assert len(llm.requests) == 1


def test_an_answer_that_breaks_before_its_first_piece_is_sent_again() -> None:
    """Nothing was handed out, so the retry is seen by nobody."""
    llm = Teller(breaks=1, after=0)

    assert "".join(feste.stream(llm.tell("a"))) == "a0 a1 a2 "
    assert llm.sent == 2


def test_an_answer_that_breaks_after_its_first_piece_is_not_sent_again() -> None:
    """Pieces of two answers are never mixed: the error says what was handed out, and how to go on."""
    llm = Teller(breaks=1, after=2)
    node = llm.tell("a")
    pieces = feste.stream(node)

    assert [next(pieces), next(pieces)] == ["a0 ", "a1 "]
    with pytest.raises(RunFailed, match=r"after 6 characters .*asks anew") as caught:
        next(pieces)
    assert isinstance(caught.value.__cause__, ConnectionLost)
    assert llm.sent == 1
    assert "".join(feste.stream(node)) == "a0 a1 a2 "


def test_no_other_backend_goes_on_after_the_first_piece() -> None:
    """It would tell another story, and tell it from the beginning; before the first piece it may."""
    for after, told, asked in ((1, "a0 ", 0), (0, "b0 b1 b2 ", 1)):
        first, second = Teller(breaks=9, after=after), Teller()
        got: list[str] = []
        pieces = feste.stream(first.or_else(second).tell("a" if after else "b"))
        try:
            got.extend(pieces)
        except RunFailed as failed:
            assert isinstance(failed.__cause__, ConnectionLost)

        assert ("".join(got), second.sent) == (told, asked)


def test_whoever_waits_for_a_stream_that_breaks_asks_anew() -> None:
    """It has shown no pieces, so it may."""
    llm = Teller(breaks=1, after=1)
    llm.holds = True
    node = llm.tell("a")
    pieces = feste.stream(node)
    next(pieces)
    values: list[Any] = []
    other = threading.Thread(target=lambda: values.append(node.compute()))
    other.start()
    until_joined()
    llm.holds = False
    with pytest.raises(RunFailed, match="after 3 characters"):
        next(pieces)
    other.join(LONG)

    assert (values, llm.sent) == (["a0 a1 a2 "], 2)


@pytest.mark.parametrize("setting", ["raise", "return", "stop"])
def test_a_failed_call_raises(setting: str) -> None:
    """A stream has no place for an error, so it is raised whatever ``on_error`` says."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no")})

    with pytest.raises(RunFailed, match="the stream failed"):
        list(feste.stream(llm.chat(shout(llm.chat("bad"))), on_error=setting))


def test_what_is_no_text_is_refused() -> None:
    """The error names the way: before the call where that is known, else without losing the answer."""
    llm = FakeBackend()
    vector = llm.embed("a")

    with pytest.raises(ParameterError, match="several answers"):
        feste.stream(llm.chat("a", FakeParams(n=2)))
    with pytest.raises(ParameterError, match="as_completed"):
        feste.stream([llm.chat("a")])  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"not an? int"):
        feste.stream(3)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"embed-.* gave an array\.array: use compute"):
        list(feste.stream(vector))
    vector.compute()
    assert len(llm.requests) == 1


def held() -> tuple[Teller, Any]:
    llm = Teller()
    llm.holds = True
    return llm, feste.stream(llm.tell("a"))


def test_leaving_the_loop_cancels_the_request() -> None:
    """After ``break`` nobody holds the iterator, and the request ends."""
    llm = Teller()
    llm.holds = True

    for piece in feste.stream(llm.tell("a")):
        assert piece == "a0 "
        break

    assert llm.cancelled.wait(LONG)


def test_close_cancels_the_request_and_ends_the_iterator() -> None:
    llm, pieces = held()
    next(pieces)

    pieces.close()

    assert llm.cancelled.wait(LONG)
    assert list(pieces) == []


def test_a_cancelled_task_cancels_the_request() -> None:
    """Cancelling the task that waits for a piece ends the request; no orphan goes on."""
    llm, pieces = held()

    async def read() -> None:
        async for _ in pieces:
            pass

    async def cancel() -> bool:
        task = asyncio.create_task(read())
        await asyncio.to_thread(llm.begun.wait, LONG)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancel())
    assert llm.cancelled.wait(LONG)


def test_a_request_that_another_run_waits_for_goes_on() -> None:
    """A stream that is closed gives up only what nobody else needs."""
    llm = Teller()
    llm.holds = True
    node = llm.tell("a")
    pieces = feste.stream(node)
    next(pieces)
    values: list[Any] = []
    other = threading.Thread(target=lambda: values.append(node.compute()))
    other.start()
    until_joined()
    pieces.close()
    llm.holds = False
    other.join(LONG)

    assert values == ["a0 a1 a2 "]
    assert llm.sent == 1
    assert not llm.cancelled.is_set()


def test_closing_wakes_a_reader_on_another_thread() -> None:
    """It ends at once, although the request goes on for another run."""
    llm = Teller()
    llm.holds = True
    node = llm.tell("a")
    pieces = feste.stream(node)
    next(pieces)
    reader = threading.Thread(target=lambda: got.extend(pieces))
    got: list[str] = []
    reader.start()
    other = threading.Thread(target=node.compute)
    other.start()
    until_joined()

    pieces.close()
    reader.join(LONG)
    ended = not reader.is_alive()
    llm.holds = False
    other.join(LONG)

    assert (ended, got) == (True, [])


def test_the_last_one_to_leave_cancels_the_request() -> None:
    """When the stream is closed, and then the run that had joined it is given up, nobody is left."""
    llm = Teller()
    llm.holds = True
    node = llm.tell("a")
    pieces = feste.stream(node)
    next(pieces)
    other = feste.as_completed([node])
    reader = threading.Thread(target=lambda: list(other))
    reader.start()
    until_joined()

    pieces.close()
    assert not llm.cancelled.is_set()
    other.close()

    assert llm.cancelled.wait(LONG)
    reader.join(LONG)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that Feste's threads do."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def until_joined() -> None:
    until(lambda: any(len(r) > 1 for r in list(driver().brain.joins.under_way.values())))


def test_several_streams_at_once_keep_their_texts_apart() -> None:
    llm = Teller(words=20)
    streams = [feste.stream(llm.tell(f"{name}")) for name in "abcdef"]
    texts = ["".join(pieces) for pieces in zip(*streams, strict=True)]

    assert texts[7] == "a7 b7 c7 d7 e7 f7 "


def test_one_iterator_has_one_reader() -> None:
    """A second thread that asks while the first one waits gets an error, not a piece."""
    llm, pieces = held()
    reader = threading.Thread(target=lambda: list(pieces))
    reader.start()
    llm.begun.wait(LONG)
    until(pieces._turn.locked)

    with pytest.raises(FesteError, match="another thread or task"):
        while True:
            next(pieces)
    llm.holds = False
    reader.join(LONG)


def test_nothing_leaks() -> None:
    """Two hundred streams, a part of them left early, leave no thread, descriptor or object behind."""
    llm = FakeBackend()

    def some(number: int) -> None:
        for i in range(number):
            for _ in feste.stream(llm.chat(f"{i}")):
                if i % 2:
                    break
        llm.requests.clear()

    def counts() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    some(20)
    before = counts()
    some(200)

    def runs() -> int:
        gc.collect()
        return sum(type(o) is Run for o in gc.get_objects())

    assert counts() == before
    until(lambda: runs() < 20)  # those left early end a moment later


def test_a_blocking_stream_is_refused_on_feste_loops() -> None:
    """An async task has to use ``async for``, and may."""

    @feste.task
    async def wrong() -> Any:
        return list(feste.stream(FakeBackend().chat("a")))

    @feste.task
    async def right() -> Any:
        return [piece async for piece in feste.stream(FakeBackend().chat("a"))]

    with pytest.raises(RunFailed) as caught:
        wrong().compute()
    assert isinstance(caught.value.__cause__, BlockingCallError)
    assert "async for" in str(caught.value)
    assert len(right().compute()) > 1


def test_streams_in_tasks_and_threads() -> None:
    """A sync task may stream, as it may compute; its pool grows meanwhile."""
    llm = FakeBackend()

    @feste.task
    def tell(i: int) -> str:
        return "".join(feste.stream(llm.chat(f"{i}")))

    texts = feste.compute([tell(i) for i in range(60)])[0]

    assert len(set(texts)) == 60
