"""A run that can make no progress ends with an error that names its nodes, instead of hanging."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest

import feste
from feste.backend import Backend, Limits, operation
from feste.errors import FesteError, RunFailed, StalledError
from feste.scheduler import LocalExecutor, PyTask, stalls
from feste.scheduler.driver import driver
from feste.testing import FakeBackend, VirtualClock


@feste.task
def double(x: Any) -> Any:
    return 2 * x


class Forgetful(LocalExecutor):
    """An executor that says a chunk has ended, and nothing of its tasks."""

    def call(self, where: str, chunk: list[PyTask]) -> None:
        if where == "thread":
            self._report.free(where, chunk)
        else:
            super().call(where, chunk)


class Late(LocalExecutor):
    """An executor that reports the end of a chunk before the ends of its tasks."""

    def chunk_seconds(self, where: str) -> float:
        return 0.0

    def call(self, where: str, chunk: list[PyTask]) -> None:
        self._report.free(where, chunk)
        for task in chunk:
            self._report.done(task, True, task.fn(*task.args), 0.0)


class Deaf(LocalExecutor):
    """An executor that drops requests, and knows it or does not."""

    def __init__(self, target: Any = None) -> None:
        super().__init__(target)
        self.knows, self.drops = False, True
        self.dropped: list[Any] = []

    def send(self, handle: int, *rest: Any) -> None:
        if self.drops:
            self.dropped.append(handle)
        else:
            super().send(handle, *rest)

    def has_lost(self, work: Any) -> bool:
        return self.knows and work in self.dropped


class Timed(FakeBackend):
    """A backend whose requests have a time limit."""

    def _request(self, *rest: Any) -> Any:
        return replace(super()._request(*rest), timeout=0.1)


class Rude(Backend):
    """A backend that stops the loop which it runs on, or breaks it."""

    limits = Limits(concurrency=1)

    @operation
    async def ask(self, prompt: str) -> str:
        loop = asyncio.get_running_loop()
        if prompt == "stop":
            loop.stop()
        if prompt == "break":
            loop.call_soon(vars(loop)["_selector"].close)
            await asyncio.sleep(3600)
        await asyncio.sleep(0.01)
        return prompt


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "PATIENCE", 0.05)


@pytest.mark.parametrize("form", ["compute", "as_completed", "map", "stream"])
def test_lost_work_ends_the_run_with_an_error(form: str) -> None:
    """The error names the node, its place and the executor."""
    made = [double(1)]
    forms: dict[str, Any] = {
        "compute": lambda **given: feste.compute(made, **given),
        "as_completed": lambda **given: list(feste.as_completed(made, **given)),
        "map": lambda **given: list(feste.map(lambda node: node, made, **given)),
        "stream": lambda **given: list(feste.stream(made[0], **given)),
    }

    with pytest.raises(
        StalledError, match=r"1 node did not end: double-.*Forgetful lost"
    ) as caught:
        forms[form](scheduler=Forgetful)

    assert "test_stalls.py" in caught.value.origin


def test_reports_in_another_order_are_no_stall() -> None:
    """A chunk may be reported as ended a moment before its tasks are."""
    assert feste.compute(feste.task(abs)(-3), scheduler=Late()) == (3,)


@contextmanager
def another_run() -> Iterator[None]:
    """A run that works all the time; nothing ends it."""
    opened = threading.Event()
    values: list[Any] = []
    working = feste.task(opened.wait)(60)
    thread = threading.Thread(target=lambda: values.append(feste.compute(working)))
    thread.start()
    try:
        yield
        assert thread.is_alive()
    finally:
        opened.set()
        thread.join()
    assert values == [(True,)]


def test_another_run_that_works_goes_on() -> None:
    """A run that has lost its request ends while another one works, which is not touched."""
    deaf = Deaf()
    deaf.knows = True

    with another_run(), pytest.raises(StalledError, match="1 node did not end: chat-"):
        feste.compute(FakeBackend().chat("a"), scheduler=deaf)


@pytest.mark.parametrize("bug", [False, True])
def test_what_was_finished_is_in_the_error(bug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost work, or a bug in the scheduler: the answers that were paid are not lost with it."""
    deaf, llm = Deaf(), FakeBackend(limits=Limits(concurrency=1))
    deaf.knows, deaf.drops = True, False
    paid = llm.chat("a")

    @feste.task
    def spoils(answer: str) -> str:
        deaf.drops = True
        if bug:
            monkeypatch.setattr(driver().brain.gates, "admit", lambda: 1 / 0)
        return answer.upper()

    with pytest.raises(StalledError) as caught:
        feste.compute({"paid": paid, "lost": llm.chat(spoils(paid))}, scheduler=deaf)

    (partial,) = caught.value.partial
    assert isinstance(partial["paid"], str)
    assert isinstance(partial["lost"], FesteError)
    assert caught.value.report.states["done"] >= 1
    assert pickle.loads(pickle.dumps(caught.value)).partial[0]["paid"] == partial["paid"]


@pytest.mark.parametrize("busy", [True, False])
def test_a_lost_request_keeps_no_place_when_its_run_has_ended(busy: bool) -> None:
    """A deadline has ended the call before it was known that nothing will come."""
    deaf = Deaf()
    llm = FakeBackend(limits=Limits(concurrency=1))
    with pytest.raises(RunFailed, match="deadline"):
        feste.compute(llm.chat("a"), scheduler=deaf, deadline=0.05)
    deaf.knows, deaf.drops = True, False

    with another_run() if busy else nullcontext():
        assert len(feste.compute(llm.chat("b"), scheduler=deaf)[0]) > 0


def test_waiting_is_no_stall() -> None:
    """An hour of rate limits, a slow store, a map that waits for its consumer: these are no stalls."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 3600.0)

    clock.compute([llm.chat("a"), double(llm.chat("b"))])
    results = feste.map(double, range(10), window=1)
    values = [next(results)]
    clock.compute(llm.chat("c"))  # meanwhile nothing happens in the map's run
    values += results

    assert values == [2 * i for i in range(10)]
    assert clock.now == 7200.0


def test_what_the_brain_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the virtual clock: a node that is lost inside of the brain ends its run."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    run = clock.run([llm.chat("a"), llm.chat("b")])
    monkeypatch.setattr(clock.brain.gates, "queue", lambda *args, **given: None)
    clock.tell(0.0, ("submit", run))

    with pytest.raises(StalledError):
        clock.drive()

    assert isinstance(run.failure, StalledError)
    assert all(isinstance(value, FesteError) for value in run.results())
    assert not issubclass(StalledError, RunFailed)


@pytest.mark.parametrize("knows", [True, False])
def test_dropped_requests_are_found(knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an executor owns up to, and those that it should have reported long ago."""
    monkeypatch.setattr(stalls, "OVERDUE", 0.1)
    deaf = Deaf()
    deaf.knows = knows
    llm = (FakeBackend if knows else Timed)(limits=Limits(concurrency=1))
    with pytest.raises(StalledError, match=r"2 nodes did not end: chat-.*, chat-.*Deaf lost"):
        feste.compute([llm.chat("a"), llm.chat("b")], scheduler=deaf)
    deaf.drops = False

    assert len(feste.compute([llm.chat("c"), llm.chat("d")], scheduler=deaf)[0]) == 2


def test_a_request_without_an_end_is_no_stall() -> None:
    """An executor that says nothing is trusted: as long as the time limit allows, if there is one."""
    llm = FakeBackend(latency=1.0)

    assert len(feste.compute(llm.chat("a"))[0]) > 0


def test_a_loop_that_code_of_a_backend_stops_goes_on() -> None:
    """Nobody but Feste ends its loop, or all requests on it would hang."""
    rude = Rude()

    assert feste.compute([rude.ask("stop"), rude.ask("a")]) == (["stop", "a"],)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_breaks_ends_the_run_and_is_replaced() -> None:
    """The error names the calls that were on it; the next run has a loop that works."""
    rude = Rude()
    with pytest.raises(
        StalledError, match=r"2 nodes did not end: ask-.*, ask-.*LocalExecutor lost"
    ):
        feste.compute([rude.ask("break"), rude.ask("a")])

    assert feste.compute([rude.ask("b"), rude.ask("c")]) == (["b", "c"],)


def test_async_tasks_on_a_broken_loop_end_the_run_too() -> None:
    """Tasks have a loop of their own, to which the same happens."""

    @feste.task
    async def stops() -> int:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return 1

    assert feste.compute(stops()) == (1,)
