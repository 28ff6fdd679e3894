"""Map HTTP error statuses to Feste's errors, in one table for all providers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from feste.backend.rate_headers import RateLimit, Spellings, rate_limits, seconds_from
from feste.backend.redaction import redact
from feste.backend.secret import Secret
from feste.errors import (
    AuthFailed,
    CallError,
    ConnectionLost,
    ContentFiltered,
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    QuotaExhausted,
    RateLimited,
    Rejected,
    ServerError,
)

__all__ = ["error_for_status", "retry_after"]

_TOO_LONG = (
    "context_length",
    "context length",
    "context size",
    "too long",
    "maximum context",
    "too many tokens",
)
_FILTERED = ("content_filter", "content_policy", "content management policy", "moderation")
# not "billing" alone: rate-limit messages also point to billing pages
_NO_MONEY = ("insufficient_quota", "billing_", "billing details", "exceeded your current quota")


def error_for_status(
    status: int,
    text: str,
    *,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
    request_id: str | None = None,
    secret: Secret | None = None,
    more: Spellings = (),
) -> CallError:
    """Return the error for an HTTP status and body.

    :param status: the HTTP status.
    :param text: the provider's message or body; it is shortened and keys in it are redacted.
    :param code: the provider's error code, or None.
    :param headers: the response's headers, names in lower case.
    :param request_id: the provider's ID of the request.
    :param secret: the key that was used, so that it is redacted.
    :param more: the backend's ``rate_limit_headers``, if it names any.

    >>> type(error_for_status(429, "slow down")).__name__
    'RateLimited'
    >>> type(error_for_status(429, "x", code="insufficient_quota")).__name__
    'QuotaExhausted'
    >>> print(error_for_status(307, "", headers={"location": "https://other.example/v1"}))
    ... # doctest: +ELLIPSIS
    the provider answered 307, a redirect to other.example, which is not followed: ...
    """
    headers = headers or {}
    if 300 <= status < 400:
        said = _redirected(status, headers.get("location", ""))
        return InvalidRequest(said, status=status, code=code, request_id=request_id)
    wait = retry_after(headers)
    kind = _kind(status, f"{code or ''} {text}".lower(), asked_to_wait=wait is not None)
    said = redact(text.strip(), secret) or "no message"
    limits = rate_limits(headers, more)
    if wait is None and kind is RateLimited:
        wait = _reset(limits)
    error = kind(
        f"the provider answered {status}: {said}",
        status=status,
        code=code,
        request_id=request_id,
        retry_after=wait,
    )
    error.rate_limits = limits
    return error


def _redirected(status: int, location: str) -> str:
    """Say where a redirect leads; the place is the server's own words, so only a host is shown."""
    try:
        host = urlsplit(location).hostname or ""
    except ValueError:
        host = ""
    place = f" to {host}" if re.fullmatch(r"[a-z0-9._:-]{1,100}", host) else ""
    return (
        f"the provider answered {status}, a redirect{place}, which is not followed: key and prompts "
        "go to the server of base_url only. If the other one is right, give its address as base_url"
    )


def _kind(status: int, said: str, *, asked_to_wait: bool) -> type[CallError]:
    if status in (401, 403):
        return AuthFailed
    if status == 402 or (status == 429 and any(word in said for word in _NO_MONEY)):
        return QuotaExhausted
    if status == 404:
        return ModelNotFound
    if status in (429, 529) or (status == 503 and asked_to_wait):
        return RateLimited
    if status in (502, 504, 524):  # from a gateway; the provider behind it may have answered
        return ConnectionLost
    if status in (405, 501, 505):
        return Rejected
    if status in (408, 409) or status >= 500:
        return ServerError
    if any(word in said for word in _FILTERED):
        return ContentFiltered
    if any(word in said for word in _TOO_LONG):
        return ContextTooLong
    return InvalidRequest


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait, or None; a day or longer counts as None.

    Reads ``retry-after-ms``, and ``Retry-After`` as seconds, integer or decimal, as a duration, or
    as an HTTP date (RFC 9110, section 10.2.3), which is compared with the response's own ``Date``.

    :param headers: the response's headers, names in lower case.

    >>> retry_after({"retry-after": "1.5"})
    1.5
    >>> retry_after({"retry-after": "soon"}) is None
    True
    """
    milliseconds = headers.get("retry-after-ms")
    if milliseconds:
        seconds = seconds_from(f"{milliseconds.strip()}ms", headers)
        if seconds is not None:
            return seconds
    return seconds_from(headers.get("retry-after", ""), headers)


def _reset(limits: tuple[RateLimit, ...]) -> float | None:
    """Return when a refused request may go: when all that is used up is there again."""
    waits = [
        r.reset
        for r in limits
        if r.reset is not None and r.remaining is not None and r.remaining < 1
    ]
    if waits:
        return max(waits)
    return min((r.reset for r in limits if r.reset), default=None)
