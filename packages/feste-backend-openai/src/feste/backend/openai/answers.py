"""Parse a provider's JSON into the values of calls; pure, so it is free to repeat.

The SDK does not validate answers and there are many servers, so every shape is checked here.
"""

from __future__ import annotations

import array
import base64
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feste.backend import Reply, Request, Response, Usage, instance_of, redact
from feste.errors import CountMismatch, MalformedResponse, OutputMismatch

if TYPE_CHECKING:
    from feste.backend.openai.client import OpenAI

__all__ = [
    "chat_value",
    "complete_value",
    "unpack_choices",
    "unpack_draws",
    "unpack_vectors",
    "usage_of",
    "vector",
]


def chat_value(llm: OpenAI, response: Response, arguments: Mapping[str, Any]) -> Any:
    """Return the value of a ``chat`` call: a Reply or an instance; for several choices a list.

    :param llm: the backend.
    :param response: the response.
    :param arguments: the call's arguments, by name.
    :raises MalformedResponse: if the response does not have the form the endpoint promises.
    """
    wanted = arguments["params"].n or 1
    replies = [_chat_reply(llm, c, response, wanted) for c in _choices(llm, response, wanted)]
    output = arguments["output"]
    values = replies if output is None else [_instance(llm, r, output) for r in replies]
    return values if wanted > 1 else values[0]


def complete_value(llm: OpenAI, response: Response, arguments: Mapping[str, Any]) -> Any:
    """Return the value of a ``complete`` call: a Reply; for several choices a list.

    :param llm: the backend.
    :param response: the response.
    :param arguments: the call's arguments, by name.
    :raises MalformedResponse: if the response does not have the form the endpoint promises.
    """
    wanted = arguments["params"].n or 1
    replies = []
    for choice in _choices(llm, response, wanted):
        text = choice.get("text")
        if not isinstance(text, str):
            raise _malformed(llm, "a choice without text", choice)
        replies.append(_reply(text, None, choice, response, wanted))
    return replies if wanted > 1 else replies[0]


def vector(llm: OpenAI, response: Response, arguments: Mapping[str, Any]) -> array.array[float]:
    """Return the value of an ``embed`` call: the vector as 32-bit floats.

    :param llm: the backend.
    :param response: the response.
    :param arguments: the call's arguments, by name.
    :raises MalformedResponse: if the response does not have the form the endpoint promises.
    """
    items = _list(response.payload, "data")
    if len(items) != 1:
        raise _malformed(llm, f"{len(items)} vectors for one text", response.payload)
    raw = items[0].get("embedding")
    made = array.array("f")
    try:
        if isinstance(raw, str):
            made.frombytes(base64.b64decode(raw, validate=True))
            if sys.byteorder == "big":  # the data is little-endian
                made.byteswap()
        else:  # from a server without base64
            made.extend(raw)  # type: ignore[arg-type]
            if not all(map(math.isfinite, made)):  # a number that is none of 32 bits
                raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise _malformed(llm, "a vector that is neither base64 nor numbers", items[0]) from None
    if not made:
        raise _malformed(llm, "an empty vector", items[0])
    return made


# --- unpacking: one response for many calls -------------------------------------------------------


def unpack_choices(llm: Any, request: Request, response: Response) -> list[Response]:
    """Return the choices of each prompt in a packed completion.

    Choices are matched by index, prompt after prompt: ``index = i * n + j``. Each index must occur
    exactly once, otherwise no answer is used: a server that drops or renumbers choices would give
    answers to the wrong prompts.

    :param llm: the backend.
    :param request: the packed request.
    :param response: its response; its usage covers all prompts together.
    :raises CountMismatch: if the set of indexes is not complete.
    """
    n = request.body.get("n") or 1
    prompts = len(request.body["prompt"])
    choices = _by_index(response.payload, "choices", n * prompts)
    rest = _without(response.payload, "choices", "usage")
    return [
        Response(
            {**rest, "choices": [{**choices[i * n + j], "index": j} for j in range(n)]},
            request_id=response.request_id,
        )
        for i in range(prompts)
    ]


def unpack_draws(llm: Any, request: Request, response: Response) -> list[Response]:
    """Return a response with one choice for each distinct index that was asked for.

    Which draw gets which choice does not matter, but no choice may serve two: one without an index
    of its own may be a copy of another, so it is not used, and fewer responses come back.

    :param llm: the backend.
    :param request: the request for ``n`` answers to one prompt.
    :param response: its response; its usage covers all choices together.
    """
    n = request.body.get("n") or 1
    found: dict[int, dict[str, Any]] = {}
    for choice in _list(response.payload, "choices"):
        index = choice.get("index")
        if type(index) is int and 0 <= index < n:
            found.setdefault(index, choice)
    rest = _without(response.payload, "choices", "usage") if found else {}
    return [
        Response({**rest, "choices": [{**choice, "index": 0}]}, request_id=response.request_id)
        for choice in found.values()
    ]


def unpack_vectors(llm: Any, request: Request, response: Response) -> list[Response]:
    """Return the vector of each text in a packed request, matched by index.

    :param llm: the backend.
    :param request: the packed request.
    :param response: its response.
    :raises CountMismatch: if not every index occurs exactly once.
    """
    items = _by_index(response.payload, "data", len(request.body["input"]))
    return [Response({"data": [item]}, request_id=response.request_id) for item in items]


def _by_index(payload: Any, field: str, count: int) -> list[Any]:
    """Return the items in the order of their indexes; raise unless the set is complete."""
    items = _list(payload, field)
    found = {i["index"]: i for i in items if type(i.get("index")) is int}
    if len(items) != count or found.keys() != set(range(count)):
        raise CountMismatch(
            f"the server answered a request for {count} {field} with {len(items)}, {len(found)} of "
            "them with an index of their own"
        )
    return [found[i] for i in range(count)]


def _without(payload: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if name not in names}


# --- parts of a response --------------------------------------------------------------------------


def usage_of(payload: Any) -> Usage | None:
    """Return the tokens that a provider counted, or None if it does not report them.

    :param payload: the body of the response.

    >>> usage_of({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}})
    Usage(input=9, output=0, cached=8, written=0)
    """
    counted = payload.get("usage") if isinstance(payload, dict) else None
    if not isinstance(counted, dict):
        return None
    given = counted.get("prompt_tokens_details")
    details = given if isinstance(given, dict) else {}
    return Usage(
        _count(counted.get("prompt_tokens")),
        _count(counted.get("completion_tokens")),
        _count(details.get("cached_tokens")),
        _count(details.get("cache_write_tokens")),
    )


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _list(payload: Any, field: str) -> list[dict[str, Any]]:
    """Return the dicts in a list of a response; everything else is ignored."""
    items = payload.get(field) if isinstance(payload, dict) else None
    return [i for i in items if isinstance(i, dict)] if isinstance(items, list) else []


def _choices(llm: OpenAI, response: Response, wanted: int) -> Sequence[dict[str, Any]]:
    choices = _list(response.payload, "choices")
    if wanted == 1 == len(choices):  # some servers give a single choice a wrong index, or none
        return choices
    try:
        return _by_index(response.payload, "choices", wanted)
    except CountMismatch:
        what = f"{len(choices)} choices instead of {wanted}"
    hint = ", each with its number (does it know n? Else write as many calls)" if wanted > 1 else ""
    raise _malformed(llm, what + hint, response.payload)


def _chat_reply(llm: OpenAI, choice: dict[str, Any], response: Response, wanted: int) -> Reply:
    message = choice.get("message")
    if not isinstance(message, dict):
        raise _malformed(llm, "a choice without message", choice)
    text, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(text, (str, type(None))) or not isinstance(calls, (list, type(None))):
        raise _malformed(llm, "a message that is not text", message)
    if not all(isinstance(call, dict) for call in calls or ()):
        raise _malformed(llm, "a tool call that is no object", message)
    # keep it ready to be sent back: endpoints refuse some of the empty fields that they send
    kept = {k: v for k, v in message.items() if k == "content" or v not in (None, [])}
    kept.setdefault("role", "assistant")
    return _reply(text or "", kept, choice, response, wanted)


def _reply(
    text: str,
    message: dict[str, Any] | None,
    choice: dict[str, Any],
    response: Response,
    wanted: int,
) -> Reply:
    finish, model = choice.get("finish_reason"), response.payload.get("model")
    return Reply(
        text,
        message=message,
        finish_reason=finish if isinstance(finish, str) else None,
        usage=response.usage if wanted == 1 else None,  # it covers all choices together
        logprobs=choice.get("logprobs"),
        model=model if isinstance(model, str) else "",
    )


def _instance(llm: OpenAI, reply: Reply, model: Any) -> Any:
    refusal = reply.message.get("refusal")
    if refusal:
        raise _unusable(llm, "the model refused to answer; change the prompt", str(refusal))
    if reply.truncated:
        fix = (
            "raise max_completion_tokens (max_tokens at older servers), or bound the model's fields"
        )
        raise _unusable(llm, f"the answer was cut off, so it is no {model.__name__}: {fix}", reply)
    if reply.tool_calls:
        raise _unusable(
            llm, "the model called tools; leave output= out where tools are given", reply
        )
    try:
        return instance_of(model, str(reply), *llm.secrets)
    except ValueError as error:  # includes pydantic's ValidationError
        why = f"the answer is no {model.__name__} ({_first_fault(error)})"
        fix = "the server may ignore JSON schemas, or the validators ask for more than they say"
    raise _unusable(llm, f"{why}; {fix}", reply)


def _first_fault(error: ValueError) -> str:
    """Say what is wrong with an answer: the first of pydantic's errors, with its field."""
    faults: Any = getattr(error, "errors", None)
    if faults is None:
        return str(error)
    first = faults(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field}: {first['msg']}" if field else str(first["msg"])


def _unusable(llm: OpenAI, why: str, text: str) -> OutputMismatch:
    said = redact(text[:2000], *llm.secrets, limit=200)
    return OutputMismatch(f"{redact(why, *llm.secrets)}. It begins: {said!r}")


def _malformed(llm: OpenAI, what: str, part: Any) -> MalformedResponse:
    said = redact(repr(part)[:2000], *llm.secrets, limit=200)
    return MalformedResponse(f"the server answered with {what}: {said}")
