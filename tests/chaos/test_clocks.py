"""The time of day jumps back and forth by hours and days: nothing is sent more or later for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feste.testing import Fault, ServerLimits
from tests.chaos.checker import Evidence
from tests.chaos.driver import Chaos

pytestmark = pytest.mark.timeout(900)


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Waits until a date, budgets, deadlines and rates: as many requests as with a good clock.

    A date that a provider asks to wait for is measured against the date of its own reply.
    """
    calls = amount(150, 1_000)

    def run(name: str, **more: Any) -> tuple[dict[str, Any], Evidence]:
        (tmp_path / name).mkdir()
        with Chaos(
            tmp_path / name,
            "chains",
            calls,
            seed=seed,
            faults=[
                Fault(kind="rate_limit", probability=0.05, times=amount(2, 5), pause=1.0),
                Fault(kind="reset_before", probability=0.01, times=None),
            ],
            limits=ServerLimits(requests_per_minute=600_000),
            waits=["date"],
            settings={"budget": 100.0, "deadline": 60.0},
        ) as chaos:
            told = chaos.run(**more)
            return told, chaos.check(told)

    true, calm = run("calm")
    told, evidence = run("jumps", clock=seed)

    # a call whose connection is reset twice fails, and takes its chain along
    assert min(evidence.delivered, calm.delivered) >= 0.98 * calls
    assert abs(evidence.totals.requests - calm.totals.requests) <= 0.02 * calls
    report = told["report"]
    closings = [(c["start"], c["end"]) for c in report["closings"] if c["reason"] == "rate_limit"]
    assert 0.9 <= max(end - start for start, end in closings) <= 2.1
    # what the gate had let through was perhaps still being noted in the store
    whole = [(start, end) for start, end in closings if end - start >= 0.9]
    early = [s for s, _, _ in report["times"] for a, b in whole if (a + b) / 2 < s < b - 0.001]
    assert not early
    assert report["seconds"] <= 5 * true["report"]["seconds"] + 10
    tally(calm)
    tally(evidence)
