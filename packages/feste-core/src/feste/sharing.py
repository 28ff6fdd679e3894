"""How the calls of a graph share: requests, as a batch or a group, and the beginnings of prompts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace

__all__ = ["Batch", "Group", "Prefix"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls that will share requests.

    :param members: their keys, in order. If they exceed the limits of one request, several are
        sent.
    :param draws: sets of members that are equal calls: each set asks for several answers to one
        prompt.

    >>> batch = Batch(("a", "b", "c"), draws=(("a", "b"),))
    >>> batch.items, batch.within({"b", "c"})
    (2, Batch(members=('b', 'c'), draws=()))
    """

    members: tuple[str, ...]
    draws: tuple[tuple[str, ...], ...] = ()
    key: str = field(init=False, repr=False)
    """The batch's own key in a lowered graph; unique, because Dask may merge separate graphs."""

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(" ".join(self.members).encode(), digest_size=4).hexdigest()
        first = self.members[0] if self.members else ""
        object.__setattr__(self, "key", f"batch-{first}-{digest}")

    @property
    def items(self) -> int:
        """The number of different prompts: equal draws count once."""
        return len(self.members) - sum(len(equal) - 1 for equal in self.draws)

    def within(self, keys: Container[str]) -> Batch:
        """Return the batch without removed members; the same object if none was removed.

        :param keys: the keys that still exist.
        """
        left = tuple(m for m in self.members if m in keys)
        if len(left) == len(self.members):
            return self
        draws = (tuple(m for m in equal if m in keys) for equal in self.draws)
        return Batch(left, tuple(equal for equal in draws if len(equal) > 1))


@dataclass(frozen=True, slots=True)
class Group:
    """Calls that may share requests and become ready at different times.

    The scheduler forms their requests while the graph runs.

    :param members: their keys.
    :param levels: for each member the number of members on the longest path that ends in it, from
        1. Members of one level do not depend on each other.

    >>> Group(("a", "b", "c"), (1, 1, 2)).table
    (2, 1)
    """

    members: tuple[str, ...]
    levels: tuple[int, ...]

    @property
    def table(self) -> tuple[int, ...]:
        """The number of members of each level, from level 1."""
        counts = Counter(self.levels)
        return tuple(counts[level] for level in range(1, max(counts, default=0) + 1))

    def within(self, keys: Container[str]) -> Group:
        """Return the group without removed members; the same object if none was removed.

        :param keys: the keys that still exist.
        """
        if all(m in keys for m in self.members):
            return self
        left = [(m, n) for m, n in zip(self.members, self.levels, strict=True) if m in keys]
        return Group(tuple(m for m, _ in left), tuple(n for _, n in left))


@dataclass(frozen=True, slots=True)
class Prefix:
    """Calls whose requests begin alike, so that a provider's prompt cache can serve them.

    :param members: their keys. A call may be in several prefixes, each a beginning of the next.
    :param digest: identifies the shared text in every run.
    :param tokens: the length of the shared text, estimated.
    :param whole: how many whole parts of the prompt it has, if its end is to be marked; else 0.
    :param keyed: whether to send its digest as the cache's key.
    :param waits: whether the others wait until one of them has written the prefix.
    :param lag: the seconds after an answer until what its request wrote can be read.
    :param ttl: the seconds for which a prefix is kept after its last use.
    """

    members: tuple[str, ...]
    digest: str
    tokens: int
    whole: int = 0
    keyed: bool = False
    waits: bool = True
    lag: float = 0.0
    ttl: float = 300.0

    def within(self, keys: Container[str]) -> Prefix:
        """Return the prefix without removed members; the same object if none was removed.

        :param keys: the keys that still exist.
        """
        left = tuple(m for m in self.members if m in keys)
        return self if len(left) == len(self.members) else replace(self, members=left)
