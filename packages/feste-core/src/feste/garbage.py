"""Pause Python's search for reference cycles while many objects are made that all stay."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_collection"]

#: Held by the thread that has paused the search. Nobody waits for it.
_is_mine = threading.Lock()


def _resume_in_child() -> None:
    global _is_mine
    if _is_mine.locked():  # the thread that would end the pause is not in this process
        _is_mine = threading.Lock()
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_resume_in_child)


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the search, which takes more time than the work itself: it looks at all objects again.

    The switch is one for all threads: whoever turns it off turns it on again, and nobody else does.

    >>> with no_collection():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    mine = _is_mine
    if not gc.isenabled() or not mine.acquire(blocking=False):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        mine.release()
