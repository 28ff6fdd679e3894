"""What was paid for is not bought again: after failures of parsing, of a neighbour, of a waiter."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import OrderedDict
from typing import Any

import cloudpickle
import pytest

import feste
from feste import context
from feste.backend import Backend, Limits, Operation, Request, Response, operation
from feste.draw import Determinism
from feste.errors import (
    BackendUnavailable,
    CallTimeout,
    FesteError,
    InvalidRequest,
    RateLimited,
    RunFailed,
    ServerError,
)
from feste.prompt import Prompt
from feste.scheduler import driver
from feste.scheduler.driver import driver as the_driver
from feste.testing import FakeBackend, FakeParams, VirtualClock, fresh_draws

GREEDY = FakeParams(temperature=0)
LONG = 30.0


class Unreadable(Backend):
    """A backend whose first attempts to parse fail."""

    def __init__(self, broken: int = 1) -> None:
        self.sent = 0
        self.broken = broken

    def _prepare(self, prompt: str) -> Request:
        return Request(self.plugin, "say", self.endpoint, {"prompt": prompt})

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        self.sent += 1
        return Response(f"answer {self.sent}")

    def _parse(self, response: Response, arguments: Any) -> str:
        self.broken -= 1
        if self.broken >= 0:
            raise ValueError("cannot read it")
        return str(response.payload)

    say = Operation(prepare=_prepare, send=_send, parse=_parse)


def test_an_answer_that_could_not_be_parsed_is_parsed_again() -> None:
    """The node keeps the response: the next compute pays nothing."""
    llm = Unreadable()
    node = llm.say("hello")
    with pytest.raises(RunFailed, match="cannot read it"):
        node.compute()

    assert node.compute() == "answer 1"
    assert (llm.sent, node._node.paid) == (1, None)


def test_with_keep_none_nothing_stays() -> None:
    """Who wants nothing kept pays again."""
    llm = Unreadable()
    node = llm.say("hello")
    with pytest.raises(RunFailed):
        node.compute(keep="none")

    assert node.compute(keep="none") == "answer 2"


def test_what_a_task_emitted_is_gone_on_from() -> None:
    """One bad call among ten that a task returned: the next compute asks for that one only."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no")})
    ran = []

    @feste.task(emits=True)
    def ask() -> Any:
        ran.append(1)
        return [llm.chat(f"question {i}" if i != 4 else "bad") for i in range(10)]

    node = ask()
    with pytest.raises(RunFailed):
        node.compute()
    sent = len(llm.requests)
    llm.fail.clear()
    values = node.compute()

    assert (sent, len(llm.requests), len(ran)) == (10, 11, 1)
    assert len(values) == 10 and all(isinstance(v, str) for v in values)


def test_what_a_task_emitted_joins_its_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the emitted calls are answered, the task's value is made of them, not emitted anew."""
    llm = FakeBackend()
    grown = []
    compile_emission = driver.compile_emission

    def counted(*args: Any) -> Any:
        grown.append(1)
        return compile_emission(*args)

    monkeypatch.setattr(driver, "compile_emission", counted)

    @feste.task(emits=True)
    def ask() -> Any:
        return [llm.chat("a"), llm.chat("b")]

    assert len(ask().compute()) == 2
    assert len(grown) == 1


def test_merged_nodes_in_flight_are_one_request() -> None:
    """A task may return a node that was merged into one that is under way."""
    llm = FakeBackend(latency=0.2)
    one, two = llm.embed("a"), llm.embed("a")

    @feste.task(emits=True)
    def other() -> Any:
        return two

    values = feste.compute(one, two, other())

    assert values[0] == values[1] == values[2]
    assert len(llm.requests) == 1


def test_whoever_shared_an_answer_keeps_it_for_all_that_were_merged() -> None:
    """A run that waits for another one's request learns its value for each of its equal nodes."""
    llm = FakeBackend(latency=0.3)
    one = llm.chat("a", GREEDY)
    two = llm.chat("a", GREEDY)
    first = threading.Thread(target=feste.compute, args=(one,))
    first.start()
    deadline = time.monotonic() + LONG
    while not llm.requests and time.monotonic() < deadline:
        time.sleep(0.001)
    feste.compute(one, two)
    first.join(LONG)
    two.compute()

    assert len(llm.requests) == 1


def test_a_wait_of_zero_is_no_hot_loop() -> None:
    """Retry-After is the least time to wait; the backoff still grows."""

    def answer(request: Request) -> Response:
        raise RateLimited("slow", retry_after=0)

    clock = VirtualClock(answer)
    (result,) = clock.compute(FakeBackend().chat("Hi"))

    assert isinstance(result, BackendUnavailable)
    assert len(clock.sent) < 100


def test_an_odd_answer_of_one_backend_fails_its_own_call_only() -> None:
    """What a plugin returns or raises may be anything: the scheduler goes on."""

    class Gone(InvalidRequest):
        def __init__(self, message: str, code: int) -> None:
            super().__init__(message)

    class Odd(Backend):
        @operation
        async def say(self, prompt: str) -> str:
            return prompt

        @say.batch(max_items=8)
        async def say_many(self, prompts: list[str]) -> list[str]:
            raise Gone("all of them", 3)

    class NoResponse(Unreadable):
        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            return {"answer": 1}  # type: ignore[return-value]

        say = Operation(prepare=Unreadable._prepare, send=_send, parse=Unreadable._parse)

    odd = Odd()
    results = feste.compute(
        odd.say("a"),
        odd.say("b"),
        NoResponse().say("c"),
        FakeBackend().chat("d"),
        on_error="return",
    )

    # the list is refused, its calls are asked singly
    assert results[:2] == ("a", "b")
    assert "not a Response" in str(results[2])
    assert isinstance(results[3], str)


def test_a_sent_request_that_waits_for_its_retry_is_told_as_such() -> None:
    """A run that stops meanwhile says why it failed and that it may have been billed."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if "slow" in str(request.body):
            raise CallTimeout("late", retry_after=20.0)
        raise InvalidRequest("stop here")

    clock = VirtualClock(answer, request_seconds=lambda r: 1.0 if "slow" in str(r.body) else 2.0)
    run = clock.run([llm.chat("slow"), llm.chat("bad")], on_error="stop")
    clock.tell(0.0, ("submit", run))
    clock.drive()
    first, second = run.results()

    assert isinstance(first, CallTimeout) and first.billed == "unknown"
    assert isinstance(second, InvalidRequest)
    assert run.count_states() == {"failed": 2}


def test_calls_do_not_wait_for_users_tools() -> None:
    """Tools may fill their threads: prompts are rendered and requests sent all the same."""
    llm = FakeBackend()
    hold = threading.Event()
    ended: list[int] = []

    @feste.task
    def tool(i: int) -> int:
        hold.wait(LONG)
        ended.append(i)
        return i

    tools = [tool(i) for i in range(100)]
    waiting = threading.Thread(target=feste.compute, args=(tools,))
    waiting.start()
    try:
        prompt = feste.Prompt("{{ x }}?")
        values = feste.compute([llm.chat(prompt(x=llm.chat(str(i)))) for i in range(5)])
        assert not ended
    finally:
        hold.set()
        waiting.join(LONG)

    assert len(values[0]) == 5


def test_limits_of_a_client_that_is_gone_do_not_hold() -> None:
    """A client is freed with its last use, without the help of the garbage collector."""

    def peak(concurrency: int) -> int:
        llm = FakeBackend(latency=0.02, limits=Limits(concurrency=concurrency))
        feste.compute([llm.chat(str(i)) for i in range(12)])
        return llm.peak

    assert (peak(1), peak(4)) == (1, 4)


def test_equal_expressions_are_equal_in_eager_mode() -> None:
    """Equal inputs that are no samples make one expression; a task's calls are drawn in its scope."""

    @feste.task
    def same(text: str) -> str:
        return text

    def program() -> Any:
        llm = FakeBackend()

        @feste.task(emits=True)
        def ask(i: int) -> Any:
            return llm.chat("hi")

        return [
            *[llm.chat(same("q")) for _ in range(2)],
            *[llm.chat(llm.complete("q", GREEDY)) for _ in range(2)],
            llm.chat("hi"),
            *[ask(i) for i in range(2)],
        ]

    fresh_draws()
    lazy = feste.compute(program())[0]
    fresh_draws()
    with context.set(eager=True):
        eager = program()

    assert lazy == eager
    assert len(set(lazy[:4])) == 4


def test_a_task_may_change_its_arguments() -> None:
    """They are its own: a node that runs twice gives the same value twice, and so do merged ones."""

    @feste.task
    def add(items: list[Any], x: int) -> list[Any]:
        items.append(x)
        items[0]["n"] = x
        return items

    node = add([{"n": 0}], 2)

    assert node.compute() == node.compute() == [{"n": 2}, 2]


def test_values_that_do_not_fit_are_not_lost() -> None:
    """Vectors cannot go into a set: the error holds what was computed."""
    llm = FakeBackend()

    @feste.task
    def breaks() -> None:
        raise ValueError("broken")

    with pytest.raises(RunFailed, match="give a list instead of a set") as caught:
        feste.compute({llm.embed("a"), llm.embed("b")}, breaks())

    assert len(caught.value.partial) == 3
    assert isinstance(caught.value.partial[2], FesteError)


def test_the_report_of_an_older_run_is_not_shown_for_a_new_one() -> None:
    """A run by a plain get function, or one that was given up, has no report."""
    import dask

    llm = FakeBackend()

    async def main() -> None:
        await feste.acompute(llm.chat("a"))
        assert feste.last_report() is not None
        await feste.acompute(llm.chat("b"), scheduler=dask.get)  # type: ignore[attr-defined]
        report: Any = feste.last_report()
        assert report is None or report.run.startswith("run")
        await feste.acompute(feste.task(abs)(-1), scheduler=dask.get)  # type: ignore[attr-defined]
        assert feste.last_report() is None

    asyncio.run(main())


def test_a_shared_request_that_fails_in_a_run_that_stops_is_asked_again() -> None:
    """The run that stops does not try again; the one that waits for the same node does."""
    llm = FakeBackend()
    node = llm.chat("hello")
    faults = [ServerError("oops")]

    def answer(request: Request) -> Response:
        if faults:
            raise faults.pop()
        return llm.answer(request)

    clock = VirtualClock(answer)
    first, second = clock.run(node), clock.run(node)
    clock.tell(0.0, ("submit", first))
    clock.tell(0.1, ("submit", second))
    clock.tell(0.2, ("stop", first, 0.0))
    clock.drive()

    assert isinstance(second.results()[0], str)
    assert len(clock.sent) == 2


def test_a_list_that_others_wait_for_is_unpacked_though_its_run_is_over() -> None:
    """The answer to a list waits for a thread; its run is stopped, another wants one of its calls."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, places=1)
    clock.task_seconds = lambda task: 10.0 if task.node.op.kind == "prompt" else 0.0
    first, second = llm.complete("a"), llm.complete("b")

    @feste.task(pure=True)
    def one() -> str:
        return "1"

    stopped, waits = clock.run(first, second), clock.run(second)
    slow = clock.run(Prompt("slow {{ x }}")(x=one()))  # it has the only thread as the answer comes
    clock.tell(0.0, ("submit", stopped))
    clock.tell(0.1, ("submit", waits))
    clock.tell(0.6, ("submit", slow))
    clock.tell(3.0, ("stop", stopped, 0.0))
    clock.drive()

    assert isinstance(waits.results()[0], str)
    assert len(clock.sent) == 1


def test_what_a_task_emitted_while_its_run_stopped_is_kept() -> None:
    """Another run that waits for the task goes on from what it returned: the task has run once."""
    llm = FakeBackend()
    ran = []

    @feste.task(emits=True)
    def ask() -> Any:
        ran.append(1)
        return llm.chat("question")

    clock = VirtualClock(llm.answer, task_seconds=lambda task: 5.0 if task.name == "ask" else 0.0)
    node = ask()
    stopped, waits = clock.run(node), clock.run(node)
    clock.tell(0.0, ("submit", stopped))
    clock.tell(1.0, ("submit", waits))
    clock.tell(2.0, ("stop", stopped, 0.0))
    clock.drive()

    assert isinstance(waits.results()[0], str)
    assert ran == [1]


def test_answers_that_are_here_are_parsed_when_their_run_is_given_up() -> None:
    """A cancelled run still makes values of what was paid for."""
    llm = FakeBackend()
    clock = VirtualClock(
        llm.answer, task_seconds=lambda task: 0.5 if task.stage == "parse" else 0.0
    )
    node = llm.chat("hello")
    run = clock.run(node)
    clock.tell(0.0, ("submit", run))
    clock.tell(1.2, ("stop", run, 0.0))
    clock.drive()

    assert isinstance(run.results()[0], str)
    assert run.count_states() == {"done": 1}


def test_two_runs_that_gave_up_a_shared_task_leave_nothing_behind() -> None:
    """When the last one that waits for a task gives up, the task is cancelled."""
    cancelled = threading.Event()

    @feste.task
    async def forever() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def main() -> None:
        node = forever()
        first = asyncio.ensure_future(feste.acompute(node))
        await asyncio.sleep(0.2)
        second = asyncio.ensure_future(feste.acompute(node))
        await asyncio.sleep(0.2)
        for task in (first, second):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.1)

    asyncio.run(main())

    assert cancelled.wait(LONG)
    deadline = time.monotonic() + LONG
    while the_driver().brain.runs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert the_driver().brain.runs == []


class Mutable(list[Any]):
    """A list of the user's own."""


@dataclasses.dataclass
class Box:
    items: list[Any]


@pytest.mark.parametrize("make", [list, dict, set, Mutable, OrderedDict, lambda: Box([])])
def test_each_run_of_a_task_gets_its_own_copy(make: Any) -> None:
    """Of any container that Feste looks into, also inside of others."""

    @feste.task
    def grow(wrapped: Any) -> int:
        (given,) = wrapped
        items = given.items if isinstance(given, Box) else given
        if isinstance(items, dict):
            items[len(items)] = 1
        elif isinstance(items, set):
            items.add(len(items))
        else:
            items.append(1)
        return len(items)

    node = grow((make(),))

    assert (node.compute(), node.compute()) == (1, 1)


class Parent(Backend):
    @operation(determinism=Determinism.PURE)
    async def say(self, text: str) -> str:
        return "parent"

    @say.batch(max_items=8)
    async def say_many(self, texts: list[str]) -> list[str]:
        return ["parent"] * len(texts)


class Child(Parent):
    @operation(determinism=Determinism.PURE)
    async def say(self, text: str) -> str:
        return "child"

    @say.batch(max_items=8)
    async def say_many(self, texts: list[str]) -> list[str]:
        return ["child"] * len(texts)

    def both(self, text: str) -> list[Any]:
        return [self.say(text), super().say(text), Parent.say(self, text)]


def test_an_overridden_operation_is_not_that_of_its_base() -> None:
    """They share no request and are not merged, and travel as what they are."""
    child = Child()

    assert feste.compute(child.both("a"))[0] == ["child", "parent", "parent"]
    assert (
        feste.compute([*child.both("b"), *child.both("c")])[0] == ["child", "parent", "parent"] * 2
    )
    base = cloudpickle.loads(cloudpickle.dumps(Parent.say.__get__(child, Child)))
    assert base("d").compute() == "parent"
