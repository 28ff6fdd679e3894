"""Let one request go ahead of those that begin alike, so that these find their prefix cached.

A provider's prompt cache serves a prefix only some time after the request that wrote it. Of the
requests that share one, the first that reaches its gate leads; the others are held until its answer
is there and the cache has had its time. If it fails, the next one leads.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING

from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run
from feste.sharing import Prefix

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Prefixes"]

#: How many prefixes are remembered over runs.
_MOST = 1024


class _Warmth:
    """Whether a provider has a prefix in its cache, as far as is known here."""

    __slots__ = ("held", "leader", "used", "warm")

    def __init__(self) -> None:
        #: The request that is writing the prefix, or None.
        self.leader: Parcel | None = None
        #: When the prefix can be read, and when it was last used, on the brain's clock.
        self.warm = float("inf")
        self.used = float("-inf")
        self.held: list[Parcel] = []

    def is_warm(self, prefix: Prefix, now: float) -> bool:
        return self.warm <= now <= self.used + prefix.ttl


class Prefixes:
    """Hold requests back while another one writes their prefix; shared by all runs.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self._warmths: dict[Hashable, _Warmth] = {}
        #: The prefixes that each request in flight leads.
        self._leading: dict[int, list[tuple[Prefix, _Warmth]]] = {}

    def holds(self, parcel: Parcel) -> bool:
        """Return whether a request must wait; if not, it leads those prefixes that are not cached.

        :param parcel: the request, on its way to its gate.
        """
        prefixes = parcel.run.prefixes.get(parcel.members[0])
        if not prefixes:
            return False
        cold = []
        for prefix in (p for p in prefixes if p.waits):
            warmth = self._warmth(parcel, prefix)
            if warmth.is_warm(prefix, self.brain.now):
                warmth.used = self.brain.now
            elif warmth.leader is None:
                cold.append((prefix, warmth))
            else:
                warmth.held.append(parcel)
                return True
        for _, warmth in cold:
            warmth.leader = parcel
        if cold:
            self._leading[id(parcel)] = cold
        return False

    def ended(self, parcel: Parcel, answered: bool) -> None:
        """Let go on what waited for a request.

        :param parcel: the request, answered or given up.
        :param answered: whether it was answered, so that its prefixes were written.
        """
        for prefix, warmth in self._leading.pop(id(parcel), ()):
            if answered:
                warmth.warm, warmth.used = self.brain.now + prefix.lag, self.brain.now + prefix.lag
                self.brain.later(prefix.lag, partial(self._release, warmth))
            else:
                self._release(warmth, self.brain.now)

    def drop(self, run: Run) -> None:
        """Forget the requests of a stopping run that are held.

        :param run: the run.
        """
        for warmth in self._warmths.values():
            warmth.held = [parcel for parcel in warmth.held if parcel.run is not run]

    def _release(self, warmth: _Warmth, now: float) -> None:
        warmth.leader = None
        held, warmth.held = warmth.held, []
        for parcel in held:
            self.brain.calls.enter(parcel)

    def _warmth(self, parcel: Parcel, prefix: Prefix) -> _Warmth:
        name = (
            parcel.request.endpoint,
            parcel.request.account,
            parcel.request.model,
            prefix.digest,
        )
        known = self._warmths.get(name)
        if known is None:
            if len(self._warmths) >= _MOST:
                idle = [n for n, w in self._warmths.items() if w.leader is None and not w.held]
                for old in idle[: _MOST // 2]:  # the oldest
                    del self._warmths[old]
            known = self._warmths[name] = _Warmth()
        return known
