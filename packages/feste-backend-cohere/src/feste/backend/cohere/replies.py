"""Parse Cohere's JSON into values, checking the count and shape of every reply."""

from __future__ import annotations

import array
import base64
import binascii
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from feste.backend import Reply, Response, Secret, Usage, instance_of
from feste.errors import CountMismatch, MalformedResponse, OutputMismatch

__all__ = ["chat_reply", "generations", "instance", "split", "usage", "vectors"]

_FINISH = {"COMPLETE": "stop", "MAX_TOKENS": "length", "TOOL_CALL": "tool_calls"}
_TYPECODES = {"float": "f", "int8": "b", "uint8": "B", "binary": "b", "ubinary": "B"}


def usage(payload: Mapping[str, Any]) -> Usage | None:
    """Return the billed tokens of a reply, or None if it does not report them.

    :param payload: the reply.

    >>> usage({"usage": {"billed_units": {"input_tokens": 7.0, "output_tokens": 2.0}}})
    Usage(input=7, output=2, cached=0, written=0)
    """
    counted = payload.get("usage") or payload.get("meta")
    billed = counted.get("billed_units") if isinstance(counted, dict) else None
    if not isinstance(billed, dict) or not {"input_tokens", "output_tokens"} & billed.keys():
        return None
    return Usage(
        _count(billed.get("input_tokens")),
        _count(billed.get("output_tokens")),
        _count(counted.get("cached_tokens")) if isinstance(counted, dict) else 0,
    )


def _count(value: Any) -> int:
    return int(value) if type(value) in (int, float) and 0 <= value < 2**53 else 0


def chat_reply(payload: Any, model: str) -> Reply:
    """Return the answer of ``/v2/chat``.

    :param payload: the reply.
    :param model: the requested model.
    :raises MalformedResponse: if the reply does not have the form the endpoint promises, or stopped
        before any answer. A partial answer before an ``ERROR`` or ``TIMEOUT`` is ``truncated``.
    """
    payload = _checked(payload, dict, "the reply")
    message = _checked(payload.get("message"), dict, "message")
    reason = _checked(payload.get("finish_reason"), str, "finish_reason")
    for call in _checked(message.get("tool_calls") or [], list, "message.tool_calls"):
        _checked(call, dict, "a tool call")
    text = _text(message.get("content"))
    if reason in ("ERROR", "TIMEOUT") and not text and not message.get("tool_calls"):
        raise MalformedResponse(f"Cohere broke off before there was an answer: {reason}")
    return Reply(
        text,
        message={"role": "assistant", **message},
        finish_reason=_FINISH.get(reason, reason.lower()),
        usage=usage(payload),
        logprobs=payload.get("logprobs"),
        model=model,
    )


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [_checked(p, dict, "a part") for p in _checked(content, list, "message.content")]
    texts = [p for p in parts if p.get("type") == "text"]
    return "".join(_checked(p.get("text"), str, "the text of a part") for p in texts)


def instance(reply: Reply, model: Any, *secrets: Secret | None) -> Any:
    """Parse a JSON answer into an instance of a pydantic model.

    :param reply: the answer.
    :param model: the model.
    :param secrets: keys that are redacted in errors.
    :raises OutputMismatch: if the answer was cut off or does not fit the model.
    """
    if reply.truncated:
        raise OutputMismatch(
            f"the answer was cut off ({reply.finish_reason}) before it was a whole "
            f"{model.__name__}; allow more max_tokens or a shorter answer"
        )
    try:
        return instance_of(model, str(reply), *secrets)
    except ValueError as error:  # from pydantic; it holds the whole answer
        details: list[Any] = getattr(error, "errors", list)()
    wrong = [f"{'.'.join(map(str, d['loc'])) or 'all'}: {d['msg']}" for d in details[:3]]
    raise OutputMismatch(f"the answer is no {model.__name__}: {'; '.join(wrong)}")


def generations(payload: Any, count: int, model: str) -> list[Reply]:
    """Return the answers of ``/v1/generate``.

    :param payload: the reply.
    :param count: the number of answers asked for.
    :param model: the requested model.
    :raises CountMismatch: if there are more or fewer.
    :raises MalformedResponse: if the reply does not have the form the endpoint promises.
    """
    payload = _checked(payload, dict, "the reply")
    made = [
        _checked(one, dict, "a generation")
        for one in _checked(payload.get("generations"), list, "generations")
    ]
    if len(made) != count:
        raise CountMismatch(f"{len(made)} generations came for the {count} asked for")
    if all(type(one.get("index")) is int for one in made):
        made.sort(key=lambda one: int(one["index"]))
    whole = usage(payload) if count == 1 else None
    return [_generation(one, whole, model) for one in made]


def _generation(one: Mapping[str, Any], whole: Usage | None, model: str) -> Reply:
    reason = one.get("finish_reason")
    return Reply(
        _checked(one.get("text"), str, "the text of a generation"),
        finish_reason=_FINISH.get(reason, reason.lower()) if isinstance(reason, str) else None,
        usage=whole,
        logprobs=one.get("token_likelihoods"),
        model=model,
    )


def split(payload: Any, kinds: Sequence[str], count: int) -> list[Response]:
    """Split a reply of ``/v2/embed`` for many texts into one reply for each.

    :param payload: the reply.
    :param kinds: the requested formats of vectors.
    :param count: the number of texts.
    :raises CountMismatch: if there are more or fewer vectors.
    :raises MalformedResponse: if the reply does not have the form the endpoint promises.
    """
    columns = {kind: _column(payload, kind, count) for kind in kinds}
    return [
        Response({"embeddings": {kind: [column[i]] for kind, column in columns.items()}})
        for i in range(count)
    ]


def vectors(payload: Any, kinds: Sequence[str]) -> dict[str, array.array[Any]]:
    """Return the vectors of one text by format.

    :param payload: the reply for this text.
    :param kinds: the requested formats.
    :raises CountMismatch: if the number of texts in the reply is not 1.
    :raises MalformedResponse: if the reply does not have the form the endpoint promises.
    """
    return {kind: _vector(_column(payload, kind, 1)[0], kind) for kind in kinds}


def _column(payload: Any, kind: str, count: int) -> list[Any]:
    forms = _checked(_checked(payload, dict, "the reply").get("embeddings"), dict, "embeddings")
    column: list[Any] = _checked(forms.get(kind), list, f"embeddings.{kind}")
    if len(column) != count:
        raise CountMismatch(f"{len(column)} vectors came for {count} texts")
    return column


def _vector(values: Any, kind: str) -> array.array[Any]:
    try:
        if kind != "base64":
            numbers = _checked(values, list, f"a vector of embeddings.{kind}")
            made = array.array(_TYPECODES.get(kind, "f"), numbers)
            if not all(map(math.isfinite, made)):  # a number that is none of 32 bits
                raise ValueError
        else:  # little-endian 32-bit floats
            made = array.array("f")
            made.frombytes(base64.b64decode(values, validate=True))
            if sys.byteorder == "big":
                made.byteswap()
    except (TypeError, ValueError, OverflowError, binascii.Error):
        raise MalformedResponse(f"a vector of embeddings.{kind} holds no such numbers") from None
    if not made:
        raise MalformedResponse(f"a vector of embeddings.{kind} is empty")
    return made


def _checked(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise MalformedResponse(
            f"Cohere's reply is not as promised: {name} is "
            f"{'missing' if value is None else f'a {type(value).__name__}'}, not a {kind.__name__}"
        )
    return value
