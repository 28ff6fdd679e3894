"""The stores that this process has open, by path: one journal for each, however many runs use it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from feste.store.claims import Claims
from feste.store.journal import Journal

__all__ = ["close", "forget_claims", "opened"]

_journals: dict[tuple[Path, bool], Journal] = {}
_claims: dict[tuple[Path, tuple[int, int]], Claims] = {}
_lock = threading.Lock()
_inherited: list[Any] = []


def opened(path: str | Path, *, wait: float = 0.0, read_only: bool = False) -> Journal:
    """Return the journal of a store; open it on first use.

    It stays open until the process ends or :func:`close` is called. One that failed, or whose file
    was removed, is opened anew.

    :param path: the file.
    :param wait: seconds to wait for another process that is writing it.
    :param read_only: whether nothing is written.
    :raises JournalError: if it cannot be used.
    """
    given = Path(os.path.abspath(path))
    name = (given.parent.resolve() / given.name, read_only)
    with _lock:
        journal = _journals.get(name)
        if journal is not None and not journal.is_current:
            del _journals[name]
            journal.close()
            journal = None
        if journal is None:
            journal = Journal(name[0], wait=wait, read_only=read_only, claims=_claims_of(name[0]))
            _journals[name] = journal
            _claims[name[0], journal.file] = journal.claims
        return journal


def _claims_of(path: Path) -> Claims | None:
    """Return what draws of this process took from a file that was open before."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _claims.get((path, (status.st_dev, status.st_ino)))


def forget_claims(path: str | Path) -> None:
    """Forget which draws took which answers: after a purge the numbers of answers are used again.

    :param path: the file.
    """
    given = Path(os.path.abspath(path))
    with _lock:
        for known in [
            known for known in _claims if known[0] == given.parent.resolve() / given.name
        ]:
            del _claims[known]


def close(path: str | Path | None = None) -> None:
    """Close a store, so that another process may write it; the next run opens it again.

    :param path: the file, or None for all.

    >>> close("no-such.db")
    """
    given = None if path is None else Path(os.path.abspath(path))
    with _lock:
        for name in list(_journals):
            if given is None or name[0] == given.parent.resolve() / given.name:
                _journals.pop(name).close()


def _forget() -> None:
    """Make a forked child open its own: it must neither use nor close its parent's connections."""
    global _lock
    _inherited.append(dict(_journals))
    _journals.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
