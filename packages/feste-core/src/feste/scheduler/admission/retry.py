"""Decide whether and when a failed request is sent again.

Only this layer retries: SDKs send once. Waits are random between zero and a bound that doubles
("full jitter"), so that callers who failed together do not return together. A budget for each
backend keeps retries a small share of all requests: an empty one delays them, and fails none.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from feste.errors import (
    Ambiguous,
    AuthFailed,
    CallError,
    CountMismatch,
    MalformedResponse,
    ModelNotFound,
    OutputMismatch,
    QuotaExhausted,
    RateLimited,
    Transient,
    WorkerLost,
)

__all__ = ["REFUSED_ALL", "RetryBudget", "RetryPolicy", "is_ambiguous", "is_unreadable"]

#: Refusals that concern all calls of an account, or of a model, and not one request.
REFUSED_ALL = (AuthFailed, QuotaExhausted, ModelNotFound)


def is_unreadable(error: BaseException) -> bool:
    """Return whether an answer came that is not what the endpoint promises, so that a new one may be.

    One of the wrong count is: that of a list sends its calls one by one before it comes to this.

    :param error: why a call failed.
    """
    unreadable = isinstance(error, (MalformedResponse, CountMismatch))
    return unreadable and not isinstance(error, OutputMismatch)


def is_ambiguous(error: BaseException) -> bool:
    """Return whether a request brought no answer for a reason that lies with its provider or the network.

    It may have been billed. So may one whose worker process died, which tells nothing of the provider
    and counts by itself.

    :param error: why a call failed.
    """
    return isinstance(error, Ambiguous) and not isinstance(error, WorkerLost)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The limits on attempts and waits.

    :param max_attempts: attempts of one request in total, the first included.
    :param max_ambiguous: attempts that may have been billed without a response.
    :param max_lost: attempts whose worker process died, which is no fault of the provider: so they do
        not count as ambiguous.
    :param max_unreadable: attempts that were billed, and whose answer cannot be read.
    :param max_elapsed: seconds since the first attempt after which no other is started; if the last
        one was refused for rate, the run's patience holds where it is longer.
    :param base: the bound of the first wait in seconds.
    :param cap: the bound of every wait in seconds, except that a longer wait which the provider
        asks for is kept.
    """

    max_attempts: int = 6
    max_ambiguous: int = 2
    max_lost: int = 4
    max_unreadable: int = 2
    max_elapsed: float = 900.0
    base: float = 1.0
    cap: float = 60.0

    def delay(
        self,
        error: CallError,
        *,
        attempt: int,
        throttled: int = 0,
        ambiguous: int,
        lost: int = 0,
        unreadable: int = 0,
        elapsed: float,
        patience: float | None = 0.0,
        rng: random.Random,
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or None if there is none.

        A refusal that concerns all calls is sent again here; who asks decides how often.

        :param error: why the last attempt failed.
        :param attempt: the number of attempts so far.
        :param throttled: how many of them do not count, the last one left out: they were refused for
            rate, or asked whether a backend that was down is up again.
        :param ambiguous: how many of them may have been billed.
        :param lost: how many of them died with their worker.
        :param unreadable: how many of them brought an answer that cannot be read.
        :param elapsed: seconds since the first attempt.
        :param patience: seconds that its run waits for a backend that serves nobody; None means for ever.
        :param rng: the source of the jitter.

        >>> from feste.errors import InvalidRequest, RateLimited
        >>> told = {"attempt": 1, "ambiguous": 0, "elapsed": 0.0, "rng": random.Random(1)}
        >>> RetryPolicy().delay(InvalidRequest(), **told) is None
        True
        >>> RetryPolicy().delay(RateLimited(retry_after=7.0), **told)
        7.0
        """
        if isinstance(error, WorkerLost):
            if lost >= self.max_lost:
                return None
        elif is_ambiguous(error):
            if ambiguous >= self.max_ambiguous:
                return None
        elif is_unreadable(error):
            if unreadable >= self.max_unreadable:
                return None
        elif not isinstance(error, (Transient, *REFUSED_ALL)):
            return None
        # a throttled request was not served at all: time bounds it, not max_attempts
        longest = self.max_elapsed
        if isinstance(error, RateLimited):
            longest = math.inf if patience is None else max(longest, patience)
        elif attempt - throttled >= self.max_attempts:
            return None
        wait = rng.uniform(0, min(self.cap, self.base * 2.0 ** min(attempt - 1, 16)))
        if error.retry_after is not None:
            wait = max(error.retry_after, wait)
        return wait if elapsed + wait <= longest else None


class RetryBudget:
    """The tokens that pay for retries to one backend.

    A retry costs 1 token, and :attr:`AMBIGUOUS` if the request before it may have been billed, unless
    its worker died, which tells nothing of the backend. An answer gives 0.1 back, and time 5 a second,
    up to 100.

    >>> budget = RetryBudget()
    >>> [budget.take(50.0, now=0.0) for _ in range(3)]
    [0.0, 0.0, 10.0]
    """

    FULL = 100.0
    REFUND = 0.1
    PER_SECOND = 5.0
    AMBIGUOUS = 5.0

    __slots__ = ("_at", "_tokens")

    def __init__(self) -> None:
        self._tokens = self.FULL
        self._at = 0.0

    def take(self, cost: float, now: float) -> float:
        """Take tokens, on credit if need be; return the seconds until they are there.

        :param cost: how many.
        :param now: the time in seconds on the brain's clock.
        """
        gained = max(0.0, now - self._at) * self.PER_SECOND
        self._tokens = min(self.FULL, self._tokens + gained) - cost
        self._at = now
        return max(0.0, -self._tokens / self.PER_SECOND)

    def refund(self) -> None:
        """Give a part of a token back, for an answer that came."""
        self._tokens = min(self.FULL, self._tokens + self.REFUND)
