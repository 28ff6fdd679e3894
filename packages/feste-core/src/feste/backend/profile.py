"""What is known of a provider beforehand: how long it takes, what it costs, what it can do.

Everything here may be unknown, and stays None then: an unknown price is never taken for zero.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from feste.errors import ConfigError, PluginWarning
from feste.wording import printable, raised_at

if TYPE_CHECKING:
    from feste.backend.base import Backend

__all__ = ["Latency", "Price", "Profile", "PromptCache", "profile_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long a request takes, in seconds: ``base + item * items + token * tokens generated``.

    :param base: seconds for any request.
    :param item: seconds for each call in it.
    :param token: seconds for each token that one answer generates.
    :raises ConfigError: if a number is negative or none at all.
    """

    base: float
    item: float = 0.0
    token: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self)

    def seconds(self, items: int = 1, tokens: float = 0.0) -> float:
        """Return the seconds of one request.

        :param items: the calls in it.
        :param tokens: the tokens of its longest answer.

        >>> Latency(base=0.5, item=0.25).seconds(4)
        1.5
        """
        return self.base + self.item * items + self.token * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What tokens cost, in dollars per million.

    :param input: tokens read.
    :param output: tokens generated.
    :param cached: tokens read from the provider's prompt cache; None means as the profile's
        :class:`PromptCache` says, or as ``input``.
    :param written: tokens written to it; None likewise.
    :raises ConfigError: if a number is negative or none at all.
    """

    input: float
    output: float = 0.0
    cached: float | None = None
    written: float | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)

    def dollars(
        self, input: float = 0, output: float = 0, cached: float = 0, written: float = 0
    ) -> float:
        """Return the price of some tokens in dollars.

        :param input: tokens read, with those from the cache and those written to it.
        :param output: tokens generated.
        :param cached: how many of ``input`` come from the prompt cache.
        :param written: how many of ``input`` are written to it.

        >>> Price(input=2.0, output=8.0, cached=0.5).dollars(1_000_000, 500_000, cached=400_000)
        5.4
        """
        plain = input - cached - written
        total = plain * self.input + output * self.output
        total += cached * (self.input if self.cached is None else self.cached)
        total += written * (self.input if self.written is None else self.written)
        return total / 1_000_000

    def at_most(self, input: float = 0, output: float = 0) -> float:
        """Return the most that some tokens may cost in dollars, whatever the prompt cache does.

        :param input: tokens read.
        :param output: tokens generated.

        >>> Price(input=2.0, output=8.0, cached=0.5, written=2.5).at_most(1_000_000, 500_000)
        6.5
        """
        read = max(self.input, self.cached or 0.0, self.written or 0.0)
        return (input * read + output * self.output) / 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCache:
    """How a provider caches the beginnings of prompts.

    :param minimum: the shortest prefix that it caches, in tokens.
    :param step: cached prefixes are multiples of this, in tokens.
    :param write: the price of a token that is written, in prices of a plain one.
    :param read: the price of a token that is read from the cache, likewise.
    :param lag: the seconds after an answer until what its request wrote can be read.
    :param ttl: the seconds for which a prefix is kept after its last use.
    :param breakpoints: whether a request may mark where its reusable prefix ends.
    :param keys: whether a request may name a key that sends equal prefixes to one machine.
    :raises ConfigError: if a number is out of range.
    """

    minimum: int = 1024
    step: int = 1
    write: float = 1.0
    read: float = 0.1
    lag: float = 0.0
    ttl: float = 300.0
    breakpoints: bool = False
    keys: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.minimum < 1 or self.step < 1:
            raise ConfigError(
                f"minimum and step are at least 1 token, not {self.minimum} and {self.step}"
            )

    def units(self, uses: int, prefix: int) -> float:
        """Return what a shared prefix costs if one request writes it and the others read it.

        :param uses: the requests that share it.
        :param prefix: its tokens.
        :returns: the cost in prices of a plain token.

        >>> round(PromptCache(write=1.25, read=0.1).units(64, 4_000))
        30200
        """
        return prefix * (self.write + self.read * (uses - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is known of a model at a provider; None is unknown.

    :param latency: how long requests take.
    :param price: what tokens cost.
    :param prompt_cache: how the beginnings of prompts are cached.
    :param max_draws: the maximum number of answers to one prompt in one request; 1 if its answers
        would not be independent, or only one is given.
    :raises ConfigError: if a field is of another type.
    """

    latency: Latency | None = None
    price: Price | None = None
    prompt_cache: PromptCache | None = None
    max_draws: int | None = None

    def __post_init__(self) -> None:
        kinds = {"latency": Latency, "price": Price, "prompt_cache": PromptCache, "max_draws": int}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"Profile({name}={value!r}): it takes {_example(kind)}, or None")
        if isinstance(self.max_draws, bool) or (self.max_draws is not None and self.max_draws < 1):
            raise ConfigError(f"Profile(max_draws={self.max_draws}): it must be at least 1")

    @classmethod
    def of(cls, given: Profile | None) -> Profile:
        """Return the profile that a backend's constructor was given, or an empty one.

        :param given: the argument ``profile``.
        :raises ConfigError: if it is something else.

        >>> Profile.of(None) == Profile()
        True
        """
        if given is not None and not isinstance(given, cls):
            raise ConfigError(f"profile={given!r}: it takes Profile(price=Price(...), ...) or None")
        return given or cls()

    def over(self, other: Profile) -> Profile:
        """Return this profile, with what it leaves unknown taken from another.

        :param other: the other profile.

        >>> Profile(max_draws=1).over(Profile(max_draws=8, price=Price(input=1.0))).max_draws
        1
        """
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return Profile(
            **{n: getattr(other, n) if value is None else value for n, value in known.items()}
        )


def _example(kind: type) -> str:
    return "a whole number" if kind is int else f"{kind.__name__}(...)"


def _check_numbers(given: Latency | Price | PromptCache) -> None:
    """Raise unless each field is a number from 0, of the type that it is declared with."""
    for field in fields(given):
        value = getattr(given, field.name)
        kind: Any = {"int": int, "bool": bool}.get(str(field.type), (int, float))
        if value is None and "None" in str(field.type):
            continue
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (kind is not bool and not 0 <= value < math.inf):
            what = {int: "a whole number", bool: "True or False"}.get(kind, "a number")
            least = "" if kind is bool else " from 0"
            raise ConfigError(
                f"{type(given).__name__}({field.name}={value!r}): it must be {what}{least}"
            )


def profile_of(client: Backend, model: str) -> Profile:
    """Return what a backend knows of a model: nothing, with a warning, if it cannot tell.

    :param client: the backend.
    :param model: the model.
    """
    try:
        profile: object = client.profile(model)
    except Exception as error:  # a plugin's; a plan or a report is no reason to lose results
        did = f"raised {type(error).__name__}: {printable(str(error))} ({raised_at(error)})"
    else:
        if isinstance(profile, Profile):
            return profile
        did = f"returned {type(profile).__name__}, not a Profile"
    warnings.warn(
        f"{type(client).__name__}.profile() {did}; nothing is known of its models",
        PluginWarning,
        stacklevel=1,
    )
    return Profile()
