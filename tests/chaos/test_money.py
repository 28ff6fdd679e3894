"""A cap on the bill holds amid faults that may have been billed, and a higher one buys only the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from feste.backend import Price
from tests.chaos.driver import PRICE, Chaos

pytestmark = pytest.mark.timeout(900)

#: What went wrong may have been billed, or was.
FAULTS = dict.fromkeys(("reset_after", "truncated", "gateway_timeout", "garbage"), 0.0125)


def test_the_bill_stays_below_its_cap(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """With 64 in flight nothing is sent after the stop; with more money only the rest is bought."""
    worth = amount(100, 500)
    cap = worth * Price(**PRICE).dollars(4, 8)
    for run in range(amount(1, 7)):
        folder = tmp_path / str(run)
        folder.mkdir()
        calls = 2 * worth
        with Chaos(
            folder,
            "chains",
            calls,
            seed=1_000 * seed + run,
            window=64,
            faults=FAULTS,
            settings={"budget": cap},
        ) as chaos:
            told = chaos.run()
            bill, bought = chaos.server.totals(), len(chaos.server.ledger())
            rest = chaos.run(settings={"budget": 100 * cap})
            evidence = chaos.check(rest)

        answered = sum(value is not None for value in told["values"])
        assert worth / 4 < answered < calls
        assert bill.dollars is not None and 0 < bill.dollars <= cap
        assert bill.in_flight == 0 and told["late"] == 0
        assert rest["report"]["reused"] == answered
        assert len(evidence.ledger) - bought <= calls - answered + rest["report"]["owned_up"]
        tally(evidence)
