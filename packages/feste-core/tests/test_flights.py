"""Equal calls in flight are answered by one request, wherever they come from; draws are not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Backend, Operation, Request, Response
from feste.draw import Determinism
from feste.errors import CallError, InvalidRequest, ServerError
from feste.scheduler.driver import driver
from feste.scheduler.states import JOINED
from feste.testing import FakeBackend, FakeParams, VirtualClock

GREEDY = FakeParams(temperature=0.0)


class Oracle(Backend):
    """Answers only after it was told to go on; counts what it is asked."""

    plugin = "oracle"

    def __init__(self, account: str = "") -> None:
        self.label = account
        self.sent = 0
        self.go = threading.Event()

    def config(self) -> Mapping[str, Any]:
        return {"label": self.label}

    def _prepare(self, question: str) -> Request:
        return Request("oracle", "ask", "plugin:oracle", {"q": question}, account=self.label)

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        self.sent += 1
        await asyncio.to_thread(self.go.wait)
        return Response({"answer": request.body["q"] + "!"})

    def _parse(self, response: Response, arguments: Mapping[str, Any]) -> str:
        return str(response.payload["answer"])

    ask = Operation(prepare=_prepare, send=_send, parse=_parse, determinism=Determinism.PURE)
    draw = Operation(prepare=_prepare, send=_send, parse=_parse)


def waiting() -> int:
    """How many calls wait for an equal one."""
    return sum(len(calls) for calls in list(driver().brain.flights._waiting.values()))


def ask_from_threads(llm: Oracle, count: int, **settings: Any) -> list[str]:
    answers: list[str] = []

    def ask() -> None:
        with context.set(**settings):
            answers.extend(feste.compute(llm.ask("why")))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    pause = threading.Event()
    while waiting() < count - 1 and llm.sent < 2:
        pause.wait(0.002)
    llm.go.set()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("eager", [False, True])
def test_fifty_threads_send_one(eager: bool) -> None:
    llm = Oracle()

    assert ask_from_threads(llm, 50, eager=eager) == ["why!"] * 50
    assert llm.sent == 1
    assert waiting() == 0
    assert not driver().brain.flights._led


def test_greedy_calls_share_within_a_run() -> None:
    """What is equal only once the inputs are known is found too."""
    llm = FakeBackend()
    same = feste.task(pure=True)(lambda x: "same text")
    clock = VirtualClock(llm.answer)
    values = clock.compute([llm.chat(same(x), GREEDY) for x in range(50)])

    assert len(clock.sent) == 1
    assert len(set(values)) == 1


def test_what_is_batched_is_shared_before() -> None:
    llm = FakeBackend()
    same = feste.task(pure=True)(lambda x: f"text {x % 3}")
    clock = VirtualClock(llm.answer, task_seconds=lambda t: 0.1 if t.stage == "run" else 0.0)
    values = clock.compute([llm.embed(same(x)) for x in range(30)], objective="cost")

    assert [r.items for _, r in clock.sent] == [3]
    assert values[:3] == values[3:6] == values[27:]


@pytest.mark.parametrize("params", [FakeParams(), FakeParams(temperature=0.7)])
def test_draws_are_not_shared(params: FakeParams) -> None:
    llm = FakeBackend()
    same = feste.task(pure=True)(lambda x: "same text")
    clock = VirtualClock(llm.answer)
    clock.compute([llm.chat(same(x), params) for x in range(9)])

    assert sum(r.items for _, r in clock.sent) == 9


@pytest.mark.parametrize("optimize", [False, {"cse": False}])
def test_it_is_switched_off_with_its_pass(optimize: Any) -> None:
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    clock.compute([llm.chat("Hi", GREEDY) for _ in range(4)], optimize=optimize)

    assert sum(r.items for _, r in clock.sent) == 4


def test_accounts_share_nothing() -> None:
    one, two = Oracle("one"), Oracle("two")
    one.go.set(), two.go.set()
    feste.compute(one.ask("why"), two.ask("why"))

    assert (one.sent, two.sent) == (1, 1)


def test_the_call_that_fails_lets_another_run_try() -> None:
    """The first run gives up; the second one's call is sent then, and has its own answer."""
    llm = FakeBackend()
    failed: list[Request] = []

    def answer(request: Request) -> Response:
        if len(failed) < 6:  # as many attempts as a call has
            failed.append(request)
            raise ServerError("down")
        return llm.answer(request)

    clock = VirtualClock(answer)
    runs = [clock.run(llm.chat("Hi", GREEDY), on_error="return") for _ in range(2)]
    for run in runs:
        clock.tell(0.0, ("submit", run))
    clock.drive()

    first, second = (run.results()[0] for run in runs)
    assert isinstance(first, ServerError)
    assert second == llm.chat("Hi", GREEDY).compute()


def test_a_refusal_holds_for_all() -> None:
    llm = FakeBackend()
    sent: list[Request] = []

    def answer(request: Request) -> Response:
        sent.append(request)
        raise InvalidRequest("no")

    clock = VirtualClock(answer)
    runs = [clock.run([llm.chat("Hi", GREEDY)], on_error="return") for _ in range(3)]
    for run in runs:
        clock.tell(0.0, ("submit", run))
    clock.drive()

    errors = [run.results()[0] for run in runs]
    assert len(sent) == 1
    assert all(isinstance(error, CallError) for error in errors)
    assert len({id(error) for error in errors}) == 3


@pytest.mark.parametrize("grace", [0.0, 0.5, 10.0])
def test_a_stopped_run_goes_on_for_those_that_wait(grace: float) -> None:
    """Stopping the run that sent the call neither loses its answer for the other nor buys two."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 2.0)
    one, two = (clock.run(llm.chat("Hi", GREEDY), on_error="return") for _ in range(2))
    clock.tell(0.0, ("submit", one))
    clock.tell(0.1, ("submit", two))
    clock.tell(1.0, ("stop", one, grace))
    clock.drive()

    assert len(clock.sent) == 1
    assert two.results() == [llm.chat("Hi", GREEDY).compute()]


def test_a_stopped_run_that_waits_just_ends() -> None:
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 2.0)
    one, two = (clock.run(llm.chat("Hi", GREEDY), on_error="return") for _ in range(2))
    clock.tell(0.0, ("submit", one))
    clock.tell(0.1, ("submit", two))
    clock.tell(1.0, ("stop", two, 0.0))
    clock.drive(until=1.5)

    assert two.ended == pytest.approx(1.0)
    assert JOINED not in two.state
    clock.drive()
    assert len(clock.sent) == 1
    assert one.results() == [llm.chat("Hi", GREEDY).compute()]


def test_each_store_gets_the_answer(tmp_path: Any, restart: Any) -> None:
    """Two runs with stores of their own share a request, and both can be replayed."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, store_seconds=0.01)
    for name in "ab":
        run = clock.run(llm.chat("Hi", GREEDY), store=tmp_path / f"{name}.db")
        clock.tell(0.0, ("submit", run))
    clock.drive()
    assert len(clock.sent) == 1

    for name in "ab":
        restart()
        again = VirtualClock(llm.answer)
        again.compute(llm.chat("Hi", GREEDY), store=tmp_path / f"{name}.db")
        assert not again.sent


def test_a_call_waits_for_none_with_a_later_deadline() -> None:
    """It is sent by itself, and ends in time."""
    llm = FakeBackend()
    seconds = iter([1000.0, 1.0, 1.0])
    clock = VirtualClock(llm.answer, request_seconds=lambda request: next(seconds))
    slow, quick, other = (
        clock.run(llm.chat("Hi", GREEDY), deadline=deadline) for deadline in (None, 3.0, 5.0)
    )
    for run in (slow, quick, other):
        clock.tell(0.0, ("submit", run))
    clock.drive()

    assert [run.ended for run in (slow, quick, other)] == [1000.0, 1.0, 1.0]
    assert len(clock.sent) == 3
