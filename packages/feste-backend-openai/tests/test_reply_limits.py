"""The limits on what is read of a reply are above whatever a call asked for."""

from __future__ import annotations

import json
import time
import zlib
from typing import Any

import pytest

from feste.backend import Body
from feste.backend.openai import ChatParams, EmbedParams, OpenAI
from feste.backend.openai.requests import chat_request, embed_request, most_bytes, pack_by
from feste.backend.openai.streams import Whole


def chat_text(top: int | None, *, stream: bool) -> str:
    """Return about what OpenAI sends for each token: indented, or an event."""
    if top is None and not stream:
        return " hello"
    entry = {"token": " hello", "logprob": -0.00012345678, "bytes": list(b" hello")}
    token: dict[str, object] = {"content": " hello"}
    if top is not None:
        token["logprobs"] = {**entry, "top_logprobs": [entry] * top}
    frame = {"id": "chatcmpl-" + "x" * 29, "object": "chat.completion.chunk", "created": 1764400000}
    frame |= {"model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_0123456789"}
    frame |= {"choices": [{"index": 0, "finish_reason": None}], "obfuscation": "x" * 12}
    return json.dumps(token | frame) if stream else json.dumps(token, indent=2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [None, 0, 20])
@pytest.mark.parametrize(("tokens", "n"), [(100_000, 1), (100_000, 8), (16_384, 128)])
def test_no_limit_refuses_what_was_asked_for(
    tokens: int, n: int, top: int | None, *, stream: bool
) -> None:
    """A long answer that a call asked for is paid, so it is read."""
    given: dict[str, Any] = {} if top is None else {"logprobs": True, "top_logprobs": top}
    params = ChatParams(max_completion_tokens=tokens, n=n, **given)
    request = chat_request(OpenAI("m", api_key="k"), "Hi", params)

    most, answers = most_bytes(request, stream=stream)
    text = chat_text(top, stream=stream) + "\n\n" * stream
    Body(most=most // 100, answers=answers if stream else None).take(
        text.encode() * (tokens * n // 100)
    )


def test_no_limit_refuses_vectors_of_any_model() -> None:
    """A server that knows no base64 may send 2,048 vectors of 4,096 numbers as text."""
    one = embed_request(OpenAI("m", api_key="k"), "Hi", EmbedParams())
    packed = pack_by("input")(None, [one] * 2_048)

    vector = b"[" + b"-0.012345678901234567, " * 4_096 + b"], "
    Body(most=most_bytes(packed, stream=False)[0] // 64).take(vector * (2_048 // 64))


def test_a_stream_that_packs_well_is_no_bomb() -> None:
    """The frames of its events are all alike, so a piece of it unpacks to much more."""
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "hello"}}]}\n\n'
    packed = zlib.compress(event * 100_000, wbits=31)
    assert len(packed) < 65_536

    body = Body("gzip", most=68 << 20, answers=1)

    assert b"".join(body.parts(packed)) == event * 100_000


def test_long_streams_cost_what_they_have() -> None:
    """100,000 pieces with logprobs take a moment of the loop that all requests share."""
    whole, begun = Whole(), time.process_time()
    for _ in range(100_000):
        choice = {"index": 0, "delta": {"content": " hello"}, "logprobs": {"content": [[]]}}
        whole.add({"choices": [choice]})
    whole.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    (choice,) = whole.payload()["choices"]

    assert time.process_time() - begun < 5
    assert choice["message"]["content"] == " hello" * 100_000
    assert len(choice["logprobs"]["content"]) == 100_000
