"""Eager mode: every call runs here and now, through the same gate, and fails at the user's own line."""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Backend, Limits, Reply, operation
from feste.delayed import FesteDelayed
from feste.errors import (
    BlockingCallError,
    CallError,
    InvalidRequest,
    ParameterError,
    PlainDataError,
    UndefinedVariable,
)
from feste.prompt import ChatPrompt, Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws


@pytest.fixture
def eager() -> Iterator[None]:
    with context.set(eager=True):
        yield


pytestmark = pytest.mark.usefixtures("eager")


@feste.task
def increment(x: int) -> int:
    return x + 1


@feste.task
def share(a: int, b: int) -> float:
    return a / b


@feste.task
async def later(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


@dataclass
class Pair:
    left: Any
    right: Any


# --- values --------------------------------------------------------------------------------------


def test_calls_give_values_at_once() -> None:
    """Prompts give text, operations what they parse, tasks what they return: no node anywhere."""
    llm = FakeBackend(model="eager")
    prompt = Prompt("Hello {{ name }}!")(name="world")
    reply = llm.chat(prompt)

    assert str(prompt) == "Hello world!"
    assert type(reply) is Reply and reply.startswith("eager:")
    assert len(llm.embed("text")) == 8
    assert increment(increment(1)) == 3
    assert later(1) == 2
    assert not isinstance(ChatPrompt(user="{{ x }}")(x="1"), FesteDelayed)


def test_a_task_runs_on_the_callers_own_thread() -> None:
    """A debugger stops in it: Python runs where it is called, whatever its executor."""
    here = threading.get_ident()

    for executor in ("thread", "inline", "process"):
        assert feste.task(executor=executor)(threading.get_ident)() == here  # type: ignore[call-overload]


def test_containers_come_and_go_as_they_are() -> None:
    """Arguments are what the user gave, also the containers; results are not looked into."""
    given = [1, {"a": Pair(2, {3})}]
    same = feste.task(lambda x: x)

    assert same(given) == given
    assert same(Pair(1, [2])) == Pair(1, [2])


def test_the_front_door_takes_values() -> None:
    """The same program runs unchanged: compute, explain and last_report accept what eager gives."""
    llm = FakeBackend(model="eager-door")

    def program() -> tuple[Any, ...]:
        texts = [llm.chat(Prompt("Number {{ i }}")(i=i)) for i in range(3)]
        both = {"texts": texts, "count": increment(2)}
        explained = feste.explain(both)
        assert str(explained)
        values = feste.compute(both, "plain")
        report = feste.last_report()
        assert report is not None and str(report)
        return values

    fresh_draws()
    eager_values = program()
    with context.set(eager=False):
        fresh_draws()
        assert program() == eager_values


def test_it_is_awaited_values_too() -> None:
    """``acompute`` gives plain values back."""

    async def main() -> Any:
        return await feste.acompute([increment(1)], later)

    value, task = asyncio.run(main())

    assert value == [2] and task is later


def test_equal_calls_are_draws_as_in_a_graph() -> None:
    """The n-th equal call answers as the n-th equal node; asked for determinism, all are one."""
    llm = FakeBackend(model="eager-draws")
    greedy = FakeParams(temperature=0.0)
    fresh_draws()
    eagerly = [llm.chat("hello") for _ in range(3)] + [llm.chat("hello", greedy) for _ in range(2)]
    with context.set(eager=False):
        fresh_draws()
        nodes = [llm.chat("hello") for _ in range(3)] + [
            llm.chat("hello", greedy) for _ in range(2)
        ]
        lazily = feste.compute(nodes)[0]

    assert eagerly == lazily
    assert len(set(eagerly)) == 4


def test_nodes_recorded_before_may_be_used() -> None:
    """A node that was recorded lazily is computed when an eager call needs it, once."""
    llm = FakeBackend(model="eager-mixed")
    with context.set(eager=False):
        node = llm.chat("recorded")
        deep = [node, {"k": Pair(node, increment(1))}]

    got = feste.task(lambda x: x)(deep)

    assert got == [node.compute(), {"k": Pair(node.compute(), 2)}]
    assert llm.chat(node) != got[0]
    assert [r.operation for r in llm.requests] == ["chat", "chat"]


def test_operators_of_nodes_recorded_before_give_values() -> None:
    """In eager mode an operator on an old node computes it."""
    with context.set(eager=False):
        node = increment(1)

    assert node + 1 == 3
    assert (node == 2) is True


def test_a_task_may_return_nodes_recorded_before() -> None:
    """What a task returns is a value: nodes in it are computed."""
    with context.set(eager=False):
        node = increment(1)

    assert feste.task(emits=True)(lambda: [node, 5])() == [2, 5]


def test_an_async_task_that_emits_in_eager_mode() -> None:
    """Nodes that a coroutine returns are computed too."""
    with context.set(eager=False):
        node = increment(1)

    @feste.task(emits=True)
    async def emits() -> Any:
        return [node]

    assert emits() == [2]


def test_calls_in_an_async_task_are_nodes() -> None:
    """A coroutine cannot wait for a call, so it awaits or returns it: the same code runs both ways."""
    llm = FakeBackend(model="eager-async")

    @feste.task(emits=True)
    async def returns(text: str) -> Any:
        return [llm.chat(text), feste.task(str.upper)(llm.chat(text))]

    @feste.task
    async def awaits(text: str) -> Any:
        return [await llm.chat(text), *(await feste.acompute(llm.chat(text)))]

    @feste.task
    async def blocks(text: str) -> Any:
        return [llm.chat(text).compute()]

    def program() -> Any:
        fresh_draws()
        return feste.compute([returns("a"), awaits("b")])

    with context.set(eager=False):
        lazy = program()
    sent = len(llm.requests)
    assert program() == lazy
    assert len(llm.requests) == 2 * sent
    with pytest.raises(BlockingCallError, match="acompute"):
        blocks("c")


def test_a_task_that_calls_the_model_in_a_loop() -> None:
    """An agent written as plain Python runs as plain Python."""
    llm = FakeBackend(model="eager-agent")

    @feste.task(emits=True)
    def agent(text: str, rounds: int) -> str:
        for i in range(rounds):
            text = llm.chat(f"{i}: {text}")
        return text

    assert agent("start", 5).startswith("eager-agent:")
    assert len(llm.requests) == 5


# --- errors --------------------------------------------------------------------------------------


def test_the_users_exception_is_raised_as_it_is() -> None:
    """Its own class, its own object, and the traceback leads from the call into the function."""

    class Mine(Exception):
        """An exception of the user's."""

    raised = Mine("look here")

    @feste.task
    def breaks(x: int) -> int:
        local = x * 2
        if local:
            raise raised
        return local

    line = inspect.currentframe().f_lineno + 2  # type: ignore[union-attr]
    with pytest.raises(Mine) as caught:
        breaks(21)

    assert caught.value is raised
    assert raised.__cause__ is None and raised.__context__ is None
    frames = list(traceback.walk_tb(caught.value.__traceback__))
    assert (frames[0][0].f_code.co_filename, frames[0][1]) == (__file__, line)
    assert frames[-1][0].f_locals["local"] == 42
    assert [f for f, _ in frames if f.f_code.co_filename == __file__] == [
        frames[0][0],
        frames[-1][0],
    ]


def test_an_exception_of_an_async_task_is_raised_as_it_is() -> None:
    """Also from another thread: the same object, the user's frame innermost."""

    @feste.task
    async def breaks() -> None:
        local = 42
        await asyncio.sleep(0)
        raise LookupError(f"not {local}")

    with pytest.raises(LookupError, match="not 42") as caught:
        breaks()

    innermost = list(traceback.walk_tb(caught.value.__traceback__))[-1][0]
    assert innermost.f_code.co_name == "breaks" and innermost.f_locals["local"] == 42


def test_exits_go_through() -> None:
    """``SystemExit`` of a task ends the program, as it would without Feste."""

    @feste.task
    def leaves() -> None:
        raise SystemExit(3)

    @feste.task
    async def leaves_later() -> None:
        raise SystemExit(4)

    with pytest.raises(SystemExit, match="3"):
        leaves()
    with pytest.raises(SystemExit, match="4"):
        leaves_later()


def test_a_call_raises_its_own_error() -> None:
    """Not RunFailed: the CallError itself, with the user's line, backend, model and attempts."""
    llm = FakeBackend(model="eager-fail", fail={"bad": InvalidRequest("a bad prompt")})
    line = inspect.currentframe().f_lineno + 2  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="a bad prompt") as caught:
        llm.chat("bad")

    error = caught.value
    assert isinstance(error, CallError)
    assert error.origin == f"{__file__}:{line}"
    assert (error.backend, error.model, error.attempts) == ("fake", "eager-fail", 1)
    assert error.node.startswith("chat-")


class Broken(Backend):
    """A backend with a mistake in each half."""

    @operation
    async def say(self, prompt: str) -> str:
        raise ZeroDivisionError("in send")

    @operation
    async def odd(self, prompt: str) -> Any:
        return object()


def test_a_mistake_of_a_backend_is_a_call_error_too() -> None:
    """Whatever half of an operation breaks, it is the call that failed."""
    with pytest.raises(CallError, match="ZeroDivisionError: in send"):
        Broken().say("hello")
    with pytest.raises(CallError, match=r"the reply is .*object"):
        Broken().odd("hello")
    with pytest.raises(PlainDataError):
        Broken().say({1, 2})  # type: ignore[arg-type]


def test_misuse_is_refused_at_the_call() -> None:
    """What a lazy call refuses, an eager one refuses with the same class."""
    with pytest.raises(ParameterError):
        increment(1, 2)
    with pytest.raises(ParameterError):
        FakeBackend().chat("hello", promt="x")
    with pytest.raises(UndefinedVariable):
        Prompt("{{ a }}")()


def test_an_emitted_node_that_fails_raises_its_own_error() -> None:
    """The error of the node that failed, not of the one that returned it."""
    llm = FakeBackend(model="eager-emit-fail", fail={"bad": InvalidRequest("a bad prompt")})
    with context.set(eager=False):
        node = llm.chat("bad")

    @feste.task(emits=True)
    async def emits() -> Any:
        return [node]

    with pytest.raises(InvalidRequest, match="a bad prompt"):
        emits()


# --- the same gate, the same report --------------------------------------------------------------


def test_eager_calls_go_through_the_gate() -> None:
    """The account's limit holds for eager calls of many threads and for graphs, together."""
    llm = FakeBackend(model="eager-gate", latency=0.01, limits=Limits(concurrency=2))

    def work(i: int) -> str:
        if i % 4 == 3:
            with context.set(eager=False):
                return feste.compute([llm.chat(f"lazy {i}.{k}") for k in range(4)])[0][0]  # type: ignore[no-any-return]
        with context.set(eager=True):
            return str(llm.chat(f"eager {i}"))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(work, range(24)))) == 24
    assert len(llm.requests) == 18 + 6 * 4
    assert llm.peak == 2


def test_each_eager_call_has_a_report() -> None:
    """``last_report`` is that of the last eager call; Python tasks need none."""
    llm = FakeBackend(model="eager-report")
    llm.chat("hello")
    report = feste.last_report()
    increment(1)

    assert report is not None and report is feste.last_report()
    assert report.states == {"done": 1}
    assert len(report.requests) == 1


def test_eager_calls_are_not_batched() -> None:
    """One call is one request, here and now."""
    llm = FakeBackend(model="eager-single")

    [llm.complete(f"text {i}") for i in range(5)]

    assert [r.items for r in llm.requests] == [1] * 5


def test_the_setting_holds_for_the_block_and_inside_its_tasks() -> None:
    """Eager ends with its block; a graph computed outside runs its tasks lazily."""
    with context.set(eager=False):
        node = increment(1)
        inside = feste.task(lambda: isinstance(increment(1), FesteDelayed))()

        assert isinstance(node, FesteDelayed)
        assert inside.compute() is True
    assert increment(1) == 2
