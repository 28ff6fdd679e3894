"""The tests can fail: a Feste that is broken on purpose turns one of them red."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.defects import CHAOS, DEFECTS, RERUN

pytestmark = pytest.mark.timeout(300)

#: Noticed by programs that run for a while: these are left to the long form.
LONG = [name for name, defect in DEFECTS.items() if defect.test.startswith(CHAOS)]
QUICK = [name for name in DEFECTS if name not in LONG[1:]]


def ended(test: str, defect: str) -> subprocess.CompletedProcess[str]:
    """Run a test with a defect, or with none."""
    pytest_of_it = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.chaos.defects", test]
    return subprocess.run(
        [*pytest_of_it, "-p", "no:cacheprovider", "--tb=short"],
        env={**os.environ, "CHAOS_DEFECT": defect, "CHAOS": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", DEFECTS if os.environ.get("CHAOS") == "full" else QUICK)
def test_each_defect_is_noticed(name: str) -> None:
    """The test that has to notice fails by what is wrong, not by a timeout or a defect that misfits."""
    defect = DEFECTS[name]
    red = ended(defect.test, name)

    assert red.returncode == pytest.ExitCode.TESTS_FAILED, red.stdout[-3000:] + red.stderr
    assert re.search(rf"(?m)^E .*{defect.words}", red.stdout), red.stdout[-3000:]


def test_without_a_defect_the_test_passes() -> None:
    """What turns red is turned so by the defect, and not by how it is run."""
    green = ended(RERUN, "")

    assert green.returncode == pytest.ExitCode.OK, green.stdout[-3000:] + green.stderr
