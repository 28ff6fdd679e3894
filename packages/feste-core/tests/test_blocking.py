"""Where a blocking call is refused, where it is allowed, and that the allowed ones never deadlock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Backend, operation
from feste.errors import BlockingCallError, FesteError, NestedRunError, RunFailed
from feste.plugins import registry
from feste.scheduler import Executor
from feste.scheduler.choice import choose
from feste.testing import FakeBackend

LONG = 30.0
AWAIT = r"await feste\.acompute\(\.\.\.\)"


@feste.task
def increment(x: int) -> int:
    return x + 1


def eagerly() -> Any:
    """A call in eager mode: it waits for its answer, here and now."""
    with context.set(eager=True):
        return FakeBackend(model="blocking").chat("hello")


def blocks() -> Any:
    return increment(1).compute()


def runs_a_loop() -> Any:
    """``acompute`` does not wait, but the ``asyncio.run`` around it does."""
    return asyncio.run(feste.acompute(increment(1)))


WAITS = pytest.mark.parametrize("wait", [blocks, eagerly, runs_a_loop], ids=lambda f: f.__name__)
BLOCKS = pytest.mark.parametrize("wait", [blocks, eagerly], ids=lambda f: f.__name__)


def refused(node: Any) -> FesteError:
    """Compute a node that must fail; return its error."""
    with pytest.raises(RunFailed) as caught:
        node.compute()
    return caught.value.errors[0]


@contextmanager
def plugin(part: Any) -> Iterator[None]:
    """Have a plugin for a block."""
    registry().manager.register(part)
    try:
        yield
    finally:
        registry().manager.unregister(part)


# --- refused -------------------------------------------------------------------------------------


@WAITS
def test_in_an_inline_task(wait: Callable[[], Any]) -> None:
    """Inline tasks run on the brain's own thread: waiting there would stop every run."""
    error = refused(feste.task(executor="inline")(wait)())

    assert isinstance(error, BlockingCallError)
    assert "an inline task" in str(error) and "feste.acompute" in str(error)
    assert increment(1).compute() == 2


@BLOCKS
def test_in_an_async_task(wait: Callable[[], Any]) -> None:
    """Async tasks share one loop: one that waits for another would wait for ever."""

    @feste.task
    async def waits() -> Any:
        return wait()

    error = refused(waits())

    assert isinstance(error, BlockingCallError)
    assert "event loops" in str(error)
    with pytest.raises(BlockingCallError, match=AWAIT):
        raise error


class Nosy(Backend):
    """A backend that runs something where it should only send."""

    def __init__(self) -> None:
        self.what: Callable[[], Any] = blocks
        self.caught: list[BaseException] = []

    def _try(self) -> str:
        try:
            self.what()
        except BaseException as error:
            self.caught.append(error)
        return "sent"

    @operation
    async def ask(self, prompt: str) -> str:
        return self._try()

    @operation
    def ask_in_a_thread(self, prompt: str) -> str:
        return self._try()


@BLOCKS
def test_in_an_async_method_of_a_backend(wait: Callable[[], Any]) -> None:
    """Requests are sent from one loop: waiting on it would stop every request."""
    llm = Nosy()
    llm.what = wait

    assert llm.ask("hello").compute() == "sent"
    (error,) = llm.caught
    with pytest.raises(BlockingCallError, match=AWAIT):
        raise error


@WAITS
def test_in_a_sync_method_of_a_backend(wait: Callable[[], Any]) -> None:
    """A method of a backend holds a place at the gate: a run inside may need that very place."""
    llm = Nosy()
    llm.what = wait

    assert llm.ask_in_a_thread("hello").compute() == "sent"
    (error,) = llm.caught
    with pytest.raises(BlockingCallError, match="a method of a backend"):
        raise error


@WAITS
def test_in_an_observer(wait: Callable[[], Any]) -> None:
    """Observers are heard before a run is handed back: a run inside one would wait for itself."""
    caught: list[BaseException] = []

    class Observer:
        @feste.hookimpl
        def feste_run_started(self, event: Any) -> None:
            try:
                wait()
            except BaseException as error:
                caught.append(error)

    with plugin(Observer()):
        assert increment(1).compute() == 2

    (error,) = caught
    with pytest.raises(BlockingCallError, match="an observer hook"):
        raise error


@WAITS
def test_in_a_pass(wait: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass sees a graph and returns a graph; a run inside one would be optimized by it in turn."""
    caught: list[BaseException] = []

    class Pass:
        name = "nosy"

        def apply(self, graph: Any, cx: Any) -> Any:
            try:
                wait()
            except BaseException as error:
                caught.append(error)
            return graph

    monkeypatch.setitem(registry().optimizations, "nosy", Pass())

    assert increment(1).compute() == 2
    for error in caught:
        with pytest.raises(BlockingCallError, match="an optimization pass"):
            raise error
    assert caught


@WAITS
def test_in_a_worker_process(wait: Callable[[], Any]) -> None:
    """A worker has no gate: a run of its own would go round the account's limits."""
    how = wait.__name__

    @feste.task(executor="process")
    def works(in_a_thread: bool) -> list[str]:
        import asyncio
        import threading

        import feste
        from feste.testing import FakeBackend

        def attempt() -> None:
            node = FakeBackend(model="blocking").chat("hello")
            try:
                if how == "blocks":
                    node.compute()
                elif how == "runs_a_loop":
                    asyncio.run(feste.acompute(node))
                else:
                    with feste.context.set(eager=True):
                        FakeBackend(model="blocking").chat("hello")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")

        said: list[str] = []
        if in_a_thread:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()
        else:
            attempt()
        return said

    for said in feste.compute(works(False), works(True)):
        assert len(said) == 1
        assert said[0].startswith("NestedRunError") and "return the node" in said[0]


def test_the_error_of_a_worker_comes_back_as_it_is() -> None:
    """A refusal inside a worker is the error of that node, with the user's line."""

    @feste.task(executor="process")
    def works() -> Any:
        from feste.testing import FakeBackend

        return FakeBackend(model="blocking").chat("hello").compute()

    error = refused(works())

    assert isinstance(error, NestedRunError)
    assert "test_blocking.py:" in error.origin


# --- allowed -------------------------------------------------------------------------------------


def test_in_a_thread_of_the_users() -> None:
    """Any thread of the user's may wait, also one that a task started."""
    got: list[int] = []

    @feste.task
    def starts() -> list[int]:
        thread = threading.Thread(target=lambda: got.append(increment(1).compute()))
        thread.start()
        thread.join(LONG)
        return got

    assert starts().compute() == [2]


def test_inside_a_foreign_running_loop() -> None:
    """In a loop of the user's own, a blocking call blocks that loop and works."""

    async def main() -> list[Any]:
        with context.set(eager=True):
            eager = increment(10)
        return [increment(1).compute(), eager, FakeBackend(model="blocking").embed("a").compute()]

    one, eleven, vector = asyncio.run(main())

    assert (one, eleven, len(vector)) == (2, 11, 8)


def places() -> int:
    """How many threads may run tasks at once."""
    hands = choose(context.settings(scheduler="local"))
    assert isinstance(hands, Executor)
    return hands.capacity("thread")


def test_more_waiting_tasks_than_threads() -> None:
    """A pool thread that waits for a run is made up for, so tasks that wait never use up the pool."""
    width = 3 * places()

    @feste.task
    def outer(x: int) -> int:
        return increment(x).compute() + 1

    assert feste.compute([outer(x) for x in range(width)])[0] == [x + 2 for x in range(width)]


def test_waiting_tasks_several_levels_deep() -> None:
    """The pool grows at each level: nested runs in nested runs end."""

    @feste.task
    def down(depth: int) -> int:
        if not depth:
            return 1
        return sum(feste.compute([down(depth - 1), down(depth - 1)])[0])

    assert down(6).compute() == 64


def test_a_loop_of_the_users_inside_a_pool_thread() -> None:
    """``asyncio.run`` in a task occupies its thread like a blocking call, and is made up for alike."""
    width = 3 * places()

    @feste.task
    def outer(x: int) -> int:
        async def main() -> int:
            return await increment(x) + await increment(x)

        return asyncio.run(main())

    assert feste.compute([outer(x) for x in range(width)])[0] == [2 * x + 2 for x in range(width)]


def test_more_waiting_coroutines_than_may_run() -> None:
    """An async task that awaits a run of its own is made up for too: they are limited like threads."""

    @feste.task
    async def inner(x: int) -> int:
        return x + 1

    @feste.task
    async def outer(x: int) -> int:
        return await inner(x) + 1

    assert feste.compute([outer(x) for x in range(1100)])[0] == [x + 2 for x in range(1100)]


def test_an_async_task_may_block_in_a_thread_aside() -> None:
    """``asyncio.to_thread(node.compute)`` is the way to block from a coroutine: more than there are
    threads aside, each waiting for one that needs such a thread itself."""

    @feste.task
    async def inner(x: int) -> int:
        return await asyncio.to_thread(lambda: x + 1)

    @feste.task
    async def outer(x: int) -> int:
        return await asyncio.to_thread(inner(x).compute)

    assert feste.compute([outer(x) for x in range(100)])[0] == [x + 1 for x in range(100)]


def test_the_pool_is_as_small_as_before_when_nobody_waits() -> None:
    """What waiting tasks were made up for is taken back when they go on."""
    before = places()

    @feste.task
    def outer(x: int, fail: bool) -> int:
        value = increment(x).compute()
        if fail:
            raise ValueError("after waiting")
        return value

    feste.compute([outer(x, x % 2 == 0) for x in range(20)], on_error="return")

    assert places() == before


def test_eager_calls_in_a_pool_thread_wait_too() -> None:
    """An eager call of a backend inside a task parks a pool thread, which is made up for."""
    llm = FakeBackend(model="blocking-eager")

    @feste.task
    def asks(i: int) -> str:
        with context.set(eager=True):
            return str(llm.chat(f"number {i}"))

    assert len(set(feste.compute([asks(i) for i in range(40)])[0])) == 40
