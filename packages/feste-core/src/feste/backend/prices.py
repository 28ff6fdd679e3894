"""Prices of providers, from the optional package ``genai-prices``: ``feste-core[prices]``.

Its prices come with it; the network is never asked. Only its documented call is used, as a
calculator: what does a prompt of so many tokens cost? How it holds prices is its own affair.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from datetime import UTC, datetime
from typing import Any

from feste.backend.profile import Price
from feste.errors import PluginWarning

__all__ = ["price_of"]

_warned: list[Exception] = []

#: The tokens of a prompt: any number below the first tier of a price.
_SHORT = 1_000
#: A price that rises for longer prompts only is given as it is below; others are not.
_LONG = 100_000


@functools.cache
def price_of(provider: str, model: str) -> Price | None:
    """Return what a model's tokens cost today, at the provider's standard service tier.

    Of a price that rises with the length of the prompt, the first tier is returned if it holds up
    to 100,000 tokens: longer prompts may cost more. The first answer is kept while the process lives.

    :param provider: the provider's name, such as ``"openai"`` or ``"cohere"``.
    :param model: the model's name, as in requests.
    :returns: the price; None if ``genai-prices`` is not installed, if it does not know the model, or
        if its price is of another form: for each request, by the hour, or for other than tokens.

    >>> price_of("openai", "no-such-model") is None
    True
    """
    try:
        return _asked(importlib.import_module("genai_prices"), provider, model)
    except ModuleNotFoundError as error:
        if error.name != "genai_prices":
            _warn(error)
    except LookupError:
        pass  # an unknown provider or model
    except Exception as error:  # it is young, and its interface moves
        _warn(error)
    return None


def _asked(library: Any, provider: str, model: str) -> Price | None:
    now = datetime.now(UTC)

    def cost(hour: int = now.hour, **tokens: int) -> Any:
        at = now.replace(hour=hour)
        usage = library.Usage(**tokens)
        return library.calc_price(usage, model, provider_id=provider, genai_request_timestamp=at)

    def dollars(calculated: Any, tokens: int = _SHORT) -> float:
        return round(float(calculated.total_price) / tokens * 1_000_000, 9)

    plain = cost(input_tokens=_SHORT)
    price = dollars(plain)
    output = dollars(cost(input_tokens=0, output_tokens=_SHORT))
    cached = dollars(cost(input_tokens=_SHORT, cache_read_tokens=_SHORT))
    written = dollars(cost(input_tokens=_SHORT, cache_write_tokens=_SHORT))
    stated = (
        plain.provider.id == provider  # names are matched loosely: "my-openai" would be "openai"
        and price > 0  # otherwise it is by other things than tokens
        and (output > 0 or "embed" in model)  # of vectors only the input is paid
        and all(0 <= each < math.inf for each in (price, output, cached, written))
        and dollars(cost(input_tokens=_LONG), _LONG) == price  # no tier below, no fee a request
        and all(dollars(cost(hour, input_tokens=_SHORT)) == price for hour in range(24))
    )
    if not stated:
        return None
    return Price(
        input=price,
        output=output,
        cached=None if cached == price else cached,
        written=None if written == price else written,
    )


def _warn(error: Exception) -> None:
    if _warned:
        return  # one cause, many models
    _warned.append(error)
    warnings.warn(
        "genai-prices is installed but cannot be used, so prices are unknown "
        f"({type(error).__name__}: {error}). Install a version that fits: "
        'pip install "feste-core[prices]"',
        PluginWarning,
        stacklevel=3,
    )
