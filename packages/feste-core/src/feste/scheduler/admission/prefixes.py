"""Let one request go ahead of those that begin alike, so that these find their prefix cached.

A provider's prompt cache serves a prefix only some time after the request that wrote it. Of the
requests that share one, the first that reaches its gate leads; the others are held until its answer
is there and the cache has had its time. If an attempt of it fails, the next one leads; after three
failures in a row nobody waits any more, since the fault is not in one request.
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

#: How many prefixes are remembered over runs, besides those in use.
_MOST = 1024
#: After so many failures in a row the requests of a prefix no longer wait for each other.
_TRIES = 3


class _Warmth:
    """Whether a provider has a prefix in its cache, as far as is known here."""

    __slots__ = ("failures", "held", "leader", "used", "warm")

    def __init__(self) -> None:
        #: The request that is writing the prefix, or None.
        self.leader: Parcel | None = None
        #: When the prefix can be read, and when it was last used, on the brain's clock.
        self.warm = float("inf")
        self.used = float("-inf")
        self.failures = 0
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
        self._prune_at = _MOST
        #: What each request in flight leads.
        self._leading: dict[int, list[_Warmth]] = {}

    def holds(self, parcel: Parcel) -> bool:
        """Return whether a request must wait; if not, it leads those prefixes that are not cached.

        :param parcel: the request, on its way to its gate.
        """
        cold = []
        for prefix in self._prefixes(parcel):
            warmth = self._warmth(parcel, prefix)
            if warmth.is_warm(prefix, self.brain.now):
                warmth.used = self.brain.now
            elif warmth.leader is not None:
                warmth.held.append(parcel)
                return True
            elif warmth.failures < _TRIES:
                cold.append(warmth)
        for warmth in cold:
            warmth.leader = parcel
        if cold:
            self._leading[id(parcel)] = cold
        return False

    def answered(self, parcel: Parcel) -> None:
        """Let go on what waited for a request, as soon as the prefixes that it wrote can be read.

        :param parcel: the request.
        """
        now = self.brain.now
        self._leading.pop(id(parcel), None)
        for prefix in self._prefixes(parcel):
            warmth = self._warmth(parcel, prefix)
            warmth.failures = 0
            coming = now < warmth.warm < float("inf")  # another answer wrote it just before
            if not coming and not warmth.is_warm(prefix, now):
                warmth.warm = warmth.used = now + prefix.lag
                warmth.leader = parcel  # nobody else needs to write it
                self.brain.later(prefix.lag, partial(self._release, warmth, parcel))

    def failed(self, parcel: Parcel, *, counts: bool = True) -> None:
        """Let another request lead, since an attempt failed, or the request is given up.

        :param parcel: the request.
        :param counts: whether it is a failure of the provider; a stopped run and a list that is sent
            in another form are none.
        """
        for warmth in self._leading.pop(id(parcel), ()):
            warmth.failures += counts
            self._release(warmth, parcel, self.brain.now)

    def drop(self, run: Run) -> None:
        """Forget the requests of a stopping run that are held.

        :param run: the run.
        """
        for warmth in self._warmths.values():
            if warmth.held:
                warmth.held = [parcel for parcel in warmth.held if parcel.run is not run]

    def _release(self, warmth: _Warmth, leader: Parcel, now: float) -> None:
        if warmth.leader is not leader:
            return  # another one has answered meanwhile
        warmth.leader = None
        held, warmth.held = warmth.held, []
        for parcel in held:
            self.brain.gates.enter(parcel)

    def _prefixes(self, parcel: Parcel) -> list[Prefix]:
        """Return the prefixes of a request for which it waits."""
        return [p for p in parcel.run.prefixes.get(parcel.members[0], ()) if p.waits]

    def _warmth(self, parcel: Parcel, prefix: Prefix) -> _Warmth:
        name = (*parcel.request.scope, prefix.digest)
        known = self._warmths.get(name)
        if known is None:
            if len(self._warmths) >= self._prune_at:
                self._prune()
            known = self._warmths[name] = _Warmth()
        return known

    def _prune(self) -> None:
        """Forget the oldest prefixes that nobody uses; more rarely the more are in use."""
        idle = [n for n, w in self._warmths.items() if w.leader is None and not w.held]
        for name in idle[: max(0, len(idle) - _MOST // 2)]:
            del self._warmths[name]
        self._prune_at = max(_MOST, 2 * len(self._warmths))
