"""What holds requests back: their account's gate, and a prefix that another one writes first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from feste.backend import Limits
from feste.backend.limits import CEILING, START
from feste.optimization.analysis.paths import Paths
from feste.sharing import Prefix

__all__ = ["Gate", "Waits", "waits_of"]


class Waits(NamedTuple):
    """What waits for the prompt cache.

    :param paths: paths with a further step for each prefix, behind the nodes: it needs the call that
        writes the prefix, and the calls that read it need the step.
    :param lags: the seconds of each of these steps.
    :param leaders: the keys of the calls that write a prefix.
    """

    paths: Paths
    lags: list[float]
    leaders: set[str]


def waits_of(
    paths: Paths, prefixes: Sequence[Prefix], weights: Sequence[float], sent: Mapping[str, int]
) -> Waits:
    """Return what waits until a prefix is written, by the one of its calls that is ready first.

    :param paths: the paths without that.
    :param prefixes: the prefixes of the plan.
    :param weights: the seconds of each node, by position.
    :param sent: the number of each call's request, by key.
    """
    if not any(prefix.waits for prefix in prefixes):
        return Waits(paths, [], set())
    position = {key: i for i, key in enumerate(paths.keys)}
    place = {i: n for n, i in enumerate(paths.order)}
    ends = paths.ends(weights)
    steps: list[tuple[int, list[int]]] = []
    lags: list[float] = []
    leaders: set[str] = set()
    for prefix in prefixes:
        members = [position[key] for key in prefix.members if prefix.waits and key in sent]
        # a node comes after what it needs by either number, so that no two wait for each other
        first = min(
            members,
            key=lambda i: (max((ends[d] for d in paths.deps[i]), default=0.0), place[i]),
            default=None,
        )
        if first is None:
            continue
        own = sent[paths.keys[first]]
        others = [i for i in members if sent[paths.keys[i]] != own]
        if others:
            steps.append((first, others))
            lags.append(prefix.lag)
            leaders.add(paths.keys[first])
    return Waits(paths.through(steps), lags, leaders)


@dataclass(slots=True)
class Gate:
    """The requests of one account, which go through its gate.

    :param busy: the seconds of each request.
    :param leading: those of the requests for which others wait.
    :param late: the seconds that each of the others waits at least.
    :param limits: what the clients allow.
    :param tokens: the tokens of all requests, read and generated; None if they are not known.
    """

    busy: list[float] = field(default_factory=list)
    leading: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    limits: set[Limits] = field(default_factory=set)
    tokens: float | None = 0.0

    def add(self, seconds: float, leads: bool, late: float) -> None:
        """Add a request.

        :param seconds: how long it takes.
        :param leads: whether others wait for it.
        :param late: how long it waits for others.
        """
        self.busy.append(seconds)
        if leads:
            self.leading.append(seconds)
        else:
            self.late.append(late)

    def seconds(self) -> float | None:
        """Return how long all take, with the time in which all others wait for those that lead.

        :returns: None if it depends on tokens that are not known.
        """
        idle = 0.0
        lanes = _lowest(limits.concurrency for limits in self.limits)
        if self.leading:
            first = max(*self.leading, _through(self.leading, lanes))
            idle = max(0.0, min(self.late, default=0.0) - first)
        seconds = [_through(self.busy, lanes) + idle]
        requests = _lowest(limits.requests_per_minute for limits in self.limits)
        if requests is not None:
            seconds.append(60 * (len(self.busy) - 1) / requests)
        tokens = _lowest(limits.tokens_per_minute for limits in self.limits)
        if tokens is not None:
            if self.tokens is None:
                return None
            seconds.append(60 * self.tokens / tokens)
        return max(seconds)


def _lowest(limits: Iterable[float | None]) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _through(busy: Sequence[float], lanes: float | None) -> float:
    """Return how long some requests take at one gate, which doubles its limit every round trip."""
    if lanes is not None:
        return sum(busy) / lanes
    left, width, rounds = len(busy), START, 0.0
    while left > 0:
        rounds += min(1.0, left / width)
        left -= width
        width = min(CEILING, 2 * width)
    return rounds * sum(busy) / len(busy)
