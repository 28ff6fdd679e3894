"""SECURITY.md promises what tests show, and stands where people look for it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = re.sub(r"(?s)<!--.*?-->", "", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))


def test_each_promise_names_tests_that_exist() -> None:
    """A promise without a test is a wish; a test that was renamed is noticed here."""
    _, _, after = TEXT.partition("## What Feste promises")
    promises = re.findall(r"(?ms)^- .*?(?=^- |^\*\*|\Z)", after.partition("\n## ")[0])
    named = [re.findall(r"`([\w./-]+\.py)`", promise) for promise in promises]

    assert len(promises) > 20
    assert [promise for promise, tests in zip(promises, named) if not tests] == []
    assert [path for tests in named for path in tests if not (ROOT / path).is_file()] == []


def test_it_is_found_from_every_door() -> None:
    """The read-me, the guide for contributors and the documentation lead to it."""
    doors = {"README.md": "(SECURITY.md)", "CONTRIBUTING.md": "(SECURITY.md)"}
    doors |= {"docs/index.md": "(security.md)", "docs/security.md": "{include} ../SECURITY.md"}

    for path, link in doors.items():
        assert link in (ROOT / path).read_text(encoding="utf-8"), path


def test_variables_that_it_names_are_read() -> None:
    """What it tells people to set has an effect."""
    source = "".join(
        path.read_text(encoding="utf-8") for path in ROOT.glob("packages/*/src/**/*.py")
    )

    assert {name for name in re.findall(r"FESTE_\w+", TEXT) if name not in source} == set()
