"""The send half with `on_chunk`: pieces are handed over as they come, and the whole is returned."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from feste.backend import Response, Usage
from feste.backend.clients import close_clients
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.backend.openai.streams import Whole
from feste.backend.openai.testing import answer
from feste.errors import CallError, ConnectionLost, MalformedResponse, ServerError
from feste.testing.sim_server import Fault, SimServer


@pytest.fixture
def llm(server: SimServer) -> OpenAI:
    return OpenAI("m", base_url=f"{server.url}/v1")


def send(call: Any, prompt: Any, params: Any, on_chunk: Any = None) -> tuple[Response, Any]:
    """Prepare, send and parse one call by its halves."""
    arguments = [prompt, params] + [None] * (call.name == "chat")

    async def go() -> Response:
        try:
            answered: Response = await call.send(call.prepare(arguments), on_chunk)
            return answered
        finally:
            await close_clients(asyncio.get_running_loop())

    response = asyncio.run(go())
    return response, call.parse(response, arguments)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("prompt", "given"),
    [
        ("one two three", {}),
        ("one two three", {"max_tokens": 3}),
        ("one two three", {"n": 3}),
        ("one two three", {"logprobs": True}),
        ('CALL: add {"a": 1}', {"tools": [TOOL]}),
    ],
)
def test_a_streamed_chat_is_the_unstreamed_one(
    llm: OpenAI, prompt: str, given: dict[str, Any]
) -> None:
    """Streamed or not, the same request gives the same value, usage and tool calls included."""
    params = ChatParams(temperature=0, **given)
    pieces: list[str] = []
    response, streamed = send(llm.chat, prompt, params, pieces.append)
    plain_response, plain = send(llm.chat, prompt, params)
    for one, other in zip(_several(streamed), _several(plain), strict=True):
        assert one == other
        assert vars(one) == vars(other)
    assert response.usage == plain_response.usage
    assert response.payload.keys() == plain_response.payload.keys()
    assert response.payload["object"] == "chat.completion"
    first = _several(plain)[0]
    assert "".join(pieces) == first
    assert len(pieces) > 1 or not first


def test_a_streamed_completion_is_the_unstreamed_one(llm: OpenAI, server: SimServer) -> None:
    """The same for completions; what the user says of the stream is sent with streams only."""
    params = CompleteParams(temperature=0, stream_options={"x": 1})
    pieces: list[str] = []
    response, streamed = send(llm.complete, "one two", params, pieces.append)
    plain_response, plain = send(llm.complete, "one two", params)
    assert streamed == plain == "".join(pieces) == answer("one two")
    assert vars(streamed) == vars(plain)
    assert response.usage == plain_response.usage == Usage(2, 8)
    one, other = (request.body for request in server.requests())
    assert one["stream"] is True and one["stream_options"] == {"include_usage": True, "x": 1}
    assert "stream" not in other and "stream_options" not in other


def test_pieces_come_before_the_end(llm: OpenAI, server: SimServer) -> None:
    """A piece is handed over when it comes: the request is still in flight then."""
    server.add(Fault(kind="drip", pause=0.02))
    flying: list[int] = []
    send(llm.chat, "one two", ChatParams(), lambda piece: flying.append(server.totals().in_flight))
    assert flying[0] == 1


def test_lists_and_vectors_are_not_streamed(llm: OpenAI, server: SimServer) -> None:
    """Only single texts are streamed: a vector, or a list of prompts, comes whole."""
    pieces: list[str] = []
    send(llm.embed, "hello", EmbedParams(), pieces.append)
    call: Any = llm.complete
    requests = [call.prepare([text, CompleteParams()]) for text in "ab"]
    packed = call.rule.pack(llm, requests)

    async def go() -> Response:
        try:
            return await call.send(packed, pieces.append)  # type: ignore[no-any-return]
        finally:
            await close_clients(asyncio.get_running_loop())

    assert len(asyncio.run(go()).payload["choices"]) == 2
    assert pieces == []
    assert not any(request.body.get("stream") for request in server.requests())


def test_a_stream_that_breaks_off(llm: OpenAI, server: SimServer) -> None:
    """Half an answer is none: it may have been billed, and the SDK's exception stays inside."""
    server.add(Fault(kind="truncated"))
    with pytest.raises(ConnectionLost) as caught:
        send(llm.chat, "one two", ChatParams(), str)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        (['{"error": {"message": "overloaded"}}'], ServerError),
        (["not json"], CallError),
        (["[DONE]"], MalformedResponse),
        (["null", "[DONE]"], MalformedResponse),
        (['{"choices": [{"index": 0, "delta": {"content": "x"}}]}', "[DONE]"], ConnectionLost),
    ],
)
def test_streams_that_are_no_answer(
    llm: OpenAI, server: SimServer, events: list[str], kind: type[CallError]
) -> None:
    """An error among the pieces, rubbish, and a stream without an end are errors of the tree."""
    body = "".join(f"data: {event}\n\n" for event in events)
    server.add(Fault(kind="garbage", body=body, headers={"content-type": "text/event-stream"}))
    with pytest.raises(kind) as caught:
        send(llm.chat, "one", ChatParams(), str)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert caught.value.billed in ("unknown", "yes")


def test_pieces_of_tool_calls_go_together_by_number() -> None:
    """Calls of tools come in turns; names and ids come whole, arguments in pieces."""
    whole = Whole()
    for index, function in (
        (0, {"name": "add", "arguments": ""}),
        (1, {"name": "sub", "arguments": '{"b"'}),
        (0, {"arguments": '{"a": '}),
        (1, {"name": None, "arguments": ": 2}"}),
        (0, {"name": "", "arguments": "1}"}),
    ):
        call = {"index": index, "id": f"c{index}", "type": "function", "function": function}
        whole.add({"choices": [{"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}}]})
    whole.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    (choice,) = whole.payload()["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
            {"id": "c1", "type": "function", "function": {"name": "sub", "arguments": '{"b": 2}'}},
        ],
    }


def test_many_tool_calls_take_no_long_time() -> None:
    """A server may send as many as it likes; more than an answer can have are refused."""
    whole, begun = Whole(), time.process_time()
    calls = [{"index": i, "function": {"arguments": "{"}} for i in range(10_000)]
    for piece in (calls, calls[::-1]):
        whole.add({"choices": [{"delta": {"tool_calls": piece}, "finish_reason": "tool_calls"}]})
    (choice,) = whole.payload()["choices"]

    assert choice["message"]["tool_calls"] == [{"function": {"arguments": "{{"}}] * 10_000
    assert time.process_time() - begun < 2
    more = [{"index": i} for i in range(10_001)]
    for choices in ([{"delta": {"tool_calls": more}}], more):
        with pytest.raises(MalformedResponse, match="too many"):
            Whole().add({"choices": choices})


def test_a_token_named_index_is_no_number() -> None:
    """Log-probabilities are lists of dicts by token, which must not be taken for numbered parts."""
    whole = Whole()
    for token in ("index", "index"):
        logged = {"tokens": [token], "top_logprobs": [{token: -0.5}]}
        whole.add({"choices": [{"index": 0, "text": token, "logprobs": logged}]})
    whole.add({"choices": [{"index": 0, "text": "", "finish_reason": "stop", "logprobs": None}]})
    (choice,) = whole.payload()["choices"]
    assert choice["logprobs"] == {"tokens": ["index"] * 2, "top_logprobs": [{"index": -0.5}] * 2}
    assert json.dumps(choice["text"]) == '"indexindex"'


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
