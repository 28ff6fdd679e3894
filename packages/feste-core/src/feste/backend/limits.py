"""What an account or a server can take."""

from __future__ import annotations

from dataclasses import dataclass

from feste.errors import ConfigError

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that the user knows better than Feste.

    :param concurrency: requests in flight at once, at most, over all runs and threads of the
        process; None lets Feste find out (it starts with 10 and never goes above 512).
    :param max_items: logical calls packed into one request, at most; None takes the operation's
        own limit.
    :raises ConfigError: if one is below 1.

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
