"""Observers: they hear everything, in order, from one thread, and can harm nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Backend, operation
from feste.errors import FesteWarning, InvalidRequest, RateLimited, ServerError
from feste.events import (
    EVENTS,
    SCHEMA,
    GateClosed,
    NodeFinished,
    RequestFinished,
    RequestStarted,
    RunFinished,
    RunStarted,
)
from feste.plugins import registry
from feste.scheduler.observers import Observers
from feste.testing import FakeBackend

LONG = 30.0


class Ear:
    """Hears every event; ``slow`` waits a moment at each."""

    def __init__(self, *, slow: float = 0.0) -> None:
        self.heard: list[Any] = []
        self.threads: set[str] = set()
        self.slow = slow

    def _hear(self, event: Any) -> None:
        time.sleep(self.slow)
        self.threads.add(threading.current_thread().name)
        self.heard.append(event)

    @feste.hookimpl
    def feste_run_started(self, event: Any) -> None:
        self._hear(event)

    @feste.hookimpl
    def feste_node_finished(self, event: Any) -> None:
        self._hear(event)

    @feste.hookimpl
    def feste_request_started(self, event: Any) -> None:
        self._hear(event)

    @feste.hookimpl
    def feste_request_finished(self, event: Any) -> None:
        self._hear(event)

    @feste.hookimpl
    def feste_gate_closed(self, event: Any) -> None:
        self._hear(event)

    @feste.hookimpl
    def feste_run_finished(self, event: Any) -> None:
        self._hear(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.heard if type(event) is kind]


@contextmanager
def listening(*ears: Any) -> Iterator[Any]:
    """Have observers for a block."""
    for ear in ears:
        registry().manager.register(ear, name=f"an ear {id(ear)}")
    try:
        yield ears[0]
    finally:
        for ear in ears:
            registry().manager.unregister(ear)


@feste.task
def increment(x: int) -> int:
    return x + 1


def test_every_event_is_heard_before_compute_returns() -> None:
    """One event for the start, each node, each request and the end: all there when the values are."""
    llm = FakeBackend(model="observers")
    with listening(Ear()) as ear:
        feste.compute([increment(i) for i in range(100)], [llm.complete(f"{i}") for i in range(20)])
        report = feste.last_report()
        heard = list(ear.heard)

    assert report is not None
    assert len(ear.of(NodeFinished)) == report.nodes == 120
    assert ear.of(RequestFinished) == report.requests and len(report.requests) == 2
    assert len(ear.of(RunStarted)) == len(ear.of(RunFinished)) == 1
    assert (type(heard[0]), type(heard[-1])) == (RunStarted, RunFinished)
    assert {event.run for event in heard} == {report.run}


def test_events_come_in_order_from_one_thread() -> None:
    """Times never go back, a node is told after those that it needed, and a call after its request."""
    llm = FakeBackend(model="observers-order")
    call = llm.chat("hello")
    first = increment(1)
    last = increment(increment(first))
    shout = feste.task(str.upper)(call)
    with listening(Ear()) as ear:
        feste.compute(last, shout, optimize={"fuse": False})

    times = [event.at for event in ear.heard]
    keys = [event.key for event in ear.of(NodeFinished)]
    kinds = [getattr(event, "key", type(event)) for event in ear.heard]
    assert times == sorted(times)
    assert keys.index(first.key) < keys.index(last.key)
    assert kinds.index(RequestFinished) < kinds.index(call.key) < kinds.index(shout.key)
    assert ear.threads == {"feste-observers"}


def test_events_say_what_happened() -> None:
    """States, kinds, lines and errors of nodes; the counts of the run."""
    llm = FakeBackend(model="observers-say", fail={"bad": InvalidRequest("refused")})
    paid = llm.chat("paid")
    paid.compute()
    bad = llm.chat("bad")
    needs = increment(bad)
    with listening(Ear()) as ear:
        feste.compute(paid, bad, needs, increment(1), on_error="return")

    told = {event.key: event for event in ear.of(NodeFinished)}
    assert {key: event.state for key, event in told.items()}[paid.key] == "kept"
    assert (told[bad.key].state, told[bad.key].kind, told[bad.key].op) == ("failed", "call", "chat")
    assert "refused" in told[bad.key].error and "test_observers.py:" in told[bad.key].origin
    assert told[needs.key].state == "skipped" and bad.key in told[needs.key].error
    (begun,), (ended,) = ear.of(RunStarted), ear.of(RunFinished)
    assert (begun.nodes, begun.calls) == (4, 2)
    assert ended.states == {"done": 1, "failed": 1, "skipped": 1, "kept": 1}
    assert (ended.requests, ended.cancelled) == (1, False)
    assert all(0 <= event.ready <= event.at for event in told.values())


class Refuses(Backend):
    """Refuses the first request."""

    left = 1

    @operation
    async def say(self, prompt: str) -> str:
        if self.left:
            self.left = 0
            raise ServerError("busy", status=503, retry_after=0.0)
        return prompt


def test_every_attempt_is_told() -> None:
    """A call that was tried twice ends two requests and one node."""
    with listening(Ear()) as ear:
        Refuses().say("hello").compute()

    assert [(r.attempt, r.error, r.status) for r in ear.of(RequestFinished)] == [
        (1, "ServerError", 503),
        (2, "", None),
    ]
    assert [n.state for n in ear.of(NodeFinished)] == ["done"]


def test_emitted_nodes_and_eager_calls_are_told_too() -> None:
    """Nodes that joined the run while it ran are events like any others; so is an eager call."""
    llm = FakeBackend(model="observers-more")
    with listening(Ear()) as ear:
        feste.task(emits=True)(lambda: [increment(1), increment(2)])().compute()
        nodes = len(ear.of(NodeFinished))
        with context.set(eager=True):
            llm.chat("hello")

    assert nodes == 3
    assert ear.of(RunFinished)[0].states == {"done": 3}
    assert ear.heard[-1].run.startswith("eager-")
    assert len(ear.of(RequestFinished)) == 1


def test_a_slow_observer_loses_nothing() -> None:
    """However slow it is, every event reaches it, in order; compute waits for it."""
    with listening(Ear(slow=0.002)) as ear:
        feste.compute([increment(i) for i in range(50)])
        heard = list(ear.heard)

    assert len(heard) == 52
    assert [event.at for event in heard] == sorted(event.at for event in heard)


def test_several_runs_at_once_are_told_apart() -> None:
    """Events of runs that go on together carry their run's name; each run's are complete."""
    with listening(Ear()) as ear:
        threads = [
            threading.Thread(target=lambda: feste.compute([increment(i) for i in range(30)]))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)

    runs = {event.run for event in ear.heard}
    assert len(runs) == 10
    for run in runs:
        mine = [event for event in ear.heard if event.run == run]
        assert (type(mine[0]), type(mine[-1]), len(mine)) == (RunStarted, RunFinished, 32)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_observer_that_raises_is_named_once_and_ignored(kind: type[BaseException]) -> None:
    """It never stops a run; a warning names it, others go on hearing, it hears no more."""
    calls: list[Any] = []

    class Breaks:
        @feste.hookimpl
        def feste_node_finished(self, event: Any) -> None:
            calls.append(event)
            raise kind("cannot bear it")

        @feste.hookimpl
        def feste_run_finished(self, event: Any) -> None:
            calls.append(event)

    ear, broken = Ear(), Breaks()
    with listening(ear, broken), pytest.warns(FesteWarning) as caught:
        assert feste.compute([increment(i) for i in range(5)])[0] == [1, 2, 3, 4, 5]
        increment(1).compute()

    assert len(calls) == 1
    assert len(caught) == 1
    said = str(caught[0].message)
    assert f"an ear {id(broken)}" in said and f"{kind.__name__}: cannot bear it" in said
    assert len(ear.of(NodeFinished)) == 6


def test_a_warning_made_an_error_does_not_hang_the_run() -> None:
    """With ``python -W error`` the broken observer is told on stderr, and the run ends."""
    code = """if True:
        import feste
        from feste.plugins import registry

        class Breaks:
            @feste.hookimpl
            def feste_run_started(self, event):
                raise ValueError("cannot bear it")

        registry().manager.register(Breaks())
        print(feste.task(abs)(-1).compute(), feste.task(abs)(-2).compute())
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "1 2\n"
    assert "FesteWarning: the observer" in done.stderr


def test_an_observer_may_take_no_argument() -> None:
    """A hook may leave out what it does not need."""
    times: list[int] = []

    class Counts:
        @feste.hookimpl
        def feste_run_finished(self) -> None:
            times.append(1)

    with listening(Counts()):
        increment(1).compute()

    assert times == [1]


def test_without_observers_nothing_is_told() -> None:
    """Whoever comes in the middle of a run hears of the next one."""
    ear = Ear()
    begun, go_on = threading.Event(), threading.Event()

    @feste.task
    def waits() -> None:
        begun.set()
        go_on.wait(LONG)

    thread = threading.Thread(target=lambda: waits().compute())
    thread.start()
    assert begun.wait(LONG)
    with listening(ear):
        go_on.set()
        thread.join(LONG)
        assert ear.heard == []
        increment(1).compute()
    increment(1).compute()

    assert len(ear.of(RunStarted)) == 1


def test_a_stopped_runs_requests_are_told_before_its_end() -> None:
    """The end of a run is its last event, also when requests were in flight as it was stopped."""
    asked = threading.Event()

    class Held(Backend):
        @operation
        async def say(self, prompt: str) -> str:
            asked.set()
            await asyncio.sleep(LONG)
            return prompt

    ended = threading.Event()

    class Listens(Ear):
        @feste.hookimpl
        def feste_run_finished(self, event: Any) -> None:
            self._hear(event)
            ended.set()

    async def main() -> None:
        task = asyncio.ensure_future(feste.acompute(Held().say("hello")))
        await asyncio.to_thread(asked.wait, LONG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(ended.wait, LONG)

    with listening(Listens()) as ear:
        asyncio.run(main())
        increment(1).compute()  # everything that came late would be heard before this
        first = [event for event in ear.heard if event.run == ear.heard[0].run]

    assert [type(event) for event in first] == [
        RunStarted,
        RequestStarted,
        RequestFinished,
        NodeFinished,
        RunFinished,
    ]
    assert first[2].error == "Interrupted" and first[3].state == "interrupted"
    assert first[-1].cancelled and first[-1].requests == 1


def test_each_request_begins_and_ends_under_one_number() -> None:
    """A gauge of what is in flight, and spans for a tracer, need no other state than the numbers."""
    with listening(Ear()) as ear:
        feste.compute([Refuses().say(f"{i}") for i in range(5)])

    open_, peak = dict[int, RequestStarted](), 0
    for event in ear.heard:
        if type(event) is RequestStarted:
            open_[event.number] = event
            peak = max(peak, len(open_))
        elif type(event) is RequestFinished:
            begun = open_.pop(event.number)
            assert begun.at == event.sent
            assert (begun.backend, begun.operation, begun.model) == ("refuses", "say", "")
            assert (begun.items, begun.attempt) == (event.items, event.attempt)
    assert not open_ and len(ear.of(RequestStarted)) == 10
    assert ear.of(RunFinished)[0].peak == peak
    assert ear.of(RunFinished)[0].retries == {"ServerError": 5}


def test_a_gate_that_closes_is_told_once() -> None:
    """With the model, why, and for how long; the calls that waited for it say so."""

    class Throttles(Backend):
        refused = False

        @operation
        async def say(self, prompt: str) -> str:
            if not self.refused:
                self.refused = True
                raise RateLimited("slow down", retry_after=0.05)
            return prompt

    with listening(Ear()) as ear:
        Throttles().say("hello").compute()

    (closed,) = ear.of(GateClosed)
    (_, last), (ended,) = ear.of(RequestFinished), ear.of(RunFinished)
    assert (closed.backend, closed.model, closed.reason) == ("throttles", "", "rate_limit")
    assert closed.seconds == pytest.approx(0.05)
    assert last.waits["retry"] >= 0.05 and ended.waits["retry"] == last.waits["retry"]
    report = feste.last_report()
    assert report is not None
    (closing,) = report.closings
    assert (closing.reason, closing.start) == ("rate_limit", closed.at)
    assert closing.end - closing.start == pytest.approx(0.05)


def test_every_event_is_json_with_its_schema() -> None:
    """Of each kind, whatever happened."""
    llm = FakeBackend(model="observers-json", fail={"bad": InvalidRequest("refused")})
    with listening(Ear()) as ear:
        feste.compute(Refuses().say("hello"), llm.chat("bad"), increment(1), on_error="return")

    for event in [*ear.heard, GateClosed("run-1", 0.5, "fake", "m", "breaker", 3.0)]:
        data = json.loads(json.dumps(event.to_json()))
        fields = {each.name for each in dataclasses.fields(event)}
        assert data == event.to_json()
        assert set(data) == {"schema", "event", *fields}
        assert (data["schema"], data["event"]) == (SCHEMA, event.name)
    assert {event.name for event in EVENTS} == {
        name.removeprefix("feste_") for name in dir(Ear) if name.startswith("feste_")
    }


def test_an_observer_of_one_event_costs_no_others() -> None:
    """The scheduler makes only those events that somebody implements a hook for."""

    class Ends:
        @feste.hookimpl
        def feste_run_finished(self, event: Any) -> None:
            pass

    with listening(Ends()):
        assert Observers().heard() == {"run_finished"}
    with listening(Ends(), Ear()):
        assert Observers().heard() == {event.name for event in EVENTS}
