"""A long run takes no more of its machine at its end than at its beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.driver import Chaos
from tests.chaos.faults import everything
from tests.chaos.work import make

pytestmark = pytest.mark.timeout(900)

MIB = 1 << 20


def test_a_long_run_leaks_nothing(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Streamed answers with 5 % faults: descriptors, memory, threads and tasks are bounded.

    All warnings are errors, those of what was not closed too: the driver finds them on stderr.
    """
    calls, window = amount(1_000, 9_000), 64  # a report has the last 10,000 requests
    with Chaos(
        tmp_path,
        "flat",
        calls,
        seed=seed,
        window=window,
        store=False,
        faults=everything(make("flat", calls, seed, equal=1)),
        python=("-W", "error", "-m", "tests.chaos.streamer"),
        timeout=10.0,
        rate=60_000,  # so that a refusal teaches it no slower pace
        every=calls // 10,
        equal=1,
    ) as streamed:
        evidence = streamed.check(streamed.run())
    first, *during, last = evidence.told["seen"]
    # the least of some, since a look may come upon a big reply
    early, late = (min(s["bytes"] for s in some) for some in (during[1:5], during[-4:]))

    assert len(during) == 10
    assert max(seen["files"] for seen in during) <= window + 40
    assert last["files"] - first["files"] <= 8
    assert late - early <= 20 * MIB
    assert last["tasks"] == []
    assert [name for name in last["threads"] if not name.startswith(("MainThread", "feste"))] == []
    assert max(len(seen["threads"]) for seen in [*during, last]) <= window + 16
    tally(evidence)
