"""The stores that this process has open, by path: one journal for each, however many runs use it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from feste.store.claims import Claims
from feste.store.journal import Journal
from feste.store.opening import identity

__all__ = ["close", "forget_claims", "opened"]

_journals: dict[tuple[Path, bool], Journal] = {}
#: Which draws took which answers of a file; kept while the process lives.
_claims: dict[tuple[Path, tuple[int, ...]], Claims] = {}
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
    name = (_resolved(path), read_only)
    with _lock:
        journal = _journals.get(name)
        if journal is not None and not journal.is_current:
            journal.close()
            del _journals[name]
            journal = None
        if journal is None:
            claims = _claims_of(name[0])
            journal = Journal(name[0], wait=wait, read_only=read_only, claims=claims, start=False)
            _journals[name] = journal  # before it starts: an interrupt must not forget it
        journal.start()
    journal.open()
    _claims[name[0], identity(name[0])] = journal.claims  # a deleted file may have had the same
    return journal


def _resolved(path: str | Path) -> Path:
    given = Path(os.path.abspath(os.path.expanduser(path)))
    return given.parent.resolve() / given.name


def _claims_of(path: Path) -> Claims | None:
    """Return what draws of this process took from a file that was open before."""
    try:
        return _claims.get((path, identity(path)))
    except OSError:
        return None


def close(path: str | Path | None = None) -> None:
    """Close a store, so that another process may write it; the next run opens it again.

    :param path: the file, or None for all.

    >>> close("no-such.db")
    """
    given = None if path is None else _resolved(path)
    with _lock:
        for name in list(_journals):
            if given is None or name[0] == given:
                _journals[name].close()
                del _journals[name]  # not before: an interrupt must not forget it


def forget_claims() -> None:
    """Close all stores, and forget which answers draws of this process have taken."""
    close()
    _claims.clear()


def _forget() -> None:
    """Make a forked child open its own: it must neither use nor close its parent's connections."""
    global _lock
    _inherited.append(dict(_journals))
    _journals.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
