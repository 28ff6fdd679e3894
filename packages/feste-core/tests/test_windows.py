"""Executors with a window, on the virtual clock: it is never exceeded, always used, and delays nobody else."""

from __future__ import annotations

import random
from typing import Any

import pytest

import feste
from feste.backend import Limits, Price, Profile, Request, Response
from feste.budget import Budget
from feste.errors import (
    CallTimeout,
    ConfigError,
    FesteError,
    InvalidRequest,
    RateLimited,
    ServerError,
    WorkerLost,
)
from feste.scheduler.run import Run
from feste.testing import FakeBackend, FakeParams, VirtualClock
from feste.testing.virtual_clock import VirtualHands

SHORT = FakeParams(max_tokens=8)
PRICED = Profile(price=Price(input=1_000.0, output=10_000.0))


class Windowed(VirtualHands):
    """An executor that takes so many requests at once, and says so if it gets more."""

    def __init__(self, clock: VirtualClock, size: int) -> None:
        super().__init__(clock, places=6)
        self.size = size
        self.peak = 0

    @property
    def window(self) -> int:
        return self.size

    def send(self, *args: Any) -> None:
        parcels = self.clock.brain.attempts.parcels.values()
        under_way = sum(parcel.run.executor is self for parcel in parcels)
        assert under_way <= self.size
        self.peak = max(self.peak, under_way)
        super().send(*args)

    def resize(self, at: float, size: int) -> None:
        """Change the window at a time."""

        def change() -> None:
            self.size = size

        self.clock.tell(at, ("capacity", self, "request"), before=change)


def on(clock: VirtualClock, hands: Any, *args: Any, at: float = 0.0, **settings: Any) -> Run:
    """A run on an executor, which begins at a time."""
    clock.hands = hands
    run = clock.run(*args, **settings)
    clock.tell(at, ("submit", run))
    return run


def forgotten(clock: VirtualClock) -> bool:
    """Whether nothing is left of what has ended."""
    windows = clock.brain.windows
    gates = clock.brain.gates.by_scope.values()
    held = any(gate.held_by or len(gate) or gate.in_flight for gate in gates)
    return not (windows.full or windows._out or held or clock.brain.attempts.parcels)


def chats(llm: FakeBackend, count: int, name: str = "") -> list[Any]:
    return [llm.chat(f"{name} {i}", SHORT) for i in range(count)]


def test_a_window_is_used_and_not_exceeded() -> None:
    """Forty seconds of work in three places; what waits for them waits for a worker."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    hands = Windowed(clock, 3)
    run = on(clock, hands, chats(llm, 40))

    clock.drive()

    assert hands.peak == 3
    assert clock.now == -(-40 // 3)
    waits = run.sum_waits()
    assert set(waits) == {"worker"}
    assert waits["worker"] == pytest.approx(sum(i // 3 for i in range(40)))
    assert forgotten(clock)


def test_runs_share_a_window_and_others_are_not_held() -> None:
    """Two runs on one executor take turns; a run elsewhere with the same account goes on."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    here, hands = clock.hands, Windowed(clock, 2)
    first = on(clock, hands, chats(llm, 20, "first"))
    second = on(clock, hands, chats(llm, 4, "second"), at=0.1)
    local = on(clock, here, chats(llm, 5, "local"), at=0.5)

    clock.drive()

    assert hands.peak == 2
    assert (local.ended, second.ended, first.ended) == (1.5, 5.0, 12.0)
    assert "worker" not in local.sum_waits()
    assert forgotten(clock)


def test_a_window_changes_while_requests_wait() -> None:
    """Workers come and go: with none all wait, and nobody takes the run for stalled."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    hands = Windowed(clock, 0)
    run = on(clock, hands, chats(llm, 30))
    for at, size in (10.0, 2), (12.0, 5), (14.0, 1), (17.0, 0), (100.0, 4):
        hands.resize(at, size)

    clock.drive()

    assert not run.errors
    sent = [at for at, _ in clock.sent]
    begun = {at: sent.count(at) for at in sorted(set(sent))}
    small = {10: 2, 11: 2, 12: 5, 13: 5, 14: 1, 15: 1, 16: 1}
    assert begun == small | {100: 4, 101: 4, 102: 4, 103: 1}
    assert forgotten(clock)


def test_each_account_has_its_turns() -> None:
    """A window is for all accounts: one that is asked later is held as well, and not passed over."""
    many, few = FakeBackend("many"), FakeBackend("few")
    clock = VirtualClock(many.answer)
    hands = Windowed(clock, 2)
    on(clock, hands, chats(many, 100))
    later = on(clock, hands, chats(few, 5), at=0.5)
    chain: Any = "begin"
    for _ in range(5):
        chain = many.chat(few.chat(chain))
    both = on(clock, hands, chain, at=0.5)

    clock.drive()

    assert hands.peak == 2
    assert (later.ended or 0) < 12
    assert (both.ended or 0) < 45
    assert clock.now == pytest.approx(115 / 2, abs=0.51)
    assert forgotten(clock)


@pytest.mark.parametrize("grace", [0.0, 2.0])
def test_a_run_that_is_stopped_gives_its_places_back(grace: float) -> None:
    """Its requests under way keep theirs until they end, and another run gets them then."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    hands = Windowed(clock, 2)
    first = on(clock, hands, chats(llm, 20, "first"))
    second = on(clock, hands, chats(llm, 4, "second"), at=0.2)
    clock.tell(0.5, ("stop", first, grace))

    clock.drive()

    assert len(clock.sent) == 2 + 4
    assert second.ended == 3.0
    assert not second.errors
    assert forgotten(clock)


def test_what_is_stopped_before_it_is_sent_gives_its_place_back(tmp_path: Any) -> None:
    """Requests wait until a store has noted them: they have a place by then."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, store_seconds=1.0)
    hands = Windowed(clock, 2)
    with feste.context.set(store=tmp_path / "runs.db"):
        first = on(clock, hands, chats(llm, 20, "first"), on_error="return")
    second = on(clock, hands, chats(llm, 4, "second"), at=2.5)
    clock.tell(1.5, ("stop", first, 0.0))  # they were looked up by 1.0, and are noted at 2.0

    clock.drive()

    assert not second.errors
    assert forgotten(clock)


def test_a_budget_and_a_window_hold_the_same_run() -> None:
    """Whatever holds a run, it goes on when both have room, and exceeds neither."""
    llm = FakeBackend(profile=PRICED)
    clock = VirtualClock(llm.answer, request_seconds=lambda r: 1.0 + r.tokens % 3)
    hands = Windowed(clock, 3)
    dear = on(clock, hands, chats(llm, 30, "dear"), budget=Budget(0.5), on_error="return")
    free = on(clock, hands, chats(llm, 30, "free"), at=0.1)
    hands.resize(3.3, 1)
    hands.resize(9.9, 4)

    clock.drive()

    assert not free.errors
    assert 0 < sum(dear.spent.values()) <= 0.5
    assert forgotten(clock)


def test_what_is_sent_again_waits_for_a_place() -> None:
    """A request that failed has given its place to another, and gets the next one."""
    llm = FakeBackend()
    failed: set[str] = set()

    def answer(request: Request) -> Response:
        if request.key not in failed:
            failed.add(request.key)
            raise ServerError("oops")
        return llm.answer(request)

    clock = VirtualClock(answer)
    hands = Windowed(clock, 2)
    run = on(clock, hands, chats(llm, 20))

    clock.drive()

    assert not run.errors
    assert len(clock.sent) == 40
    assert forgotten(clock)


def test_lists_count_as_one_request() -> None:
    """Calls gather while no place is free, and then go together."""
    llm = FakeBackend(limits=Limits(max_items=10))
    clock = VirtualClock(llm.answer)
    hands = Windowed(clock, 1)
    run = on(clock, hands, [llm.complete(llm.chat(f"{i}", SHORT)) for i in range(20)])

    clock.drive()

    assert hands.peak == 1
    assert not run.errors
    assert len(clock.sent) == 20 + 2


def test_requests_that_died_with_their_worker_are_sent_again_soon() -> None:
    """That is no sign of a provider in trouble; but who kills four workers is not sent a fifth time."""
    llm = FakeBackend()
    lost: dict[str, int] = {}

    def answer(request: Request) -> Response:
        lost[request.key] = lost.get(request.key, 0) + 1
        if lost[request.key] == 1 or "deadly" in str(request.body):
            raise WorkerLost("died")
        return llm.answer(request)

    clock = VirtualClock(answer, seed=1)
    clock.hands = Windowed(clock, 100)
    *results, deadly = clock.compute(*chats(llm, 100), llm.chat("deadly"), on_error="return")

    assert not any(isinstance(r, FesteError) for r in results)
    assert isinstance(deadly, WorkerLost)
    assert deadly.attempts == 4
    assert clock.now < 20
    assert forgotten(clock)


def test_the_runs_of_a_broken_executor_end_with_its_error() -> None:
    """What is under way is reported by the executor; nothing else is begun, and others go on."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    here, hands = clock.hands, Windowed(clock, 2)
    broken = on(clock, hands, chats(llm, 20), on_error="return")
    local = on(clock, here, chats(llm, 20, "local"))
    clock.tell(0.5, ("broken", hands, ConfigError("the cluster is gone: all of it")))

    clock.drive()

    assert isinstance(broken.fault, ConfigError)
    told = [type(r).__name__ for r in broken.results()]
    assert told == ["Reply"] * 2 + ["NotStarted"] * 18
    assert not local.errors
    assert len(clock.sent) == 22
    assert forgotten(clock)


def test_a_run_on_an_executor_that_broke_before_it_began() -> None:
    """It waits for nothing; who starts the executor again can use it."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    hands = Windowed(clock, 0)
    clock.tell(0.5, ("broken", hands, ConfigError("the cluster at tcp://host is gone: all of it")))
    late = on(clock, hands, chats(llm, 2), at=1.0, on_error="return")
    clock.tell(2.0, ("started", hands))
    hands.resize(2.0, 2)
    again = on(clock, hands, chats(llm, 2, "again"), at=3.0)

    clock.drive()

    assert isinstance(late.fault, ConfigError)
    told = [str(r).partition(" (at ")[0] for r in late.results()]
    assert told == ["not begun: the cluster at tcp://host is gone"] * 2
    assert not again.errors and again.ended == 4.0
    assert forgotten(clock)


def test_an_executor_that_is_done_with_is_forgotten() -> None:
    """The last thing that is heard of a closed one is that it takes nothing more."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    hands = Windowed(clock, 2)
    run = on(clock, hands, chats(llm, 4))
    waits = on(clock, hands, chats(llm, 4, "waits"), at=3.0)
    hands.resize(2.5, 0)
    clock.tell(4.0, ("stop", waits, 0.0))

    clock.drive()

    assert not run.errors
    assert len(waits.errors) == 4
    assert forgotten(clock)
    clock.brain.on([("capacity", hands, "request")], 100.0)
    assert forgotten(clock)
    assert not clock.brain.dispatcher.busy


def some_program(rng: random.Random, llms: list[FakeBackend]) -> list[Any]:
    """Calls of several accounts over one another, some of which share requests."""
    made: list[Any] = ["word"]
    for i in range(rng.randrange(4, 16)):
        llm, text = rng.choice(llms), feste.task(str, pure=True)(rng.choice(made))
        made.append(llm.complete(text, SHORT) if rng.random() < 0.4 else llm.chat(f"{i}", SHORT))
        if rng.random() < 0.5:
            made.append(llm.chat(text, SHORT))
    return made[1:]


@pytest.mark.parametrize("part", range(4))
def test_random_programs_end_and_keep_the_window(part: int) -> None:
    """Windows that change, budgets, limits, faults, stops, several runs and accounts: nothing hangs."""
    for seed in range(80 * part, 80 * part + 80):
        rng = random.Random(seed)
        llms = [
            FakeBackend(
                f"m-{i}",
                profile=PRICED,
                limits=Limits(concurrency=rng.choice([None, 2]), max_items=3),
            )
            for i in range(rng.randint(1, 3))
        ]
        faults = rng.choice([0.0, 0.3])

        def answer(request: Request, rng: Any = rng, llms: Any = llms, faults: Any = faults) -> Any:
            if rng.random() < faults:
                kind = rng.choice(
                    [RateLimited, ServerError, CallTimeout, InvalidRequest, WorkerLost]
                )
                raise kind("no")
            return llms[0].answer(request)

        clock = VirtualClock(
            answer,
            request_seconds=lambda r, rng=rng: rng.lognormvariate(0, 1),
            seed=seed,
            store_seconds=rng.choice([0.0, 0.3]),
        )
        here, hands = clock.hands, Windowed(clock, rng.randrange(4))
        runs = [
            on(
                clock,
                rng.choice([hands, hands, here]),
                some_program(rng, llms),
                at=rng.random() * 3,
                budget=rng.choice([None, Budget(rng.random())]),
                deadline=rng.choice([None, None, 5.0]),
                on_error=rng.choice(["return", "stop"]),
            )
            for _ in range(rng.randint(1, 4))
        ]
        for at in sorted(rng.random() * 20 for _ in range(rng.randrange(6))):
            hands.resize(at, rng.randrange(4))
        hands.resize(21.0, 2)
        if rng.random() < 0.3:
            clock.tell(3 + 5 * rng.random(), ("stop", runs[0], rng.choice([0.0, 2.0])))
        if rng.random() < 0.1:
            clock.tell(rng.random() * 9, ("broken", hands, ConfigError("gone: all")))

        try:
            clock.drive()
        except FesteError as error:
            raise AssertionError(seed) from error

        assert not any(run.open for run in runs), seed
        assert forgotten(clock), seed
