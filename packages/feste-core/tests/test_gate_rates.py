"""The gate against exact models of providers' limits, on the virtual clock: few refusals, little idle."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from feste.backend import Limits, Request, Response, Usage, error_for_status
from feste.testing import FakeBackend, FakeParams, VirtualClock, fresh_draws

#: The seconds that are looked at.
HORIZON = 60.0

Latency = Callable[[random.Random], float]
SHORT: Latency = lambda rng: 0.2  # noqa: E731
LONG: Latency = lambda rng: 2.0  # noqa: E731
MIXED: Latency = lambda rng: rng.uniform(0.2, 2.0)  # noqa: E731


@dataclass
class Bucket:
    """What a provider allows: it fills steadily, and is full after a second."""

    rate: float
    level: float = 0.0
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.rate

    def fill(self, now: float) -> None:
        self.level = min(self.rate, self.level + self.rate * (now - self.at))
        self.at = now


class Provider:
    """A provider that refuses, within 50 ms, what its buckets do not hold when it arrives."""

    def __init__(
        self,
        latency: Latency,
        seed: int,
        *,
        requests: float,
        tokens: float = 1e12,
        headers: bool = False,
        limits: Limits | None = None,
    ) -> None:
        fresh_draws()
        self.rng = random.Random(seed)
        self.latency = latency
        self.headers = headers
        self.requests, self.tokens = Bucket(requests), Bucket(tokens)
        self.accepted = self.refused = self.spent = self.refused_at_once = 0
        self.llm = FakeBackend(limits=limits)
        self.clock = VirtualClock(self.answer, request_seconds=self.seconds, seed=seed)
        self.verdict: Response | None = None

    def seconds(self, request: Request) -> float:
        """Decide on a request as it arrives."""
        usage = Usage(int(1.2 * request.tokens), self.rng.randrange(10, 60))
        for bucket in (self.requests, self.tokens):
            bucket.fill(self.clock.now)
        enough = self.requests.level >= 1 - 1e-9 and self.tokens.level >= usage.total - 1e-9
        self.verdict = None
        if not enough:
            self.refused += 1
            self.refused_at_once += self.clock.now == 0.0
            return 0.05
        self.accepted += 1
        self.spent += usage.total
        self.requests.level -= 1
        self.tokens.level -= usage.total
        self.verdict = replace(self.llm.answer(request), usage=usage, headers=self.told())
        return self.latency(self.rng)

    def told(self) -> dict[str, str]:
        if not self.headers:
            return {}
        told = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            told[f"x-ratelimit-limit-{name}"] = str(round(60 * bucket.rate))
            told[f"x-ratelimit-remaining-{name}"] = str(int(bucket.level))
            told[f"x-ratelimit-reset-{name}"] = f"{1000 * (1 - bucket.level / bucket.rate):.0f}ms"
        return told

    def answer(self, request: Request) -> Response:
        if self.verdict is None:
            raise error_for_status(429, "slow down", headers=self.told())
        return self.verdict

    def work(self, calls: int, params: FakeParams = FakeParams()) -> Provider:
        """Let a run ask for more than it allows, for a minute."""
        texts = ("x" * self.rng.randrange(80, 240) + str(i) for i in range(calls))
        run = self.clock.run([self.llm.chat(text, params) for text in texts])
        self.clock.tell(0.0, ("submit", run))
        self.clock.drive(until=HORIZON)
        return self

    def refused_share(self, *, known_before: bool = True) -> float:
        refused = self.refused if known_before else self.refused - self.refused_at_once
        return refused / (self.accepted + self.refused)


CASES = pytest.mark.parametrize(
    ("rate", "latency", "seeds"),
    [(5, SHORT, 1), (5, LONG, 1), (5, MIXED, 3), (50, MIXED, 1)],
    ids=["5/s, 0.2 s", "5/s, 2 s", "5/s, mixed", "50/s, mixed"],
)


@CASES
def test_a_rate_that_nothing_states_is_learnt(rate: int, latency: Latency, seeds: int) -> None:
    """Without headers and limits, at most 5 % are refused and at least 80 % of the quota is used."""
    for seed in range(seeds):
        provider = Provider(latency, seed, requests=rate).work(70 * rate)

        assert provider.refused_share() <= 0.05
        assert provider.accepted >= 0.8 * rate * HORIZON


@CASES
def test_the_users_limit_is_kept_and_used(rate: int, latency: Latency, seeds: int) -> None:
    """With `requests_per_minute`, at most 1 % are refused, and at least 95 % of the quota is used."""
    for seed in range(seeds):
        limits = Limits(requests_per_minute=60 * rate)
        provider = Provider(latency, seed, requests=rate, limits=limits).work(70 * rate)

        assert provider.refused_share() <= 0.01
        assert provider.accepted >= 0.95 * rate * HORIZON


@CASES
def test_limits_in_headers_are_kept_and_used(rate: int, latency: Latency, seeds: int) -> None:
    """The same with the limits in headers, except for the ten that are sent before any has come."""
    for seed in range(seeds):
        provider = Provider(latency, seed, requests=rate, headers=True).work(70 * rate)

        assert provider.refused_share(known_before=False) <= 0.01
        assert provider.accepted >= 0.95 * rate * HORIZON


@pytest.mark.parametrize("stated", ["by the user", "in headers"])
@pytest.mark.parametrize("bound", [None, 100], ids=["no bound", "max_tokens=100"])
def test_tokens_are_counted_too(stated: str, bound: int | None) -> None:
    """A limit of tokens is kept and used; what an answer will cost is learnt from answers before."""
    rate = 1700.0
    limits = Limits(tokens_per_minute=60 * rate) if stated == "by the user" else None
    provider = Provider(
        MIXED, 0, requests=200, tokens=rate, headers=limits is None, limits=limits
    ).work(1400, FakeParams(max_tokens=bound))

    assert provider.refused_share(known_before=False) <= 0.01
    assert provider.spent >= 0.95 * rate * HORIZON


def test_a_limit_of_tokens_that_nothing_states_is_learnt() -> None:
    """Refusals for tokens teach a pace like those for requests."""
    provider = Provider(MIXED, 1, requests=400, tokens=85 * 25.0).work(1800)

    assert provider.refused_share() <= 0.05
    assert provider.spent >= 0.8 * 85 * 25.0 * HORIZON


def test_nobody_looks_at_a_gate_more_often_than_needed() -> None:
    """While requests wait for their time, there is about one alarm for each of them."""
    provider = Provider(SHORT, 0, requests=5, limits=Limits(requests_per_minute=300))
    brain: Any = provider.clock.brain
    looks = 0
    on = brain.on

    def counted(events: Any, now: float) -> Any:
        nonlocal looks
        looks += not events
        return on(events, now)

    brain.on = counted
    provider.work(600)

    assert looks <= 1.1 * provider.accepted


@pytest.mark.parametrize("limits", [{"requests_per_minute": 30}, {"tokens_per_minute": 600}])
def test_groups_that_wait_for_quota_are_sent_in_time(limits: dict[str, float]) -> None:
    """Calls that share a request wait for the gate's quota, and nothing is forgotten there."""
    llm = FakeBackend(limits=Limits(**limits))
    clock = VirtualClock(llm.answer, request_seconds=lambda r: 0.3 + 0.1 * len(r.draws))
    firsts = [llm.chat(f"first {i}") for i in range(12)]
    replies = clock.compute([llm.complete(first + "!") for first in firsts])

    assert all(isinstance(reply, str) for reply in replies)
    assert 13 <= len(clock.sent) <= 24
