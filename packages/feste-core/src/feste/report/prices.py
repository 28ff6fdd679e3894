"""What the requests of a run cost, by the prices that their backends know."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from feste.backend import Backend, Price
from feste.errors import PluginWarning
from feste.events import RequestFinished
from feste.optimization.analysis.profiles import Profiles

__all__ = ["prices_of", "sum_of"]


def prices_of(
    requests: Sequence[RequestFinished], clients: Sequence[Backend]
) -> list[float | None]:
    """Return the price of each request in dollars; None where price or tokens are unknown.

    A request that the provider did not charge for costs nothing.

    :param requests: the requests.
    :param clients: the backend of each.
    """
    profiles = Profiles()
    broken: set[int] = set()

    def known_price(client: Backend, model: str) -> Price | None:
        if id(client) in broken:
            return None
        try:
            return profiles.price(client, model or str(getattr(client, "model", None) or ""))
        except Exception as error:  # a plugin's; a report is no reason to lose the results
            broken.add(id(client))
            warnings.warn(
                f"{type(client).__name__}.profile() raised {type(error).__name__}: {error}; its requests "
                "have no price",
                PluginWarning,
                stacklevel=2,
            )
            return None

    dollars: list[float | None] = []
    for request, client in zip(requests, clients, strict=False):
        price = known_price(client, request.model)
        if price is not None and request.error and request.billed == "no":
            dollars.append(0.0)
        elif price is None or request.input_tokens is None:
            dollars.append(None)
        else:
            read = request.input_tokens
            cached = min(read, request.cached_tokens or 0)
            written = min(read - cached, request.written_tokens or 0)
            dollars.append(price.dollars(read, request.output_tokens or 0, cached, written))
    return dollars


def sum_of(prices: Iterable[float | None]) -> tuple[float | None, int]:
    """Return the sum of the known prices, and how many are unknown.

    :param prices: the prices.
    :returns: the sum, None if some are unknown and none is known; and the number of unknown ones.

    >>> sum_of([0.5, None, 0.25]), sum_of([None]), sum_of([])
    ((0.75, 1), (None, 1), (0.0, 0))
    """
    known, unknown = [], 0
    for price in prices:
        if price is None:
            unknown += 1
        else:
            known.append(price)
    return (None if unknown and not known else float(sum(known))), unknown
