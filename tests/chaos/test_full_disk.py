"""The disk becomes full in the middle of a run: spending stops, and a run with space goes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from feste.store.repair.verify import verify
from tests.chaos.checker import rows
from tests.chaos.driver import Chaos

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits"),
]

CALLS, WINDOW = 200, 8
#: How much the store may grow: about half of what it would, to the page or with its log.
ROOM = {"pages": 100_000, "size": 1_000_000}
#: A small disk of its own for the store, which is copied out of it at the end.
SMALL = """
mount -t tmpfs -o size=5200k none "$0" || exit 77
"$@"; code=$?
cp -a "$0/." "$0.copy" && exit $code
"""
INSIDE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.mark.parametrize("how", ["pages", "size", "disk"])
def test_a_full_disk_stops_spending(
    how: str, tmp_path: Path, seed: int, tally: Callable[..., None]
) -> None:
    """Nothing new is sent; what was in flight is handed over, what is in the store stays good."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with Chaos(tmp_path, "flat", CALLS, seed=seed, window=WINDOW, equal=1) as filled:
        store = filled.store = folder / "runs.db"
        filled.todo["settings"]["store"] = str(store)
        if how == "disk":
            if shutil.which("unshare") is None:
                pytest.skip("this system has no namespaces")
            filled.prefix = [*INSIDE, SMALL, str(folder)]
            refused = subprocess.run([*filled.prefix, "true"], capture_output=True)
            if refused.returncode:
                pytest.skip(f"this system lets nobody mount: {refused.stderr.decode()}")
            shutil.rmtree(f"{folder}.copy")
        disk = {"how": how, "store": str(store), "room": ROOM.get(how, 0)}
        first = filled.run(warns="could not be written", disk=disk)
        if how == "disk":
            shutil.copytree(f"{folder}.copy", folder, dirs_exist_ok=True)
            shutil.rmtree(f"{folder}.copy")
        filled.prefix = ()
        handed = set(filter(None, first["values"]))
        made = {entry["answer"] for entry in filled.server.ledger()}
        asked = filled.server.totals().requests
        ((noted,),) = rows(store, "SELECT max(id) FROM requests")
        texts = [text for (text,) in rows(store, "SELECT response FROM answers")]
        kept = {answer for answer in handed if any(answer in text for text in texts)}

        assert verify(store).problems == []
        # each request was noted before it was sent, and none was noted after the first failure
        assert asked <= noted == first["noted"]
        assert 0 < len(kept) == len(texts) < CALLS
        # what was paid for is in the results, and all but what was in flight is in the store
        assert handed == made
        assert len(handed - kept) <= WINDOW
        if how == "disk":
            assert handed == kept  # space was reserved for it

        evidence = filled.check(filled.run(), spoiled=len(handed - kept))

    assert evidence.delivered == CALLS
    assert evidence.extra == len(handed - kept)
    tally(evidence, **{"full disks": 1})
