"""Several programs and one store: one works at a time, the others wait, or are told who it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from tests.chaos.checker import rows
from tests.chaos.driver import LONG, Chaos

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX here"),
]

CALLS = 240
Programs = dict[int, "subprocess.Popen[bytes]"]


def test_programs_take_turns(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Many want the same work; one buys it, and when it is killed, the next one goes on."""
    programs, kills = amount(5, 8), amount(1, 6)
    with (
        Chaos(tmp_path, "chains", CALLS, seed=seed, window=8, base=0.05) as shared,
        ExitStack() as stack,
    ):
        patient = {**shared.todo["settings"], "store_wait": LONG}
        waiting: Programs = {}
        for _ in range(programs):
            process = stack.enter_context(shared.program(settings=patient))
            waiting[process.pid] = process
        for point in sorted(Random(seed).sample(range(20, CALLS * 8 // 10), kills)):
            owner = owner_of(shared, waiting, max(point, shared.ledger.made() + 1))
            os.kill(owner, signal.SIGSTOP)  # it has the store as long as the other one looks
            hasty = stack.enter_context(shared.program())
            _, errors = hasty.communicate(timeout=LONG)

            assert hasty.returncode == 1
            assert f"is being written by process {owner}:" in errors.decode()
            os.kill(owner, signal.SIGKILL)
            waiting.pop(owner).wait()
            shared.kills += 1
        told = []
        for process in waiting.values():
            out, errors = process.communicate(timeout=LONG)
            assert (process.returncode, errors) == (0, b"")
            told.append(json.loads(out))
        sessions = [pid for (pid,) in rows(tmp_path / "runs.db", "SELECT pid FROM sessions")]
        evidence = [shared.check(one) for one in told]

    assert len(told) == programs - kills
    assert len({tuple(one["values"]) for one in told}) == 1
    # each had the store once, and nobody else had it
    assert sorted(sessions) == sorted(set(sessions))
    assert len(sessions) == programs
    tally(evidence[0])


def owner_of(shared: Chaos, waiting: Programs, point: int) -> int:
    """Return the process that has the store when so many answers are made."""
    shared.ledger.wait_for(point, next(iter(waiting.values())))
    ((owner,),) = rows(
        shared.folder / "runs.db", "SELECT pid FROM sessions ORDER BY id DESC LIMIT 1"
    )
    assert owner in waiting
    return int(owner)
