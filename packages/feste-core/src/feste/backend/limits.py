"""The user's limits for an account or a server."""

from __future__ import annotations

from dataclasses import dataclass

from feste.errors import ConfigError

__all__ = ["CEILING", "START", "Limits"]

#: How many requests are in flight for an account without a limit of the user's: at first, and at
#: most.
START, CEILING = 10, 512


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that the user sets because Feste cannot know them.

    :param concurrency: the maximum number of requests in flight, over all runs and threads of the
        process; None lets Feste find it, from 10 up to at most 512.
    :param max_items: the maximum number of calls packed into one request; None uses the operation's
        own limit.
    :raises ConfigError: if a limit is below 1.

    >>> Limits(concurrency=32)
    Limits(concurrency=32, max_items=None)
    """

    concurrency: int | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(f"Limits({name}={value!r}): it must be at least 1")

    @classmethod
    def of(cls, given: Limits | None) -> Limits:
        """Return the limits that a backend's constructor was given, or none.

        :param given: the argument ``limits``.
        :raises ConfigError: if it is something else.

        >>> Limits.of(None)
        Limits(concurrency=None, max_items=None)
        """
        if given is not None and not isinstance(given, cls):
            raise ConfigError(f"limits={given!r}: it takes Limits(concurrency=...) or None")
        return given or cls()
