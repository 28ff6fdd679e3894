"""From what a failed request left behind to Feste's errors; no key gets into one."""

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
    """Return the error that an HTTP reply is.

    :param status: its status.
    :param content: its body.
    :param headers: its headers, names in lower case.
    :param secret: the key that was used.
    """
    try:
        said = json.loads(content)
    except ValueError:
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
    if status == 499:  # "request cancelled", on Cohere's side: it asks to try again
        return _as(ServerError, error)
    if status == 429 and "/ month" in str(error):  # a trial key has used up its month
        return _as(QuotaExhausted, error)
    return error


def short(name: object, secret: Secret) -> str | None:
    """Return the name of a request, cut and without the key; None for what is no text.

    :param name: what the server gave.
    :param secret: the key that was used.
    """
    return redact(name, secret, limit=100) if isinstance(name, str) else None


def _as(kind: type[CallError], error: CallError) -> CallError:
    made = kind(*error.args)
    made.__dict__.update(error.__dict__)
    return made


def failure(error: Exception, secret: Secret) -> CallError:
    """Return Feste's error for one that the SDK or httpx raised instead of a reply.

    :param error: the exception; only its class and its text, without the key, are kept.
    :param secret: the key that was used.
    """
    import httpx

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
    if isinstance(error, (httpx.TransportError, OSError)):
        return ConnectionLost(f"the connection broke: {said}")
    if isinstance(error, httpx.DecodingError):
        return MalformedResponse(f"the reply could not be read: {said}")
    return Rejected(f"the SDK broke: {said}", billed="unknown")
