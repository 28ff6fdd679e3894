"""Decide which threads may block while they wait for a run.

A blocking call (``compute``, an eager call) is allowed on a user's own thread, even inside a
foreign event loop, and on a pool thread, which one extra thread then replaces. It would stop Feste
itself on Feste's loops, in a backend's method, on the brain's thread, in a hook or in an
optimization; and a worker process has no gate.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from feste.errors import BlockingCallError, NestedRunError

__all__ = ["Role", "Waits", "become", "belong", "check", "in_loop", "inside", "waiting"]

Role = Literal["", "brain", "loop", "backend", "hook", "pass", "pool", "worker"]

_NAMES = {
    "brain": "an inline task",
    "loop": "an async function on one of Feste's event loops",
    "backend": "a method of a backend",
    "hook": "an observer hook",
    "pass": "an optimization pass",
}


class Waits(Protocol):
    """A pool that is notified when one of its threads or coroutines starts or stops waiting."""

    def waiting(self, more: int) -> None:
        """Adjust the pool's size by the number of waiting threads or coroutines.

        :param more: +1 or -1.
        """


class _Here(threading.local):
    role: Role = ""
    pool: Waits | None = None


_here = _Here()


def belong(pool: Waits) -> None:
    """Register the calling thread as a member of a pool.

    :param pool: the pool.
    """
    _here.pool = pool


def become(role: Role) -> None:
    """Give all threads of this process a role; used in worker processes.

    :param role: the role of threads that :func:`inside` gives no other.
    """
    _Here.role = role


@contextmanager
def waiting(*, awaited: bool = False) -> Iterator[None]:
    """Mark the calling thread as waiting for a run; its pool grows by one during the block.

    :param awaited: True if the thread's event loop keeps running meanwhile.
    :raises BlockingCallError: where waiting is not allowed; NestedRunError in a worker process.
    """
    check(awaited=awaited)
    pool = _here.pool
    if pool is not None:
        pool.waiting(1)
    try:
        yield
    finally:
        if pool is not None:
            pool.waiting(-1)


@contextmanager
def inside(role: Role) -> Iterator[None]:
    """Give the calling thread a role for a block.

    :param role: the role.
    """
    before, _here.role = _here.role, role
    try:
        yield
    finally:
        _here.role = before


def check(*, awaited: bool = False) -> None:
    """Refuse a blocking call where waiting is not allowed.

    :param awaited: as for :func:`waiting`; Feste's own loops allow only this way of waiting.
    :raises BlockingCallError: on Feste's loops or the brain, in a hook or an optimization.
    :raises NestedRunError: in a worker process.
    """
    role = _here.role
    if role == "worker":
        raise NestedRunError(
            "a run inside a worker process would go round the limits of your account: return the "
            "node from the task instead, and Feste runs it where the gate is"
        )
    if role in _NAMES and not (awaited and role == "loop"):
        raise BlockingCallError(
            f"a blocking call in {_NAMES[role]} would stop Feste itself: use `await "
            "feste.acompute(...)` or `async for` in async code, or return the node"
        )


def in_loop() -> bool:
    """Return whether an event loop runs on the calling thread, so that waiting here blocks it."""
    asyncio = sys.modules.get("asyncio")  # where it was never imported, no loop runs
    return asyncio is not None and asyncio._get_running_loop() is not None


def _forget() -> None:
    """Reset the main thread of a forked child, whatever role it had in the parent."""
    _here.pool = None
    if _here.role != "worker":
        _here.role = ""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
