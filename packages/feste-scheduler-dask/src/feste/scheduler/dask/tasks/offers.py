"""What the workers of a cluster offer: threads, and the resources that tasks ask for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from feste.errors import FesteWarning

__all__ = ["Offers"]

#: Seconds without any worker after which that is told; a nanny needs some to start the next one.
_EMPTY = 15.0


class Offers:
    """The threads and resources of the workers, as last seen.

    :param link: the connection. It is asked on the thread that talks to Dask only.
    """

    def __init__(self, link: Any) -> None:
        self._link = link
        #: The number of threads of all workers.
        self.threads: int = link.threads()
        #: The threads and resources of each worker, once a task needs resources.
        self.workers: Sequence[tuple[int, Mapping[str, float]]] = ()
        self._was_empty = not self.threads
        self._needed = False
        #: Since when no worker has been seen; None while there are some.
        self._empty: float | None = None
        self._told = False
        self._warned: set[frozenset[tuple[str, float]]] = set()

    @property
    def may_grow(self) -> bool:
        """Whether the cluster seems to be adaptive: it decides by the work that it sees."""
        return self._was_empty or bool(getattr(self._link.client.cluster, "_adaptive", None))

    def look(self) -> bool:
        """Ask the scheduler; return whether something has changed."""
        before = self.threads, self.workers
        if self._needed:
            seen = self._link.client.scheduler_info(n_workers=-1)["workers"].values()
            self.workers = [
                (w["nthreads"], {name: much for name, much in w["resources"].items() if much})
                for w in seen
            ]
            self.threads = sum(threads for threads, _ in self.workers)
        else:
            self.threads = self._link.threads()
        self._tell_if_empty()
        return before != (self.threads, self.workers)

    def _tell_if_empty(self) -> None:
        if self.threads:
            self._empty, self._told = None, False
        elif self._empty is None:
            self._empty = monotonic()
        elif monotonic() - self._empty > _EMPTY and not self._told and not self.may_grow:
            self._told = True
            warnings.warn(
                f"the Dask cluster at {self._link.client.scheduler.address} has lost all its workers; "
                "Python tasks wait until it has new ones",
                FesteWarning,
                stacklevel=2,
            )

    def room(self, needs: Mapping[str, float]) -> int:
        """Return how many tasks may run at once.

        :param needs: the resources that each of them needs.
        """
        if not needs:
            return self.threads
        return sum(min(threads, _times(offer, needs)) for threads, offer in self.workers)

    def check(self, name: str, needs: Mapping[str, float]) -> bool:
        """Warn, once, if no worker offers what a task needs; return whether something has changed.

        :param name: the name of the task.
        :param needs: the resources that it needs.
        """
        wanted = frozenset(needs.items())
        if not needs or wanted in self._warned:
            return False
        self._needed = True
        if self._is_met(needs):
            return False
        changed = self.look()
        if not self._is_met(needs):
            self._warned.add(wanted)
            offers = dict.fromkeys(repr(offer) for _, offer in self.workers if offer)
            warnings.warn(
                f"{name} needs resources={dict(needs)!r}, and no worker of the Dask cluster at "
                f"{self._link.client.scheduler.address} has them: it waits for one. The workers "
                f"offer {', '.join(offers) or 'none'}; start one with `dask worker --resources`",
                FesteWarning,
                stacklevel=2,
            )
        return changed

    def _is_met(self, needs: Mapping[str, float]) -> bool:
        return any(_times(offer, needs) for _, offer in self.workers)


def _times(offer: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """Return how often a worker can meet the needs at once."""
    return min(int(offer.get(name, 0) / amount) for name, amount in needs.items())
