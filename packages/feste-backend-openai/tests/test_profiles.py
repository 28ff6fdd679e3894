"""What is known of models beforehand: of OpenAI's own from dated lists, of others from the user."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from feste.backend import Latency, Price, Profile, PromptCache, price_of
from feste.backend.openai import OpenAI
from feste.backend.openai.profiles import known
from feste.errors import ConfigError

MINE = Profile(price=Price(input=1.0, output=2.0), max_draws=2)
CACHED = [
    *("gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-4.1-mini", "gpt-4.1-nano", "o1", "o3", "o3-mini"),
    *("o4-mini", "gpt-5", "gpt-5-mini", "gpt-5-nano", "gpt-5.1", "gpt-5.2", "gpt-5.4", "gpt-5.5"),
    *("gpt-5.6-luna", "gpt-5.6-terra", "gpt-5.6-sol", "gpt-6-luna", "gpt-6-sol", "gpt-6.1-sol"),
]


class TestWhatIsKnown:
    @pytest.mark.parametrize(
        ("model", "exact"),
        [
            ("gpt-4o-mini", False),
            ("gpt-5", False),
            ("gpt-5-mini-2025-08-07", False),
            ("gpt-5.5", False),
            ("gpt-5.6", True),
            ("gpt-5.6-sol-2026-06-30", True),
            ("gpt-5.10", True),
            ("gpt-6-luna", True),
            ("gpt-6.1-terra", True),
            ("gpt-10", True),
        ],
    )
    def test_two_kinds_of_cache(self, model: str, exact: bool) -> None:
        """From gpt-5.6 on a prefix ends where a request marks it, and writing costs."""
        cache = known(model).prompt_cache

        assert cache is not None and cache.keys and cache.minimum == 1024
        assert (cache.step, cache.write) == ((1, 1.25) if exact else (128, 1.0))
        assert cache.breakpoints is exact and 0 < cache.read < 1

    @pytest.mark.parametrize(
        ("model", "draws", "cache"),
        [
            ("gpt-4-turbo", 128, False),
            ("gpt-3.5-turbo-instruct", 128, False),
            ("gpt-4o-2024-05-13", 128, False),
            ("gpt-4o-mini-search-preview", 1, False),
            ("gpt-5-search-api", 1, False),
            ("gpt-4o", 128, True),
            ("gpt-5-pro", None, False),
            ("gpt-4o-realtime-preview", None, False),
            ("text-embedding-3-small", None, False),
            ("my-model", None, False),
            ("", None, False),
        ],
    )
    def test_draws(self, model: str, draws: int | None, cache: bool) -> None:
        """Models that talk take `n` up to 128, those that search do not; of others, who knows."""
        profile = known(model)

        assert (profile.max_draws, profile.prompt_cache is not None) == (draws, cache)
        assert (profile.latency is None) is (draws is None and not model.startswith("text-"))

    @pytest.mark.parametrize("model", CACHED)
    def test_the_cache_costs_what_the_list_of_prices_says(self, model: str) -> None:
        """The file's factors are the ratios of prices, from another source."""
        pytest.importorskip("genai_prices")
        price, cache = price_of("openai", model), known(model).prompt_cache

        assert price is not None and price.cached is not None and cache is not None
        assert cache.read == pytest.approx(price.cached / price.input, abs=0.02)
        assert cache.write == pytest.approx((price.written or price.input) / price.input)


class TestProfile:
    def test_the_user_goes_first_field_by_field(self) -> None:
        """What the user does not say, the backend says."""
        whole = OpenAI("gpt-5.6-sol", profile=MINE).profile("gpt-5.6-sol")

        assert whole == replace(known("gpt-5.6-sol"), price=MINE.price, max_draws=2)

    def test_an_empty_name_is_the_model_of_the_client(self) -> None:
        """So a plan may ask before it knows a request."""
        llm = OpenAI("gpt-5.6-sol")

        assert llm.profile("") == llm.profile("gpt-5.6-sol") != llm.profile("gpt-5")
        assert OpenAI().profile("") == Profile()

    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1:8000/v1",
            "https://mine.openai.azure.com/openai/v1",
            "https://eu.api.openai.com/v1",
            "https://api.openai.com.example/v1",
            "https://example.com/api.openai.com",
        ],
    )
    def test_of_other_servers_only_the_user_knows(self, url: str) -> None:
        """Another server may serve a model of that name at another price, and without a cache."""
        assert OpenAI("gpt-5.6-sol", base_url=url, api_key="k").profile("gpt-5.6-sol") == Profile()
        assert OpenAI("gpt-5.6-sol", base_url=url, api_key="k", profile=MINE).profile("") == MINE

    def test_prices_come_from_the_list(self) -> None:
        """For OpenAI itself, and only where neither the user nor the list leaves them unknown."""
        pytest.importorskip("genai_prices")
        llm = OpenAI("gpt-4o-mini", base_url="https://API.openai.com:443/v1/")

        assert llm.profile("").price == Price(input=0.15, output=0.6, cached=0.075)
        assert llm.profile("gpt-4o").price == price_of("openai", "gpt-4o")
        assert llm.profile("no-such-model").price is None

    def test_a_price_of_the_user_needs_no_list(self) -> None:
        """The list is imported only to answer what is not known otherwise."""
        code = (
            "import sys\n"
            "from feste.backend import Price, Profile\n"
            "from feste.backend.openai import OpenAI\n"
            "mine = Profile(price=Price(input=1.0))\n"
            "assert OpenAI('gpt-4o', profile=mine).profile('').price == Price(input=1.0)\n"
            "assert not {'genai_prices', 'openai'} & sys.modules.keys()"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_it_travels_and_is_no_part_of_the_identity(self) -> None:
        """Like limits, it changes no answer."""
        llm = OpenAI("m", base_url="http://127.0.0.1:9/v1", profile=MINE)
        plain = OpenAI("m", base_url="http://127.0.0.1:9/v1")

        assert (llm.identity, llm.token, llm.config()) == (
            plain.identity,
            plain.token,
            plain.config(),
        )
        for again in (pickle.loads(pickle.dumps(llm)), copy.copy(llm), copy.deepcopy(llm)):
            assert again.profile("m") == MINE and again.token == llm.token

    @pytest.mark.parametrize("wrong", [0.5, {}, Price(input=1.0), Latency(base=1.0), PromptCache()])
    def test_another_type_is_refused(self, wrong: Any) -> None:
        """The error says what to give."""
        with pytest.raises(ConfigError, match=r"it takes Profile\(price=Price"):
            OpenAI(profile=wrong)
