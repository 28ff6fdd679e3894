"""What is known of Cohere's models beforehand, as of 2026-11-28.

Times are assumed, round figures for want of published ones; measure yours and give ``profile=``. Of
a prompt cache, or cheaper input for repeated prefixes, Cohere's documentation says nothing.
"""

from __future__ import annotations

import functools
from typing import Final

from feste.backend import Latency, Profile, price_of

__all__ = ["known", "whole"]

_VECTORS: Final = Profile(latency=Latency(base=0.2, item=0.002))
_TEXTS: Final = Profile(latency=Latency(base=0.5, token=0.012))


def known(model: str) -> Profile:
    """Return what is known of a model of Cohere, without its price.

    :param model: the model's name, as in requests.

    >>> known("command-a-03-2025").latency.seconds(tokens=100)
    1.7
    """
    if model.startswith("embed-"):
        return _VECTORS
    return _TEXTS if model.startswith(("command", "c4ai-")) else Profile()


@functools.cache  # plans ask for every call
def whole(given: Profile, model: str) -> Profile:
    """Return a profile of the user's over all that is known of a model of Cohere, with its price.

    :param given: what the user knows.
    :param model: the model's name, as in requests.
    """
    made = given.over(known(model))
    return made if made.price else made.over(Profile(price=price_of("cohere", model)))
