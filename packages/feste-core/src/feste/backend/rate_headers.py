"""Read what a provider's headers say of its rate limits, in every common spelling."""

from __future__ import annotations

import email.utils
import functools
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from feste.backend.redaction import SHORTEST
from feste.errors import ConfigError

if TYPE_CHECKING:
    from feste.backend.secret import Secret

__all__ = [
    "SPELLINGS",
    "RateLimit",
    "Spellings",
    "kept_headers",
    "rate_limits",
    "seconds_from",
    "spellings_of",
]

Unit = Literal["requests", "tokens"]

Spellings = tuple[tuple[Unit, str], ...]
"""What is counted, and the names of its headers; `{}` is limit, remaining or reset."""

SPELLINGS: Spellings = (
    ("requests", "x-ratelimit-{}-requests"),  # OpenAI and most compatible servers
    ("tokens", "x-ratelimit-{}-tokens"),
    ("requests", "anthropic-ratelimit-requests-{}"),
    ("tokens", "anthropic-ratelimit-tokens-{}"),
    ("requests", "ratelimit-{}"),  # drafts of the IETF
    ("requests", "x-ratelimit-{}"),  # Cohere and many gateways
    ("requests", "x-trial-endpoint-call-{}"),  # keys for trials at Cohere
)
_PARTS = ("limit", "remaining", "reset")
#: Of the names of headers that are kept.
_KEPT = (*_PARTS, "retry-after", "request-id", "trace-id")
#: A number above this is a moment in seconds since 1970, not a duration.
_EPOCH = 1e9
_DAY = 86_400.0
_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": _DAY,
}
_PIECE = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_PIECE.pattern})+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?![\w.])")


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What a provider says of one of its limits; None is unknown.

    :param unit: what is limited: ``"requests"`` or ``"tokens"``.
    :param limit: how many a window allows.
    :param remaining: how many are left.
    :param reset: the seconds until all are there again.
    :param window: the seconds that the limit is for, where the provider names them.
    """

    unit: Unit
    limit: float | None = None
    remaining: float | None = None
    reset: float | None = None
    window: float | None = None


def rate_limits(headers: Mapping[str, str], more: Spellings = ()) -> tuple[RateLimit, ...]:
    """Return what headers say of rate limits, in the order of :data:`SPELLINGS`.

    Numbers that cannot be true are left out: limits below 1, negative ones, and what is no number.

    :param headers: the response's headers, names in lower case.
    :param more: further spellings of a provider, such as ``("tokens", "x-{}-tokens-minute")``.

    >>> rate_limits({"x-ratelimit-limit-requests": "60", "x-ratelimit-reset-requests": "1m2s"})
    (RateLimit(unit='requests', limit=60.0, remaining=None, reset=62.0, window=None),)
    >>> rate_limits({"ratelimit": '"all";r=5;t=30', "ratelimit-policy": '"all";q=9;w=60'})
    (RateLimit(unit='requests', limit=9.0, remaining=5.0, reset=30.0, window=60.0),)
    """
    if not headers:
        return ()
    found = [
        _stated(unit, headers, names)
        for unit, names in _spelt(more + SPELLINGS)
        if names[0] in headers or names[1] in headers or names[2] in headers
    ]
    if "ratelimit" in headers or "ratelimit-policy" in headers:
        found += _structured(headers)
    return tuple(r for r in found if not r.limit is r.remaining is r.reset is None)


def spellings_of(client: object) -> Spellings:
    """Return the ``rate_limit_headers`` of a backend.

    :param client: the backend.
    :raises ConfigError: if they are no pairs of that form; the message names its class.
    """
    given: Any = getattr(client, "rate_limit_headers", ())
    try:
        pairs = tuple((unit, name) for unit, name in given)
        _spelt(pairs)
        wrong = [unit for unit, _ in pairs if unit not in ("requests", "tokens")]
    except (TypeError, ValueError, LookupError, AttributeError):
        wrong = [given]
    if wrong:
        raise ConfigError(
            f"the backend {type(client).__name__} has rate_limit_headers={given!r}: it takes pairs such "
            'as ("tokens", "x-{}-tokens-minute")'
        )
    return pairs


def kept_headers(headers: Mapping[str, str], *secrets: Secret) -> dict[str, str]:
    """Return the headers of an answer that anything reads, without keys.

    That are those of rate limits in any spelling, the date, and the IDs by which a provider knows a
    request; not cookies, nor whatever else a server may repeat.

    :param headers: the response's headers, names in lower case.
    :param secrets: the keys.

    >>> kept_headers({"ratelimit": "5", "set-cookie": "a=b", "x-request-id": "1"})
    {'ratelimit': '5', 'x-request-id': '1'}
    """
    kept = {}
    for name, text in headers.items():
        if name == "date" or any(part in name for part in _KEPT):
            for secret in secrets:
                text = secret.blank(text, SHORTEST)
            kept[name] = text
    return kept


@functools.cache
def _spelt(spellings: Spellings) -> tuple[tuple[Unit, tuple[str, ...]], ...]:
    return tuple((unit, tuple(map(name.format, _PARTS))) for unit, name in spellings)


def _stated(unit: Unit, headers: Mapping[str, str], names: tuple[str, ...]) -> RateLimit:
    limit, remaining, reset = names
    most = str(headers.get(limit, ""))
    window = re.search(r";\s*w=(\d+)", most) if ";" in most else None  # "10, 10;w=1"
    return RateLimit(
        unit,
        _number(most, least=1.0),
        _number(str(headers.get(remaining, ""))),
        seconds_from(str(headers.get(reset, "")), headers),
        _number(window[1], least=1.0) if window else None,
    )


def _structured(headers: Mapping[str, str]) -> list[RateLimit]:
    """Read ``RateLimit`` and ``RateLimit-Policy``, of both the older and the newer drafts."""
    fields: dict[str, dict[str, str]] = {}
    for name in ("ratelimit-policy", "ratelimit"):
        text = str(headers.get(name, ""))
        if re.match(r"\s*(limit|remaining|reset)\s*=", text):  # limit=10, remaining=3, reset=5
            text = ";".join(["", *text.split(",")])
        for item in text.split(","):
            title, *parameters = (part.strip() for part in item.split(";"))
            pairs = (p.partition("=") for p in parameters)
            known = fields.setdefault(title if title.startswith('"') else "", {})
            if title.isdigit():  # 10;w=60
                known["limit"] = title
            known.update((key.strip(), value.strip()) for key, _, value in pairs)
    return [
        RateLimit(
            "requests",
            _number(f.get("limit", f.get("q", "")), least=1.0),
            _number(f.get("remaining", f.get("r", ""))),
            seconds_from(f.get("reset", f.get("t", "")), headers),
            _number(f.get("w", ""), least=1.0),
        )
        for f in fields.values()
        if f.get("qu", '"requests"').strip('"') == "requests"  # not bytes
    ]


def _number(text: str, least: float = 0.0) -> float | None:
    if text.isdecimal():
        number = float(text)
    else:
        found = _NUMBER.match(text.strip())
        if found is None:
            return None
        number = float(found[0])
    return number if least <= number < math.inf else None


def seconds_from(text: str, headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a text of a header means, from 0 to a day; None for anything else.

    A moment is compared with the response's ``Date``, so that a wrong clock here does no harm.

    :param text: a number, a duration like ``6m0s``, a moment in seconds since 1970, or a date.
    :param headers: the response's headers, names in lower case.

    >>> seconds_from("1m0.5s", {}), seconds_from("12ms", {}), seconds_from("-1", {})
    (60.5, 0.012, None)
    >>> date = {"date": "Fri, 31 Dec 1999 23:59:00 GMT"}
    >>> seconds_from("Fri, 31 Dec 1999 23:59:30 GMT", date), seconds_from("1999-12-31T23:59:30Z", date)
    (30.0, 30.0)
    """
    text = text.strip()
    if not text:
        return None
    seconds = _duration(text)
    if seconds is None:
        moment = _moment(text)
        if moment is None:
            return None
        seconds = moment - _now(headers)
    elif seconds >= _EPOCH:
        seconds = seconds / (1000.0 if seconds >= 1000 * _EPOCH else 1.0) - _now(headers)
    return seconds if 0 <= seconds < _DAY else None


def _duration(text: str) -> float | None:
    if text[-1] in "smhd" and _DURATION.fullmatch(text):
        return sum(float(number) * _UNITS[unit] for number, unit in _PIECE.findall(text))
    try:
        return float(text)
    except ValueError:
        return None


def _now(headers: Mapping[str, str]) -> float:
    """Return the provider's time, or else this machine's."""
    told = _moment(str(headers.get("date", "")))
    return time.time() if told is None else told


def _moment(text: str) -> float | None:
    try:
        parsed = email.utils.parsedate_tz(text)
        if parsed is not None:
            return float(email.utils.mktime_tz(parsed))
        return datetime.fromisoformat(text).timestamp()
    except (OverflowError, ValueError, TypeError, IndexError):
        return None
