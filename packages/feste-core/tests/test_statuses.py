"""One table from HTTP replies to errors, and the three ways to ask for patience."""

from __future__ import annotations

import email.utils
import time

import pytest

from feste.backend import Secret, error_for_status, retry_after
from feste.errors import Ambiguous, Rejected, Transient

TABLE = [
    (400, "bad value for n", None, "InvalidRequest"),
    (400, "This model's maximum context length is 8192 tokens", None, "ContextTooLong"),
    (400, "no", "context_length_exceeded", "ContextTooLong"),
    (400, "blocked by the content management policy", None, "ContentFiltered"),
    (400, "no", "content_policy_violation", "ContentFiltered"),
    (401, "wrong key", None, "AuthFailed"),
    (402, "pay first", None, "QuotaExhausted"),
    (403, "not yours", None, "AuthFailed"),
    (404, "no such model", None, "ModelNotFound"),
    (408, "too slow", None, "ServerError"),
    (409, "conflict", None, "ServerError"),
    (413, "prompt is too long", None, "ContextTooLong"),
    (413, "payload too large", None, "InvalidRequest"),
    (415, "not JSON", None, "InvalidRequest"),
    (422, "unknown field", None, "InvalidRequest"),
    (429, "slow down", None, "RateLimited"),
    (429, "no", "insufficient_quota", "QuotaExhausted"),
    (429, "no", "billing_hard_limit_reached", "QuotaExhausted"),
    (
        429,
        "You exceeded your current quota, please check your plan and billing details.",
        None,
        "QuotaExhausted",
    ),
    (
        429,
        "Rate limit reached on requests per min. Limit: 3 / min. Please add a payment method to "
        "your account to increase your rate limit. Visit https://example.com/account/billing",
        "rate_limit_exceeded",
        "RateLimited",
    ),
    (500, "oops", None, "ServerError"),
    (405, "not here", None, "Rejected"),
    (501, "no embeddings", None, "Rejected"),
    (502, "", None, "ConnectionLost"),
    (504, "gateway timeout", None, "ConnectionLost"),
    (524, "", None, "ConnectionLost"),
    (503, "overloaded", None, "ServerError"),
    (529, "overloaded", None, "RateLimited"),
    (599, "?", None, "ServerError"),
]


@pytest.mark.parametrize(("status", "text", "code", "kind"), TABLE)
def test_the_table(status: int, text: str, code: str | None, kind: str) -> None:
    """What a reply means decides whether it is tried again; the facts of the reply are kept."""
    error = error_for_status(status, text, code=code, request_id="r-1")

    assert type(error).__name__ == kind
    billed = "unknown" if kind == "ConnectionLost" else "no"
    assert (error.status, error.code, error.request_id, error.billed) == (
        status,
        code,
        "r-1",
        billed,
    )
    assert str(error) == f"the provider answered {status}: {text or 'no message'}"


def test_what_is_tried_again() -> None:
    """Every error of the table is either refused for good or may work later."""
    for status, text, code, _ in TABLE:
        error = error_for_status(status, text, code=code)

        assert isinstance(error, Rejected) is not isinstance(error, (Transient, Ambiguous))


def test_text_of_the_provider_is_cut_and_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers echo keys, and whole prompts; neither gets into an error."""
    monkeypatch.setenv("A_KEY_OF_THESE_TESTS", "oddly formed key")
    text = f"  oddly formed key and sk-abcdefghij12 {'x' * 900}"
    error = error_for_status(401, text, secret=Secret("A_KEY_OF_THESE_TESTS"))

    assert str(error).startswith("the provider answered 401: *** and *** x")
    assert len(str(error)) < 540


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, None),
        ({"retry-after": "Fri, 99 Foo 9999 99:99:99 GMT"}, None),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    """Milliseconds, seconds or a date; nonsense, the past and more than a day are no answer."""
    assert retry_after(headers) == seconds
    assert error_for_status(429, "slow", headers=headers).retry_after == seconds


def test_a_date_to_wait_for() -> None:
    """An HTTP date means the seconds until then."""
    found = retry_after({"retry-after": email.utils.formatdate(time.time() + 100, usegmt=True)})

    assert found is not None
    assert 90 < found <= 101
