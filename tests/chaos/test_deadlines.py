"""Servers that drip or hang: no call outlasts its deadline, and the others do not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from feste.testing import Fault
from feste.testing.sim_faults import FaultKind
from tests.chaos.driver import Chaos

pytestmark = pytest.mark.timeout(900)

DEADLINE = 3.0
#: The most seconds of a call that has a deadline, and what a busy machine is given on top.
MOST, SLACK = 4.0, 5


def test_no_call_outlasts_its_deadline(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Bodies and heads that drip, and silence: all end in time, and their connections are closed."""
    each = amount(20, 100)
    kinds = [kind for kind in ("drip", "hang", "drip_headers") if kind in get_args(FaultKind)]
    slow = {i: kinds[i % len(kinds)] for i in range(0, 2 * each * len(kinds), 2)}
    faults = [
        Fault(kind=kind, match=f"start {i} of 0", times=None, pause=0.5) for i, kind in slow.items()
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
    bad = [r for r in evidence.log if r.fault in kinds]
    assert len(bad) == len(slow)
    assert all(r.left is not None for r in bad)
    assert max(r.left - r.started for r in bad if r.left is not None) <= MOST * SLACK
    waited = [at - sent for sent, at, error in told["report"]["times"] if error == "CallTimeout"]
    assert len(waited) == len(slow) and min(waited) >= DEADLINE / 2  # it begins before the store
    good = [r for r in evidence.log if r.fault is None]
    assert len(good) == calls - len(slow) and all(r.delivered for r in good)
    assert evidence.totals.in_flight == 0
    tally(evidence)
