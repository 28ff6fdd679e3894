"""What is known of models beforehand: of Cohere's own rough times and prices, of others nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from feste.backend import Latency, Price, Profile, price_of
from feste.backend.cohere import Cohere
from feste.backend.cohere.profiles import known
from feste.errors import ConfigError

MINE = Profile(price=Price(input=1.0, output=2.0), latency=Latency(base=9.0))


def test_the_user_goes_first_field_by_field() -> None:
    """What the user does not say, the backend says; of a prompt cache nobody knows."""
    whole = Cohere("command-a-03-2025", profile=MINE).profile("command-a-03-2025")

    assert whole == Profile(price=MINE.price, latency=MINE.latency, max_draws=1)
    assert Cohere(profile=Profile(max_draws=3)).profile("m").max_draws == 3


def test_vectors_generate_nothing() -> None:
    """A request for vectors takes longer with more texts; chats take longer with longer answers."""
    vectors, texts = known("embed-v4.0").latency, known("command-a-03-2025").latency

    assert vectors is not None and vectors.token == 0 and vectors.item > 0
    assert texts is not None and texts.token > 0
    assert known("another") == known("") == Profile()


def test_an_empty_name_is_the_model_of_the_client() -> None:
    """So a plan may ask before it knows a request."""
    assert Cohere("embed-v4.0").profile("") == Cohere().profile("embed-v4.0")
    assert Cohere("embed-v4.0").profile("command-a-03-2025").latency != known("embed-v4.0").latency


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://api.cohere.com.example"])
def test_of_other_servers_only_the_user_knows(url: str) -> None:
    """Only that a chat gives one answer, since the interface has no parameter for more."""
    model = "command-a-03-2025"

    assert Cohere(model, base_url=url, api_key="k").profile(model) == Profile(max_draws=1)
    assert Cohere(model, base_url=url, api_key="k", profile=MINE).profile("").price == MINE.price


def test_prices_come_from_the_list() -> None:
    """For Cohere itself; vectors cost what is read only."""
    pytest.importorskip("genai_prices")

    assert Cohere("command-a-03-2025").profile("").price == Price(input=2.5, output=10.0)
    assert Cohere(base_url="https://api.cohere.ai").profile("embed-v4.0").price == Price(input=0.12)
    assert price_of("cohere", "no-such-model") is Cohere().profile("no-such-model").price is None


def test_it_travels_and_is_no_part_of_the_identity() -> None:
    """Like limits, it changes no answer."""
    llm = Cohere("m", base_url="http://127.0.0.1:9", profile=MINE)
    plain = Cohere("m", base_url="http://127.0.0.1:9")

    assert (llm.identity, llm.token) == (plain.identity, plain.token)
    for again in (pickle.loads(pickle.dumps(llm)), copy.copy(llm), copy.deepcopy(llm)):
        assert again.profile("m") == llm.profile("m") and again.token == llm.token


@pytest.mark.parametrize("wrong", [0.5, {}, Price(input=1.0)])
def test_another_type_is_refused(wrong: Any) -> None:
    """The error says what to give."""
    with pytest.raises(ConfigError, match=r"it takes Profile\(price=Price"):
        Cohere(profile=wrong)
