"""The user's limits for an account or a server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from feste.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from feste.backend.base import Backend

__all__ = ["CEILING", "START", "Limits"]

#: How many requests are in flight for an account without a limit of the user's: at first, and at
#: most.
START, CEILING = 10, 512


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that the user sets because Feste cannot know them, or to stay below the provider's.

    All but `max_items` hold for the account's model over all runs and threads of the process. If
    several living clients name one, the lowest holds; what the provider's headers say can only lower
    it further.

    :param concurrency: the maximum number of requests in flight; None lets Feste find it, from 10 up
        to at most 512.
    :param requests_per_minute: the maximum number of requests sent a minute, evenly spread; None
        uses what the provider's headers say, or what it turns out to accept.
    :param tokens_per_minute: the maximum number of tokens a minute, read and generated together;
        None likewise.
    :param max_items: the maximum number of calls packed into one request; None uses the operation's
        own limit.
    :raises ConfigError: if a limit is below 1 or no number; the first and the last are whole.

    >>> Limits(concurrency=32, tokens_per_minute=90_000).tokens_per_minute
    90000
    """

    concurrency: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = "int" in str(field.type)
            kind = int if whole else (int, float)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not 1 <= value < math.inf:
                what = "a whole number" if whole else "a number"
                raise ConfigError(
                    f"Limits({field.name}={value!r}): it must be {what}, at least 1, or None"
                )

    @classmethod
    def of(cls, given: Limits | None) -> Limits:
        """Return the limits that a backend's constructor was given, or none.

        :param given: the argument ``limits``.
        :raises ConfigError: if it is something else.

        >>> Limits.of(None) == Limits()
        True
        """
        if given is not None and not isinstance(given, cls):
            raise ConfigError(f"limits={given!r}: it takes Limits(concurrency=...) or None")
        return given or cls()

    @classmethod
    def of_client(cls, client: Backend) -> Limits:
        """Return the limits of a backend; None in their place stands for those of its class.

        :param client: the backend.
        :raises ConfigError: if they are something else; the message names the class.
        :raises PluginError: if they cannot be read.
        """
        kind = type(client)
        try:
            given = client.limits
        except Exception as error:  # of a property of a plugin's class
            raise PluginError(
                f"the limits of the backend {kind.__name__} raised {type(error).__name__}: {error}"
            ) from error
        if given is None and isinstance(kind.limits, cls):
            given = kind.limits
        try:
            return cls.of(given)
        except ConfigError as error:
            raise ConfigError(f"the backend {kind.__name__} has {error.message}") from None
