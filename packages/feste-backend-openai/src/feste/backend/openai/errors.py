"""Convert exceptions of the SDK and its transport into Feste's errors.

The SDK's exceptions hold the request with its ``Authorization`` header, so tracebacks and pickles
could leak the key; they also cannot be unpickled. The new error is made from redacted text only,
and must be raised outside of any ``except`` block, where Python would keep the old one as its
context.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import httpx2
import openai

from feste.backend import Secret, error_for_status, redact
from feste.errors import (
    CallError,
    CallTimeout,
    ConnectionLost,
    MalformedResponse,
    Rejected,
    Unreachable,
)

__all__ = ["failure", "no_answer", "short", "told"]

#: How many bytes of a body that is no answer are kept.
_RAW = 65_536

#: Nothing was sent, so sending again cannot be billed twice.
_UNSENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    httpx2.ConnectError,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)
#: The connection broke after a part of the request was sent.
_LOST = (openai.APIConnectionError, httpx2.RequestError, aiohttp.ClientError, OSError)


def failure(error: Exception, *, url: str, timeout: float | None, secret: Secret) -> CallError:
    """Return Feste's error for an exception raised while a request was sent.

    The SDK's transport reports a connection that was reset after the request as a connect timeout,
    so the first cause decides and not the SDK's class of error.

    :param error: the exception.
    :param url: the URL of the request.
    :param timeout: the time limit of the attempt in seconds.
    :param secret: the key to redact.
    """
    for step in _causes(error):  # the SDK wraps what is raised below it
        if isinstance(step, CallError):
            return _redacted(step, secret)
    if type(error) is TimeoutError:  # from our own limit
        return _too_late(url, timeout)
    if isinstance(error, openai.APIStatusError):
        response = error.response
        return told(response.status_code, response.text, dict(response.headers), secret)
    causes = list(_causes(error))
    said = redact(str(causes[-1])[:2000], secret, limit=200) or type(causes[-1]).__name__
    if isinstance(error, openai.APIError) and not isinstance(error, openai.APIConnectionError):
        return _failed_in_stream(error, secret)
    if any(map(_is_unreadable, causes)):
        return MalformedResponse(f"{url} answered with what nobody can read: {said}")
    if any(isinstance(e, ssl.SSLCertVerificationError) for e in causes):
        return Rejected(f"the certificate of {url} is not trusted, so nothing was sent: {said}")
    if any(isinstance(e, _UNSENT) or _was_closed(e) for e in causes):
        return Unreachable(f"no connection to {url}: {said}")
    if any(isinstance(e, TimeoutError) for e in causes):
        return _too_late(url, timeout)
    if any(isinstance(e, _LOST) for e in causes):
        return ConnectionLost(f"the connection to {url} broke before the answer was whole: {said}")
    return Rejected(
        f"the request to {url} failed: {type(error).__name__}: {said}", billed="unknown"
    )


def _is_unreadable(error: BaseException) -> bool:
    """Whether an answer came whose headers are without end, or whose JSON is none or too deep."""
    if isinstance(error, (aiohttp.http_exceptions.LineTooLong, RecursionError)):
        return True
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return True
    too_long = ("Too many headers", "Receive buffer too long", "too many header")
    return any(text in str(error) for text in too_long)


def _redacted(error: CallError, secret: Secret) -> CallError:
    made = error.copy()
    made.__cause__ = None
    if isinstance(made, MalformedResponse) and made.raw is not None:
        made.raw = redact(made.raw, secret, limit=_RAW)
    return made


def _was_closed(error: BaseException) -> bool:
    """Whether a kept connection turned out to be closed before the whole body was written.

    A partial body is not a request, so nothing was billed. Only this message proves that: other
    errors of the class may occur after the last byte.
    """
    reset = isinstance(error, aiohttp.ClientConnectionResetError)
    return reset and "write to closing transport" in str(error)


def _too_late(url: str, timeout: float | None) -> CallTimeout:
    given = "its time" if timeout is None else f"{timeout:g} seconds"
    return CallTimeout(
        f"{url} gave no whole answer within {given}; the client's timeout= is for one attempt"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


def told(status: int, text: str, headers: Mapping[str, str], secret: Secret) -> CallError:
    """Return the error for an HTTP reply that is not an answer.

    :param status: the HTTP status.
    :param text: the body.
    :param headers: the headers, names in lower case.
    :param secret: the key to redact.
    """
    request_id = short(headers.get("x-request-id"), secret)
    message, code = _message(text)
    message = message[:2000]
    if status == 404 and "model" not in message.lower():  # the path is unknown, not the model
        message = (
            f"{message.strip() or 'not found'} (does base_url end as the server wants, in /v1?)"
        )
    return error_for_status(
        status,
        message,
        code=short(code, secret),
        headers=headers,
        request_id=request_id,
        secret=secret,
    )


def _message(text: str) -> tuple[str, str | None]:
    """Return the message and the code from an error's body, in any of the servers' formats."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text, None
    error: Any = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        code = error.get("code")
        said = error.get("message") or error.get("detail") or error
        return (
            said if isinstance(said, str) else json.dumps(said),
            str(code if isinstance(code, str) else error.get("type") or code or "") or None,
        )
    return (error, None) if isinstance(error, str) else (text, None)


def short(text: str | None, secret: Secret) -> str | None:
    """Shorten a name from a server and redact the key in it; None stays None.

    :param text: the name.
    :param secret: the key to redact.
    """
    return None if text is None else redact(text, secret, limit=100)


def _failed_in_stream(error: openai.APIError, secret: Secret) -> CallError:
    """Return an error sent within a stream: the status was 200, and tokens were generated."""
    made = told(_status_in(error.body), json.dumps({"error": error.body}, default=str), {}, secret)
    made.billed = "unknown"
    return made


def _status_in(body: Any) -> int:
    code = body.get("code") if isinstance(body, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def no_answer(
    payload: Any, content: bytes, *, kind: str, why: str = "", url: str, secret: Secret
) -> CallError | None:
    """Return the error for a reply of status 200 without an answer, or None if it has one.

    :param payload: the body as JSON, or None if it is not JSON.
    :param content: the body.
    :param kind: its content type.
    :param why: why it is not JSON.
    :param url: the URL of the request.
    :param secret: the key to redact.
    """
    if isinstance(payload, dict):
        error = payload.get("error")
        if not isinstance(error, dict) or "choices" in payload or "data" in payload:
            return None
        # some gateways send 200 before they have called the server behind them
        return told(_status_in(error), json.dumps(payload), {}, secret)
    said = redact(content[:2000].decode(errors="replace").strip(), secret, limit=200)
    error = MalformedResponse(
        f"{url} answered 200 with {redact(kind, secret, limit=60) or 'something'} that is no JSON "
        f"object{f' ({why[:100]})' if why else ''}; is base_url right? It begins: {said!r}"
    )
    error.raw = redact(content[:_RAW].decode(errors="replace"), secret, limit=_RAW)
    return error
