"""How many requests may be in flight: slow start, then additive increase, and halving.

See Chiu and Jain, "Analysis of the increase and decrease algorithms for congestion avoidance", 1989,
and for slow start Jacobson, "Congestion avoidance and control", 1988.
"""

from __future__ import annotations

import math

from feste.backend.limits import CEILING, START

__all__ = ["Slots"]

#: A server is busy when its answers take this many times as long as they did at best.
_SLOWER = 2.0
#: The fewest answers of a round trip that say how long answers take.
_SAMPLE = 8
#: The seconds that requests are taken to need while none has been answered.
_FIRST_SECONDS = 2.0
#: The slots for a known rate, in those that it fills on average: latencies differ.
_SPARE = 1.5


class Slots:
    """The slots of a gate.

    >>> slots = Slots()
    >>> slots.pressed = True
    >>> for _ in range(10):
    ...     slots.answered(sent=0.0, now=1.0, tokens=20)
    >>> slots.limit  # of the next round trip, if requests waited for a slot
    20.0
    """

    def __init__(self) -> None:
        self.ceiling = CEILING
        self.limit = float(START)
        #: Whether requests had to wait for a slot in this round trip, and in the one before; if none
        #: had, more slots would prove nothing.
        self.pressed = self._was_pressed = False
        #: The mean seconds of a request, or None.
        self.seconds: float | None = None
        self._slow_start = True
        self._halved_at = -math.inf
        self._round = _Round(-math.inf)
        self._best: tuple[float, float] = (math.inf, math.inf)

    def bound(self, concurrency: int | None) -> None:
        """Use the user's limit, or start to probe for one.

        :param concurrency: the user's limit, or None.
        """
        never_refused = self._halved_at == -math.inf
        if concurrency is not None:
            self.limit = float(concurrency) if never_refused else min(self.limit, concurrency)
        elif self.ceiling < CEILING or self.limit > CEILING:  # the client with a limit is gone
            self.limit = float(START) if never_refused else min(self.limit, START)
        self.ceiling = concurrency or CEILING
        self._slow_start = never_refused and concurrency is None

    def count(self, rate: float) -> int:
        """Return how many requests may be in flight.

        Where the rate is known, the rate is what holds requests back, and there are enough slots for
        it (Little's law).

        :param rate: the requests a second that the account takes; infinite if that is not known.
        """
        limit = self.limit
        if rate < math.inf:
            limit = max(limit, rate * max(_FIRST_SECONDS, _SPARE * (self.seconds or 0.0)))
        return int(min(limit, self.ceiling))

    def answered(self, sent: float, now: float, tokens: int | None) -> None:
        """Take account of a request that was served.

        :param sent: the time at which it was sent, in seconds.
        :param now: the time.
        :param tokens: the tokens that it generated, or None.
        """
        took = now - sent
        self.seconds = took if self.seconds is None else self.seconds + 0.1 * (took - self.seconds)
        if sent > self._halved_at and (self.pressed or self._was_pressed):
            step = 1.0 if self._slow_start else 1.0 / self.limit
            self.limit = min(self.ceiling, self.limit + step)
        if sent >= self._round.began:
            self._end_round(now)
        self._round.add(took, tokens)

    def refused(self, sent: float, now: float) -> None:
        """Take account of a request that was refused for rate.

        :param sent: the time at which it was sent, in seconds.
        :param now: the time.
        """
        self._slow_start = False
        if sent > self._halved_at:  # one cut for all requests that were in flight together
            self._halved_at = now
            self.limit = max(1.0, self.limit / 2)

    def _end_round(self, now: float) -> None:
        """Compare a round trip with the best one, and start the next."""
        last, self._round = self._round, _Round(now)
        self._was_pressed, self.pressed = self.pressed, False
        if last.answers >= _SAMPLE:
            each, a_token = last.took / last.answers, last.took / max(1, last.tokens)
            best = self._best
            # both: a mix of longer answers is no sign, nor is one of shorter ones
            if each > _SLOWER * best[0] and (not last.tokens or a_token > _SLOWER * best[1]):
                self._slow_start = False
            self._best = (min(best[0], each), min(best[1], a_token) if last.tokens else best[1])


class _Round:
    """What was answered in one round trip."""

    __slots__ = ("answers", "began", "tokens", "took")

    def __init__(self, began: float) -> None:
        self.began = began
        self.answers = 0
        self.took = 0.0
        self.tokens = 0

    def add(self, took: float, tokens: int | None) -> None:
        self.answers += 1
        self.took += took
        self.tokens += tokens or 0
