"""Let no fork happen while a thread is inside SQLite.

SQLite has locks of its own for the whole process. A child that is forked while another thread holds
one inherits it locked for ever, and hangs when it opens a store itself.
"""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

__all__ = ["fork_lock"]

_locks: WeakSet[threading.Lock] = WeakSet()
_held: list[threading.Lock] = []
_forking = threading.Lock()


def fork_lock() -> threading.Lock:
    """Make a lock for one thread to hold while it uses SQLite; a fork waits for it.

    >>> with fork_lock():
    ...     pass  # use SQLite
    """
    made = threading.Lock()
    with _forking:
        _locks.add(made)
    return made


def _hold() -> None:
    _forking.acquire()
    for lock in list(_locks):
        lock.acquire()
        _held.append(lock)


def _release() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)
