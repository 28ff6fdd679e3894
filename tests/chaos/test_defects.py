"""The tests can fail: a Feste that is broken on purpose turns one of them red."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.defects import DEFECTS

pytestmark = pytest.mark.timeout(300)


#: Noticed by programs that run for a while: these are left to the long form.
LONG = [name for name, (_, test) in DEFECTS.items() if test.startswith("tests/chaos/")]
QUICK = [name for name in DEFECTS if name not in LONG[1:]]


@pytest.mark.parametrize("name", DEFECTS if os.environ.get("CHAOS") == "full" else QUICK)
def test_each_defect_is_noticed(name: str) -> None:
    """The test that has to notice fails, and not because the defect no longer fits what it breaks."""
    _, test = DEFECTS[name]
    pytest_of_it = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.chaos.defects", test]
    ended = subprocess.run(
        [*pytest_of_it, "-p", "no:cacheprovider", "--tb=short"],
        env={**os.environ, "CHAOS_DEFECT": name, "CHAOS": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )

    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout[-3000:] + ended.stderr
    misfits = r"(?m)^E  +(Type|Attribute|Name|Import|ModuleNotFound)Error\b.*"
    assert re.findall(misfits, ended.stdout) == [], ended.stdout[-3000:]
