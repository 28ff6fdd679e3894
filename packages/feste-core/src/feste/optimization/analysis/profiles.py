"""What is known of the models of a graph's calls; an unknown price is never taken for zero."""

from __future__ import annotations

from dataclasses import replace

from feste.backend import Backend, Price, Profile
from feste.backend.profile import profile_of

__all__ = ["Profiles", "effective_price"]


def effective_price(profile: Profile) -> Price | None:
    """Return a model's price, with the prompt cache's factors where it names no prices for that.

    :param profile: what is known of the model.

    >>> from feste.backend import PromptCache
    >>> price = effective_price(Profile(price=Price(input=2.0), prompt_cache=PromptCache(read=0.1)))
    >>> price.cached, price.written
    (0.2, 2.0)
    """
    price, cache = profile.price, profile.prompt_cache
    if price is None or cache is None:
        return price
    return replace(
        price,
        cached=price.input * cache.read if price.cached is None else price.cached,
        written=price.input * cache.write if price.written is None else price.written,
    )


class Profiles:
    """The profiles of the models of some calls, each asked for once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[Backend, Profile, Price | None]] = {}

    def of(self, client: Backend, model: str) -> Profile:
        """Return what is known of a model.

        :param client: the backend.
        :param model: the model.
        """
        return self._of(client, model)[1]

    def price(self, client: Backend, model: str) -> Price | None:
        """Return the price of a model, or None if it is not known.

        :param client: the backend.
        :param model: the model.
        """
        return self._of(client, model)[2]

    def _of(self, client: Backend, model: str) -> tuple[Backend, Profile, Price | None]:
        known = self._known.get((id(client), model))
        if known is None:
            profile = profile_of(client, model)
            # it holds the client too, so that no other one gets its id
            known = self._known[id(client), model] = (client, profile, effective_price(profile))
        return known
