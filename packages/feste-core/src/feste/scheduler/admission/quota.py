"""Token buckets: how many requests, and how many tokens of text, may be sent by when.

A bucket is filled at a steady rate and holds little, so that what is sent is spread evenly: many
providers count by the second what they state by the minute.
"""

from __future__ import annotations

import math

from feste.backend import Request, Usage

__all__ = ["Bucket", "Costs"]

#: The seconds of its rate that a bucket holds. A provider's own may hold no more than one second,
#: and requests do not arrive as evenly as they are sent.
_HOLDS = 0.5
#: Rounding must not keep a request waiting for a hundred-millionth of itself.
_NEARLY = 1e-6


class Bucket:
    """A bucket of requests or of tokens; it holds one at least.

    >>> bucket = Bucket()
    >>> bucket.allow(2.0, now=0.0)  # a second
    >>> bucket.take(1.0)
    >>> bucket.wait(1.0, now=0.0), bucket.wait(1.0, now=0.5)
    (0.5, 0.0)
    """

    __slots__ = ("at", "capacity", "given", "level", "rate", "taken", "told_by")

    def __init__(self) -> None:
        self.rate = math.inf
        self.capacity = math.inf
        self.level = math.inf
        self.at = -math.inf
        #: All that was ever taken, less what was given back.
        self.taken = 0.0
        #: What was given back of late; it is forgotten at the rate.
        self.given = 0.0
        #: The number of the last request whose answer told the level.
        self.told_by = 0

    def room(self, each: float, now: float) -> float:
        """Return how many times an amount may be taken at once.

        :param each: the amount.
        :param now: the time in seconds.
        """
        if self.rate == math.inf:
            return math.inf
        if self.wait(each, now):
            return 0.0
        return max(1.0, self.level / each) if each else math.inf

    def allow(self, rate: float, now: float) -> None:
        """Set the rate.

        :param rate: how many a second; infinite for no limit.
        :param now: the time in seconds.
        """
        if rate == self.rate:
            return
        self.fill(now)
        self.rate, self.at = rate, now
        self.capacity = max(1.0, _HOLDS * rate)
        self.level = min(self.level, self.capacity) if rate < math.inf else math.inf

    def fill(self, now: float) -> None:
        """Add what has come since the last time.

        :param now: the time in seconds.
        """
        if now > self.at and self.rate < math.inf:
            came = self.rate * (now - self.at)
            self.level = min(self.capacity, self.level + came)
            self.given = max(0.0, self.given - came)
            self.at = now

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until an amount may be taken, 0 for at once.

        An amount that is more than the bucket holds may be taken from a full one, which then is in
        debt.

        :param amount: the amount.
        :param now: the time in seconds.
        """
        if self.rate == math.inf:
            return 0.0
        self.fill(now)
        missing = min(amount, self.capacity) - self.level
        return missing / self.rate if missing > _NEARLY * self.capacity else 0.0

    def take(self, amount: float) -> None:
        """Take an amount out.

        :param amount: the amount.
        """
        self.taken += amount
        self.level -= amount

    def give_back(self, amount: float, number: int) -> None:
        """Give back what a request did not need.

        :param amount: the amount; negative if it needed more.
        :param number: the request's number. If the level was told by the answer to a later one, that
            is in it already.
        """
        self.taken -= amount
        if number <= self.told_by:
            return
        debt = max(0.0, -self.level)
        if amount > debt and self.rate < math.inf:  # what was not used in time is gone by now
            amount = debt + min(amount - debt, max(0.0, self.capacity - self.given))
            self.given += amount - debt
        self.level = min(self.capacity, self.level + amount)

    def lower(self, level: float, number: int, now: float) -> None:
        """Lower the level to one that is known.

        :param level: the level.
        :param number: the number of the request whose answer tells it.
        :param now: the time in seconds.
        """
        self.fill(now)
        if level < self.level and self.rate < math.inf:
            self.level = level
            self.told_by = max(self.told_by, number)


class Costs:
    """What requests cost in tokens, learnt from what providers have counted."""

    __slots__ = ("_known", "_scale", "typical")

    #: How much the last answer counts.
    _SHARE = 0.1
    #: A little more is reserved than an answer has on average; what is too much comes back.
    _SPARE = 1.1
    #: The tokens of an answer of which nothing is known.
    _GUESS = 256
    #: The fewest answers that say how long answers are.
    _SAMPLE = 5

    def __init__(self) -> None:
        #: For each operation: the answers so far, and the mean tokens that a call generates.
        self._known: dict[str, tuple[int, float]] = {}
        #: The tokens that providers count for one that is counted here.
        self._scale = 1.0
        #: The mean tokens of a request, as expected.
        self.typical = 0.0

    def of(self, request: Request | None) -> float:
        """Return the tokens that a request is expected to cost.

        :param request: the request.
        """
        if request is None:
            return 1.0
        answers, mean = self._known.get(request.operation, (0, 0.0))
        bound = request.max_output
        if answers < self._SAMPLE:
            output: float = self._GUESS if bound is None else bound
        else:
            output = self._SPARE * mean
            output = output if bound is None else min(output, bound)
        return self._scale * request.tokens + output * request.items

    def saw(self, tokens: float) -> None:
        """Take account of a request that is sent.

        :param tokens: what it is expected to cost.
        """
        self.typical += (self._SHARE if self.typical else 1.0) * (tokens - self.typical)

    def learn(self, request: Request, usage: Usage) -> None:
        """Take account of what a provider has counted.

        :param request: the request.
        :param usage: its tokens.
        """
        answers, mean = self._known.get(request.operation, (0, 0.0))
        share = max(self._SHARE, 1 / (answers + 1))
        mean += share * (usage.output / request.items - mean)
        self._known[request.operation] = answers + 1, mean
        if usage.input:
            scale = min(8.0, max(0.125, usage.input / request.tokens))
            self._scale += share * (scale - self._scale)
