"""``acompute`` and ``await node``: any loop, cancelling, async tasks, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

import feste
from feste.backend import Backend, Limits, Request, operation
from feste.draw import Draw
from feste.errors import InvalidRequest, NodeError, RunFailed
from feste.scheduler import LocalExecutor, Reporter
from feste.scheduler.choice import choose
from feste.scheduler.driver import driver
from feste.testing import FakeBackend

LONG = 30.0


@feste.task
def increment(x: int) -> int:
    return x + 1


@feste.task
async def later(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


def until(what: Callable[[], Any]) -> bool:
    """Wait for something that happens on another thread; False if it never does."""
    deadline = time.monotonic() + LONG
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def hands() -> LocalExecutor:
    found = choose(feste.context.settings(scheduler="local"))
    assert isinstance(found, LocalExecutor)
    return found


class Held(Backend):
    """Answers when it is told to, and notes what is cancelled."""

    limits = Limits(concurrency=2)

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()
        self.sent: list[str] = []
        self.cancelled: list[str] = []

    @operation
    async def say(self, prompt: str) -> str:
        self.sent.append(prompt)
        self.asked.set()
        try:
            while not self.answer.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        return prompt


# --- in loops of the user's ----------------------------------------------------------------------


def test_acompute_returns_what_compute_does() -> None:
    """Shapes, plain values and errors are those of ``compute``."""

    async def main() -> None:
        assert await feste.acompute([increment(1), {"k": later(2)}], 5) == ([2, {"k": 3}], 5)
        assert await feste.acompute() == ()
        assert await increment(1) == 2
        with pytest.raises(RunFailed) as caught:
            await feste.acompute(increment(1), increment("a"))
        assert caught.value.partial[0] == 2
        (error,) = await feste.acompute(increment("a"), on_error="return")
        assert isinstance(error, NodeError)

    asyncio.run(main())


def test_the_loop_goes_on_while_a_run_is_awaited() -> None:
    """Awaiting blocks nobody: another task of the same loop opens what the run waits for."""
    llm = Held()

    async def main() -> str:
        async def opens() -> None:
            await asyncio.to_thread(llm.asked.wait, LONG)
            llm.answer.set()

        answer, _ = await asyncio.gather(llm.say("hello"), opens())
        return answer

    assert asyncio.run(main()) == "hello"


def test_many_runs_in_one_loop() -> None:
    """Runs awaited together run together, each with its own values."""

    async def main() -> list[Any]:
        return await asyncio.gather(*[feste.acompute(increment(i), later(i)) for i in range(50)])

    assert asyncio.run(main()) == [(i + 1, i + 1) for i in range(50)]


def test_several_loops_one_after_the_other() -> None:
    """Nothing of Feste is bound to the first loop that it met."""
    llm = FakeBackend(model="async-loops")

    async def main(i: int) -> Any:
        return await increment(i), await later(i), str(await llm.chat(f"{i}"))

    got = [asyncio.run(main(i)) for i in range(4)]

    assert [g[:2] for g in got] == [(i + 1, i + 1) for i in range(4)]
    assert len({g[2] for g in got}) == 4


def test_two_loops_in_two_threads() -> None:
    """Loops in several threads at once are each woken for their own runs."""
    together = threading.Barrier(2)
    got: dict[int, list[int]] = {}

    async def main(i: int) -> None:
        await asyncio.to_thread(together.wait, LONG)
        got[i] = [await increment(i * 100 + k) for k in range(20)]

    threads = [threading.Thread(target=asyncio.run, args=(main(i),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)

    assert got == {i: [i * 100 + k + 1 for k in range(20)] for i in range(2)}


def test_one_node_awaited_twice_at_once_is_one_draw() -> None:
    """Awaiting a node in several places gives one answer, bought once."""
    llm = FakeBackend(model="async-twice", latency=0.01)

    async def main() -> list[str]:
        node = llm.chat("hello")
        return await asyncio.gather(node, node, node)

    assert len(set(asyncio.run(main()))) == 1
    assert len(llm.requests) == 1


def test_last_report_is_that_of_the_task_that_awaited() -> None:
    """Each async task has its own last report."""

    async def one(count: int) -> int:
        await feste.acompute([increment(i) for i in range(count)])
        await asyncio.sleep(0)
        report = feste.last_report()
        assert report is not None
        return report.nodes

    async def main() -> list[int]:
        return await asyncio.gather(*[one(count) for count in range(1, 6)])

    assert asyncio.run(main()) == [1, 2, 3, 4, 5]


name: ContextVar[str] = ContextVar("name", default="nobody")


def test_async_tasks_run_in_their_own_copy_of_the_context() -> None:
    """An async task sees the caller's context, and changes only its own."""

    @feste.task
    async def renamed(to: str) -> str:
        before = name.get()
        name.set(to)
        await asyncio.sleep(0)
        assert name.get() == to
        return before

    async def main() -> list[str]:
        name.set("caller")
        got = (await feste.acompute([renamed(f"{i}") for i in range(20)]))[0]
        return [*got, name.get()]

    assert asyncio.run(main()) == ["caller"] * 21


# --- inside tasks --------------------------------------------------------------------------------


def test_async_tasks_await_nodes_of_their_own() -> None:
    """On Feste's own loop ``await`` is the way to wait: agents and nested runs work there."""
    llm = FakeBackend(model="async-nested")

    @feste.task
    async def agent(depth: int) -> int:
        answer = await llm.chat(f"depth {depth}")
        assert answer.startswith("async-nested:")
        if not depth:
            return 1
        return sum(await asyncio.gather(agent(depth - 1), agent(depth - 1))) + await increment(0)

    assert agent(3).compute() == 15
    assert len(llm.requests) == 15


def test_a_thousand_async_tasks_wait_together() -> None:
    """Async tasks wait side by side: as many as there are, not as there are threads."""
    arrived: list[int] = []

    @feste.task
    async def meets(i: int) -> int:
        arrived.append(i)
        while len(arrived) < 1000:
            await asyncio.sleep(0.001)
        return i

    assert feste.compute([meets(i) for i in range(1000)])[0] == list(range(1000))


def test_an_async_task_that_raises_fails_like_any_other() -> None:
    """Its exception is named, with the user's line; the other tasks of the loop go on."""

    @feste.task
    async def breaks() -> None:
        raise LookupError("not here")

    good, bad = feste.compute(later(1), breaks(), on_error="return")

    assert good == 2
    assert "LookupError: not here" in str(bad) and "test_async.py:" in bad.origin
    assert isinstance(bad.__cause__, LookupError)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_an_async_task_cannot_end_the_loop(kind: type[BaseException]) -> None:
    """Whatever a coroutine raises is its node's failure; the loop serves those that come after."""

    @feste.task
    async def leaves() -> None:
        raise kind

    (error,) = feste.compute(leaves(), on_error="return")

    assert isinstance(error, NodeError) and error.cause_type.endswith(kind.__name__)
    assert later(1).compute() == 2


def test_a_task_of_an_async_task_cannot_end_the_loop_either() -> None:
    """Code of the user's may start tasks of its own: an exit in one of them is not Feste's end."""

    @feste.task
    async def starts() -> str:
        async def leaves() -> None:
            raise SystemExit(3)

        inner = asyncio.ensure_future(leaves())
        with contextlib.suppress(SystemExit):
            await inner
        return "went on"

    assert starts().compute() == "went on"
    assert later(1).compute() == 2


class Leaves(Backend):
    """A backend that wants to end the program."""

    @operation
    async def say(self, prompt: str) -> str:
        raise SystemExit(prompt)


def test_a_backend_cannot_end_the_loop_of_requests() -> None:
    """``SystemExit`` in a backend's method fails the call; other requests are sent all the same."""
    node = Leaves().say("bye")

    (error,) = feste.compute(node, on_error="return")

    assert "SystemExit: bye" in str(error) and error.billed == "unknown"
    assert len(FakeBackend(model="async-after").chat("hello").compute()) > 0


# --- giving up -----------------------------------------------------------------------------------


def cancel_in_flight(node: Any, begun: threading.Event) -> None:
    """Await a node, and cancel that when it is under way."""

    async def main() -> None:
        task = asyncio.ensure_future(feste.acompute(node))
        assert await asyncio.to_thread(begun.wait, LONG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_cancelling_gives_up_the_requests_of_the_run() -> None:
    """A cancelled ``acompute`` sends nothing more, cancels what is in flight, and ends its run."""
    llm = Held()
    cancel_in_flight([llm.say(f"{i}") for i in range(10)], llm.asked)

    assert until(lambda: driver().brain.runs == [])
    assert until(lambda: len(llm.cancelled) == len(llm.sent))
    assert set(llm.sent) == set(llm.cancelled) and len(llm.sent) <= 2
    assert until(lambda: not hands().requests.loop._tasks)


def test_after_a_cancelled_run_the_gate_has_all_its_places() -> None:
    """Cancelled requests leave their places at the gate, also if they had not begun."""
    llm = Held()
    for _ in range(5):
        llm.asked.clear()
        cancel_in_flight([llm.say("a"), llm.say("b")], llm.asked)
    llm.answer.set()

    assert feste.compute([llm.say("c"), llm.say("d"), llm.say("e")])[0] == ["c", "d", "e"]


def test_a_request_cancelled_before_its_first_step_is_reported() -> None:
    """Sending and giving up may reach the loop together: the place at the gate comes back."""
    told: list[tuple[Any, ...]] = []
    executor = LocalExecutor()
    executor.start(Reporter(told.append, executor))
    llm = Held()
    loop_is_held, let_go = threading.Event(), threading.Event()

    async def holds_the_loop() -> None:
        loop_is_held.set()
        let_go.wait(LONG)

    try:
        executor.requests.loop.start("holds", holds_the_loop)
        assert loop_is_held.wait(LONG)
        draws = (Draw("main", "0", 0),)
        request = Request("held", "say", "plugin:held", {"prompt": "a"}, draws=draws)
        executor.send(1, llm.say, request)
        executor.cancel(1)
        let_go.set()

        assert until(lambda: told)
        assert [report[:4] for report in told] == [("sent", executor, 1, False)]
        assert type(told[0][4]).__name__ == "Interrupted"
    finally:
        let_go.set()
        executor.close()


def test_cancelling_cancels_async_tasks_of_the_run() -> None:
    """A user's coroutine of a run that was given up is cancelled: no task goes on in the background."""
    begun = threading.Event()
    ended: list[str] = []

    @feste.task
    async def forever() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    cancel_in_flight(forever(), begun)

    assert until(lambda: ended == ["cancelled"])
    assert until(lambda: not hands().tasks._tasks)
    assert later(1).compute() == 2


def test_a_coroutine_that_was_not_begun_when_cancelled_is_no_warning() -> None:
    """Cancelling early leaves no "never awaited" behind."""

    async def main() -> None:
        for _ in range(30):
            task = asyncio.ensure_future(feste.acompute([later(i) for i in range(20)]))
            await asyncio.sleep(0.001)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
        assert until(lambda: driver().brain.runs == [])
        assert until(lambda: not hands().tasks._tasks)
        gc.collect()

    assert [str(w.message) for w in caught] == []


def test_a_timeout_around_a_run_works() -> None:
    """``asyncio.timeout`` stops a run like any coroutine."""
    llm = Held()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await llm.say("slow")

    asyncio.run(main())

    assert until(lambda: driver().brain.runs == [])


def test_a_loop_closed_early_does_not_break_the_driver() -> None:
    """A run whose loop is gone ends by itself: there is nobody to tell, and that is all."""
    llm = Held()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        await llm.say("nobody waits")

    task = loop.create_task(main())
    assert loop.run_until_complete(loop.run_in_executor(None, llm.asked.wait, LONG))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()

    assert increment(1).compute() == 2
    llm.answer.set()
    assert until(lambda: driver().brain.runs == [])
    assert asyncio.run(feste.acompute(later(1))) == (2,)
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio would tell of it
    del task
    gc.collect()


def test_a_failing_run_among_others_in_a_task_group() -> None:
    """In a ``TaskGroup`` the failure of one run cancels the others, as with any coroutine."""
    llm = Held()
    fake = FakeBackend(model="async-group", fail={"bad": InvalidRequest("no")})

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(feste.acompute(llm.say("slow")))
            await asyncio.to_thread(llm.asked.wait, LONG)
            group.create_task(feste.acompute(fake.chat("bad")))

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())

    assert [type(error) for error in caught.value.exceptions] == [RunFailed]
    assert until(lambda: llm.cancelled == ["slow"])
