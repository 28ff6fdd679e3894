"""What an executor lost ends the run with an error that names the nodes, and never as a hang."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.driver import LONG, Chaos

pytestmark = pytest.mark.timeout(900)

#: As in the released package it would take 50 seconds more than the time limit of a request.
IMPATIENT = {"feste.scheduler.stalls:OVERDUE": 1.0, "feste.scheduler.stalls:PATIENCE": 1.0}
#: Seconds in which such a run has ended, its start included; a busy machine needs some of them.
SOON = 60.0


@pytest.mark.parametrize(
    ("scheduler", "options", "noise"),
    [
        ("Silent", {"timeout": 3.0, "constants": IMPATIENT}, b""),
        ("BrokenLoop", {}, b"Bad file descriptor"),
    ],
)
def test_lost_requests_end_the_run_and_the_next_goes_on(
    tmp_path: Path,
    seed: int,
    scheduler: str,
    options: dict[str, object],
    noise: bytes,
    amount: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    """A dropped future, or a dead thread of the loop: the error names calls; no answer is lost."""
    with Chaos(tmp_path, "flat", amount(200, 1_000), seed=seed, equal=1, base=0.05) as chaos:
        begun = time.monotonic()
        with chaos.program(scheduler=f"tests.chaos.broken:{scheduler}", **options) as process:
            out, errors = process.communicate(timeout=LONG)
        took = time.monotonic() - begun
        told = json.loads(out)
        chaos.kills += scheduler == "BrokenLoop"  # of what was in flight on it
        evidence = chaos.check(chaos.run())

    assert process.returncode == 0
    assert took <= SOON
    assert noise in errors and bool(errors) == bool(noise)
    assert re.search(
        rf"\d+ nodes? did not end: .*\bchat-\w+-\d+.*{scheduler} lost", told["stalled"]
    )
    assert evidence.delivered == len(chaos.steps)
    tally(evidence, stalls=1)


def test_a_loop_that_others_stop_goes_on(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Code inside of a backend may stop the loop that it runs on: nothing is lost by it."""
    with Chaos(tmp_path, "chains", amount(200, 1_000), seed=seed) as chaos:
        evidence = chaos.check(chaos.run(scheduler="tests.chaos.broken:ForeignStop"))

    assert evidence.delivered == len(chaos.steps) and evidence.extra == 0
    tally(evidence)
