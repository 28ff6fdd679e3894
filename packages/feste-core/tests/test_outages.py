"""Backends that are down or refuse everything: few requests, no call lost, and an end in sight."""

from __future__ import annotations

import asyncio
import pickle
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import feste
from feste._compute.results import hand_back
from feste.backend import Limits, Request, Response
from feste.errors import (
    AuthFailed,
    BackendUnavailable,
    BudgetExceeded,
    CallError,
    CallTimeout,
    InvalidRequest,
    MalformedResponse,
    ModelNotFound,
    NotStarted,
    OutputMismatch,
    QuotaExhausted,
    RateLimited,
    ServerError,
    Unreachable,
    UpstreamFailed,
)
from feste.scheduler.admission.retry import RetryPolicy
from feste.scheduler.brain import Brain
from feste.scheduler.run import Run
from feste.testing import FakeBackend, FakeParams, Fault, SimServer, VirtualClock

CALLS = 1000


@feste.task
def join(*parts: Any) -> str:
    return "|".join(map(str, parts))


def text_of(request: Request) -> str:
    return str(request.body["messages"][0]["content"])


def started(clock: VirtualClock, *args: Any, **settings: Any) -> Run:
    run = clock.run(*args, **settings)
    clock.tell(0.0, ("submit", run))
    return run


def outage(
    llm: FakeBackend, begin: float, end: float, error: CallError, seconds: float, seed: int
) -> VirtualClock:
    """A clock of a backend that is down for some time: all requests fail, after some seconds."""

    def is_down() -> bool:
        return begin <= clock.now < end

    def answer(request: Request) -> Response:
        if is_down():
            raise error.copy()
        return llm.answer(request)

    clock = VirtualClock(
        answer,
        request_seconds=lambda request: seconds if is_down() else clock.rng.uniform(0.5, 1.5),
        seed=seed,
    )
    return clock


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Unreachable("connection refused"), 0.001),
        (ServerError("down", status=503), 0.05),
        (CallTimeout("hangs"), 6.0),
    ],
    ids=["refused", "503", "hang"],
)
def test_an_outage_costs_few_requests_and_no_call(
    error: CallError, seconds: float, seed: int
) -> None:
    """20 seconds without a backend in 1,000 calls: at most 1,100 requests, and every call is done."""
    llm = FakeBackend(limits=Limits(concurrency=64))
    clock = outage(llm, 3.0 + seed, 23.0 + seed, error, seconds, seed)
    run = started(clock, [llm.chat(f"call {i}") for i in range(CALLS)])

    clock.drive()

    assert not run.errors
    assert CALLS < len(clock.sent) <= CALLS + 100
    assert run.openings >= 1
    assert sum(run.retries.values()) == len(clock.sent) - CALLS


def with_quick_errors(rate: float, concurrency: int, seed: int) -> Any:
    """Run 800 calls of which a share fails at once, and the others are answered after 2 seconds."""
    llm = FakeBackend(limits=Limits(concurrency=concurrency))
    quick: set[int] = set()

    def seconds(request: Request) -> float:
        if clock.rng.random() >= rate:
            return clock.rng.uniform(2.0, 2.7)
        quick.add(id(request))
        return 0.02

    def answer(request: Request) -> Response:
        if id(request) in quick:
            quick.discard(id(request))
            raise ServerError("now and then", status=500)
        return llm.answer(request)

    clock = VirtualClock(answer, request_seconds=seconds, seed=seed)
    run = started(clock, [llm.chat(f"call {i}") for i in range(800)])
    clock.drive()
    assert run.count_states() == {"done": 800}
    return run


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [0.03, 0.08])
def test_quick_errors_among_slow_answers_are_no_outage(rate: float, seed: int) -> None:
    """Of requests sent together the errors come first: more than ten before the first answer."""
    run = with_quick_errors(rate, 400, seed)

    assert run.retries["ServerError"] > 10 and run.openings == 0


def test_a_backend_that_answers_most_requests_is_not_waited_for() -> None:
    """One of five replicas is dead: answers to what was sent with the failures close the breaker."""
    runs = [with_quick_errors(0.2, 64, seed) for seed in range(4)]
    waited = [run.sum_waits().get("outage", 0.0) / 800 for run in runs]

    assert sum(waited) / 4 <= 3.0  # seconds a call


@pytest.mark.parametrize("seed", range(4))
def test_an_outage_shows_behind_the_answers_of_earlier_requests(seed: int) -> None:
    """Those were sent before it began: what was sent since then fails, and nothing more is sent."""
    llm = FakeBackend(limits=Limits(concurrency=400))
    clock = outage(llm, 1.0, 21.0, ServerError("down", status=503), 0.05, seed)
    run = started(clock, [llm.chat(f"call {i}") for i in range(CALLS)])
    clock.drive()

    assert not run.errors and run.openings == 1
    assert len(clock.sent) <= CALLS + 100


@pytest.mark.parametrize("asks", [None, 1.0, 3600.0], ids=lambda asks: f"Retry-After {asks}")
def test_a_backend_that_only_refuses_for_rate_ends_the_calls(asks: float | None) -> None:
    """After ``outage_patience`` seconds without one answer the calls fail; a later run goes on."""
    llm = FakeBackend(limits=Limits(concurrency=8))
    nodes = [llm.chat(f"call {i}") for i in range(300)]
    refused = RateLimited("slow down", status=429, retry_after=asks)
    clock = outage(llm, 0.0, 100.0, refused, 0.1, 1)
    run = started(clock, nodes, outage_patience=60.0)
    clock.drive()

    told = {type(value) for value in run.results()}
    # what was sent, and is asked to wait for longer than any call may, fails at once
    assert told == ({BackendUnavailable, RateLimited} if asks == 3600.0 else {BackendUnavailable})
    assert "refused every request for rate for longer than outage_patience=60" in str(
        run.results()[-1]
    )
    assert run.ended is not None and run.ended <= 62.0 and len(clock.sent) <= 50
    later = started(clock, nodes, outage_patience=7200.0)
    clock.drive()
    assert not later.errors


@pytest.mark.parametrize("patience", [7200.0, None])
def test_who_has_patience_waits_for_an_hour(patience: float | None) -> None:
    """A quota that is used up for an hour costs no call, if the run waits for that long."""
    llm = FakeBackend(limits=Limits(concurrency=8))
    refused = RateLimited("come tomorrow", status=429, retry_after=3600.0)
    clock = outage(llm, 0.0, 3500.0, refused, 0.1, 1)
    run = started(clock, [llm.chat(f"call {i}") for i in range(100)], outage_patience=patience)
    clock.drive()

    assert not run.errors and run.ended is not None
    assert run.ended < 3900.0


def test_some_refusals_for_rate_take_no_patience() -> None:
    """As long as anything is answered, the backend is there."""
    llm = FakeBackend(limits=Limits(concurrency=8))

    def answer(request: Request) -> Response:
        if len(clock.sent) % 3:
            raise RateLimited("slow down", status=429, retry_after=5.0)
        return llm.answer(request)

    clock = VirtualClock(answer)
    run = started(clock, [llm.chat(f"call {i}") for i in range(30)], outage_patience=180.0)
    clock.drive()

    assert not any(isinstance(value, BackendUnavailable) for value in run.results())
    assert run.ended is not None and run.ended > 180.0


def test_a_backend_that_stays_down_ends_the_calls() -> None:
    """After ``outage_patience`` seconds the calls fail, with few requests; a later run goes on."""
    llm = FakeBackend(limits=Limits(concurrency=8))
    nodes = [llm.chat(f"call {i}") for i in range(100)]
    clock = outage(llm, 0.0, 100.0, ServerError("down"), 0.1, 1)
    run = started(clock, nodes, join(*nodes), outage_patience=60.0)
    clock.drive()

    kinds = {type(error) for error in run.errors.values()}
    assert kinds == {BackendUnavailable, UpstreamFailed}
    assert "outage_patience=60 seconds" in str(run.results()[0])
    assert run.ended is not None and 55.0 < run.ended < 75.0
    assert len(clock.sent) <= 30
    again = started(clock, nodes)
    clock.drive()
    assert again.count_states() == {"done": 100}


@pytest.mark.parametrize("seed", range(4))
def test_patience_does_not_wait_for_the_next_probe(seed: int) -> None:
    """Calls that come to a gate where none waited before are given up in time, too."""
    llm = FakeBackend(limits=Limits(concurrency=12))
    clock = outage(llm, 0.0, 1000.0, ServerError("down"), 0.1, seed)
    started(clock, [llm.chat(f"call {i}") for i in range(12)], outage_patience=0.5)
    run = clock.run([llm.chat("later")], outage_patience=1.0)
    clock.tell(3.0, ("submit", run))
    clock.drive()

    assert {type(error) for error in run.errors.values()} == {BackendUnavailable}
    assert run.ended is not None and 3.9 <= run.ended <= 4.5


def test_probes_use_up_no_attempts() -> None:
    """One call asks again and again whether the backend is up, and is answered in the end."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    clock = outage(llm, 0.0, 550.0, ServerError("down"), 0.1, 2)
    run = started(clock, [llm.chat("one"), llm.chat("two")], outage_patience=3600.0)
    clock.drive()

    assert run.count_states() == {"done": 2}
    assert 12 < len(clock.sent) < 45


def test_another_account_goes_on_meanwhile() -> None:
    """A breaker is for one endpoint and account: other backends do not notice."""
    down, up = FakeBackend(), FakeBackend(limits=Limits(concurrency=8))
    type_of_up = type("Up", (FakeBackend,), {"plugin": "up"})
    up = type_of_up(limits=Limits(concurrency=8))

    def answer(request: Request) -> Response:
        if request.plugin == "fake" and clock.now < 60:
            raise Unreachable("refused")
        return up.answer(request)

    clock = VirtualClock(answer)
    run = started(
        clock, [down.chat(f"{i}") for i in range(20)], [up.chat(f"{i}") for i in range(9)]
    )
    clock.drive()

    assert not run.errors
    assert max(at for at, request in clock.sent if request.plugin == "up") < 5


def test_retries_stay_a_share_of_all_requests() -> None:
    """With half of all requests failing the budget delays retries, and every call is done."""
    llm = FakeBackend(limits=Limits(concurrency=50))

    def answer(request: Request) -> Response:
        if clock.rng.random() < 0.5:
            raise ServerError("now and then")
        return llm.answer(request)

    brain = Brain(RetryPolicy(max_elapsed=60.0), seed=3)  # which waits for the budget would exceed
    clock = VirtualClock(answer, request_seconds=lambda request: 0.1, seed=3, brain=brain)
    run = started(clock, [llm.chat(f"{i}") for i in range(1000)])
    clock.drive()

    lost = [error for error in run.errors.values() if error.attempts < 6]  # type: ignore[attr-defined]
    assert not lost
    assert len(clock.sent) - 1000 <= 100 + 100 + 5 * clock.now + 30  # tokens, refunds, time


# --- refusals of all calls --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [AuthFailed("no", status=401), QuotaExhausted("pay"), ModelNotFound("what model?")]
)
def test_a_refusal_of_all_calls_is_confirmed_once(error: CallError) -> None:
    """The first refusal is asked once more; then nothing is sent, and the rest names the cause."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    refuses = [True]

    def answer(request: Request) -> Response:
        if refuses[0] and request.plugin == "fake":
            raise error.copy()
        return llm.answer(request)

    slow = "ready long after the refusal"
    clock = VirtualClock(answer, request_seconds=lambda r: 60.0 if slow in text_of(r) else 1.0)
    other = type("Other", (FakeBackend,), {"plugin": "other"})()
    nodes = [llm.chat(f"{i}") for i in range(49)] + [llm.chat(other.chat(slow))]
    run = started(clock, nodes, join(*nodes), [other.chat(f"{i}") for i in range(49)])
    clock.drive()

    mine = [value for value in run.results() if isinstance(value, Exception)]
    assert sum(request.plugin == "fake" for _, request in clock.sent) == 2
    assert [type(value) for value in mine].count(NotStarted) == 48
    assert [type(value) for value in mine].count(type(error)) == 2
    assert f"{type(error).__name__}: {error.message}" in str(mine[10])
    assert run.count_states() == {"done": 50, "failed": 2, "not_started": 48, "skipped": 1}
    refuses[0] = False
    later = started(clock, nodes)
    clock.drive()
    assert later.count_states() == {"done": 50, "kept": 1}


def test_one_refused_call_among_good_ones_stops_nothing() -> None:
    """A refusal that only one call meets fails this call alone, after it was asked twice."""
    llm = FakeBackend(limits=Limits(concurrency=4))

    def answer(request: Request) -> Response:
        if text_of(request) == "7":
            raise AuthFailed("not for you", status=401)
        return llm.answer(request)

    clock = VirtualClock(answer)
    run = started(clock, [llm.chat(f"{i}") for i in range(40)])
    clock.drive()

    assert run.count_states() == {"done": 39, "failed": 1}
    assert len(clock.sent) == 41


def test_what_was_in_flight_with_a_refusal_does_not_confirm_it() -> None:
    """A moment in which all is refused ends no run: only a request that was sent afterwards tells."""
    llm = FakeBackend(limits=Limits(concurrency=4))

    def answer(request: Request) -> Response:
        if 5 <= len(clock.sent) <= 8:  # all four that are in flight
            raise AuthFailed("no", status=401)
        return llm.answer(request)

    clock = VirtualClock(answer)
    run = started(clock, [llm.chat(f"{i}") for i in range(100)])
    clock.drive()

    assert run.count_states() == {"done": 100}
    assert len(clock.sent) == 104


def test_calls_that_another_run_found_refused_are_an_error_too() -> None:
    """A run whose calls are all left, since those of another run were refused, does not pass for good."""
    llm = FakeBackend(limits=Limits(concurrency=1))

    def answer(request: Request) -> Response:
        raise AuthFailed("no", status=401)

    clock = VirtualClock(answer)
    first = started(clock, [llm.chat(f"{i}") for i in range(3)])
    second = clock.run(llm.chat("of another run"))
    clock.tell(1.5, ("submit", second))  # while the first one confirms
    clock.drive()

    assert len(first.failed) == 2
    assert type(second.results()[0]) is NotStarted
    with pytest.raises(feste.errors.RunFailed, match="AuthFailed: no"):
        hand_back(second, tuple)


def test_an_unknown_model_leaves_the_others() -> None:
    """What is refused for one model, 404 or 403, closes this model alone."""
    llm = FakeBackend(limits=Limits(concurrency=1))

    def answer(request: Request) -> Response:
        if request.model == "fake-1":
            raise AuthFailed("not this model", status=403)
        return llm.answer(request)

    clock = VirtualClock(answer)
    good = [llm.chat(f"{i}", FakeParams(model="other")) for i in range(5)]
    run = started(clock, [llm.chat(f"{i}") for i in range(5)], good)
    clock.drive()

    assert run.count_states() == {"done": 5, "failed": 2, "not_started": 3}


def test_the_rest_of_a_list_is_left_too() -> None:
    """Halves of a refused list, and calls that wait for their list, end as well."""
    llm = FakeBackend(limits=Limits(concurrency=1, max_items=4))

    def answer(request: Request) -> Response:
        if len(clock.sent) < 2:
            raise InvalidRequest("no lists")
        raise AuthFailed("no", status=401)

    clock = VirtualClock(answer)
    run = started(clock, [llm.complete(f"{i}") for i in range(12)])
    clock.drive()

    assert set(run.count_states()) == {"failed", "not_started"}


# --- answers that cannot be read --------------------------------------------------------------------


def test_an_unreadable_answer_is_bought_once_more() -> None:
    """What the provider garbled is bought again, once; the run says of how many calls."""
    llm = FakeBackend()
    garbled = {"0": 1, "1": 9}

    def answer(request: Request) -> Response:
        left = garbled.get(text_of(request), 0)
        if left:
            garbled[text_of(request)] = left - 1
            return Response({"odd": "<html>"})
        return llm.answer(request)

    clock = VirtualClock(answer)
    run = started(clock, [llm.chat(f"{i}") for i in range(3)])
    clock.drive()

    good, bad, other = run.results()
    assert isinstance(good, str) and isinstance(other, str)
    assert type(bad) is MalformedResponse and (bad.billed, bad.attempts) == ("yes", 2)
    assert len(clock.sent) == 5 and run.retries == {"MalformedResponse": 2}


@pytest.mark.parametrize("error", [OutputMismatch("no City"), ValueError("my own parser")])
def test_what_a_parser_refuses_is_never_bought_again(error: Exception) -> None:
    """An answer as promised, which the program's own model or parser refuses, is kept as it is."""

    class Picky(FakeBackend):
        def _parse(self, response: Response, arguments: Any) -> Any:
            raise error

        chat = feste.backend.Operation(
            prepare=FakeBackend._prepare_chat, send=FakeBackend._send, parse=_parse
        )

    llm = Picky()
    clock = VirtualClock(llm.answer)
    clock.compute(llm.chat("Hi"))

    assert len(clock.sent) == 1


def test_a_good_answer_takes_the_place_of_an_unreadable_one(tmp_path: Any) -> None:
    """The store keeps what cannot be read; an answer that can be replaces it, and is replayed."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        return llm.answer(request) if len(clock.sent) > 1 else Response({"odd": 1})

    clock = VirtualClock(answer)
    node = llm.chat("Hi")
    (first,) = clock.compute(node, store=tmp_path / "runs.db", keep="none")
    (again,) = clock.compute(node, store=tmp_path / "runs.db")

    assert isinstance(first, str) and first == again
    assert len(clock.sent) == 2


# --- deadlines --------------------------------------------------------------------------------------


def hanging(seconds: float, error: CallError | None = None) -> tuple[FakeBackend, VirtualClock]:
    llm = FakeBackend(limits=Limits(concurrency=2))

    def answer(request: Request) -> Response:
        if error is not None:
            raise error.copy()
        return llm.answer(request)

    return llm, VirtualClock(answer, request_seconds=lambda request: seconds)


def test_a_call_in_flight_ends_by_its_deadline() -> None:
    """The brain cancels what is not answered in time; the error says that it may be billed."""
    llm, clock = hanging(100.0)
    run = started(clock, llm.chat("Hi"), deadline=30.0)
    clock.drive(until=31.0)

    (error,) = run.results()
    assert run.ended == 30.0
    assert type(error) is CallTimeout and (error.billed, error.attempts) == ("unknown", 1)
    assert "deadline=30 seconds" in str(error)
    assert [record.billed for record in run.requests] == ["unknown"] and len(run.requests) == 1


def test_the_deadline_begins_with_the_first_attempt() -> None:
    """Waiting in a queue is no part of it; attempts and the waits between them are."""
    llm, clock = hanging(10.0)
    queued = started(clock, [llm.chat(f"{i}") for i in range(20)], deadline=15.0)
    clock.drive()
    assert not queued.errors and clock.now == 100.0

    llm, clock = hanging(4.0, ServerError("oops"))
    run = started(clock, llm.chat("Hi"), deadline=15.0)
    clock.drive(until=15.5)

    (error,) = run.results()
    assert run.ended == 15.0
    assert type(error) is CallTimeout and "ServerError: oops" in str(error)
    assert error.billed == "unknown" if clock.in_flight else "no"


def test_no_timer_outlives_an_answer() -> None:
    """A call that is answered in time takes its alarm with it."""
    llm, clock = hanging(1.0)
    clock.compute([llm.chat(f"{i}") for i in range(20)], deadline=1000.0)

    assert clock.now == 10.0 and clock.brain.wake_at is None and not clock.brain._dropped


def test_after_a_deadline_the_place_is_free_again() -> None:
    """What ends by its deadline gives back its place at the gate when its request has ended."""
    llm, clock = hanging(20.0)
    run = started(clock, [llm.chat(f"{i}") for i in range(6)], deadline=5.0)
    clock.drive()

    assert {type(error) for error in run.errors.values()} == {CallTimeout}
    assert all(gate.in_flight == 0 for gate in clock.brain.gates.by_scope.values())


def test_the_parts_of_a_refused_list_end_by_its_deadline() -> None:
    """The part under way is cancelled and counted, and what waits at a closed gate does not go on."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if request.items > 2:
            raise InvalidRequest("too many")
        return llm.answer(request)

    clock = VirtualClock(answer, request_seconds=lambda request: 3.0)
    run = started(clock, [llm.complete(f"{i}") for i in range(4)], deadline=5.0)
    clock.drive()

    assert run.ended == 5.0
    assert {type(error) for error in run.errors.values()} == {CallTimeout}
    assert [(r.items, r.error) for r in run.requests] == [(4, "InvalidRequest"), (2, "CallTimeout")]
    assert len(clock.sent) == 2


def test_an_unreadable_answer_does_not_outlast_its_deadline() -> None:
    """While its call waits to be bought once more, a rate limit closes the gate for a minute."""
    llm = FakeBackend()
    answers = iter([Response({"garbled": True}), RateLimited("slow", retry_after=60.0)])

    def answer(request: Request) -> Response:
        given = next(answers)
        if isinstance(given, CallError):
            raise given
        return given

    clock = VirtualClock(answer, request_seconds=lambda r: 2.0 if len(clock.sent) == 1 else 0.5)
    calls = [llm.chat("garbled"), feste.task(lambda: llm.chat("later"))()]
    run = started(clock, calls, deadline=5.0)
    clock.drive()

    assert run.ended == 5.0


# --- max_failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "least"), [(3, 3), (0.1, 10), (1, 1)])
def test_a_run_stops_after_too_many_failures(most: float, least: int) -> None:
    """Calls that failed on their own count, poisoned ones do not; the rest is not started."""
    llm = FakeBackend(limits=Limits(concurrency=1))

    def answer(request: Request) -> Response:
        if int(text_of(request)) % 2:
            raise InvalidRequest("odd")
        return llm.answer(request)

    clock = VirtualClock(answer)
    nodes = [llm.chat(f"{i}") for i in range(100)]
    run = started(clock, nodes, [join(node) for node in nodes], max_failures=most)
    clock.drive()

    states = run.count_states()
    assert states["failed"] == least and states["skipped"] == least
    assert len(clock.sent) < 40
    assert run.series.why == f"{least} call{'s' * (least > 1)} failed (max_failures={most})"
    assert str(run.errors[run.outputs[99]]).startswith(f"not begun: {run.series.why}")


def test_run_failed_tells_why_it_stopped() -> None:
    """Whoever reads the error learns that the rest was not tried."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no")}, limits=Limits(concurrency=1))
    with pytest.raises(feste.errors.RunFailed, match=r"stopped: 2 calls failed \(max_failures=2\)"):
        feste.compute([llm.chat(f"bad {i}") for i in range(30)], max_failures=2)

    assert len(llm.requests) == 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "many", 0.0])
def test_a_wrong_number_of_failures_is_refused(wrong: Any) -> None:
    """Neither none nor more than all."""
    with pytest.raises(feste.errors.ConfigError, match="whole number from 1, a share"):
        feste.context.settings(max_failures=wrong)


# --- over sockets, and with real loops ----------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Any]:
    pytest.importorskip("feste.backend.openai")
    with SimServer("feste.backend.openai.testing:OpenAIWire") as running:
        yield running


@pytest.mark.parametrize("fault", [Fault(kind="drip", pause=0.1), Fault(kind="hang")])
def test_neither_drops_nor_silence_escape_a_deadline(server: Any, fault: Fault) -> None:
    """The brain cancels a request at the deadline of its call, whatever the server sends."""
    from feste.backend.openai import OpenAI

    server.add(replace(fault, times=None))
    llm = OpenAI("sim-1", base_url=server.url + "/v1")
    (error,) = feste.compute(llm.chat("Hi"), on_error="return", deadline=0.4)

    assert type(error) is CallTimeout and "deadline=0.4 seconds" in str(error)
    assert (error.billed, error.attempts) == ("unknown", 1)


def test_a_backend_that_forgets_its_timeout_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin's ``send`` that never ends is cut off a moment after the time of the attempt."""
    monkeypatch.setattr("feste.scheduler.hands.requests._GRACE", 0.05)
    sent: list[Request] = []

    class Endless(FakeBackend):
        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            sent.append(request)
            await asyncio.sleep(3600)
            raise AssertionError

        def _prepare(self, prompt: str) -> Request:
            return replace(self._prepare_chat(prompt), timeout=0.05)

        chat = feste.backend.Operation(prepare=_prepare, send=_send, parse=FakeBackend._parse_text)

    (error,) = feste.compute(Endless().chat("Hi"), on_error="return")

    assert type(error) is CallTimeout and "within 0.05 seconds" in str(error)
    assert len(sent) == 2  # it may have been billed, so one more attempt only


def test_a_blocked_loop_is_named_as_the_cause() -> None:
    """Who computes on a running loop of his own, where the server runs, reads why it cannot answer."""

    async def blocks() -> Any:
        llm = FakeBackend(latency=60.0)
        return feste.compute(llm.chat("Hi"), on_error="return", deadline=0.2)[0]

    error = asyncio.run(blocks())

    assert type(error) is CallTimeout and "await feste.acompute" in str(error)
    (plain,) = feste.compute(FakeBackend(latency=60.0).chat("Hi"), on_error="return", deadline=0.2)
    assert "acompute" not in str(plain)


def test_what_cannot_be_read_is_kept_in_the_store(server: Any, tmp_path: Any) -> None:
    """The body of a success that is no answer is in the file, beside the request that brought it."""
    from feste.backend.openai import OpenAI

    server.add(Fault(kind="garbage", body="<html>oh dear</html>", times=None))
    llm = OpenAI("sim-1", base_url=server.url + "/v1")
    path = tmp_path / "runs.db"
    (error,) = feste.compute(llm.chat("Hi"), on_error="return", store=path)
    feste.store.close()

    assert type(error) is MalformedResponse and error.attempts == 2
    with sqlite3.connect(path) as conn:
        raw = [row[0] for row in conn.execute("SELECT raw FROM requests")]
    assert len(raw) == 2 and all("oh dear" in text for text in raw)


def test_errors_of_a_run_travel() -> None:
    """They are plain data: what a run raises can be pickled, with its numbers."""
    error = BudgetExceeded("the budget is reached", cap=2.0, spent=1.5, reserved=0.25)
    back = pickle.loads(pickle.dumps(error))

    assert (back.cap, back.spent, back.reserved, back.unit) == (2.0, 1.5, 0.25, "dollars")


def test_equal_calls_share_the_answer_that_can_be_read() -> None:
    """Whoever waits for an equal call gets no garbage: it gets what was bought in its place."""
    llm = FakeBackend()
    greedy = FakeParams(temperature=0)

    def answer(request: Request) -> Response:
        return llm.answer(request) if len(clock.sent) > 1 else Response({"odd": 1})

    clock = VirtualClock(answer)
    runs = [started(clock, llm.chat("the same", greedy)) for _ in range(3)]
    clock.drive()

    assert len(clock.sent) == 2
    assert {type(run.results()[0]).__name__ for run in runs} == {"Reply"}


def test_a_call_with_a_fallback_does_not_wait_for_a_backend_that_is_down() -> None:
    """As soon as a backend is known to be down its calls are made elsewhere, and so are refused ones."""
    for error in (Unreachable("refused"), AuthFailed("no", status=401)):
        first = FakeBackend(limits=Limits(concurrency=4))
        second = type("Second", (FakeBackend,), {"plugin": "second"})()

        def answer(request: Request, error: CallError = error) -> Response:
            if request.plugin == "fake":
                raise error.copy()
            return FakeBackend().answer(request)

        clock = VirtualClock(answer)
        run = started(clock, [first.or_else(second).chat(f"{i}") for i in range(200)])
        clock.drive()

        assert run.count_states() == {"done": 200}
        assert sum(request.plugin == "fake" for _, request in clock.sent) < 20
        assert run.ended is not None and run.ended < 60


@pytest.mark.parametrize("has_fallback", [True, False])
def test_what_is_noted_in_a_store_is_given_up_once(has_fallback: bool, tmp_path: Any) -> None:
    """The backend goes down while it is written that requests will be sent: these are not sent."""
    first = FakeBackend("first")
    second = type("Second", (FakeBackend,), {"plugin": "second"})("second")

    def answer(request: Request) -> Response:
        if request.body["model"] == "first":
            raise ServerError("down")
        return second.answer(request)

    clock = VirtualClock(answer, request_seconds=lambda r: len(clock.sent) / 50, store_seconds=0.3)
    llm = first.or_else(second) if has_fallback else first
    calls = [llm.chat(join(i)) for i in range(40)]
    run = started(clock, calls, store=tmp_path / "a.db", outage_patience=0.1)
    clock.drive()

    asked = [text_of(request) for _, request in clock.sent if request.body["model"] == "second"]
    assert sorted(asked) == sorted(map(str, range(40) if has_fallback else ()))
    assert len(run.requests) == len(clock.sent) < 60
    assert not clock.brain.runs


def test_the_alarm_of_a_breaker_is_not_rounded() -> None:
    """A probe that may be sent at a time is sent then: no sum of seconds falls short of it."""
    llm = FakeBackend()
    for seed in range(60):
        answers = iter([AuthFailed("no", status=401), ServerError("down"), None])

        def answer(request: Request, answers: Iterator[CallError | None] = answers) -> Response:
            error = next(answers)
            if error is not None:
                raise error
            return llm.answer(request)

        clock = VirtualClock(answer, request_seconds=lambda request: 0.1, seed=seed)
        assert started(clock, llm.chat(f"{seed}")).open == 1
        clock.drive()

        assert len(clock.sent) == 3
