"""Which threads may wait for a run.

A blocking call (``compute``, an eager call) parks its thread until the run is done. That is fine for
a user's own thread, inside a foreign event loop too, and for a thread of Feste's pool (the pool then
grows by one). It would stop Feste itself on one of its loops, in a backend's method, on the brain's
thread, in a hook or in a pass; and in a worker process there is no gate to go through.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from feste.errors import BlockingCallError, NestedRunError

__all__ = ["Role", "Waits", "become", "belong", "check", "here", "inside", "waiting"]

Role = Literal["", "brain", "loop", "backend", "hook", "pass", "pool", "worker"]

_NAMES = {
    "brain": "an inline task",
    "loop": "an async function on one of Feste's event loops",
    "backend": "a method of a backend",
    "hook": "an observer hook",
    "pass": "an optimization pass",
}


class Waits(Protocol):
    """A pool that is told when one of its threads or coroutines begins or ends to wait."""

    def waiting(self, more: int) -> None:
        """Hear of one more, or one less.

        :param more: +1 or -1.
        """


class _Here(threading.local):
    role: Role = ""
    pool: Waits | None = None


_here = _Here()


def belong(pool: Waits) -> None:
    """Say that the calling thread is one of a pool.

    :param pool: the pool.
    """
    _here.pool = pool


def become(role: Role) -> None:
    """Give every thread of this process a role: all of a worker process is a worker.

    :param role: the role of threads that are not ``inside`` another.
    """
    _Here.role = role


@contextmanager
def waiting(*, awaited: bool = False) -> Iterator[None]:
    """Wait for a run for the block; the thread's pool grows by one as long.

    :param awaited: the loop that runs on this thread goes on meanwhile.
    :raises BlockingCallError: where nobody may wait; NestedRunError in a worker process.
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


def here() -> Role:
    """Return the role of the calling thread."""
    return _here.role


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
    """Refuse a blocking call where nobody may wait.

    :param awaited: as for :func:`waiting`; on Feste's own loops that is the way to wait.
    :raises BlockingCallError: on Feste's loops, on the brain, in a hook or a pass.
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
            "feste.acompute(...)` in async code, or return the node"
        )


def _forget() -> None:
    """A forked child has one thread, its main one, whatever that was to the parent."""
    _here.pool = None
    if _here.role != "worker":
        _here.role = ""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
