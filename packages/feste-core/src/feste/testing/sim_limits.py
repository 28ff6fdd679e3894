"""The limits of a simulated provider: how much an account may send, and how a refusal says so.

`Limiter` is what `SimServer` itself uses. It has no clock of its own, so a test on simulated time
meets exactly the same limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from email.utils import formatdate
from typing import Literal

__all__ = ["Limiter", "Remaining", "ServerLimits", "Wait", "retry_after"]

Wait = Literal["seconds", "fraction", "milliseconds", "date", "long", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What a simulated provider allows one account for one model; the rest is answered 429.

    Quota flows into a bucket evenly. A request takes 1 of the requests, and of the tokens its
    prompt and the ``max_tokens`` of each answer; what it did not generate flows back afterwards.

    :param requests_per_minute: the requests; None for any number.
    :param tokens_per_minute: the tokens, read and generated; None for any number.
    :param concurrency: the requests at once; None for any number.
    :param bucket: the seconds of quota that an idle account saves up; it starts with as much.
    :param headers: whether replies tell the limits and what is left of them.
    :raises ValueError: if a number is not above 0.

    >>> ServerLimits(requests_per_minute=600, bucket=1).requests_per_minute
    600
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int | None = None
    bucket: float = 60.0
    headers: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "headers" and value is not None and not value > 0:
                raise ValueError(f"ServerLimits({field.name}={value!r}): it must be above 0")


@dataclass(frozen=True, slots=True)
class Remaining:
    """One limit as the headers of a reply tell it.

    :param limit: the quota of a minute.
    :param left: what may be sent at once.
    :param reset: the seconds until the bucket is full.
    """

    limit: float
    left: float
    reset: float


class Bucket:
    """One quota: `rate` flows in each second, up to `size`."""

    def __init__(self, per_minute: float, seconds: float, now: float) -> None:
        self.per_minute, self.rate = per_minute, per_minute / 60
        self.size = max(1.0, self.rate * seconds)
        self.level, self.at, self.taken = self.size, now, 0.0

    def fill(self, now: float) -> None:
        """Let flow in what is due."""
        self.level = min(self.size, self.level + self.rate * max(0.0, now - self.at))
        self.at = max(self.at, now)

    def wait(self, now: float, amount: float) -> float:
        """Return the seconds until an amount may be taken; more than fits needs a full bucket."""
        self.fill(now)
        short = min(amount, self.size) - self.level
        if short <= 1e-9 * self.size:  # sums of floats are not exact
            return 0.0
        return short / self.rate

    def take(self, amount: float) -> None:
        """Take an amount, also more than there is; a negative one is given back."""
        self.level -= amount
        self.taken += amount

    def remaining(self, now: float) -> Remaining:
        """Return the state for headers."""
        reset = self.wait(now, self.size)
        return Remaining(self.per_minute, max(0.0, self.level), reset)


class Limiter:
    """The limits of one account and model, at work.

    :param limits: the limits.
    :param now: the time, in seconds of any clock.

    >>> limiter = Limiter(ServerLimits(requests_per_minute=60, bucket=2))
    >>> [limiter.allow(10.0) for _ in range(3)]
    [0.0, 0.0, 1.0]
    >>> limiter.allow(11.0)
    0.0
    """

    def __init__(self, limits: ServerLimits, now: float = 0.0) -> None:
        self.concurrency = math.inf if limits.concurrency is None else limits.concurrency
        self.in_flight = 0
        self._requests, self._tokens = (
            None if rate is None else Bucket(rate, limits.bucket, now)
            for rate in (limits.requests_per_minute, limits.tokens_per_minute)
        )
        self._first: float | None = None
        self._last = now

    def allow(self, now: float, tokens: float = 0) -> float:
        """Admit a request, or say how long it would have to wait.

        :param now: the time in seconds.
        :param tokens: what it may use at most; more than fits into the bucket needs a full one.
        :returns: 0 if it is admitted, and `settle` must follow; else the seconds until it would
            be: infinite where it takes the end of another request.
        """
        self._first = now if self._first is None else self._first
        self._last = now
        if self.in_flight >= self.concurrency:
            return math.inf
        wait = 0.0
        if self._requests is not None:
            wait = self._requests.wait(now, 1)
        if self._tokens is not None:
            wait = max(wait, self._tokens.wait(now, tokens))
        if wait == 0:
            self.in_flight += 1
            if self._requests is not None:
                self._requests.take(1)
            if self._tokens is not None:
                self._tokens.take(tokens)
        return wait

    def settle(self, now: float, reserved: float = 0, used: float = 0) -> None:
        """End an admitted request.

        :param now: the time in seconds.
        :param reserved: the tokens that `allow` was told.
        :param used: the tokens that it used; the others are given back.
        """
        self.in_flight -= 1
        if self._tokens is not None:
            self._tokens.fill(now)
            self._tokens.take(used - reserved)

    def requests(self, now: float) -> Remaining | None:
        """Return what is left of the requests, or None without a limit.

        :param now: the time in seconds.
        """
        return None if self._requests is None else self._requests.remaining(now)

    def tokens(self, now: float) -> Remaining | None:
        """Return what is left of the tokens, or None without a limit.

        :param now: the time in seconds.
        """
        return None if self._tokens is None else self._tokens.remaining(now)

    def used(self) -> tuple[float, float, float, float]:
        """Return the requests taken and available, and the tokens taken and available.

        Available is what flowed in from the first request to the last, or a full bucket if that is
        more. So whoever also takes what was saved up at first takes more than is available. A limit
        that there is not counts 0.
        """
        seconds = self._last - self._first if self._first is not None else 0.0
        sums: list[float] = []
        for bucket in (self._requests, self._tokens):
            given = 0.0 if bucket is None else max(bucket.size, bucket.rate * seconds)
            sums += [0.0 if bucket is None else bucket.taken, given]
        return sums[0], sums[1], sums[2], sums[3]


def retry_after(spelling: Wait, seconds: float, now: float) -> dict[str, str]:
    """Return the headers that tell a client how long to wait.

    ``"long"`` is 2 minutes more than what is true; ``"none"``, or a time that is not known, tells
    nothing.

    :param spelling: how to say it; whole seconds and dates are rounded up.
    :param seconds: the seconds to wait.
    :param now: the time of day, in seconds since 1970.

    >>> retry_after("seconds", 0.2, 0), retry_after("milliseconds", 0.2, 0)
    ({'retry-after': '1'}, {'retry-after-ms': '200'})
    """
    if not math.isfinite(seconds):
        return {}
    match spelling:
        case "seconds":
            return {"retry-after": str(max(1, math.ceil(seconds)))}
        case "fraction":
            return {"retry-after": f"{math.ceil(seconds * 1000) / 1000:.3f}"}
        case "milliseconds":
            return {"retry-after-ms": str(math.ceil(seconds * 1000))}
        case "date":
            then = formatdate(math.ceil(now + seconds), usegmt=True)
            return {"date": formatdate(now, usegmt=True), "retry-after": then}
        case "long":
            return {"retry-after": str(120 + max(1, math.ceil(seconds)))}
        case "none":
            return {}
