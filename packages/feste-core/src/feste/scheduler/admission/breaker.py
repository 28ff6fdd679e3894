"""A circuit breaker: it notices that a backend is down, and lets one probe at a time through.

It opens when the last ten requests sent have failed; the probe that is answered closes it.

Errors come at once, answers take seconds. So requests are taken in the order in which they were sent,
not in that in which they end: an answer speaks for all that was sent until then, and what is under way
with the failures speaks against them, unless these are a third of it. Opened wrongly, it closes with the
first answer to what was sent with the failures.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from feste.errors import CallError

__all__ = ["Breaker"]

#: So many failures in a row open a breaker, if they are such a part of what was sent since the first.
_ROW, _PART = 10, 1 / 3
#: The seconds between probes: at first, and at most.
_FIRST, _LAST = 5.0, 60.0


class Breaker:
    """Whether a backend is up, and when to ask it again.

    >>> breaker, rng = Breaker(), random.Random(1)
    >>> any(breaker.failed(0.5, 1.0, rng, lambda since: 0) for _ in range(9)), breaker.admits(1.0)
    (False, True)
    >>> breaker.failed(0.5, 1.0, rng, lambda since: 99), breaker.failed(0.5, 1.0, rng, lambda since: 9)
    (False, True)
    >>> breaker.admits(5.9), breaker.admits(11.0)
    (False, True)
    """

    __slots__ = ("closed", "doubt", "next", "opened", "probe", "row", "since", "wait", "watch")

    def __init__(self) -> None:
        #: When the requests were sent that have failed since one was answered.
        self.row: list[float] = []
        #: When it opened, or None; and when it closed for the last time.
        self.opened: float | None = None
        #: An answer to what was sent from then on closes it.
        self.since = 0.0
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
            self.opened, self.since, self.wait = now, now, _FIRST
        self.next = now

    def failed(
        self,
        sent: float,
        now: float,
        rng: random.Random,
        under_way: Callable[[float], int],
        *,
        probe: bool = False,
    ) -> bool:
        """Record a request that the backend did not answer; return whether the breaker opened.

        :param sent: when it was sent.
        :param now: the time in seconds on the brain's clock.
        :param rng: the source of the jitter.
        :param under_way: returns how many requests are under way that were sent since a time.
        :param probe: whether it was the probe.
        """
        self.row.append(sent)
        opens = self.opened is None and self._is_down(under_way)
        if opens:
            self.open(now)
            self.since = min(self.row)
        if opens or probe:  # what was sent before it opened says nothing new
            self.next = now + rng.uniform(self.wait, 2 * self.wait)
            self.wait = min(2 * self.wait, _LAST / 2)
            self.doubt = None  # it does not refuse: it is down
        return opens

    def _is_down(self, under_way: Callable[[float], int]) -> bool:
        if len(self.row) < _ROW:
            return False
        row = sorted(self.row)
        for since in (row[-_ROW], row[0]):  # all at once, or each after some time
            failed = len(row) - bisect_left(row, since)
            if failed >= _PART * (failed + under_way(since)):
                return True
        return False

    def worked(self, sent: float, now: float) -> None:
        """Record a request that was answered, if only by a refusal.

        :param sent: when it was sent: an answer to an older request closes no breaker.
        :param now: the time in seconds on the brain's clock.
        """
        if self.opened is None:
            self.row = [each for each in self.row if each > sent]
        elif sent >= self.since:
            self.row, self.opened, self.closed, self.doubt = [], None, now, None

    def shut(self, since: float, now: float) -> float:
        """Return for how many of the last seconds it was open.

        :param since: when these seconds begin.
        :param now: the time in seconds on the brain's clock.
        """
        if self.opened is not None:
            return now - max(since, self.opened)
        return max(0.0, self.closed - since)
