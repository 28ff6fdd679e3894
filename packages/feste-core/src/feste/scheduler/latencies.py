"""How long requests and tasks take, as measured in this process: recent ones count most."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from feste.backend import Call, Latency, Request

__all__ = ["Durations", "Latencies"]

#: What a request is taken to need before any was measured, where its profile says nothing.
_GUESS = Latency(base=0.5)
#: How much each further measurement makes of the earlier ones.
_DECAY = 0.98
#: How many measurements the mean of a duration looks back.
_WINDOW = 50
#: How many operations are remembered; the oldest are forgotten first.
_MOST = 1024
#: How many measurements a profile counts for, and at which numbers of items.
_TRUST, _AT = 10, (1, 16)


class Durations:
    """The mean duration of tasks by name, in seconds.

    >>> durations = Durations()
    >>> durations.note("parse", 1.0), durations.note("parse", 3.0)
    (None, None)
    >>> durations.of("parse"), durations.of("unknown")
    (2.0, 0.0)
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[int, float]] = {}

    def note(self, name: str, seconds: float) -> None:
        """Record a duration.

        :param name: what took so long.
        :param seconds: the duration.
        """
        count, mean = self._means.get(name, (0, 0.0))
        count = min(count + 1, _WINDOW)
        self._means[name] = count, mean + (seconds - mean) / count

    def of(self, name: str) -> float:
        """Return the mean duration; 0 if none was recorded.

        :param name: as for :meth:`note`.
        """
        return self._means.get(name, (0, 0.0))[1]


class _Fit:
    """The line ``seconds = base + item * items`` through measurements, by least squares."""

    __slots__ = ("n", "x", "xx", "xy", "y")

    def __init__(self, known: Latency | None) -> None:
        self.n = self.x = self.y = self.xx = self.xy = 0.0
        if known is not None:
            for items in _AT * _TRUST:
                self.add(items, known.seconds(items))

    def add(self, items: float, seconds: float) -> None:
        self.n = self.n * _DECAY + 1
        self.x = self.x * _DECAY + items
        self.y = self.y * _DECAY + seconds
        self.xx = self.xx * _DECAY + items * items
        self.xy = self.xy * _DECAY + items * seconds

    def latency(self) -> Latency:
        spread = self.n * self.xx - self.x * self.x
        item = 0.0
        if spread > 1e-6 * self.n * self.xx:
            # neither falls with the items, nor takes them longer than alone
            item = (self.n * self.xy - self.x * self.y) / spread
            item = min(max(0.0, item), self.y / self.x)
        return Latency(base=max(0.0, (self.y - item * self.x) / self.n), item=item)


class Latencies:
    """How long requests take at each endpoint, by model and operation."""

    def __init__(self) -> None:
        self._fits: dict[tuple[str, str, str], _Fit] = {}
        #: What is known of each operation: beforehand, or from its requests.
        self._known: dict[Hashable, Latency | _Fit] = {}

    def expect(self, call: Call[Any], latency: Latency) -> None:
        """Note what a profile says, until requests have been measured.

        :param call: the operation.
        :param latency: how long its requests take.
        """
        if call.token not in self._known:
            self._know(call, latency)

    def _know(self, call: Call[Any], latency: Latency | _Fit) -> None:
        self._known[call.token] = latency
        if len(self._known) > _MOST:
            del self._known[next(iter(self._known))]

    def note(self, call: Call[Any], request: Request, items: int, seconds: float) -> None:
        """Record an answered request.

        :param call: the operation.
        :param request: the request.
        :param items: the number of prompts in it.
        :param seconds: how long it took.
        """
        name = (request.endpoint, request.model, call.name)
        fit = self._fits.get(name)
        if fit is None:
            fit = self._fits[name] = _Fit(self._of(call))
            if len(self._fits) > _MOST:
                del self._fits[next(iter(self._fits))]
        fit.add(items, seconds)
        self._know(call, fit)

    def measured(self, call: Call[Any]) -> float | None:
        """Return the seconds of a request with one call, or None if nothing is known.

        :param call: the operation.
        """
        known = self._of(call)
        return None if known is None else known.seconds()

    def of(self, call: Call[Any]) -> Latency:
        """Return how long an operation's requests take: as measured, as its profile says, or a guess.

        :param call: the operation.
        """
        return self._of(call) or _GUESS

    def _of(self, call: Call[Any]) -> Latency | None:
        known = self._known.get(call.token)
        return known.latency() if isinstance(known, _Fit) else known
