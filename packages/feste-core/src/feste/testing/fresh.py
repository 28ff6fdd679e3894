"""Begin a test as a new process would."""

from __future__ import annotations

from feste import draw
from feste.store.opened import forget_claims

__all__ = ["fresh_draws"]


def fresh_draws() -> None:
    """Count draws from 0, and forget which stored answers were taken, as in a new process.

    Stores and caches are closed; the next run opens them again.

    >>> from feste.testing import FakeBackend
    >>> fresh_draws()
    >>> first = FakeBackend().chat("Name a fruit.").compute()
    >>> fresh_draws()
    >>> FakeBackend().chat("Name a fruit.").compute() == first
    True
    """
    forget_claims()
    draw.forget()
