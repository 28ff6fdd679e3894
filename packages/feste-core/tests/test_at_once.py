"""Failures, limits, caps, deadlines, stores and stops that come together, on the virtual clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Limits, Profile, PromptCache, Request, Response
from feste.errors import (
    AuthFailed,
    BackendUnavailable,
    CallError,
    CallTimeout,
    ConfigError,
    InvalidRequest,
    MalformedResponse,
    ModelNotFound,
    QuotaExhausted,
    RateLimited,
    ServerError,
)
from feste.scheduler.admission.gate import Gate
from feste.scheduler.brain import Brain
from feste.scheduler.run import Run
from feste.testing import FakeBackend, FakeParams, VirtualClock

GREEDY = FakeParams(temperature=0.0)
BOUND = FakeParams(max_tokens=100)


@feste.task
def same(number: int) -> str:
    return "the same text"


def started(clock: VirtualClock, *args: Any, at: float = 0.0, **settings: Any) -> Run:
    run = clock.run(*args, **settings)
    clock.tell(at, ("submit", run))
    return run


def raises(*errors: CallError, then: FakeBackend | None = None) -> Callable[[Request], Response]:
    """An answer that fails with the errors one after the other, the last one for ever if nothing follows."""
    left = list(errors)

    def answer(request: Request) -> Response:
        if left and (len(left) > 1 or then is not None):
            raise left.pop(0).copy()
        if then is not None:
            return then.answer(request)
        raise left[0].copy()

    return answer


def idle(clock: VirtualClock) -> bool:
    """Whether the brain has nothing left of its runs."""
    brain = clock.brain
    left = [
        brain.runs,
        brain.timers,
        brain.attempts.parcels,
        brain.attempts.retrying,
        brain.gates.short,
    ]
    left += [brain.flights._led, brain.flights._waiting, brain.journaling.intending]
    gates = brain.gates.by_scope.values()
    return not any(left) and not any(gate.in_flight or gate.coming or len(gate) for gate in gates)


# --- equal calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"max_failures": 2}, {"on_error": "stop"}])
def test_a_refusal_of_equal_calls_may_stop_their_run(settings: dict[str, Any]) -> None:
    """Each of them ends once, though the first of them stops the run in which the others wait."""
    llm = FakeBackend()
    clock = VirtualClock(raises(InvalidRequest("no")))
    first = started(clock, llm.chat("the same text", GREEDY))
    second = started(clock, [llm.chat(same(i), GREEDY) for i in range(5)], **settings)
    clock.drive()

    for run in first, second:
        assert run.open == 0 and run.ended == 1.0
    assert second.count_states()["not_started"] >= 3
    assert len(clock.sent) == 1 and idle(clock)


def test_a_stopped_run_ends_when_nobody_waits_for_its_calls_any_more() -> None:
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 1e5)
    one = started(clock, llm.chat("Hi", GREEDY))
    two = started(clock, llm.chat("Hi", GREEDY), at=0.5)
    clock.tell(1.0, ("stop", one, 0.0))
    clock.tell(2.0, ("stop", two, 0.0))
    clock.drive(until=3.0)

    assert (one.ended, two.ended) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("own", "kind"),
    [({"deadline": 3.0}, CallTimeout), ({"budget": "100 tokens"}, ConfigError)],
    ids=["deadline", "budget"],
)
def test_a_run_does_not_fail_for_the_settings_of_another(own: dict[str, Any], kind: Any) -> None:
    """Two runs hold one node: what the settings of the first forbid, the second one may do."""
    llm = FakeBackend()
    node = llm.chat("Hi")
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 10.0)
    first, second = started(clock, node, **own), started(clock, node)
    clock.drive()

    assert type(first.results()[0]) is kind
    assert second.count_states() == {"done": 1}


def test_nor_for_its_patience() -> None:
    llm = FakeBackend(limits=Limits(concurrency=1))
    answers = raises(*[ServerError("down")] * 14, then=llm)
    clock = VirtualClock(answers)
    shared = [llm.chat(f"call {i}") for i in range(3)]
    first, second = started(clock, shared, outage_patience=1.0), started(clock, shared)
    clock.drive()

    assert BackendUnavailable in map(type, first.results())
    assert set(second.count_states()) <= {"done", "shared"}


# --- outages --------------------------------------------------------------------------------------


def test_a_backend_that_goes_down_after_a_doubted_refusal_is_down() -> None:
    """The doubt about the key is no reason to be patient without limit."""
    llm = FakeBackend()
    clock = VirtualClock(raises(AuthFailed("key", status=401), ServerError("down")))
    run = started(clock, [llm.chat(f"call {i}") for i in range(3)], outage_patience=60.0)
    clock.drive()

    assert set(run.count_failures()) == {"BackendUnavailable"}
    assert run.ended is not None and run.ended < 130.0


@pytest.mark.parametrize("doubted", [ModelNotFound("?"), QuotaExhausted("?")])
def test_a_model_whose_refusal_is_not_confirmed_is_asked_as_ever(doubted: CallError) -> None:
    """Its failures afterwards count as attempts, though another model of the account is up."""
    llm, other = FakeBackend("big"), FakeBackend("small", limits=Limits(concurrency=1))
    fails = raises(doubted, ServerError("down"))
    clock = VirtualClock(lambda r: fails(r) if r.model == "big" else other.answer(r))
    run = started(clock, llm.chat("Hi"))
    started(clock, [other.chat(f"call {i}") for i in range(2000)])
    clock.drive()

    assert run.count_failures() == {"ServerError": 1}
    assert run.ended is not None and run.ended < 200.0


def test_a_backend_that_hangs_is_down_after_the_deadlines_of_its_calls() -> None:
    llm = FakeBackend(limits=Limits(concurrency=16))
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 1e4)
    calls = [llm.chat(f"call {i}") for i in range(200)]
    run = started(clock, calls, outage_patience=60.0, deadline=5.0)
    clock.drive()

    assert run.count_failures() == {"BackendUnavailable": 184, "CallTimeout": 16}
    assert run.ended == pytest.approx(65.0)
    assert len(clock.sent) == len(run.requests)


def down(llm: FakeBackend) -> Callable[[Request], Response]:
    """An answer of a provider whose model "big" is down."""

    def answer(request: Request) -> Response:
        if request.model == "big":
            raise ServerError("down")
        return llm.answer(request)

    return answer


@pytest.mark.parametrize("settings", [{}, {"budget": "2000 tokens"}], ids=["store", "budget"])
def test_calls_on_their_way_are_passed_on_when_their_backend_goes_down(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Those whose intents are being written, or that wait for money, are not sent to it after all."""
    big, small = FakeBackend("big", limits=Limits(concurrency=16)), FakeBackend("small")
    clock = VirtualClock(
        down(small),
        request_seconds=lambda request: clock.rng.uniform(0.5, 1.5),
        store_seconds=0.1,
    )
    calls = [big.or_else(small).chat(f"call {i}", BOUND) for i in range(100)]
    run = started(clock, calls, store=tmp_path / "runs.db", **settings)
    clock.drive()

    passed = [request for _, request in clock.sent if request.model == "small"]
    assert len(clock.sent) == len(run.requests) and idle(clock)
    if settings:  # the cap ends the run, in good order
        assert run.count_states()["done"] == len(passed) > 0
        assert set(run.count_failures()) <= {"BackendUnavailable"}
    else:
        assert run.count_states() == {"done": 100}
        assert len(passed) == 100 and len(clock.sent) <= 140


def test_calls_on_their_way_are_given_up_in_time(tmp_path: Path) -> None:
    big = FakeBackend("big", limits=Limits(concurrency=16))
    clock = VirtualClock(down(big), store_seconds=5.1)
    calls = [big.chat(f"call {i}") for i in range(100)]
    run = started(clock, calls, store=tmp_path / "runs.db", outage_patience=3.0)
    clock.drive()

    assert set(run.count_failures()) == {"BackendUnavailable"}
    assert len(clock.sent) == len(run.requests) and idle(clock)


def test_an_account_that_refuses_all_calls_gets_no_retries_either() -> None:
    """Those whose requests are under way when the refusal is confirmed fail with what they get."""
    llm = FakeBackend(limits=Limits(concurrency=8))

    def answer(request: Request) -> Response:
        if is_slow(request):
            raise ServerError("down")
        raise AuthFailed("key", status=401)

    def is_slow(request: Request) -> bool:
        return (
            2 <= int(text_of(request)[5:]) < 8
        )  # under way for longer than the refusal is doubted

    clock = VirtualClock(answer, request_seconds=lambda r: 3.0 if is_slow(r) else 0.5)
    run = started(clock, [llm.chat(f"call {i}") for i in range(20)])
    clock.drive()

    assert len(clock.sent) == 9  # one more while the first refusal was doubted
    assert run.count_failures() == {"ServerError": 6, "AuthFailed": 3}


def text_of(request: Request) -> str:
    return str(request.body["messages"][0]["content"])


class Other(FakeBackend):
    """A backend of another provider."""

    plugin = "other"


def test_a_group_does_not_wait_for_a_backend_that_is_down() -> None:
    """Its gate has no room, since others wait for the backend; its calls ask the next one at once."""
    big, small = FakeBackend("big"), Other("small")
    clock = VirtualClock(down(small), task_seconds=lambda task: 5.0 * (task.stage == "run"))
    text = feste.task(lambda i: f"text {i}")
    chats = [big.chat(f"call {i}") for i in range(12)]
    run = started(clock, chats, [big.or_else(small).embed(text(i)) for i in range(4)])
    clock.drive(until=20.0)

    assert sum(request.model == "small" for _, request in clock.sent) >= 1
    assert run.count_failures() == {}
    assert sum(request.items for _, request in clock.sent if request.model == "small") == 4


class Third(FakeBackend):
    """A backend of yet another provider."""

    plugin = "third"


def test_calls_with_other_backends_left_share_no_list() -> None:
    """What is passed on together may go on to different backends, or to none."""
    big, small, third = FakeBackend("big"), Other("small"), Third("third")

    def answer(request: Request) -> Response:
        if request.model == "big":
            raise ServerError("down")
        if request.model == "small" and clock.now < 100.0:
            raise ServerError("down")
        return third.answer(request)

    clock = VirtualClock(answer)
    two, three = big.or_else(small), big.or_else(small).or_else(third)
    before = [small.chat(f"call {i}") for i in range(12)]  # these find out that it is down
    calls = [llm.embed(f"{n} {i}") for i in range(6) for n, llm in (("2", two), ("3", three))]
    run = started(clock, before, calls)
    clock.drive()

    assert run.count_states() == {"done": 24}  # those without a third one waited
    assert sum(r.items for _, r in clock.sent if r.model == "third") == 6


# --- deadlines, caps and limits -------------------------------------------------------------------


def test_the_parts_of_a_refused_list_have_alarms_of_their_own() -> None:
    """The deadline finds the request that is under way: it is cancelled, and in the report."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if request.items > 4:
            raise InvalidRequest("too long")
        return llm.answer(request)

    clock = VirtualClock(answer, request_seconds=lambda request: 3.0)
    run = started(clock, [llm.embed(f"text {i}") for i in range(8)], deadline=5.0)
    clock.drive()

    assert len(run.requests) == len(clock.sent) == 2
    assert run.in_flight == 0
    under_way = [e for e in run.errors.values() if getattr(e, "billed", "") == "unknown"]
    assert len(under_way) == 4


def test_what_waits_for_money_waits_for_the_provider_too() -> None:
    """A request that has a place already is not sent before the time that Retry-After names."""
    llm = FakeBackend(limits=Limits(concurrency=4))
    clock = VirtualClock(raises(RateLimited("slow", retry_after=30.0), then=llm))
    run = started(clock, [llm.chat(f"call {i}", BOUND) for i in range(4)], budget="300 tokens")
    clock.drive()

    assert run.count_states() == {"done": 4}
    assert [at for at, _ in clock.sent][:2] == [0.0, 31.0]


def test_a_cap_that_stops_the_first_of_those_that_begin_alike_stops_no_other_run() -> None:
    """The request that was to write their prefix is not sent, so another one is."""
    cache = PromptCache(minimum=20, lag=2.0, breakpoints=True)
    llm = FakeBackend(profile=Profile(prompt_cache=cache), limits=Limits(concurrency=1))
    rules = {"role": "system", "content": "common beginning " * 500}
    chats = [[rules, {"role": "user", "content": f"text {i}"}] for i in range(3)]
    clock = VirtualClock(llm.answer)
    started(clock, llm.chat("something else"))  # the others wait until it has ended
    told: dict[str, Any] = {"objective": "cost"}
    capped = started(clock, [llm.chat(chat, BOUND) for chat in chats], budget="9 tokens", **told)
    other = started(clock, [llm.chat(chat, BOUND) for chat in chats], **told)
    clock.drive()

    assert capped.prefixes and capped.count_states() == {"not_started": 3}
    assert other.count_states() == {"done": 3}
    assert not clock.brain.prefixes._leading


@pytest.mark.parametrize("wait", [None, 1.0])
def test_however_long_a_server_refuses_it_is_asked_every_minute(wait: float | None) -> None:
    """So it is noticed soon that it accepts again."""
    llm = FakeBackend(limits=Limits(concurrency=4))
    clock = VirtualClock(raises(RateLimited("slow", retry_after=wait)))
    started(clock, [llm.chat(f"call {i}") for i in range(40)])
    clock.drive()

    times = [at for at, _ in clock.sent]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 61.0


def test_a_gate_is_looked_at_again_whatever_the_rounding() -> None:
    """The clock does not ring a moment before a gate opens, and then no more."""
    for n in range(200):
        brain, gate = Brain(), Gate[Any]()
        brain.now, gate.closed_until = 0.3 + n / 7, 31.002
        brain.gates.watch(gate)
        while (wake := brain.wake_at) is not None:
            brain.on([], wake)
            brain.gates.watch(gate)
        assert brain.now >= gate.closed_until


def test_a_later_run_buys_what_could_not_be_read() -> None:
    """Two answers that cannot be read fail the call; its node keeps neither of them."""
    llm = FakeBackend()
    broken = [Response({"answers": []})] * 2
    clock = VirtualClock(lambda request: broken.pop() if broken else llm.answer(request))
    node = llm.chat("Hi")

    assert isinstance(clock.compute(node)[0], MalformedResponse)
    assert str(clock.compute(node)[0]).startswith("fake-1:")
    assert len(clock.sent) == 3
