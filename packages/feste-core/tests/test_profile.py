"""Profiles: what is known of a provider beforehand, from the user, the backend and the price list."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import (
    Latency,
    Params,
    Price,
    Profile,
    PromptCache,
    Request,
    SampleRule,
    price_of,
)
from feste.errors import ConfigError, PluginWarning
from feste.testing import FakeBackend

MINE = Profile(latency=Latency(base=0.1), price=Price(input=1.0, output=2.0), max_draws=4)


class TestProfile:
    def test_each_field_goes_over_what_is_known_otherwise(self) -> None:
        """A field that the user leaves out is the backend's; one that he gives is his, also a 1."""
        known = Profile(price=Price(input=9.0), prompt_cache=PromptCache(), max_draws=128)

        whole = Profile(max_draws=1, latency=Latency(base=0.0)).over(known)

        assert whole == Profile(
            latency=Latency(base=0.0),
            price=Price(input=9.0),
            prompt_cache=PromptCache(),
            max_draws=1,
        )
        assert Profile().over(known) == known == known.over(Profile())

    @pytest.mark.parametrize(
        ("wrong", "fix"),
        [
            ({"latency": 0.5}, r"latency=0.5.*Latency\(\.\.\.\)"),
            ({"price": 3}, r"Price\(\.\.\.\)"),
            ({"prompt_cache": True}, r"PromptCache\(\.\.\.\)"),
            ({"max_draws": 2.5}, "whole number"),
            ({"max_draws": 0}, "at least 1"),
        ],
    )
    def test_a_field_of_another_type_is_refused(self, wrong: Any, fix: str) -> None:
        """Plans read profiles, where such an error would only disable a pass."""
        with pytest.raises(ConfigError, match=fix):
            Profile(**wrong)


class TestBackend:
    def test_it_returns_what_the_user_knows(self) -> None:
        """Any model has the profile that was given; without one nothing is known."""
        assert FakeBackend(profile=MINE).profile("any") == MINE
        assert FakeBackend().profile("any") == Profile()

    def test_another_type_is_refused(self) -> None:
        """The error says what to give."""
        wrong: Any = Price(input=1.0)
        with pytest.raises(ConfigError, match=r"it takes Profile\(price=Price"):
            FakeBackend(profile=wrong)

    def test_it_is_no_part_of_the_identity_and_travels(self) -> None:
        """Knowing a price makes no other client, and a copy in another process knows it too."""
        llm = FakeBackend(profile=MINE)

        assert (llm.token, llm.identity) == (FakeBackend().token, FakeBackend().identity)
        for again in (pickle.loads(pickle.dumps(llm)), copy.copy(llm), copy.deepcopy(llm)):
            assert again.profile("any") == MINE
            assert again.token == llm.token


def test_a_request_for_several_draws_differs_in_their_number_only() -> None:
    """One draw is the call's own request."""
    rule = SampleRule(unpack=lambda *_: [], field="count")
    request = Request("p", "chat", "plugin:p", {"messages": []}, account="a")

    assert rule.pack(request, 1) is request
    assert rule.pack(request, 3).body == {"messages": [], "count": 3}
    assert rule.pack(request, 3).account == "a" and "count" not in request.body


class Some(Params):
    n: int | None = None
    seed: int | None = None
    extra: Any = None


@feste.task
def later() -> Any:
    return 1


@pytest.mark.parametrize(
    ("params", "fuses"),
    [
        (Some(), True),
        (Some(n=1), True),
        (Some(extra={"top_k": 1, "n": 1}), True),
        (Some(seed=1, extra={"seed": None}), True),
        (Some(n=2), False),
        (Some(seed=0), False),
        (Some(extra={"n": 2}), False),
        (Some(extra={"seed": 1}), False),
        (Some(n=later()), False),  # type: ignore[arg-type]
        (Some(seed=later()), False),  # type: ignore[arg-type]
        (Some(extra=later()), False),
    ],
)
def test_parameters_say_whether_calls_may_become_draws(params: Params, fuses: bool) -> None:
    """Not with a seed, not if each call asks for several, not if either is unknown."""
    assert params.may_repeat() is fuses


# --- prices -----------------------------------------------------------------------------------------


def fresh(code: str, *folders: Path) -> Any:
    """What a program prints as JSON, in an interpreter of its own."""
    head = "import json, sys\n" + "".join(f"sys.path.insert(0, {str(f)!r})\n" for f in folders)
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestPricesWithTheExtra:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("genai_prices")

    @pytest.mark.parametrize(
        ("provider", "model", "price"),
        [
            ("openai", "gpt-4o-mini", Price(input=0.15, output=0.6, cached=0.075)),
            ("openai", "gpt-4-turbo", Price(input=10.0, output=30.0)),
            ("openai", "text-embedding-3-small", Price(input=0.02)),
            ("openai", "gpt-5.4", Price(input=2.5, output=15.0, cached=0.25)),  # its first tier
            ("cohere", "command-r7b-12-2024", Price(input=0.0375, output=0.15)),
        ],
    )
    def test_a_known_price(self, provider: str, model: str, price: Price) -> None:
        """Published prices that are past changing, in dollars per million tokens."""
        assert price_of(provider, model) == price

    def test_a_price_of_tokens_that_are_written_to_the_cache(self) -> None:
        """Where a provider charges for it, it is more than the plain price."""
        price = price_of("openai", "gpt-5.6-sol")

        assert price is not None and price.written is not None and price.cached is not None
        assert price.cached < price.input < price.written < price.output

    @pytest.mark.parametrize(
        ("provider", "model"),
        [
            ("openai", "no-such-model"),
            ("openai", "gpt-4o-no-such-variant"),
            ("openai", ""),
            ("no-such-provider", "gpt-4o"),
            ("my-openai", "gpt-4o"),  # the list itself would take it for OpenAI
            ("openai", "tts-1"),  # by characters
            ("openai", "whisper-1"),  # by the hour
            ("openai", "omni-moderation-latest"),  # no price, which is not yet a price of zero
            ("perplexity", "sonar"),  # by tokens, and for each request
            ("deepseek", "deepseek-chat"),  # another price at night
            ("openrouter", "qwen/qwen3.7-flash"),  # another price from 32,000 tokens on
        ],
    )
    def test_what_cannot_be_stated_is_unknown(self, provider: str, model: str) -> None:
        """Never a wrong price: what is unknown, or is no plain price for tokens, is None."""
        assert price_of(provider, model) is None

    def test_no_network_is_asked(self) -> None:
        """No name is looked up, nothing connects, no thread is left that would later."""
        code = """
        import threading
        from feste.backend import price_of
        seen = []
        sys.addaudithook(lambda event, _: seen.append(event) if event.startswith("socket.") else None)
        price = price_of("openai", "gpt-4o-mini").input
        print(json.dumps([price, threading.active_count(), sorted({*seen} - {"socket.__new__"})]))
        """
        assert fresh(code) == [0.15, 1, []]

    def test_it_is_imported_on_first_use_only(self) -> None:
        """Backends may be imported, and made, without the list."""
        code = """
        from feste.backend import price_of
        before = "genai_prices" in sys.modules
        price_of("openai", "gpt-4o-mini")
        print(json.dumps([before, "genai_prices" in sys.modules]))
        """
        assert fresh(code) == [False, True]


ASK = """
import warnings
from feste.backend import price_of
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    prices = [price_of("openai", model) for model in ("gpt-4o-mini", "gpt-4o", "gpt-4o-mini")]
print(json.dumps([prices, [[w.category.__name__, str(w.message), w.filename] for w in seen]]))
"""


def test_prices_without_the_extra() -> None:
    """Without the package prices are unknown, and nothing is said about it."""
    assert fresh("sys.modules['genai_prices'] = None\n" + ASK) == [[None, None, None], []]


@pytest.mark.parametrize(
    "module",
    [
        "import no_such_dependency",
        "raise RuntimeError('does not fit')",
        "Usage = dict",
        "def Usage(): ...",
        "class Usage:\n    def __init__(self, **_): ...\ndef calc_price(*_, **__): return 3",
    ],
)
def test_another_version_of_the_list_is_no_failure(module: str, tmp_path: Path) -> None:
    """If it cannot be imported or asked, prices are unknown; one warning says so, and what to do."""
    (tmp_path / "genai_prices.py").write_text(module)

    prices, seen = fresh(ASK, tmp_path)

    assert prices == [None, None, None]
    ((kind, text, _),) = seen
    assert kind == "PluginWarning" and 'pip install "feste-core[prices]"' in text


@pytest.mark.parametrize(
    "total",
    [
        "0 * tokens",
        "usage.get('output_tokens', 0)",  # nothing for input
        "-tokens",
        "tokens * float('nan')",
        "tokens * float('inf') if tokens else 0",
        "None",
        "tokens + 1",  # a fee for each request
        "tokens if tokens > 5000 else 2 * tokens",
        "tokens if at.hour < 9 else 2 * tokens",
        "tokens - 2 * usage.get('cache_read_tokens', 0)",
        "usage.get('input_tokens', 0)",  # nothing for output
    ],
)
def test_a_list_that_answers_nonsense_gives_no_price(total: str, tmp_path: Path) -> None:
    """Whatever comes, it is a finite price above zero that fits together, or none."""
    (tmp_path / "genai_prices.py").write_text(f"""
Usage = dict
class Found:
    class provider: id = "openai"
def calc_price(usage, *_, genai_request_timestamp, **__):
    at, found = genai_request_timestamp, Found()
    tokens = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
    found.total_price = {total}
    return found
""")

    assert fresh(ASK, tmp_path)[0] == [None, None, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Price(input="0.25"),  # type: ignore[arg-type]
        lambda: Price(input=-1.0),
        lambda: Price(input=math.nan),
        lambda: Price(input=1.0, cached=True),
        lambda: Latency(base=-5),
        lambda: Latency(base="a"),  # type: ignore[arg-type]
        lambda: Latency(base=math.inf),
        lambda: PromptCache(read="x"),  # type: ignore[arg-type]
        lambda: PromptCache(minimum=1.5),  # type: ignore[arg-type]
        lambda: PromptCache(keys=1),  # type: ignore[arg-type]
        lambda: Profile(max_draws=True),
        lambda: Profile(max_draws=0),
    ],
)
def test_what_is_no_figure_is_an_error_at_once(make: Any) -> None:
    """A wrong number would make wrong plans; the error names the field."""
    with pytest.raises(ConfigError, match=r"\(\w+="):
        make()


def raises(self: Any, model: str) -> Any:
    raise OSError("no list of models")


def gives_nothing(self: Any, model: str) -> Any:
    return None


@pytest.mark.parametrize(
    ("profile", "did"),
    [(raises, "raised OSError: no list of models ("), (gives_nothing, "returned NoneType, not a")],
)
def test_a_backend_that_cannot_tell_knows_nothing(profile: Any, did: str) -> None:
    """The backend is named, not the pass that asked it; plans and runs go on as for no profile."""
    wrong = type("Wrong", (FakeBackend,), {"profile": profile})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explained = feste.explain([wrong.chat(f"{i}") for i in range(3)])
        values = feste.compute([wrong.chat(f"{i}") for i in range(3)])[0]
    said = {str(w.message) for w in caught}

    assert len(values) == 3
    assert not [r for p in explained.plan.passes for r in p.remarks if "skipped" in r.text]
    assert len(said) == 1 and f"Wrong.profile() {did}" in said.pop()
    with (
        pytest.warns(PluginWarning, match="nothing is known of its models"),
        pytest.raises(ConfigError, match="needs the price of"),
    ):
        feste.compute(wrong.chat("a"), budget=1.0)
