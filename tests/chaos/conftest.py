"""Seeds and sizes of the chaos suite, and the sum of what it did.

``CHAOS=full`` runs the long form, with three seeds; ``CHAOS_SEEDS=7,8`` runs others. The seed is in
the name of each test, so ``CHAOS_SEEDS=7`` and that name run it again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.checker import Evidence
from tests.chaos.regressions import REGRESSIONS

FULL = os.environ.get("CHAOS") == "full"
SEEDS = [int(s) for s in os.environ.get("CHAOS_SEEDS", "1,2,3" if FULL else "1").split(",")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that has a seed with all seeds, and with those that once found something."""
    if "seed" in metafunc.fixturenames:
        found = REGRESSIONS.get(metafunc.function.__name__, ())
        metafunc.parametrize("seed", sorted({*SEEDS, *found}), ids=lambda seed: f"seed={seed}")


@pytest.fixture
def amount() -> Callable[[int, int], int]:
    """Choose the short or the full amount of something."""
    return lambda short, full: full if FULL else short


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Add to the sums that are shown at the end: from evidence, or by name."""

    def add(evidence: Evidence | None = None, **counts: int) -> None:
        if evidence is not None:
            counts["calls"] = len(evidence.steps)
            counts["requests"] = evidence.totals.requests
            counts["answers made"] = len(evidence.ledger)
            counts["answers bought again"] = evidence.extra
            counts["kills"] = evidence.kills
            for kind, times in evidence.totals.faults.items():
                counts[f"fault {kind}"] = times
        for name, count in counts.items():
            record_property(f"chaos: {name}", count)

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what the suite did."""
    sums: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, count in report.user_properties:
            if name.startswith("chaos: "):
                sums[name.removeprefix("chaos: ")] += count
    if sums:
        terminalreporter.section(f"chaos, seeds {SEEDS}")
        for name, count in sorted(sums.items(), key=lambda item: item[0].startswith("fault ")):
            terminalreporter.write_line(f"{count:10,}  {name}")
