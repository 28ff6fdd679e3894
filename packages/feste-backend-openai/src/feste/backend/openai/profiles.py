"""What is known of OpenAI's models beforehand, as of 2026-11-28.

Where a figure comes from:

- *guide*: OpenAI's guide to prompt caching (developers.openai.com/api/docs/guides/prompt-caching);
- *types*: the SDK's descriptions of parameters (openai 3.57, types/chat/completion_create_params.py);
- *prices*: the price of cached input by that of plain input (genai-prices 0.2.3);
- *reports*: what users of several clients report of refused parameters;
- *assumed*: a round figure for want of a published one; measure yours and give ``profile=``.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Final

from feste.backend import Latency, Profile, PromptCache, price_of

__all__ = ["known", "whole"]


def _automatic(read: float) -> PromptCache:
    """The cache of models before gpt-5.6."""
    return PromptCache(
        minimum=1024,  # guide
        step=128,  # guide
        write=1.0,  # guide: no fee
        read=read,
        lag=2.0,  # assumed: requests sent at once mostly miss
        ttl=300.0,  # guide: five to ten minutes of inactivity
        keys=True,  # types
    )


def _exact(read: float) -> PromptCache:
    """The cache of gpt-5.6 and later models."""
    return PromptCache(
        minimum=1024,  # guide
        step=1,  # types: the boundary is not rounded
        write=1.25,  # guide
        read=read,
        lag=2.0,  # assumed, as above
        ttl=1800.0,  # types: 30 minutes
        breakpoints=True,  # types
        keys=True,  # types
    )


_N: Final = 128  # the API reference: `n` of chats and completions is 1 to 128
# All assumed: seconds to the first token, and of each token after it.
_LARGE: Final = Latency(base=0.8, token=0.015)
_SMALL: Final = Latency(base=0.5, token=0.008)
_VECTORS: Final = Latency(base=0.3, item=0.002)
_SMALLER: Final = re.compile(r"-(mini|nano|luna)\b|^gpt-3\.5")

#: The first pattern that a name begins with decides.
_FAMILIES: Final = tuple(
    (re.compile(pattern), profile)
    for pattern, profile in (
        (r"text-embedding-", Profile(latency=_VECTORS)),
        # reports: they refuse every parameter of sampling, `n` too
        (r"\S+-search-|o1-(preview|mini)", Profile(max_draws=1)),
        # other endpoints and other kinds of tokens: nothing is known
        (r"\S+-(audio|deep-research|image|live|pro|realtime|transcribe|tts)\b", Profile()),
        (r"gpt-6\.1\b", Profile(prompt_cache=_exact(0.05), max_draws=_N)),  # read: prices
        (r"gpt-(5\.([6-9]|\d\d)|[6-9]|[1-9]\d)", Profile(prompt_cache=_exact(0.1), max_draws=_N)),
        (r"gpt-5\b", Profile(prompt_cache=_automatic(0.1), max_draws=_N)),  # read: prices
        (r"(gpt-4\.1|o3(?!-mini)|o4-mini)\b", Profile(prompt_cache=_automatic(0.25), max_draws=_N)),
        (r"gpt-4o-2024-05-13", Profile(max_draws=_N)),  # older than the cache
        (r"(gpt-4o|gpt-4\.5|o1|o3-mini)\b", Profile(prompt_cache=_automatic(0.5), max_draws=_N)),
        (r"gpt-4|gpt-3\.5", Profile(max_draws=_N)),  # guide: caching began with gpt-4o
    )
)


def known(model: str) -> Profile:
    """Return what is known of a model of OpenAI, without its price.

    :param model: the model's name, as in requests.

    >>> known("gpt-5-mini").prompt_cache.step, known("gpt-5.6-sol").prompt_cache.step
    (128, 1)
    >>> known("another") == Profile()
    True
    """
    for pattern, profile in _FAMILIES:
        if pattern.match(model):
            if profile.max_draws is None:
                return profile
            return replace(profile, latency=_SMALL if _SMALLER.search(model) else _LARGE)
    return Profile()


@functools.cache  # plans ask for every call
def whole(given: Profile, model: str) -> Profile:
    """Return a profile of the user's over all that is known of a model of OpenAI, with its price.

    :param given: what the user knows.
    :param model: the model's name, as in requests.
    """
    made = given.over(known(model))
    return made if made.price else made.over(Profile(price=price_of("openai", model)))
