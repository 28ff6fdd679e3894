"""What the requests of a run cost, by the prices that their backends know."""

from __future__ import annotations

from feste.backend import Price
from feste.errors import PluginWarning
from feste.optimization.analysis.profiles import Profiles
from feste.scheduler.totals import Totals

__all__ = ["Prices", "certain", "possible"]


class Prices:
    """The prices of models, each asked for once."""

    def __init__(self) -> None:
        self._profiles = Profiles()

    def of(self, totals: Totals) -> Price | None:
        """Return the price of a model, or None if it is not known.

        :param totals: the totals of an operation and model.
        """
        model = totals.model or str(getattr(totals.client, "model", None) or "")
        try:
            return self._profiles.price(totals.client, model)
        except PluginWarning:  # where warnings are errors: no reason to lose the results
            return None


def certain(totals: Totals, price: Price | None) -> tuple[float | None, int]:
    """Return what the requests of known price cost, and how many have none.

    A failed request that the provider did not charge for costs nothing.

    :param totals: the totals of an operation and model.
    :param price: its price.
    :returns: dollars, None if there is no request of known price; and the number of others.
    """
    if price is None:
        return None, totals.requests
    known = totals.counted + totals.free
    if not known:
        return None, totals.requests
    read, cached, written = totals.input_tokens, totals.cached_tokens, totals.written_tokens
    return price.dollars(read, totals.output_tokens, cached, written), totals.requests - known


def possible(totals: Totals, price: Price | None) -> float | None:
    """Return what the requests cost at most: as if each that was not counted was billed in full.

    :param totals: the totals of an operation and model.
    :param price: its price.
    :returns: dollars; None if a price, or the bound of a lost or uncounted answer, is unknown.
    """
    dollars, unpriced = certain(totals, price)
    if not unpriced:
        return dollars
    if price is None or totals.unbounded:
        return None
    return (dollars or 0.0) + price.at_most(totals.most_input, totals.most_output)
