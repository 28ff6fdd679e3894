"""Programs with a store are killed again and again: no answer is lost, swapped or bought twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.driver import Chaos

pytestmark = pytest.mark.timeout(900)


def test_a_run_that_nothing_disturbs(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """The measure of the others: each call is billed once, and nothing is wrong."""
    with Chaos(tmp_path, "flat", amount(1_000, 3_400), seed=seed) as calm:
        evidence = calm.check(calm.run())

    assert evidence.extra == 0
    assert evidence.delivered == len(calm.steps)
    tally(evidence)


def test_a_rerun_sends_nothing(tmp_path: Path, seed: int, tally: Callable[..., None]) -> None:
    """A program that has ended is replayed: the same answers, no request."""
    with Chaos(tmp_path, "chains", 100, seed=seed) as whole:
        first = whole.run()
        evidence = whole.check(whole.run())

    assert evidence.values == first["values"]
    assert evidence.extra == 0
    assert evidence.told["report"]["states"]["replayed"] == len(whole.steps)
    tally(evidence)


def test_kills_lose_nothing(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Whenever the program is killed, the next one goes on where it was."""
    with Chaos(tmp_path, "chains", amount(1_000, 3_400), seed=seed) as killed:
        killed.kill(amount(4, 17))
        evidence = killed.check(killed.run())

    assert evidence.delivered == len(killed.steps)
    tally(evidence)


def test_kills_amid_faults_lose_nothing(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """The same where 5 % of the requests fail."""
    kinds = ("unavailable", "reset_before", "reset_after", "truncated", "garbage")
    faults = dict.fromkeys(kinds, 0.01)
    with Chaos(tmp_path, "chains", amount(1_000, 2_000), seed=seed, faults=faults) as killed:
        killed.kill(amount(3, 10))
        evidence = killed.check(killed.run())

    # what two faults hit in the last run fails, and takes the rest of its chain along
    assert evidence.delivered >= 0.98 * len(killed.steps)
    tally(evidence)


def test_nothing_is_ahead_of_the_store(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """When a request arrives, the file has it, and the answers that it is made of."""
    with Chaos(tmp_path, "graphs", 20 * amount(25, 170), seed=seed, look=True) as watched:
        evidence = watched.check(watched.run())

    assert evidence.delivered == len(watched.steps)
    assert evidence.extra == 0
    tally(evidence)
