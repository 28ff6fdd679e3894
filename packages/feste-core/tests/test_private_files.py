"""What a store puts on the disk is its owner's alone, whatever the umask, and follows no planted link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import feste
from feste import store
from feste.cli import main
from feste.errors import JournalError
from feste.store.repair.salvage import salvage
from feste.testing import FakeBackend


@pytest.fixture(params=[0o000, 0o077], ids=["umask 000", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*")}


def test_files_of_a_store_are_private(umask: None, tmp_path: Path) -> None:
    """The store, its log and index while it is open, lock, reserve, export, and what salvage keeps."""
    folder = tmp_path / "made"
    path = folder / "s.db"
    feste.compute(FakeBackend().chat("x"), store=path)
    while_open = modes(folder)
    store.close()
    main(["store", "export", str(path), "--out", str(folder / "out.jsonl")])
    path.write_bytes(b"x" * 100 + path.read_bytes()[100:])
    salvage(path)
    after = modes(folder)

    assert {"s.db", "s.db-wal", "s.db-shm", "s.db.lock", "s.db.reserve"} <= set(while_open)
    assert set(while_open.values()) == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    folders = {name for name in after if (folder / name).is_dir()}
    assert len(folders) == 1  # the damaged files
    assert {after[name] for name in folders} == {0o700}
    assert {mode for name, mode in after.items() if name not in folders} == {0o600}
    assert "out.jsonl" in after


@pytest.mark.parametrize("end", ["", ".lock", ".reserve"])
def test_a_planted_link_is_not_followed(end: str, tmp_path: Path) -> None:
    """Neither for the store nor for what is put beside it: what the link leads to stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "s.db"
    path.with_name(f"s.db{end}").symlink_to(victim)
    with pytest.raises((JournalError, feste.errors.RunFailed)):
        feste.compute(FakeBackend().chat("x"), store=path)
    store.close()

    assert victim.read_text() == "mine"


def test_an_export_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """A link in the place of the file is refused; with ``--force`` it is the link that is replaced."""
    path, out, victim = tmp_path / "s.db", tmp_path / "out.jsonl", tmp_path / "victim"
    feste.compute(FakeBackend().chat("x"), store=path)
    store.close()
    victim.write_text("mine")
    out.symlink_to(victim)

    assert main(["store", "export", str(path), "--out", str(out)]) == 1
    assert main(["store", "export", str(path), "--out", str(out), "--force"]) == 0
    assert victim.read_text() == "mine"
    assert not out.is_symlink()
