"""Faults of all kinds at once: each costs the calls that it must, and what needs them; no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import Evidence
from tests.chaos.driver import Chaos
from tests.chaos.faults import EXPECTED, Effect, doomed, everything
from tests.chaos.work import POISON, make

pytestmark = pytest.mark.timeout(900)

#: The share of calls that the provider refuses, each time.
POISONED = 0.05
#: The timeout in seconds: a busy machine makes no false one of it.
PATIENCE = 10.0
#: Errors of calls that a provider refuses: poisoned ones, and those hit by such a fault.
REFUSED = {"InvalidRequest", "ContentFiltered"}
#: Requests a minute that the program believes in, so that a refusal teaches it no slower pace.
RATE = 60_000


def faulty(folder: Path, calls: int, seed: int, **more: Any) -> Chaos:
    """Calls in graphs of depth 4, no two of them equal: 5 % are poisoned, 5 % of requests fail."""
    work: dict[str, Any] = {"equal": 1, "poisoned": POISONED}
    faults = everything(make("layers", calls, seed, **work))
    given = {"faults": faults, "bodies": True, "timeout": PATIENCE, "rate": RATE, **work, **more}
    return Chaos(folder, "layers", calls, seed=seed, **given)


def ancestors(evidence: Evidence, i: int) -> set[int]:
    """Return all calls that a call needs."""
    found, stack = set(), [i]
    while stack:
        new = set(evidence.steps[stack.pop()].parents) - found
        found |= new
        stack += new
    return found


def test_a_failure_costs_itself_and_what_needs_it(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Delivered is exactly what has no failed ancestor; everything else names its root cause.

    A call fails for sure if it is poisoned. By faults it fails only after two of its answers were
    lost that may have been paid for, or two came that could not be read; and then it does.
    """
    with faulty(tmp_path, amount(1_000, 3_400), seed) as hit:
        evidence = hit.check(hit.run())
    own, gone = doomed(evidence)
    failed = {int(i): told for i, told in evidence.told["failed"].items()}

    assert failed.keys() == own | gone
    assert {i for i, (kind, *_) in failed.items() if kind == "UpstreamFailed"} == gone
    assert all(set(failed[i][3]) <= ancestors(evidence, i) & own and failed[i][3] for i in gone)
    refused = {failed[i][0] for i in own if POISON in evidence.steps[i].text}
    assert refused == {"InvalidRequest"}
    by_faults = [i for i in own if POISON not in evidence.steps[i].text]
    assert len(by_faults) <= len(evidence.steps) / 100
    assert {failed[i][0] for i in by_faults} >= {"ConnectionLost", "MalformedResponse"}
    totals = evidence.totals
    alone = {kind for kind in totals.faults if EXPECTED[kind] not in (Effect.LISTS, Effect.ACCOUNT)}
    assert alone == {fault.kind for fault in everything(evidence.steps)}
    # 5 %, and each kind once or twice for sure
    struck = sum(totals.faults.values())
    assert 0.03 * totals.requests <= struck <= 0.07 * totals.requests + 2 * len(alone)
    tally(evidence)


def test_what_is_raised_hands_over_what_is_returned(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """``on_error="raise"`` computes the same; its ``partial`` has each value and error in its place."""
    with faulty(tmp_path, amount(320, 700), seed, store=False, on_error="raise") as hit:
        evidence = hit.check(hit.run())
    own, gone = doomed(evidence)

    assert {int(i) for i in evidence.told["failed"]} == own | gone
    assert "failed" in evidence.told["error"]
    tally(evidence)


def test_after_a_failure_nothing_new_starts(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """``on_error="stop"``: what is in flight at the first failure is delivered, no other is sent."""
    for part in range(amount(1, 4)):
        folder = tmp_path / str(part)
        folder.mkdir()
        more = {"store": False, "on_error": "stop", "poisoned": 0.03, "base": 0.05}
        with faulty(folder, 400, 1_000 * seed + part, **more) as hit:
            evidence = hit.check(hit.run())
        told = evidence.told
        first = min(at for _, at, error in told["report"]["times"] if error in REFUSED)
        kinds = {kind for kind, *_ in told["failed"].values()}

        assert [sent for sent, *_ in told["report"]["times"] if sent > first] == []
        assert evidence.delivered == sum(r.items for r in evidence.log if r.delivered)
        assert "NotStarted" in kinds and not kinds.isdisjoint(REFUSED)
        tally(evidence)
