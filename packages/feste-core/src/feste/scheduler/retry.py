"""Whether a failed request is sent again, and when.

One layer owns retries: SDKs send once. Waits are drawn at random between zero and a bound that
doubles ("full jitter"), so that many callers who failed together do not come back together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from feste.errors import Ambiguous, CallError, RateLimited, Transient

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long.

    :param max_attempts: tries of one request in all, the first included.
    :param max_ambiguous: tries that may have been billed without an answer.
    :param max_elapsed: seconds since the first try after which none is begun.
    :param base: seconds that bound the first wait.
    :param cap: seconds that bound every wait, but for one that the provider asks for: no try comes
        before that.
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
        """Return the seconds to wait before the next try, or None for no further one.

        :param error: why the last try failed.
        :param attempt: how many tries there were.
        :param throttled: how many of them were refused for rate, before the last one.
        :param ambiguous: how many of them may have been billed.
        :param elapsed: seconds since the first try.
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
        # a throttled request was not served at all: it counts against time, not against tries
        if attempt - throttled >= self.max_attempts and not isinstance(error, RateLimited):
            return None
        wait = rng.uniform(0, min(self.cap, self.base * 2.0 ** min(attempt - 1, 16)))
        if error.retry_after is not None:
            wait = max(error.retry_after, wait)
        return wait if elapsed + wait <= self.max_elapsed else None
