"""The official Cohere SDK against `SimServer` over a real socket."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import cohere
import httpx
import pytest
from cohere.core import ApiError

import feste
from feste.backend import PromptCache
from feste.backend.cohere import Cohere
from feste.backend.cohere.testing import CohereWire, answer, embedding, json_answer
from feste.errors import QuotaExhausted
from feste.testing import Billed, Fault, ServerLimits, SimServer

WIRE = "feste.backend.cohere.testing:CohereWire"


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def connect(server: SimServer, http: httpx.Client, key: str = "test") -> cohere.ClientV2:
    return cohere.ClientV2(
        api_key=key, base_url=server.url, httpx_client=http, max_retries=0, timeout=60
    )


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[SimServer, cohere.ClientV2]]:
    with SimServer(WIRE) as server, httpx.Client() as http:
        yield server, connect(server, http)


@pytest.fixture
def server(pair: tuple[SimServer, cohere.ClientV2]) -> SimServer:
    pair[0].reset()
    return pair[0]


@pytest.fixture
def client(pair: tuple[SimServer, cohere.ClientV2], server: SimServer) -> cohere.ClientV2:
    return pair[1]


def text_of(reply: Any) -> str:
    (part,) = reply.message.content
    assert part.type == "text"
    return str(part.text)


class TestChat:
    def test_greedy_and_sampled_chats(self, server: SimServer, client: cohere.ClientV2) -> None:
        for _ in range(2):
            reply = client.chat(model="m", messages=user("one two"), temperature=0)
            assert text_of(reply) == answer("one two")
            assert reply.finish_reason == "COMPLETE"
            assert reply.usage is not None and reply.usage.billed_units is not None
            assert reply.usage.billed_units.input_tokens == 2
            assert reply.usage.billed_units.output_tokens == 8
        texts = [text_of(client.chat(model="m", messages=user("hi"))) for _ in range(3)]
        assert texts == [answer("hi", i) for i in range(3)]
        assert text_of(client.chat(model="m", messages=user("hi"), seed=4)) == answer("hi", seed=4)
        assert len(server.ledger()) == 6
        assert {entry.headers["authorization"] for entry in server.requests()} == {"Bearer ***"}

    def test_a_scripted_reply_is_cut(self, client: cohere.ClientV2) -> None:
        reply = client.chat(model="m", messages=user("REPLY: a b c"), max_tokens=2, logprobs=True)
        assert (text_of(reply), reply.finish_reason) == ("a b", "MAX_TOKENS")
        assert reply.logprobs is not None
        assert [item.text for item in reply.logprobs] == ["a ", "b"]

    def test_json_of_a_schema(self, client: cohere.ClientV2) -> None:
        schema = {
            "type": "object",
            "properties": {"city": {"type": "string"}, "size": {"type": "integer", "minimum": 2}},
            "required": ["city", "size"],
        }
        for wanted in (schema, None):
            form: Any = {"type": "json_object", "json_schema": wanted}
            reply = client.chat(model="m", messages=user("hi"), seed=1, response_format=form)
            made = json.loads(text_of(reply))
            mark = answer("hi", seed=1).split()[0]
            assert made == ({"city": mark, "size": 2} if wanted else {"echo": mark})
        assert json_answer(user("hi"), schema, seed=1) == json.dumps({"city": mark, "size": 2})

    def test_tools(self, client: cohere.ClientV2) -> None:
        parameters = {
            "type": "object",
            "properties": {"x": {"type": "integer"}},
            "required": ["x"],
        }
        tools: Any = [{"type": "function", "function": {"name": "go", "parameters": parameters}}]
        reply = client.chat(model="m", messages=user("hi"), tools=tools, tool_choice="REQUIRED")
        assert reply.finish_reason == "TOOL_CALL"
        assert reply.message.tool_calls is not None
        (call,) = reply.message.tool_calls
        assert call.function is not None and call.function.name == "go"
        assert call.function.arguments == '{"x": 0}'

        script = user('CALL: go {"x": 7}\nREPLY: done')
        assert text_of(client.chat(model="m", messages=script, tools=tools, tool_choice="NONE"))
        reply = client.chat(model="m", messages=script, tools=tools)
        assert reply.message.tool_calls is not None
        (call,) = reply.message.tool_calls
        assert call.function is not None and call.function.arguments == '{"x": 7}'
        script += [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call.id, "content": "7"},
        ]
        assert text_of(client.chat(model="m", messages=script, tools=tools)) == "done"

    def test_a_stream(self, server: SimServer, client: cohere.ClientV2) -> None:
        events = list(client.chat_stream(model="m", messages=user("hi"), temperature=0))

        kinds = [event.type for event in events]
        assert kinds[:2] == ["message-start", "content-start"]
        assert kinds[2:-2] == ["content-delta"] * 8
        assert kinds[-2:] == ["content-end", "message-end"]
        deltas: list[Any] = [event for event in events if event.type == "content-delta"]
        assert "".join(event.delta.message.content.text for event in deltas) == answer("hi")
        end: Any = events[-1]
        assert end.delta.finish_reason == "COMPLETE"
        assert end.delta.usage.tokens.output_tokens == 8
        assert server.requests()[0].items == 1

    def test_a_stream_of_a_tool_call(self, client: cohere.ClientV2) -> None:
        tools: Any = [{"type": "function", "function": {"name": "go", "parameters": {}}}]
        events: list[Any] = list(
            client.chat_stream(model="m", messages=user('CALL: go {"x": 1}'), tools=tools)
        )
        kinds = [event.type for event in events]
        calls = ["tool-call-start", "tool-call-delta", "tool-call-end"]
        assert kinds == ["message-start", *calls, "message-end"]
        assert events[1].delta.message.tool_calls.function.name == "go"
        assert events[2].delta.message.tool_calls.function.arguments == '{"x": 1}'
        assert events[-1].delta.finish_reason == "TOOL_CALL"


class TestEmbed:
    def test_vectors_of_texts(self, server: SimServer, client: cohere.ClientV2) -> None:
        reply = client.embed(
            model="m",
            input_type="search_document",
            texts=["a", "b c"],
            embedding_types=["float", "int8", "base64"],
            output_dimension=256,
        )
        vectors = [embedding("a", 256), embedding("b c", 256)]
        assert reply.embeddings.float_ == vectors
        assert reply.embeddings.base64 is not None
        data = [base64.b64decode(text) for text in reply.embeddings.base64]
        assert [list(struct.unpack("<256f", one)) for one in data] == vectors
        assert reply.embeddings.int8 is not None
        assert reply.embeddings.int8[0][0] == round(127 * vectors[0][0])
        assert reply.texts == ["a", "b c"]
        assert reply.meta is not None and reply.meta.billed_units is not None
        assert reply.meta.billed_units.input_tokens == 3
        assert server.requests()[0].items == 2
        assert [entry["prompt"] for entry in server.ledger()] == ["a", "b c"]

    def test_float_is_the_default_and_inputs_do_too(self, client: cohere.ClientV2) -> None:
        inputs: Any = [{"content": [{"type": "text", "text": text}]} for text in ("a", "b")]
        reply = client.embed(model="m", input_type="search_query", inputs=inputs)
        assert reply.embeddings.float_ == [embedding("a"), embedding("b")]
        assert reply.embeddings.int8 is None

    def test_limits(self, server: SimServer, client: cohere.ClientV2) -> None:
        most = [f"text {i}" for i in range(96)]
        reply = client.embed(model="m", input_type="search_query", texts=most)
        assert reply.embeddings.float_ is not None and len(reply.embeddings.float_) == 96

        bad: list[dict[str, Any]] = [
            {"texts": [*most, "one more"]},
            {"texts": []},
            {"texts": ["a", ""]},
            {"texts": ["a"], "embedding_types": ["binary"]},
            {"texts": ["a"], "input_type": None},
            {"texts": ["a"], "model": None},
            {"inputs": [{"content": []}]},
        ]
        for wrong in bad:
            whole = {"model": "m", "input_type": "search_query", **wrong}
            with pytest.raises(cohere.BadRequestError) as error:
                client.embed(**whole)
            assert error.value.body["message"].startswith("invalid request: ")
        assert len(server.ledger()) == 96


class TestGenerate:
    def test_generations(self, server: SimServer, client: cohere.ClientV2) -> None:
        reply = client.generate(prompt="hi", num_generations=3)
        assert [made.text for made in reply.generations] == [answer("hi", i) for i in range(3)]
        assert [made.index for made in reply.generations] == [0, 1, 2]
        reply = client.generate(prompt="hi", temperature=0, max_tokens=1)
        assert [made.text for made in reply.generations] == [answer("hi").split()[0]]
        assert reply.meta is not None and reply.meta.billed_units is not None
        assert reply.meta.billed_units.output_tokens == 1
        assert [entry.items for entry in server.requests()] == [3, 1]

    def test_what_is_refused(self, client: cohere.ClientV2) -> None:
        bad: list[dict[str, Any]] = [{"prompt": ""}, {"prompt": "hi", "num_generations": 6}]
        for wrong in bad:
            with pytest.raises(cohere.BadRequestError):
                client.generate(**wrong)


class TestPromptCache:
    def test_chats_read_what_was_read_before(self) -> None:
        cache = PromptCache(minimum=2, lag=0, write=1.0)
        with SimServer(WIRE, prompt_cache=cache) as server, httpx.Client() as http:
            client = connect(server, http)
            for text, cached in (("a b c", 0), ("a b c", 3), ("a b d", 2)):
                reply = client.chat(model="m", messages=user(text))
                assert reply.usage is not None and reply.usage.billed_units is not None
                assert (reply.usage.cached_tokens, reply.usage.billed_units.input_tokens) == (
                    cached,
                    3,
                )
            (*_, last) = client.chat_stream(model="m", messages=user("a b c"))
            assert last.type == "message-end" and last.delta is not None
            assert last.delta.usage is not None and last.delta.usage.cached_tokens == 3
            client.chat(model="other", messages=user("a b c"))

            billed = server.totals().billed
            assert (billed.cached_tokens, billed.written_tokens, billed.output_tokens) == (8, 7, 40)
            assert billed.input_units == pytest.approx(0.1 * 8 + 7)

    def test_all_endpoints_are_billed(self, server: SimServer, client: cohere.ClientV2) -> None:
        client.chat(model="m", messages=user("one two"))
        client.generate(prompt="three", num_generations=2)
        client.embed(model="m", input_type="search_query", texts=["four", "five"])

        assert server.totals().billed == Billed(5, output_tokens=24, input_units=5)


class TestQuirks:
    def test_too_few_and_too_many_vectors(self) -> None:
        a, b = embedding("a"), embedding("b")
        for lists, vectors in (("first_only", [a]), ("extra", [a, b, b])):
            options = {"lists": lists}
            with SimServer(WIRE, wire_options=options) as server, httpx.Client() as http:
                client = connect(server, http)
                kinds: list[Any] = ["float", "base64"]
                reply = client.embed(
                    model="m", input_type="search_query", texts=["a", "b"], embedding_types=kinds
                )
                assert reply.embeddings.float_ == vectors
                assert reply.embeddings.base64 is not None
                assert len(reply.embeddings.base64) == len(vectors)
                reply = client.embed(model="m", input_type="search_query", texts=["a"])
                assert reply.embeddings.float_ == [a]
                assert server.requests()[0].items == (1 if lists == "first_only" else 2)

    def test_one_poisoned_item_spoils_a_request(self) -> None:
        options = {"poison": "bad luck"}
        with SimServer(WIRE, wire_options=options) as server, httpx.Client() as http:
            client = connect(server, http)
            texts = ["good", "bad luck"]
            for ask in (
                lambda: client.embed(model="m", input_type="search_query", texts=texts),
                lambda: client.generate(prompt="some bad luck"),
                lambda: client.chat(model="m", messages=[*user("bad luck"), *user("hi")]),
            ):
                with pytest.raises(cohere.BadRequestError) as error:
                    ask()
                assert "luck" not in str(error.value.body)
            assert server.ledger() == [] and server.totals().billed == Billed()
            assert client.generate(prompt="bad").generations

    def test_a_quirk_that_there_is_not(self) -> None:
        unknown: Any = "shuffled"
        with pytest.raises(ValueError, match="is none of"):
            CohereWire(lists=unknown)


class TestErrors:
    def test_the_key(self) -> None:
        options = {"require_key": "right", "max_texts": 1, "dimensions": 3}
        with SimServer(WIRE, wire_options=options) as server, httpx.Client() as http:
            with pytest.raises(cohere.UnauthorizedError):
                connect(server, http).chat(model="m", messages=user("hi"))
            known = connect(server, http, "right")
            reply = known.embed(model="m", input_type="search_query", texts=["a"])
            assert reply.embeddings.float_ == [embedding("a", 3)]
            with pytest.raises(cohere.BadRequestError, match="at most 1"):
                known.embed(model="m", input_type="search_query", texts=["a", "b"])

    def test_what_is_refused(self, server: SimServer, client: cohere.ClientV2) -> None:
        nothing: Any = []
        with pytest.raises(cohere.BadRequestError):
            client.chat(model="m", messages=nothing)
        with pytest.raises(cohere.NotFoundError):
            client.rerank(model="m", query="hi", documents=["a"])
        assert server.ledger() == []

    @pytest.mark.parametrize(
        ("fault", "error", "billed"),
        [
            (Fault(status=429), cohere.TooManyRequestsError, 0),
            (Fault(status=502), ApiError, 0),
            (Fault(kind="reset_before"), httpx.ReadError, 0),
            (Fault(kind="reset_after"), httpx.ReadError, 1),
            (Fault(kind="truncated"), httpx.RemoteProtocolError, 1),
            (Fault(kind="garbage"), ApiError, 1),
        ],
        ids=lambda value: getattr(value, "kind", None),
    )
    def test_what_the_sdk_makes_of_a_fault(
        self,
        server: SimServer,
        client: cohere.ClientV2,
        fault: Fault,
        error: type[Exception],
        billed: int,
    ) -> None:
        server.add(fault)
        with pytest.raises(error):
            client.chat(model="m", messages=user("hi"))
        assert len(server.ledger()) == billed
        assert client.chat(model="m", messages=user("hi"), temperature=0).message is not None

    def test_the_sdk_retries_what_it_should(
        self, server: SimServer, client: cohere.ClientV2
    ) -> None:
        server.add(Fault(status=429, headers={"retry-after": "0"}, path="/v2/chat"))
        reply = client.chat(
            model="m", messages=user("hi"), temperature=0, request_options={"max_retries": 1}
        )
        assert text_of(reply) == answer("hi")
        assert [entry.status for entry in server.requests()] == [429, 200]

    def test_an_account_without_calls_is_no_rate_limit(self, server: SimServer) -> None:
        server.add(Fault(kind="quota", times=2))  # it is asked once more, to be sure
        llm = Cohere("m", base_url=server.url)
        (error,) = feste.compute(llm.chat("hi"), on_error="return")

        assert isinstance(error, QuotaExhausted)


def test_limits_are_told_in_headers_but_not_with_a_429() -> None:
    limits = ServerLimits(requests_per_minute=2, tokens_per_minute=1_000)
    with SimServer(WIRE, limits=limits) as server, httpx.Client(base_url=server.url) as http:
        body = {"model": "m", "messages": user("hi")}
        replies = [http.post("/v2/chat", json=body) for _ in range(3)]

    names = ["x-trial-endpoint-call-limit", "x-trial-endpoint-call-remaining"]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert [[reply.headers.get(name) for name in names] for reply in replies] == [
        ["2", "1"],
        ["2", "0"],
        [None, None],
    ]


def test_both_providers_on_one_port() -> None:
    other = pytest.importorskip("feste.backend.openai.testing")
    wires = [WIRE, f"{other.__name__}:OpenAIWire"]
    with SimServer(wires) as server, httpx.Client(base_url=server.url) as http:
        body = {"model": "m", "messages": user("hi"), "temperature": 0}
        assert http.post("/v2/chat", json=body).json()["message"]["content"][0]["text"] == answer(
            "hi"
        )
        reply = http.post("/v1/chat/completions", json=body).json()
        assert reply["choices"][0]["message"]["content"] == answer("hi")
        assert {entry.status for entry in server.requests()} == {200}
