"""Let a forked child inherit nothing of SQLite.

SQLite has locks and lists of open files of its own for the whole process. A child that is forked
while another thread holds a lock inherits it locked for ever. And it believes that it holds the files
open, which the system does not know: another program that closes a store then deletes the log that
the child writes. So a fork waits until no thread is inside SQLite, and connections are closed before
it; they are opened again when they are next used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakMethod

__all__ = ["fork_lock"]

_guards: WeakKeyDictionary[threading.Lock, WeakMethod[Callable[[], None]]] = WeakKeyDictionary()
_held: list[threading.Lock] = []
_forking = threading.Lock()


def fork_lock(park: Callable[[], None]) -> threading.Lock:
    """Make a lock for one thread to hold while it uses SQLite; a fork waits for it.

    :param park: a method that closes the connection; called before a fork, on the forking thread.
    """
    made = threading.Lock()
    with _forking:
        _guards[made] = WeakMethod(park)
    return made


def _hold() -> None:
    _forking.acquire()
    for lock, method in list(_guards.items()):
        lock.acquire()
        _held.append(lock)
        park = method()
        if park is not None:
            park()


def _release() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)
