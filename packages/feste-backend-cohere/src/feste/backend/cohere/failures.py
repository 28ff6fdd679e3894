"""Convert failed requests into Feste's errors, which never contain the key."""

from __future__ import annotations

import json
from collections.abc import Mapping

from feste.backend import Secret, error_for_status, redact
from feste.errors import (
    CallError,
    CallTimeout,
    ConnectionLost,
    MalformedResponse,
    QuotaExhausted,
    Rejected,
    ServerError,
    Unreachable,
)

__all__ = ["failure", "refusal", "short"]


def refusal(status: int, content: bytes, headers: Mapping[str, str], secret: Secret) -> CallError:
    """Return the error for an HTTP reply that is not an answer.

    :param status: the HTTP status.
    :param content: the body.
    :param headers: the headers, names in lower case.
    :param secret: the key to redact.
    """
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        said = {}
    message, name = said.get("message"), said.get("id") or headers.get("x-debug-trace-id")
    error = error_for_status(
        status,
        message if isinstance(message, str) else content.decode(errors="replace"),
        headers=headers,
        request_id=short(name, secret),
        secret=secret,
    )
    if status == 499:  # "request cancelled" by Cohere, which asks to retry
        return _as(ServerError, error)
    if status == 429 and "/ month" in str(error):  # a trial key has used up its monthly quota
        return _as(QuotaExhausted, error)
    return error


def short(name: object, secret: Secret) -> str | None:
    """Shorten the ID of a request and redact the key in it; None if it is not text.

    :param name: the value from the server.
    :param secret: the key to redact.
    """
    return redact(name, secret, limit=100) if isinstance(name, str) else None


def _as(kind: type[CallError], error: CallError) -> CallError:
    made = kind(*error.args)
    made.__dict__.update(error.__dict__)
    return made


def failure(error: Exception, secret: Secret) -> CallError:
    """Return Feste's error for an exception of the SDK or httpx.

    :param error: the exception; only its class and its redacted text are kept.
    :param secret: the key to redact.
    """
    import httpx

    if isinstance(error, MalformedResponse):  # from reading the body
        made = MalformedResponse(error.message)
        made.raw = None if error.raw is None else redact(error.raw, secret, limit=65_536)
        return made
    never_sent = (
        httpx.ConnectError,
        httpx.ConnectTimeout,
        httpx.PoolTimeout,
        httpx.ProxyError,
        httpx.UnsupportedProtocol,
    )
    said = redact(f"{type(error).__name__}: {error}".rstrip(": "), secret)
    if isinstance(error, never_sent):
        return Unreachable(f"no connection could be made: {said}")
    if isinstance(error, httpx.TimeoutException):
        return CallTimeout(f"no answer in time: {said}")
    if isinstance(error, httpx.RemoteProtocolError) and "too long" in str(error):
        return MalformedResponse(f"the reply has headers without end: {said}")
    if isinstance(error, (httpx.TransportError, OSError)):
        return ConnectionLost(f"the connection broke: {said}")
    if isinstance(error, httpx.DecodingError):
        return MalformedResponse(f"the reply could not be read: {said}")
    return Rejected(f"the SDK broke: {said}", billed="unknown")
