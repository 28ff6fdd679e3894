"""A circuit breaker: it notices that a backend is down, and lets one probe at a time through.

After ten failures in a row it opens; the probe that is answered closes it.
"""

from __future__ import annotations

import random
from typing import Any

from feste.errors import CallError

__all__ = ["Breaker"]

#: So many failures in a row open a breaker.
_ROW = 10
#: The seconds between probes: at first, and at most.
_FIRST, _LAST = 5.0, 60.0


class Breaker:
    """Whether a backend is up, and when to ask it again.

    >>> breaker = Breaker()
    >>> any(breaker.failed(1.0, random.Random(1)) for _ in range(9)), breaker.admits(1.0)
    (False, True)
    >>> breaker.failed(1.0, random.Random(1)), breaker.admits(5.9), breaker.admits(11.0)
    (True, False, True)
    """

    __slots__ = ("closed", "doubt", "failures", "next", "opened", "probe", "wait", "watch")

    def __init__(self) -> None:
        self.failures = 0
        #: When it opened, or None; and when it closed for the last time.
        self.opened: float | None = None
        self.closed = float("-inf")
        #: When a probe may be sent; and how long the next one waits at least, at most twice that.
        self.next = 0.0
        self.wait = _FIRST
        self.probe: Any = None
        #: A refusal of all calls that is not confirmed yet, or None.
        self.doubt: CallError | None = None
        #: The timer of the run that loses its patience first.
        self.watch: Any = None

    def admits(self, now: float) -> bool:
        """Return whether a request may be sent.

        :param now: the time in seconds on the brain's clock.
        """
        return self.opened is None or (self.probe is None and now >= self.next)

    def open(self, now: float) -> None:
        """Let one probe at a time through from now on.

        :param now: the time in seconds on the brain's clock.
        """
        if self.opened is None:
            self.opened, self.wait = now, _FIRST
        self.next = now

    def failed(self, now: float, rng: random.Random, *, probe: bool = False) -> bool:
        """Record a request that the backend did not answer; return whether the breaker opened.

        :param now: the time in seconds on the brain's clock.
        :param rng: the source of the jitter.
        :param probe: whether it was the probe.
        """
        self.failures += 1
        opens = self.opened is None and self.failures >= _ROW
        if opens:
            self.open(now)
        if opens or probe:  # what was sent before it opened says nothing new
            self.next = now + rng.uniform(self.wait, 2 * self.wait)
            self.wait = min(2 * self.wait, _LAST / 2)
            self.doubt = None  # it does not refuse: it is down
        return opens

    def worked(self, sent: float, now: float) -> None:
        """Record a request that was answered, if only by a refusal.

        :param sent: when it was sent: an answer to an older request closes no breaker.
        :param now: the time in seconds on the brain's clock.
        """
        if self.opened is None:
            self.failures = 0
        elif sent >= self.opened:
            self.failures, self.opened, self.closed, self.doubt = 0, None, now, None

    def shut(self, since: float, now: float) -> float:
        """Return for how many of the last seconds it was open.

        :param since: when these seconds begin.
        :param now: the time in seconds on the brain's clock.
        """
        if self.opened is not None:
            return now - max(since, self.opened)
        return max(0.0, self.closed - since)
