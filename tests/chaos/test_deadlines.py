"""Servers that drip or hang: no call outlasts its deadline, and the others do not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from feste.testing import Fault
from tests.chaos.driver import Chaos

pytestmark = pytest.mark.timeout(900)

DEADLINE = 3.0
KINDS = ("drip", "hang", "drip_headers")
#: The most seconds of a call that has a deadline, and what a busy machine is given on top.
MOST, SLACK = 4.0, 5


def test_no_call_outlasts_its_deadline(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Bodies and heads that drip, and silence: all end in time, and their connections are closed."""
    each = amount(20, 100)
    slow = range(0, 2 * each * len(KINDS), 2)
    faults = [
        Fault(kind=KINDS[i % len(KINDS)], match=f"start {i} of 0", times=None, pause=0.5)
        for i in slow
    ]
    calls = max(slow) + 2 * each
    with Chaos(
        tmp_path,
        "flat",
        calls,
        seed=seed,
        equal=1,
        window=60,  # what one busy machine answers within any deadline
        faults=faults,
        settings={"deadline": DEADLINE},
    ) as chaos:
        told = chaos.run()
        evidence = chaos.check(told)

    assert {int(i) for i in told["failed"]} == set(slow)
    assert {name for name, *_ in told["failed"].values()} == {"CallTimeout"}
    bad = [r for r in evidence.log if r.fault in KINDS]
    assert len(bad) == len(slow)
    assert all(r.left is not None for r in bad)
    assert max(r.left - r.started for r in bad if r.left is not None) <= MOST * SLACK
    waited = [at - sent for sent, at, error in told["report"]["times"] if error == "CallTimeout"]
    assert len(waited) == len(slow) and min(waited) >= DEADLINE / 2  # it begins before the store
    assert max(waited) <= MOST * SLACK
    good = [r for r in evidence.log if r.fault is None]
    assert len(good) == calls - len(slow) and all(r.delivered for r in good)
    assert evidence.totals.in_flight == 0
    tally(evidence)
