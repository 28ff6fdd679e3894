"""What headers say of rate limits, and how long to wait, in the spellings of many providers."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from typing import Any, cast

import pytest

from feste.backend import RateLimit, error_for_status, rate_limits, retry_after
from feste.errors import ConfigError
from feste.testing import FakeBackend, VirtualClock

DATE = {"date": "Wed, 01 Jan 2020 12:00:00 GMT"}


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (
            {
                "x-ratelimit-limit-requests": "3500",
                "x-ratelimit-remaining-requests": "3499",
                "x-ratelimit-reset-requests": "17ms",
                "x-ratelimit-limit-tokens": "90000",
                "x-ratelimit-remaining-tokens": "89984",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            [
                RateLimit("requests", 3500.0, 3499.0, 0.017),
                RateLimit("tokens", 90000.0, 89984.0, 360.0),
            ],
        ),
        (
            {
                "anthropic-ratelimit-requests-limit": "50",
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": "2020-01-01T12:00:02Z",
                **DATE,
            },
            [RateLimit("requests", 50.0, 49.0, 2.0)],
        ),
        (
            {"ratelimit-limit": "10, 10;w=1, 50;w=60", "ratelimit-remaining": "9"},
            [RateLimit("requests", 10.0, 9.0, None, 1.0)],
        ),
        (
            {"ratelimit": "limit=100, remaining=50, reset=5", "ratelimit-policy": "100;w=10"},
            [RateLimit("requests", 100.0, 50.0, 5.0, 10.0)],
        ),
        (
            {
                "ratelimit-policy": '"short";q=5;w=1, "long";q=100;w=60, "size";q=9;qu="bytes"',
                "ratelimit": '"short";r=4;t=1, "long";r=77;t=30',
            },
            [
                RateLimit("requests", 5.0, 4.0, 1.0, 1.0),
                RateLimit("requests", 100.0, 77.0, 30.0, 60.0),
            ],
        ),
        (
            {"x-ratelimit-limit": "40", "x-ratelimit-reset": "1577880010", **DATE},
            [RateLimit("requests", 40.0, None, 10.0)],
        ),
        (
            {"x-trial-endpoint-call-limit": "40", "x-trial-endpoint-call-remaining": "39"},
            [RateLimit("requests", 40.0, 39.0)],
        ),
        ({"x-ratelimit-remaining-requests": "-1", "x-ratelimit-limit-requests": "0"}, []),
        ({"x-ratelimit-limit-tokens": "many", "x-ratelimit-reset-tokens": "soon"}, []),
        ({"x-ratelimit-limit-tokens": "1e3", "x-ratelimit-remaining-tokens": "0x10"}, []),
        ({"ratelimit": ";;;,=,", "ratelimit-policy": "\x00"}, []),
        ({"content-type": "application/json"}, []),
    ],
)
def test_spellings(headers: dict[str, str], found: list[RateLimit]) -> None:
    """One table reads them all; what cannot be true is left out."""
    assert list(rate_limits(headers)) == found


def test_a_plugin_adds_its_own_spelling() -> None:
    """Further spellings come first."""
    headers = {"x-limit-tokens-minute": "70", "x-left-tokens-minute": "9"}

    assert rate_limits(headers, (("tokens", "x-{}-tokens-minute"),)) == (RateLimit("tokens", 70.0),)


def test_the_gate_reads_a_backends_own_spelling() -> None:
    """`rate_limit_headers` names it, and the answers of the send half are read with it."""

    class Mine(FakeBackend):
        plugin = "mine"
        rate_limit_headers = (("requests", "x-{}-a-minute"),)

    llm = Mine()
    clock = VirtualClock(lambda r: replace(llm.answer(r), headers={"x-limit-a-minute": "120"}))
    clock.compute([llm.chat(str(i)) for i in range(2)])

    assert [gate.requests.rate for gate in clock.brain.gates.by_scope.values()] == [2.0]


@pytest.mark.parametrize(
    "given",
    [
        7,
        None,
        ("x-{}-a-minute",),
        (("tokens",),),
        (("words", "x-{}-words"),),
        (("tokens", "x-{}-{}"),),
        (("tokens", "x-{named}"),),
        (("tokens", 7),),
    ],
)
def test_names_of_headers_that_are_none_are_told_where_the_backend_is_called(given: Any) -> None:
    """The error names the class and the form, on the user's line: nothing is planned or sent."""
    mine = type("Mine", (FakeBackend,), {"rate_limit_headers": given})()
    with pytest.raises(ConfigError, match=r"the backend Mine has rate_limit_headers=.*takes pairs"):
        mine.chat("Hi")


def test_names_of_headers_may_be_lists() -> None:
    """As they come from JSON or TOML."""
    mine = type("Mine", (FakeBackend,), {"rate_limit_headers": [["tokens", "x-{}-tokens"]]})()

    assert mine.chat.spellings == (("tokens", "x-{}-tokens"),)


def test_a_refusal_in_a_backends_own_spelling_tells_how_long_to_wait() -> None:
    """With it the error has the limits, and the time until what is used up is renewed."""
    headers = {"x-remaining-a-minute": "0", "x-reset-a-minute": "12"}
    told = error_for_status(429, "", headers=headers, more=(("requests", "x-{}-a-minute"),))

    assert told.rate_limits == (RateLimit("requests", None, 0.0, 12.0),)
    assert told.retry_after == 12.0


def test_headers_of_another_type_do_no_harm() -> None:
    """A plugin's headers may be numbers, or none at all."""
    odd: Any = {"x-ratelimit-limit-requests": 60, "ratelimit": None, "x-ratelimit-reset": b"3"}

    assert rate_limits(odd) == (RateLimit("requests", 60.0),)
    assert rate_limits(cast("dict[str, str]", None)) == ()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        ("0.25", 0.25),
        ("1m30s", 90.0),
        ("450", 450.0),
        ("Wed, 01 Jan 2020 12:10:00 GMT", 600.0),
        ("Wed, 01 Jan 2020 11:00:00 GMT", None),
        ("86400", None),
        ("1577880030", 30.0),
    ],
)
def test_retry_after_against_the_providers_own_clock(text: str, seconds: float | None) -> None:
    """A date is compared with the response's `Date`: a wrong clock here changes nothing."""
    assert retry_after({"retry-after": text, **DATE}) == seconds


def test_without_a_date_of_the_response_this_machines_clock_is_used() -> None:
    """There is nothing better."""
    wait = retry_after({"retry-after": str(int(time.time()) + 100)})

    assert wait is not None
    assert 90 < wait <= 101


def test_a_refusal_without_retry_after_waits_until_its_limit_is_renewed() -> None:
    """The limit that is used up counts, not one that is only lower; other failures do not wait."""
    headers = {
        "x-ratelimit-remaining-requests": "12",
        "x-ratelimit-reset-requests": "50s",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "7.5s",
    }

    assert error_for_status(429, "slow", headers=headers).retry_after == 7.5
    assert error_for_status(500, "oops", headers=headers).retry_after is None
    assert error_for_status(429, "x", headers={**headers, "retry-after": "3"}).retry_after == 3.0


def test_limits_travel_with_the_error() -> None:
    """They are plain data, so that a refusal on another machine teaches the gate here."""
    error = error_for_status(429, "slow", headers={"x-ratelimit-limit-requests": "60"})

    assert pickle.loads(pickle.dumps(error)).rate_limits == (RateLimit("requests", 60.0),)
