"""The admission gate alone: slots, buckets, refunds, fairness, and what it tells of itself."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest

from feste.backend import Limits, RateLimit, Request, Usage
from feste.errors import ConfigError, RateLimited
from feste.scheduler.admission.gate import Gate
from feste.testing import FakeBackend, VirtualClock


def request(tokens: int = 1, max_output: int | None = 0) -> Request:
    return Request("fake", "chat", "e", {"p": "x" * (4 * tokens - 4)}, max_output=max_output)


def through(gate: Gate[Any], now: float) -> list[Any]:
    """Take out all that may go."""
    out = []
    while (item := gate.pop(now)) is not None:
        out.append(item)
    return out


# --- the user's limits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"concurrency": 2.5},
        {"concurrency": "3"},
        {"requests_per_minute": 0.5},
        {"requests_per_minute": math.inf},
        {"tokens_per_minute": math.nan},
        {"tokens_per_minute": True},
        {"max_items": -1},
    ],
)
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    """A limit is a number from 1; the error shows what was given."""
    with pytest.raises(ConfigError, match=rf"Limits\({next(iter(wrong))}=.*at least 1"):
        Limits(**wrong)


def test_requests_are_spread_over_the_minute() -> None:
    """Sixty a minute are one a second, not sixty at once."""
    gate: Gate[int] = Gate(Limits(requests_per_minute=60))
    for i in range(10):
        gate.push(i, 0)

    assert [through(gate, now) for now in (0.0, 0.5, 1.0, 2.0, 2.9)] == [[0], [], [1], [2], []]


def test_the_lowest_limit_of_living_clients_holds() -> None:
    """Each kind on its own; the limits of a client go with it."""
    gate: Gate[int] = Gate()
    slow, small = FakeBackend(), FakeBackend()
    gate.heed(slow, Limits(requests_per_minute=60, concurrency=9))
    gate.heed(small, Limits(tokens_per_minute=600, concurrency=7))

    assert (gate.requests.rate, gate.tokens.rate, gate.slots.ceiling) == (1.0, 10.0, 7)
    del slow
    gc.collect()
    gate.heed(small, Limits(tokens_per_minute=600, concurrency=7))
    assert (gate.requests.rate, gate.tokens.rate) == (math.inf, 10.0)


# --- buckets ----------------------------------------------------------------------------------------


def test_tokens_are_reserved_and_settled() -> None:
    """What was reserved too much comes back; what was used too much is missing later."""
    gate: Gate[str] = Gate(Limits(tokens_per_minute=60_000))  # 500 at once
    gate.push("a", 0, "", request(100, max_output=300))
    gate.pop(0.0)

    assert gate.tokens.level == 100.0
    gate.left("a", 0.0, Usage(100, 50))
    assert gate.tokens.level == 350.0


@pytest.mark.parametrize("end", ["refused", "not sent"])
def test_what_was_refused_or_never_sent_is_given_back(end: str) -> None:
    """Neither has cost anything."""
    gate: Gate[str] = Gate(Limits(tokens_per_minute=60_000, requests_per_minute=600))
    gate.push("a", 0, "", request(100, max_output=300))
    gate.pop(0.0)
    if end == "refused":
        gate.throttled("a", 0.0, None)
    else:
        gate.unsent("a")

    assert gate.in_flight == 0
    assert (gate.requests.taken, gate.tokens.taken) == (0.0, 0.0)


def test_a_request_larger_than_the_bucket_goes_alone() -> None:
    """It waits for a full bucket, and the next one until it is paid off."""
    gate: Gate[str] = Gate(Limits(tokens_per_minute=600))  # 10 a second, 5 at once
    for name in ("huge", "next"):
        gate.push(name, 0, "", request(100))

    assert through(gate, 0.0) == ["huge"]
    assert gate.holds(0.0) == "rate limit"
    assert gate.wakes(0.0) == pytest.approx(10.0)
    assert through(gate, 9.9) == []
    assert through(gate, 10.0) == ["next"]


def test_answers_that_come_late_make_no_burst() -> None:
    """Refunds of the past were not saved by the provider: they let through a bucketful, no more."""
    gate: Gate[int] = Gate(Limits(tokens_per_minute=60_000))
    for i in range(60):
        gate.push(i, 0, "", request(10, max_output=490))
    sent = [item for second in range(10) for item in through(gate, second / 2)]
    for item in sent:
        gate.left(item, 5.0, Usage(10, 0))

    assert len(sent) == 10
    assert gate.tokens.level <= 500.0
    burst = through(gate, 5.0)
    assert sum(gate.costs.of(request(10, max_output=490)) for _ in burst) <= 1000.0


def test_headers_lower_the_users_limit_and_never_raise_it() -> None:
    """The lower of both holds; zeros and long windows are no limit by the minute."""
    gate: Gate[int] = Gate(Limits(requests_per_minute=600))
    for i in range(4):
        gate.push(i, 0)
    through(gate, 0.0)
    gate.left(0, 1.0, None, [RateLimit("requests", 6000.0, 5999.0)])
    assert gate.requests.rate == 10.0
    gate.left(1, 1.0, None, [RateLimit("requests", 60.0, 59.0)])
    assert gate.requests.rate == 1.0
    gate.left(2, 1.0, None, [RateLimit("requests", 100.0, 90.0, reset=40_000.0)])
    gate.left(3, 1.0, None, [RateLimit("requests", None, 0.0), RateLimit("tokens", None, 0.0)])
    assert (gate.requests.rate, gate.tokens.rate) == (1.0, math.inf)


def test_what_came_until_a_refusal_is_counted_once() -> None:
    """A provider that refuses has nothing left of what it had when the request was sent."""
    gate: Gate[int] = Gate(Limits(requests_per_minute=2400))
    for i in range(50):
        gate.push(i, 0)
    for i in range(5):  # from then on the rate stays
        assert gate.pop(10.0 * i) == i
        gate.throttled(i, 10.0 * i, None)
    assert gate.pop(50.0) == 5
    gate.throttled(5, 50.1, None)

    assert gate.requests.rate == 36.0
    assert through(gate, 50.1) == [6, 7, 8]


def test_what_others_use_of_an_account_is_noticed() -> None:
    """`remaining` tells what is left of the account, less what was sent since."""
    gate: Gate[int] = Gate(Limits(requests_per_minute=6000, concurrency=100))
    for i in range(100):
        gate.push(i, 0)
    sent = through(gate, 0.0)
    gate.left(sent[0], 0.0, None, [RateLimit("requests", 6000.0, len(sent) - 1 - 20.0)])

    assert len(sent) == 50
    assert gate.wakes(0.0) == pytest.approx(0.21)  # for the twenty that others sent, and one more


# --- closing ----------------------------------------------------------------------------------------


def test_a_very_long_retry_after_parks_the_gate_for_all_runs() -> None:
    """Nothing is sent for ten minutes, and every run that waits there knows until when."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    refused: list[float] = []

    def answer(request: Request) -> Any:
        if not refused:
            refused.append(clock.now)
            raise RateLimited("slow", retry_after=600.0)
        return llm.answer(request)

    clock = VirtualClock(answer)
    runs = [clock.run([llm.chat(f"{run} {i}") for i in range(2)]) for run in range(2)]
    for run in runs:
        clock.tell(0.0, ("submit", run))
    clock.drive(until=300.0)

    assert [run.resumes_at for run in runs] == [601.0, 601.0]
    clock.drive()
    assert not [at for at, _ in clock.sent if 0.0 < at < 601.0]


# --- fairness ---------------------------------------------------------------------------------------


def test_a_small_run_does_not_wait_for_a_large_one() -> None:
    """Runs take turns; inside a run the highest rank goes first, equal ones in order of arrival."""
    gate: Gate[Any] = Gate(Limits(concurrency=8))
    for i in range(100_000):
        gate.push(("large", i), 0, "large")
    for i, rank in enumerate((1, 5, 1)):
        gate.push(("small", i), rank, "small")

    assert through(gate, 0.0) == [
        ("large", 0),
        ("small", 1),
        ("large", 1),
        ("small", 0),
        ("large", 2),
        ("small", 2),
        ("large", 3),
        ("large", 4),
    ]


def test_turns_are_counted_in_tokens() -> None:
    """A run of long requests gets as many tokens as one of short ones, not as many requests."""
    gate: Gate[Any] = Gate(Limits(concurrency=22))
    for i in range(100):
        gate.push(("long", i), 0, "long", request(100))
        gate.push(("short", i), 0, "short", request(10))

    assert sum(name == "short" for name, _ in through(gate, 0.0)) == 20


def test_a_late_run_gets_no_credit_for_the_past() -> None:
    """It takes turns from now on, and does not catch up."""
    gate: Gate[Any] = Gate(Limits(concurrency=100))
    for i in range(200):
        gate.push(("first", i), 0, "first")
    for _ in range(50):
        gate.pop(0.0)
    for i in range(200):
        gate.push(("late", i), 0, "late")

    assert 24 <= sum(name == "late" for name, _ in through(gate, 0.0)) <= 26


def test_items_and_runs_are_removed() -> None:
    """A removed item is never popped, and a dropped run leaves the others alone."""
    gate: Gate[Any] = Gate(Limits(concurrency=100))
    items = [object() for _ in range(6)]
    for i, item in enumerate(items):
        gate.push(item, 0, "ab"[i % 2])

    assert gate.remove(items[0])
    assert not gate.remove(items[0])
    assert gate.drop("b") == [items[1], items[3], items[5]]
    assert (gate.queues("a"), gate.queues("b"), len(gate)) == (True, False, 2)
    assert through(gate, 0.0) == [items[2], items[4]]
    gate.push(items[1], 0, "b")
    assert through(gate, 0.0) == [items[1]]


# --- what it tells ----------------------------------------------------------------------------------


def test_room_counts_what_is_queued_and_coming() -> None:
    """It is what it would admit at once: slots, quota, and nothing while it is closed."""
    gate: Gate[Any] = Gate(Limits(concurrency=5))
    gate.push("a", 0)
    gate.coming = 2
    assert gate.room(0.0) == 2
    gate.pop(0.0)
    assert gate.room(0.0) == 2
    gate.throttled("a", 0.0, 10.0)
    assert (gate.room(1.0), gate.holds(1.0), gate.wakes(1.0)) == (0, "closed", 10.0)
    slow: Gate[Any] = Gate(Limits(requests_per_minute=240))  # 2 at once
    assert slow.room(0.0) == 2


def test_why_it_holds() -> None:
    """A slot that is taken ends with a request: no time will change that."""
    gate: Gate[Any] = Gate(Limits(concurrency=1))
    gate.push("a", 0)
    gate.push("b", 0)
    assert gate.holds(0.0) == ""
    gate.pop(0.0)

    assert (gate.holds(0.0), gate.wakes(0.0)) == ("slot", math.inf)


# --- slots ------------------------------------------------------------------------------------------


def test_slow_answers_end_the_slow_start() -> None:
    """When answers take twice as long, a token as well, slots are added one by one."""
    gate: Gate[Any] = Gate()
    for i in range(400):
        gate.push(i, 0, "", request())
    now = 0.0
    grown = []
    for seconds in (1.0, 1.0, 3.0, 3.0):
        before = gate.slots.limit
        sent = through(gate, now)
        now += seconds
        for item in sent:
            gate.left(item, now, Usage(5, 50))
            gate.slots.pressed = True
        grown.append(gate.slots.limit / before)

    assert grown[:3] == [2.0, 2.0, 2.0]
    assert grown[3] < 1.1


def test_slots_are_not_added_while_nobody_needs_them() -> None:
    """Requests that come one after the other prove nothing about many at once."""
    gate: Gate[Any] = Gate()
    for i in range(100):
        gate.push(i, 0)
        gate.pop(float(i))
        gate.left(i, i + 0.5)

    assert gate.slots.limit == 10.0
