"""Lets the disk under a program's store become full, and sees how far it had got."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from feste.store.opened import opened
from feste.store.writer import Writer

__all__ = ["limit", "noted"]

_noted: list[int] = []


def limit(how: Literal["pages", "size", "disk"], store: str, room: int = 0) -> None:
    """Open a store, and leave it little room to grow.

    :param how: by the ``"pages"`` of its file, by the ``"size"`` that the system allows to files, or
        by the ``"disk"``, which is small already.
    :param store: the store.
    :param room: how many bytes.
    """
    journal = opened(store)
    if how == "pages":
        ((pages,),) = journal.run(lambda conn: conn.execute("PRAGMA page_count").fetchall())
        most = f"PRAGMA max_page_count = {pages + room // 4096}"
        journal.run(lambda conn: conn.execute(most))
    elif how == "size":
        import resource  # not everywhere

        most_bytes = Path(f"{store}-wal").stat().st_size + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    fail = Writer._fail

    def failing(self: Writer, error: Exception) -> Any:
        assert self._lock is not None
        _noted.append(self._lock.acknowledged[0])
        return fail(self, error)

    Writer._fail = failing  # type: ignore[method-assign]


def noted() -> int | None:
    """Return the number of the last request that was noted when a write first failed; None if none."""
    return _noted[0] if _noted else None
