"""A provider that is away, refuses, throttles or always fails: few requests, and no call is lost."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from feste.testing import Fault, Outage
from tests.chaos.driver import Chaos

pytestmark = pytest.mark.timeout(900)

#: The breaker asks for the first time a little sooner, so that short outages are asked often too.
SOON = {"feste.scheduler.admission.breaker:_FIRST": 1.0}


#: The file that makes the provider refuse all requests, as long as it is there.
REFUSES = "refuses"


@contextmanager
def refusing(
    folder: Path, calls: int, seed: int, status: int, code: str
) -> Iterator[tuple[Chaos, Callable[[subprocess.Popen[bytes]], None]]]:
    """Work at a provider, and what lets it refuse all requests once half of the answers are made."""
    wire = {"refusal": (str(folder / REFUSES), status, code)}
    with Chaos(folder, "chains", calls, seed=seed, base=0.05, wire=wire) as chaos:

        def refuse(process: subprocess.Popen[bytes]) -> None:
            chaos.ledger.wait_for(calls // 2, process)
            (folder / REFUSES).touch()

        yield chaos, refuse


def failed(told: dict[str, Any]) -> int:
    """Return how many requests failed."""
    return sum(error != "" for _, _, error in told["report"]["times"])


@pytest.mark.parametrize("refuse", [False, True], ids=["503", "refused"])
def test_an_outage_costs_few_requests_and_no_call(
    tmp_path: Path,
    seed: int,
    refuse: bool,
    amount: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    """The breaker keeps the requests of an outage below 100, and all calls are answered after it."""
    calls = amount(300, 1_000)
    away = Outage(after_requests=calls // 2, seconds=amount(4, 20), refuse=refuse)
    with Chaos(
        tmp_path, "chains", calls, seed=seed, faults=[away], constants=amount(SOON, {})
    ) as chaos:
        told = chaos.run()
        evidence = chaos.check(told)

    assert evidence.delivered == calls
    assert 0 < failed(told) <= 100
    assert len(told["report"]["times"]) <= calls + 100
    assert told["report"]["breaker_openings"] >= 1
    tally(evidence)


def test_an_outage_that_outlasts_patience_ends_the_run_and_the_next_goes_on(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """What waits for the backend ends as unavailable; a run after the outage buys the rest alone."""
    calls, seconds = amount(300, 1_000), amount(4, 20)
    away = Outage(after_requests=calls // 2, seconds=seconds)
    with Chaos(tmp_path, "chains", calls, seed=seed, faults=[away]) as chaos:
        told = chaos.run(settings={"outage_patience": seconds / 4})
        begun = min(r.started for r in chaos.server.requests() if r.fault == "outage")
        time.sleep(max(0.0, begun + seconds - time.monotonic()))
        evidence = chaos.check(chaos.run())

    assert {r for _, roots, *_ in told["failed"].values() for r in roots} == {"BackendUnavailable"}
    assert len(told["failed"]) == calls - sum(v is not None for v in told["values"]) > 0
    assert evidence.totals.faults["outage"] <= 100
    assert evidence.delivered == calls and evidence.extra == 0
    tally(evidence)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(401, "invalid_api_key", "AuthFailed"), (429, "insufficient_quota", "QuotaExhausted")],
    ids=["key", "quota"],
)
def test_a_refused_account_ends_the_run_and_the_next_goes_on(
    tmp_path: Path,
    seed: int,
    status: int,
    code: str,
    error: str,
    amount: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    """The rest is not sent, what was answered is kept, and a run after the refusal buys the rest alone."""
    calls = amount(300, 1_000)
    with refusing(tmp_path, calls, seed, status, code) as (chaos, refuse):
        told = chaos.run(refuse)
        refused, made = chaos.server.totals().statuses[status], len(chaos.server.ledger())
        (tmp_path / REFUSES).unlink()
        rest = chaos.run()
        evidence = chaos.check(rest)

    answered = sum(value is not None for value in told["values"])
    assert calls // 2 <= answered == made < calls
    assert {r for _, roots, *_ in told["failed"].values() for r in roots} == {error, "NotStarted"}
    assert 2 <= refused <= chaos.window + 1  # what was on its way, and the first one once more
    assert rest["report"]["states"]["replayed"] == answered
    assert evidence.delivered == calls and evidence.extra == 0
    tally(evidence)


def test_a_provider_that_only_refuses_for_rate_ends_the_run_and_the_next_goes_on(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """429 for ever is asked about now and then, until the run's patience is over."""
    calls, patience = amount(300, 1_000), amount(3, 20)
    with refusing(tmp_path, calls, seed, 429, "rate_limit_exceeded") as (chaos, refuse):
        told = chaos.run(refuse, settings={"outage_patience": patience})
        refused, made = chaos.server.totals().statuses[429], len(chaos.server.ledger())
        (tmp_path / REFUSES).unlink()
        evidence = chaos.check(chaos.run())

    assert {r for _, roots, *_ in told["failed"].values() for r in roots} == {"BackendUnavailable"}
    assert calls // 2 <= sum(value is not None for value in told["values"]) == made < calls
    assert chaos.window / 2 <= refused <= 2 * chaos.window + 4 * patience
    assert evidence.delivered == calls and evidence.extra == 0
    tally(evidence)


def test_a_provider_that_always_fails_is_hardly_asked(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Not each call finds out for itself: there are fewer requests than calls."""
    broken = Fault(status=500, times=None)
    patience = {"outage_patience": amount(2, 20)}
    with Chaos(
        tmp_path, "chains", amount(400, 1_000), seed=seed, faults=[broken], settings=patience
    ) as chaos:
        evidence = chaos.check(chaos.run())

    assert evidence.delivered == 0
    assert 10 <= evidence.totals.requests <= 100
    tally(evidence)


def peak(times: list[tuple[float, float]]) -> int:
    """Return how many of these spans there are at once, at most."""
    steps = sorted([(at, -1) for _, at in times] + [(sent, 1) for sent, _ in times])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


def test_a_storm_of_refusals_is_not_answered_by_one(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Where half of the requests are refused for rate, soon half as many are in flight, and few are
    sent again.

    The gate learns the rate from refusals, round trip by round trip, so the first ones do not count.
    """
    calls, before = amount(400, 1_000), amount(150, 300)
    with Chaos(
        tmp_path,
        "flat",
        calls,
        seed=seed,
        equal=1,
        window=40,
        base=0.4,
        wire={"storm": (before, amount(4, 10), 0.5)},
    ) as chaos:
        told = chaos.run()
        evidence = chaos.check(told)

    times = told["report"]["times"]
    refused = [at for _, at, error in times if error == "RateLimited"]
    begun, over = min(refused), max(refused)
    calm = peak([(sent, at) for sent, at, _ in times if at < begun])
    storm = peak([(sent, at) for sent, at, _ in times if over - (over - begun) / 3 < sent < over])
    assert evidence.delivered == calls
    assert 0 < storm <= calm / 2
    assert len(times) - calls <= 0.2 * calls + 100
    tally(evidence)
