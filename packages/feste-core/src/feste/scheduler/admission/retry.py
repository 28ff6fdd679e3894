"""Decide whether and when a failed request is sent again.

Only this layer retries: SDKs send once. Waits are random between zero and a bound that doubles
("full jitter"), so that callers who failed together do not return together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from feste.errors import Ambiguous, CallError, RateLimited, Transient

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The limits on attempts and waits.

    :param max_attempts: attempts of one request in total, the first included.
    :param max_ambiguous: attempts that may have been billed without a response.
    :param max_elapsed: seconds since the first attempt after which no other is started.
    :param base: the bound of the first wait in seconds.
    :param cap: the bound of every wait in seconds, except that a longer wait which the provider
        asks for is kept.
    """

    max_attempts: int = 6
    max_ambiguous: int = 2
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
        elapsed: float,
        rng: random.Random,
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or None if there is none.

        :param error: why the last attempt failed.
        :param attempt: the number of attempts so far.
        :param throttled: how many of them were refused for rate, not counting the last one.
        :param ambiguous: how many of them may have been billed.
        :param elapsed: seconds since the first attempt.
        :param rng: the source of the jitter.

        >>> from feste.errors import AuthFailed, RateLimited
        >>> told = {"attempt": 1, "ambiguous": 0, "elapsed": 0.0, "rng": random.Random(1)}
        >>> RetryPolicy().delay(AuthFailed(), **told) is None
        True
        >>> RetryPolicy().delay(RateLimited(retry_after=7.0), **told)
        7.0
        """
        if isinstance(error, Ambiguous):
            if ambiguous >= self.max_ambiguous:
                return None
        elif not isinstance(error, Transient):
            return None
        # a throttled request was not served at all: max_elapsed bounds it, not max_attempts
        if attempt - throttled >= self.max_attempts and not isinstance(error, RateLimited):
            return None
        wait = rng.uniform(0, min(self.cap, self.base * 2.0 ** min(attempt - 1, 16)))
        if error.retry_after is not None:
            wait = max(error.retry_after, wait)
        return wait if elapsed + wait <= self.max_elapsed else None
