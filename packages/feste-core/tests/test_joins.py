"""A node in flight in one run is joined by other runs that hold it: one request, one draw."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import feste
from feste.backend import Backend, Limits, operation
from feste.draw import Determinism
from feste.errors import NodeError, PluginError, RunFailed
from feste.scheduler import LocalExecutor
from feste.scheduler.driver import driver
from feste.scheduler.states import JOINED

LONG = 30.0


def until(what: Callable[[], Any]) -> bool:
    """Wait for something that happens on another thread; False if it never does."""
    deadline = time.monotonic() + LONG
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def joined() -> int:
    """How many nodes wait for another run's answer."""
    return sum(run.state.count(JOINED) for run in list(driver().brain.runs))


class Held(Backend):
    """Answers, each time with another number, when it is told to."""

    def __init__(self) -> None:
        self.limits = Limits(concurrency=8)
        self.sent: list[str] = []
        self.asked, self.answer = threading.Event(), threading.Event()

    async def _say(self, prompt: str) -> str:
        number = len(self.sent)
        self.sent.append(prompt)
        self.asked.set()
        while not self.answer.is_set():
            await asyncio.sleep(0.001)
        if prompt == "bad":
            raise ValueError("a bad prompt")
        return f"{prompt} {number}"

    @operation
    async def say(self, prompt: str) -> str:
        return await self._say(prompt)

    @operation(determinism=Determinism.PURE)
    async def embed(self, text: str) -> str:
        return await self._say(text)


@pytest.fixture
def llm() -> Iterator[Held]:
    held = Held()
    yield held
    held.answer.set()


class Runs:
    """Computes in threads of its own; what each got is in ``got``."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.got: list[Any] = []

    def start(self, *nodes: Any, **settings: Any) -> None:
        def work() -> None:
            try:
                self.got.append(feste.compute(*nodes, **settings))
            except BaseException as error:
                self.got.append(error)

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def end(self) -> list[Any]:
        for thread in self.threads:
            thread.join(LONG)
        assert not any(thread.is_alive() for thread in self.threads)
        return self.got


@pytest.mark.parametrize("operation_name", ["say", "embed"])
def test_one_call_computed_by_many_threads_is_one_request(llm: Held, operation_name: str) -> None:
    """Whatever its class, a call that is under way is not sent again: the others wait for its answer."""
    node = getattr(llm, operation_name)("hello")
    runs = Runs()
    runs.start(node)
    assert llm.asked.wait(LONG)
    for _ in range(9):
        runs.start(node)
    assert until(lambda: joined() == 9)
    llm.answer.set()

    assert runs.end() == [("hello 0",)] * 10
    assert llm.sent == ["hello"]


def test_threads_that_start_together_send_one_request(llm: Held) -> None:
    """No matter who comes first: ten runs of one node are one request."""
    llm.answer.set()
    node = llm.say("hello")
    together = threading.Barrier(10)
    got: list[str] = []

    def work() -> None:
        together.wait(LONG)
        got.append(node.compute())

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)

    assert got == ["hello 0"] * 10
    assert llm.sent == ["hello"]


def test_a_task_with_effects_runs_once_for_all_who_wait() -> None:
    """A Python task in flight is joined like a call: its effect happens once."""
    begun, go_on = threading.Event(), threading.Event()
    ran: list[int] = []

    @feste.task
    def effect() -> int:
        ran.append(1)
        begun.set()
        go_on.wait(LONG)
        return len(ran)

    node = effect()
    runs = Runs()
    runs.start(node)
    assert begun.wait(LONG)
    runs.start(node)
    runs.start([node, node])
    assert until(lambda: joined() == 2)
    go_on.set()

    assert sorted(runs.end(), key=repr) == [(1,), (1,), ([1, 1],)]
    assert ran == [1]


def test_what_needs_a_joined_node_goes_on_from_its_value(llm: Held) -> None:
    """In the run that waits, consumers get the value; its report says that it was not asked for."""
    shout = feste.task(lambda text: text.upper())
    node = llm.say("hello")
    runs = Runs()
    runs.start(node)
    assert llm.asked.wait(LONG)
    reports: list[Any] = []

    def other() -> None:
        assert shout(node).compute() == "HELLO 0"
        reports.append(feste.last_report())

    thread = threading.Thread(target=other)
    thread.start()
    assert until(lambda: joined() == 1)
    llm.answer.set()
    thread.join(LONG)

    assert runs.end() == [("hello 0",)]
    assert reports[0].states == {"shared": 1, "done": 1}
    assert reports[0].requests == []


def test_a_failure_is_everybodys(llm: Held) -> None:
    """If the request fails, every run that waits for it fails with that error; none sends it again."""
    node = llm.say("bad")
    runs = Runs()
    runs.start(node)
    assert llm.asked.wait(LONG)
    runs.start(node)
    runs.start(node, on_error="return")
    assert until(lambda: joined() == 2)
    llm.answer.set()
    got = runs.end()

    assert sorted(type(g).__name__ for g in got) == ["RunFailed", "RunFailed", "tuple"]
    errors = [g.errors[0] if isinstance(g, RunFailed) else g[0] for g in got]
    assert all("a bad prompt" in str(error) for error in errors)
    assert llm.sent == ["bad"]


def test_a_request_that_others_wait_for_outlives_the_run_that_asked(llm: Held) -> None:
    """Cancelling one run does not cancel what other runs wait for: nothing is bought twice."""
    node = llm.say("hello")
    asked_first = threading.Event()

    async def first() -> None:
        task = asyncio.ensure_future(feste.acompute(node))
        await asyncio.to_thread(llm.asked.wait, LONG)
        asked_first.set()
        await asyncio.to_thread(until, lambda: joined() == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    canceller = threading.Thread(target=asyncio.run, args=(first(),))
    canceller.start()
    assert asked_first.wait(LONG)
    runs = Runs()
    runs.start(node)
    runs.start(node)
    canceller.join(LONG)
    llm.answer.set()

    assert runs.end() == [("hello 0",)] * 2
    assert llm.sent == ["hello"]


def test_a_run_that_only_waits_can_be_stopped(llm: Held) -> None:
    """Who joined may give up; the request of the other run goes on."""
    node = llm.say("hello")
    runs = Runs()
    runs.start(node)
    assert llm.asked.wait(LONG)

    async def second() -> None:
        task = asyncio.ensure_future(feste.acompute(node))
        await asyncio.to_thread(until, lambda: joined() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(second())
    llm.answer.set()

    assert runs.end() == [("hello 0",)]
    assert llm.sent == ["hello"]


def test_on_error_stop_in_one_run_leaves_the_shared_node_to_the_other(llm: Held) -> None:
    """A run that stops drains what is under way; a run that joined gets that answer."""
    node = llm.say("hello")
    fails = threading.Event()

    @feste.task
    def breaks() -> None:
        fails.wait(LONG)
        raise ValueError("broken")

    runs = Runs()
    runs.start(node, breaks(), on_error="stop")
    assert llm.asked.wait(LONG)
    runs.start(node)
    assert until(lambda: joined() == 1)
    fails.set()
    llm.answer.set()
    got = runs.end()

    (failed,) = (g for g in got if isinstance(g, RunFailed))
    assert isinstance(failed.errors[0], NodeError)
    assert failed.partial[0] == "hello 0"
    assert ("hello 0",) in got
    assert llm.sent == ["hello"]


def test_batched_calls_are_joined_one_by_one(llm: Held) -> None:
    """A member of a batch in flight is joined; calls that are not in flight are sent."""
    from feste.testing import FakeBackend

    fake = FakeBackend(model="joins-batch", latency=0.05)
    calls = [fake.complete(f"text {i}") for i in range(8)]
    runs = Runs()
    for begin in range(0, 8, 2):
        runs.start(calls[begin : begin + 4])
    runs.start(calls)
    got = runs.end()

    values = [call.compute() for call in calls]
    for (answers,) in got:
        assert set(answers) <= set(values)
    assert sum(request.items for request in fake.requests) == 8


@pytest.mark.parametrize("how", ["itself", "what needs it", "deep inside", "in a coroutine"])
def test_a_task_that_computes_its_own_node_is_told_so(how: str) -> None:
    """A task that waits for its own value would wait for ever: an error that names it, and no hang."""
    box: list[Any] = []

    @feste.task
    def deeper() -> Any:
        return box[0].compute()

    @feste.task
    def waits() -> Any:
        if how == "itself":
            return box[0].compute()
        return box[1].compute() if how == "what needs it" else deeper().compute()

    @feste.task
    async def waits_later() -> Any:
        return await box[0]

    node: Any = waits_later() if how == "in a coroutine" else waits()
    box += [node, feste.task(lambda x: x)(node)]
    with pytest.raises(RunFailed, match=f"{node.key} waits for itself") as caught:
        feste.compute(box)

    assert len(caught.value.errors) == 1
    assert driver().brain.runs == []


@feste.task
def same(text: str) -> str:
    return text


class Failing(LocalExecutor):
    """An executor that can be told to do what none may."""

    fails = False

    def capacity(self, where: str) -> int:
        if self.fails:
            raise OSError("no hands")
        return super().capacity(where)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("answered", [False, True])
def test_no_run_waits_for_the_work_of_a_faulty_executor(
    llm: Held, stopped: bool, equal: bool, answered: bool
) -> None:
    """A run elsewhere that shares a node, or a call, with it goes on by itself; so do later runs."""
    node = llm.embed("hello")
    runs = Runs()
    runs.start(node, scheduler=Failing)
    assert llm.asked.wait(LONG)
    (first,) = driver().brain.runs
    executor: Any = first.executor
    other = llm.embed(same("hello")) if equal else node
    runs.start(other)
    assert until(lambda: joined() == 1)
    if stopped:
        driver().stop(first, 0.0)
        assert until(lambda: first.interrupted)
    if answered:
        executor.fails = True
    else:
        executor._report.fault(PluginError("no hands"))
        assert until(lambda: len(llm.sent) == 2)
    llm.answer.set()
    got = runs.end()
    executor.fails = False
    errors = [one for one in got if isinstance(one, RunFailed)]
    sent = len(llm.sent)

    assert len(errors) == 1
    assert "no hands" in str(errors[0])
    assert [one for one in got if one not in errors] == [feste.compute(other)]
    assert feste.compute(other, scheduler=Failing) == feste.compute(other)
    assert len(llm.sent) == sent
    assert not driver().brain.runs
