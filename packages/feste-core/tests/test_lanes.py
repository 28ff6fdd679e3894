"""Pipelines without barriers: each item goes on as soon as it can, and no lane is idle in between."""

from __future__ import annotations

import random
from typing import Any

import pytest

import feste
from feste.backend import Limits, Request
from feste.scheduler.brain import Brain
from feste.scheduler.states import PREPARING, READY
from feste.testing import FakeBackend, VirtualClock

ITEMS = 500


@feste.task(pure=True)
def step(text: str) -> str:
    return f"next: {text}"


def pipelines(llm: FakeBackend) -> list[Any]:
    """Three calls for each item, with a little work between them."""
    made = []
    for item in range(ITEMS):
        text: Any = f"item {item}"
        for _ in range(3):
            text = step(llm.chat(text))
        made.append(text)
    return made


class Durations:
    """Heavy-tailed durations of requests, the same for the same one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.of: dict[str, float] = {}

    def __call__(self, request: Request) -> float:
        rng = random.Random(f"{self.seed} {request.key}")
        seconds = 0.5 * rng.paretovariate(1.5)
        self.of[request.body["messages"][0]["content"]] = seconds
        return seconds


def longest_chain(clock: VirtualClock, durations: Durations) -> float:
    """The sum of the slowest item's three requests."""
    llm = FakeBackend()
    best = 0.0
    for item in range(ITEMS):
        text, total = f"item {item}", 0.0
        for _ in range(3):
            total += durations.of[text]
            (sent,) = (r for _, r in clock.sent if r.body["messages"][0]["content"] == text)
            text = f"next: fake-1:{llm.answer(sent).payload['answers'][0][:16]}"
        best = max(best, total)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_with_a_lane_for_each_item_only_the_slowest_one_counts(seed: int) -> None:
    durations = Durations(seed)
    llm = FakeBackend(limits=Limits(concurrency=ITEMS))
    clock = VirtualClock(llm.answer, request_seconds=durations, places=8)
    clock.compute(pipelines(llm))

    assert len(clock.sent) == 3 * ITEMS
    assert clock.now <= 1.1 * longest_chain(clock, durations)


class NoIdleLane(Brain):
    """Checks after each event that a call only waits while all lanes are in use."""

    lanes = 64

    def on(self, events: Any, now: float) -> Any:
        actions = super().on(events, now)
        for gate in self.gates.by_scope.values():
            assert gate.in_flight <= self.lanes
            assert gate.in_flight == self.lanes or not len(gate)
        return actions


@pytest.mark.parametrize("seed", range(3))
def test_with_fewer_lanes_none_is_idle_while_a_call_is_ready(seed: int) -> None:
    durations = Durations(seed)
    llm = FakeBackend(limits=Limits(concurrency=NoIdleLane.lanes))
    brain = NoIdleLane(seed=seed)
    clock = VirtualClock(llm.answer, request_seconds=durations, places=8, brain=brain)
    run = clock.run(pipelines(llm))
    clock.tell(0.0, ("submit", run))
    clock.drive()

    assert clock.peak == NoIdleLane.lanes
    work = sum(durations(r) for _, r in clock.sent) / NoIdleLane.lanes
    assert clock.now <= work + longest_chain(clock, durations)
    assert not {READY, PREPARING} & set(run.state)


def test_a_slow_sibling_holds_up_nobody() -> None:
    """One item's first call takes 2 s; the others' second calls start as soon as theirs are there."""
    llm = FakeBackend(limits=Limits(concurrency=64))
    clock = VirtualClock(
        llm.answer,
        request_seconds=lambda r: 2.0 if r.body["messages"][0]["content"] == "item 7" else 0.2,
    )
    clock.compute([llm.chat(step(llm.chat(f"item {i}"))) for i in range(40)])
    second = sorted(at for at, r in clock.sent if "next" in r.body["messages"][0]["content"])

    assert second[-2] <= 0.2 + 0.3
    assert second[-1] == pytest.approx(2.0)


def test_what_was_measured_ranks_the_next_run() -> None:
    """Slow calls go first once they are known to be slow: both lanes end at the same time."""
    llm = FakeBackend(limits=Limits(concurrency=2))
    clock = VirtualClock(
        llm.answer, request_seconds=lambda r: 9.0 if r.operation == "complete" else 1.0
    )

    def program() -> list[Any]:
        return [*(llm.chat(f"short {i}") for i in range(9)), llm.complete("long")]

    spent = []
    for _ in range(2):
        begun = clock.now
        clock.compute(program())
        spent.append(clock.now - begun)

    assert spent == [pytest.approx(13.0), pytest.approx(9.0)]
