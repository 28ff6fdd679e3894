"""Random runs against random failures on the virtual clock: each ends, and leaves nothing behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Call, Limits, OnChunk, Price, Profile, PromptCache, Request, Response
from feste.budget import Budget
from feste.errors import (
    AuthFailed,
    CallError,
    CallTimeout,
    ConnectionLost,
    ContentFiltered,
    Interrupted,
    InvalidRequest,
    MalformedResponse,
    ModelNotFound,
    QuotaExhausted,
    RateLimited,
    ServerError,
    Unreachable,
    WorkerLost,
)
from feste.scheduler.run import Run
from feste.scheduler.states import OPEN, VALUED
from feste.testing import FakeBackend, FakeParams, VirtualClock
from feste.testing.virtual_clock import VirtualHands

FAILURES = [
    (ServerError("x"), Unreachable("x")),
    (CallTimeout("x"), ConnectionLost("x"), WorkerLost("x"), Interrupted("x")),
    (InvalidRequest("x"), ContentFiltered("x"), MalformedResponse("x")),
    (AuthFailed("x", status=401), QuotaExhausted("x"), ModelNotFound("x")),
    tuple(RateLimited("x", retry_after=wait) for wait in (None, 0.0, 0.3, 30.0, 2000.0)),
]


class Second(FakeBackend):
    """A backend of another provider."""

    plugin = "second"


@feste.task
def same(number: int, text: str) -> str:
    return text


@feste.task(emits=True)
def several(llm: Any, count: int) -> Any:
    return [llm.chat(f"emitted {i}", FakeParams(max_tokens=20)) for i in range(count)]


class Hands(VirtualHands):
    """Ends some of the requests that are cancelled at once, and notes what must not happen."""

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        brain, now = self.clock.brain, self.clock.now
        parcel = brain.attempts.parcels[handle]
        assert not brain.outages.refusal(parcel)
        assert bool(parcel.reserved) == bool(parcel.run.caps)
        assert all(b.spent + b.reserved <= b.cap * (1 + 1e-9) for b, _ in parcel.reserved)
        if parcel.run.store is None:  # else it was admitted a moment ago
            assert now >= parcel.gate.closed_until
        super().send(handle, call, request, on_chunk)

    def cancel(self, handle: int) -> None:
        if self.clock.rng.random() < 0.7:
            self.clock.tell(0.0, ("sent", self, handle, False, Interrupted("cancelled"), 0.1))


def clock_of(rng: random.Random, llms: dict[str, FakeBackend]) -> VirtualClock:
    """A clock of providers that fail at random, and take lists of random lengths."""
    errors = [error for kind in FAILURES if rng.random() < 0.5 for error in kind]
    share = rng.choice([0.05, 0.3, 0.7, 1.0]) if errors else 0.0
    longest, outage = rng.choice([1000, 4, 1]), rng.choice([(0.0, 0.0), (1.0, 30.0), (0.0, 5e3)])

    def answer(request: Request) -> Response:
        if outage[0] <= clock.now < outage[1] and request.model == "big":
            raise ServerError("down")
        if request.items > longest:
            raise InvalidRequest("the list is too long")
        if rng.random() < share:
            raise rng.choice(errors).copy()
        response = llms[request.model].answer(request)
        if rng.random() < 0.05:
            return Response({"answers": response.payload["answers"][1:]}, response.usage)
        return response

    times = rng.choice([(0.01, 1.0), (0.5, 20.0, 200.0)])
    clock = VirtualClock(
        answer,
        request_seconds=lambda request: rng.choice(times),
        task_seconds=lambda task: rng.choice([0.0, 0.1]),
        store_seconds=rng.choice([0.0, 0.001, 3.0]),
        seed=rng.randrange(99),
    )
    clock.hands = Hands(clock, rng.choice([1, 6]))
    return clock


def nodes_of(rng: random.Random, llms: list[Any], shared: list[Any]) -> list[Any]:
    """Some calls: draws, greedy ones, lists, of texts that are equal, begin alike, or come later."""
    made: list[Any] = []
    texts = rng.choice([3, 100])
    for i in range(rng.choice([1, 5, 40])):
        llm, kind, text = rng.choice(llms), rng.random(), f"text {rng.randrange(texts)}"
        params = FakeParams(temperature=rng.choice([0.0, None]), max_tokens=rng.choice([20, 200]))
        said: Any = rng.choice(["", "common beginning " * 200]) + text
        said = same(i, said) if rng.random() < 0.5 else said
        if kind < 0.1 and shared:
            made.append(rng.choice(shared))
        elif kind < 0.15:
            made.append(several(llm, 3))
        elif kind < 0.35:
            made.append(llm.embed(said))
        else:
            made.append((llm.chat if kind < 0.8 else llm.complete)(said, params))
    return made


@pytest.mark.parametrize("seed", range(45))
def test_random_runs_end_and_leave_nothing(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    limits = [None, Limits(concurrency=2), Limits(requests_per_minute=600, concurrency=16)]
    cache = PromptCache(minimum=20, step=8, lag=2.0)
    profile = Profile(price=Price(input=1.0, output=20.0), prompt_cache=rng.choice([None, cache]))
    big = FakeBackend("big", limits=rng.choice(limits), profile=profile)
    small = Second("small", limits=rng.choice(limits), profile=profile)
    clock = clock_of(rng, {"big": big, "small": small})
    llms = [big, small, big.or_else(small), small.or_else(big, on=CallError)]
    budgets = [None, None, Budget(3000, "tokens"), Budget(0.02)]
    runs: list[Run] = []
    shared: list[Any] = []
    for _ in range(rng.choice([1, 2, 4])):
        nodes = nodes_of(rng, llms, shared)
        shared += nodes
        run = clock.run(
            nodes,
            on_error=rng.choice(["raise", "return", "stop"]),
            max_failures=rng.choice([None, None, 3, 0.1]),
            deadline=rng.choice([None, None, 0.5, 60.0]),
            outage_patience=rng.choice([600.0, 0.5]),
            objective=rng.choice(["balanced", "latency", "cost"]),
            optimize=rng.choice([True, False]),
            budget=rng.choice(budgets),
            store=rng.choice([None, None, tmp_path / "a.db", tmp_path / "b.db"]),
        )
        runs.append(run)
        begin = rng.choice([0.0, rng.uniform(0.0, 10.0)])
        clock.tell(begin, ("submit", run))
        if rng.random() < 0.25:
            clock.tell(begin + rng.uniform(0.0, 15.0), ("stop", run, rng.choice([0.0, 2.0])))

    clock.drive()  # raises StalledError if something has been forgotten

    for run in runs:
        assert run.ended is not None and run.open == run.in_flight == run.retrying == 0
        assert all(state >= OPEN for state in run.state)
        assert all((run.state[i] in VALUED) != (i in run.errors) for i in run.outputs)
        assert sum(row.requests for row in run.rows.values()) == len(run.requests)
    assert sum(len(run.requests) for run in runs) == len(clock.sent)
    brain = clock.brain
    left: list[Any] = [brain.runs, brain.timers, brain.attempts.parcels, brain.attempts.retrying]
    left += [
        brain.gates.short,
        brain.journaling.intending,
        brain.flights._led,
        brain.lists._packing,
    ]
    left += [brain.flights._waiting, brain.joins.under_way, brain.prefixes._leading]
    assert not any(left)
    for gate in brain.gates.by_scope.values():
        assert gate.in_flight == gate.coming == len(gate) == 0
    assert not any(b.probe or b.watch for b in brain.outages._breakers.values())
    for budget in budgets:
        assert budget is None or budget.pending == 0
