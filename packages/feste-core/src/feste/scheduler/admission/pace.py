"""Learn from refusals at which rate a server accepts requests, where nothing states it.

Whenever a server with a token bucket refuses, its bucket is empty. So between two refusals it has
accepted what came into the bucket meanwhile: the rate times the time, give or take one. If the bucket
was full in between, it has accepted less. So each pair of refusals bounds the rate from below, and
from above as long as enough is sent. From there the pace grows, slowly at first, until the next
refusal.
"""

from __future__ import annotations

import bisect
import math
from collections import deque

__all__ = ["Pace"]

#: Seconds between two refusals that make a pair.
_APART = 0.5
#: How many refusals are remembered, and for how many seconds.
_MOST, _LONGEST = 32, 60.0
#: By how much the pace grows in a second: at least, at first, and at most. The nearer the pace is to
#: what is known to be accepted, the less.
_LEAST, _GROWTH, _FASTEST, _UNSURE = 0.004, 0.04, 0.1, 0.1
#: What a server accepted within this many seconds until it first refused is taken for what it
#: accepts in that time: most hold no less, and if it holds more, the next refusals show it.
_SECOND = 1.0
#: It grows in steps of so many seconds, so that what waits for its time need not look up often.
_STEP = 1.0
#: Without refusals for this many seconds its growth doubles.
_QUIET = 10.0
#: However much is refused, the server is asked so many times a second, to see when it accepts again.
_SLOWEST = 1 / 60
#: What is left of a pace that turned out to be too fast.
_CUT = 0.9


class Pace:
    """The pace of a gate in requests a second; infinite until the first refusals."""

    def __init__(self) -> None:
        self.rate = math.inf
        self._growth = _GROWTH
        self._paced_since = math.inf
        self._cut_at = -math.inf
        self._grown_at = -math.inf
        self._quiet_since = -math.inf
        #: Which requests were refused, by their numbers in the order of sending.
        self._refused: list[int] = []
        #: Some of them: when it was sent, and its number.
        self._refusals: deque[tuple[float, int]] = deque(maxlen=_MOST)
        #: Moments before the first refusals: the time, and how many were sent until then.
        self._sent: deque[tuple[float, int]] = deque()

    def sends(self, number: int, now: float) -> None:
        """Take account of a request that is sent.

        :param number: how many were sent before.
        :param now: the time in seconds.
        """
        if self.rate == math.inf and (not self._sent or now - self._sent[-1][0] >= _SECOND / 10):
            self._sent.append((now, number))
            while self._sent[0][0] < now - 2 * _SECOND:
                self._sent.popleft()

    def refused(self, sent: float, number: int, now: float) -> None:
        """Take account of a request that was refused for rate.

        :param sent: the time at which it was sent, in seconds.
        :param number: how many were sent until then, with this one.
        :param now: the time.
        """
        bisect.insort(self._refused, number)
        if len(self._refused) > 1:  # a single one proves nothing
            least, most = self._bounds(sent, number)
            pace = self.rate
            if sent > self._cut_at:  # one cut for all requests that were in flight together
                self._cut_at = self._grown_at = self._quiet_since = now
                self._paced_since = min(self._paced_since, now)
                pace *= _CUT
            if least == 0.0 and most == math.inf and self.rate == math.inf:
                pace = self._first(sent, number)
            self.rate = min(self.rate, max(least, min(pace, most), _SLOWEST))
            self._growth = min(_GROWTH, max(_LEAST, _UNSURE * (1 - least / self.rate)))
        if not self._refusals or sent - self._refusals[-1][0] >= _APART:
            self._refusals.append((sent, number))
            del self._refused[: bisect.bisect_left(self._refused, self._refusals[0][1])]

    def _bounds(self, sent: float, number: int) -> tuple[float, float]:
        """Return between which rates the server accepts, as its refusals until now show."""
        least, most = 0.0, math.inf
        for at, before in self._refusals:
            seconds = sent - at
            if _APART <= seconds <= _LONGEST:
                accepted = self._accepted(before, number)
                least = max(least, (accepted - 1) / seconds)
                if at >= self._paced_since:  # what is not paced comes in bursts, with idle times
                    most = min(most, (accepted + 1) / seconds)
        return least, most

    def _first(self, sent: float, number: int) -> float:
        """Return what the server had accepted in the second before its first refusals."""
        before = next((n for at, n in self._sent if at >= sent - _SECOND), number - 1)
        return max(1.0, float(self._accepted(before, number))) / _SECOND

    def _accepted(self, before: int, number: int) -> int:
        """Return how many were accepted of those after one and until another."""
        refused = bisect.bisect_right(self._refused, number)
        return number - before - (refused - bisect.bisect_right(self._refused, before))

    def grow(self, now: float) -> None:
        """Grow; to be called while requests wait for their pace.

        :param now: the time in seconds.
        """
        if self.rate == math.inf:
            return
        if now - self._grown_at < _STEP:
            return
        self._grown_at = now
        if now - self._quiet_since > _QUIET:
            self._quiet_since = now
            self._growth = min(_FASTEST, 2 * self._growth)
        self.rate *= 1 + self._growth * _STEP
