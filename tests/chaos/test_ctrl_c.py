"""Ctrl-C at any moment: the run ends soon, and the next one goes on where it was."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from feste.testing import Fault
from tests.chaos.checker import rows
from tests.chaos.driver import Chaos

pytestmark = pytest.mark.timeout(900)

#: The most seconds until a program has control again, after one and after two; what a busy machine
#: adds. How long Python takes to end with all that is imported is not Feste's.
ONE, TWO, SLACK = 3.0, 0.5, 5


def points(chaos: Chaos, times: int) -> list[int]:
    """Return at how many answers to interrupt a program."""
    return sorted(Random(chaos.seed).sample(range(1, len(chaos.steps) * 9 // 10), times))


def test_ctrl_c_loses_nothing(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """What is in flight lands and is kept: not one answer is bought again."""
    with Chaos(tmp_path, "chains", amount(400, 2_000), seed=seed, base=0.05) as chaos:
        for point in points(chaos, amount(3, 10)):
            code = chaos.stop_at(max(point, chaos.ledger.made() + 1), signal.SIGINT)

            assert code == 130, chaos.errors
            assert chaos.ending <= ONE * SLACK
        evidence = chaos.check(chaos.run())

    assert evidence.delivered == len(chaos.steps)
    assert evidence.extra == 0
    tally(evidence, interrupts=evidence.runs - 1)


def test_the_second_ctrl_c_ends_at_once(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """However long the grace, what is in flight is given up, and named."""
    stops, slow = amount(1, 5), 8
    with Chaos(
        tmp_path,
        "chains",
        amount(300, 1_000),
        seed=seed,
        constants={"feste._compute.steps:GRACE": 60.0},
    ) as chaos:
        for _ in range(stops):
            chaos.server.add(Fault(kind="slow", times=slow, pause=60.0))  # the first of a program
            point = chaos.ledger.made() + len(chaos.steps) // (3 * stops)
            code = chaos.stop_at(point, signal.SIGINT, times=2)

            assert code == 130, chaos.errors
            assert chaos.ending <= TWO * SLACK
            chaos.kills += 1  # of what was in flight
        given_up = chaos.server.totals().left
        assert chaos.store is not None
        query = "SELECT billed FROM requests WHERE outcome IN ('sent', 'unknown', 'failed')"
        named = [billed for (billed,) in rows(chaos.store, query)]
        evidence = chaos.check(chaos.run())

    assert given_up >= slow * stops
    assert len(named) >= given_up
    assert set(named) == {"unknown"}
    assert evidence.delivered == len(chaos.steps)
    tally(evidence, interrupts=2 * stops)


def test_the_end_by_sigterm_is_a_kill(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Feste leaves that signal to the program; by default it ends it at once, and the store has all."""
    with Chaos(tmp_path, "chains", amount(200, 2_000), seed=seed) as chaos:
        for point in points(chaos, amount(1, 2)):
            code = chaos.stop_at(max(point, chaos.ledger.made() + 1), signal.SIGTERM)

            assert code == -signal.SIGTERM
        evidence = chaos.check(chaos.run())

    assert evidence.delivered == len(chaos.steps)
    tally(evidence)
