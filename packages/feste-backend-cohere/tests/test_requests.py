"""The pure halves: configuration, requests as data, and what is made of replies."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import subprocess
import sys
import traceback
from array import array
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pydantic
import pytest
from cohere.raw_base_client import AsyncRawBaseCohere
from cohere.v2.raw_client import AsyncRawV2Client

from feste import errors
from feste.backend import Limits, Params, Request, Response, Secret, Usage
from feste.backend.cohere import ChatParams, Cohere, EmbedParams, GenerateParams

CANARY = "canary-0123456789-abcdef"


class City(pydantic.BaseModel):
    name: str
    size: int


class OtherParams(Params):
    temperature: float | None = None


def chat_request(llm: Cohere, prompt: Any = "Hi", **given: Any) -> Request:
    output = given.pop("output", None)
    return llm.chat.prepare([prompt, ChatParams(**given), output])


class TestParams:
    @pytest.mark.parametrize(
        ("record", "method", "own"),
        [
            (ChatParams, AsyncRawV2Client.chat, {"messages"}),
            (EmbedParams, AsyncRawV2Client.embed, {"texts", "images", "inputs"}),
            (GenerateParams, AsyncRawBaseCohere.generate, {"prompt"}),
        ],
    )
    def test_every_parameter_of_the_sdk(
        self, record: type[Params], method: Callable[..., Any], own: set[str]
    ) -> None:
        """A record has every parameter of its endpoint in the installed SDK, and `extra`."""
        of_the_sdk = set(inspect.signature(method).parameters) - {"self", "request_options"} - own
        assert {f.name for f in fields(record)} == of_the_sdk | {"extra"}  # type: ignore[arg-type]

    def test_misspelt(self) -> None:
        """A misspelt parameter is refused at once, with the right name."""
        with pytest.raises(errors.ParameterError, match="'max_tokens'"):
            ChatParams(max_token=3)  # type: ignore[call-arg]

    def test_extra_cannot_replace_the_prompt(self) -> None:
        """`extra` adds fields to the body, but none that a call's own arguments fill."""
        extra = {"new": [1], "messages": [], "stream": True, "max_tokens": 2}
        body = chat_request(Cohere("m"), extra=extra, max_tokens=1).body
        assert body["new"] == [1] and body["max_tokens"] == 2
        assert body["messages"] == [{"role": "user", "content": "Hi"}] and body["stream"] is False


class TestRequest:
    def test_it_is_plain_data_without_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A request is JSON and pickles; no key is in it, only the key's name."""
        monkeypatch.setenv("CO_API_KEY", CANARY)
        for llm in (Cohere("m"), Cohere("m", api_key=CANARY)):
            request = chat_request(llm, tools=({"type": "function"},), temperature=0)
            assert request.endpoint == "https://api.cohere.com/v2/chat"
            assert request.timeout == 300 and request.plugin == "cohere" and request.model == "m"
            assert json.loads(json.dumps(dict(request.body)))["tools"] == [{"type": "function"}]
            assert CANARY.encode() not in pickle.dumps(request)
            assert CANARY not in f"{request!r} {dict(request.client)} {request.account} {llm!r}"
            assert CANARY not in llm.identity

    def test_the_model(self) -> None:
        """A call's model goes before the client's; chat and embed need one, generate does not."""
        assert chat_request(Cohere("m"), model="n").model == "n"
        for call in (Cohere().chat, Cohere().embed):
            arguments = ["Hi", *call.operation.defaults[1:]]
            with pytest.raises(errors.ConfigError, match="needs a model"):
                call.prepare(arguments)
        request = Cohere().generate.prepare(["Hi", GenerateParams()])
        assert dict(request.body) == {"prompt": "Hi", "stream": False}

    @pytest.mark.parametrize(
        ("operation", "arguments"),
        [
            ("chat", [3, ChatParams(), None]),
            ("chat", [[], ChatParams(), None]),
            ("chat", ["Hi", EmbedParams(), None]),
            ("chat", ["Hi", ChatParams(), int]),
            ("chat", ["Hi", ChatParams(response_format={"type": "text"}), City]),
            ("embed", [["Hi"], EmbedParams()]),
            ("embed", ["Hi", EmbedParams(embedding_types="float")]),
            ("embed", ["Hi", EmbedParams(embedding_types=())]),
            ("chat", [["hello"], ChatParams(), None]),
            ("chat", [[{"content": "hello"}], ChatParams(), None]),
            ("chat", ["Hi", OtherParams(), None]),
            ("generate", [None, GenerateParams()]),
            ("generate", ["Hi", GenerateParams(extra={"num_generations": 2.0})]),
            ("generate", ["Hi", ChatParams()]),
        ],
    )
    def test_wrong_arguments(self, operation: str, arguments: list[Any]) -> None:
        """What cannot become a request of the endpoint is refused before it is sent."""
        with pytest.raises(errors.ParameterError):
            getattr(Cohere("m"), operation).prepare(arguments)

    @pytest.mark.parametrize("number", ["2", True, 2.0])
    def test_number_of_generations(self, number: Any) -> None:
        """A number that bounds what a call costs is a whole one, where it is given."""
        with pytest.raises(errors.ParameterError, match="num_generations is a whole number, not"):
            GenerateParams(num_generations=number)

    def test_parameters_of_another_backend(self) -> None:
        """Where two classes share a name, the error names their modules."""
        wanted = r"feste\.backend\.cohere\.params\.ChatParams\(\.\.\.\), not .*\.OtherParams"
        with pytest.raises(errors.ParameterError, match=wanted):
            Cohere("m").chat.prepare(["Hi", OtherParams(), None])

    def test_output(self) -> None:
        """`output=` asks for JSON of the model's schema, and makes the request another one."""
        request = chat_request(Cohere("m"), output=City)
        form = request.body["response_format"]
        assert form == {"type": "json_object", "json_schema": City.model_json_schema()}
        assert request.parser.endswith("City")
        assert request.key != chat_request(Cohere("m"), response_format=form).key

    def test_pack(self) -> None:
        """Packed calls differ in their texts only, and the timeout is kept."""
        llm = Cohere("m", timeout=7)
        requests = [llm.embed.prepare([text, EmbedParams()]) for text in "abc"]
        rule = llm.embed.rule
        assert rule is not None and len({rule.signature(r) for r in requests}) == 1
        packed = rule.pack(llm, requests)
        assert packed.body["texts"] == ["a", "b", "c"] and packed.timeout == 7
        other = llm.embed.prepare(["a", EmbedParams(input_type="search_query")])
        assert rule.signature(other) != rule.signature(requests[0])


class TestClient:
    @pytest.mark.parametrize(
        ("given", "used"),
        [
            ("https://api.cohere.com/", "https://api.cohere.com"),
            ("https://API.cohere.com/v1", "https://api.cohere.com"),
            ("https://llm.example.com:8443/Team/v1/", "https://llm.example.com:8443/Team/v1"),
            ("http://localhost:80", "http://localhost"),
            ("http://127.1.2.3", "http://127.1.2.3"),
            ("http://[::1]:9/", "http://[::1]:9"),
        ],
    )
    def test_base_url(self, given: str, used: str) -> None:
        """A base URL has one form; plain http is for this machine."""
        assert Cohere(base_url=given, api_key=CANARY).endpoint == used

    @pytest.mark.parametrize(
        "url",
        [
            "http://api.cohere.com",
            "http://localhost.example.com",
            "http://192.168.0.1",
            "ftp://localhost",
            "api.cohere.com",
            "https://",
            "https://x.com:port",
            f"https://x.com/?api_key={CANARY}",
            f"https://x.com:{CANARY}",
            f"ftp://x.com/{CANARY}",
            f"https://me:{CANARY}@x.com",
        ],
    )
    def test_base_url_refused(self, url: str) -> None:
        """A key is never sent in the clear over a network, nor kept in a URL."""
        with pytest.raises(errors.ConfigError) as caught:
            Cohere(base_url=url)
        assert CANARY not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("timeout", t) for t in (0, -1, float("nan"), float("inf"), None, True, "5")),
            ("base_url", 5),
            ("api_key", 5),
            ("model", 5),
        ],
    )
    def test_wrong_configuration(self, name: str, value: Any) -> None:
        """A wrong argument is an error where the client is made, and names the argument."""
        with pytest.raises(errors.ConfigError, match=name):
            Cohere(**{name: value})

    def test_url_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CO_API_URL is read when the client is made, the argument goes first, a copy keeps it."""
        monkeypatch.setenv("CO_API_URL", "https://one.example.com")
        llm = Cohere("m")
        monkeypatch.setenv("CO_API_URL", "https://two.example.com")
        assert llm.endpoint == "https://one.example.com"
        assert pickle.loads(pickle.dumps(llm)).endpoint == "https://one.example.com"
        assert Cohere("m").endpoint == "https://two.example.com"
        assert Cohere("m", api_key="k", base_url="https://x.com").endpoint == "https://x.com"

    def test_pickling(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client pickles as configuration with the key's name; one with a literal key does not."""
        monkeypatch.setenv("MY_KEY", CANARY)
        llm = Cohere("m", api_key=Secret("MY_KEY"), timeout=9, limits=Limits(concurrency=2))
        data = pickle.dumps(llm)
        copy = pickle.loads(data)
        assert CANARY.encode() not in data
        assert copy.token == llm.token and copy.identity == llm.identity
        assert (copy.model, copy.timeout, copy.limits) == ("m", 9, Limits(concurrency=2))
        copy.preflight()
        assert pickle.loads(pickle.dumps(llm.chat)).identity == llm.chat.identity
        with pytest.raises(errors.ConfigError, match="never leaves this process"):
            pickle.dumps(Cohere("m", api_key=CANARY))

    def test_identity(self) -> None:
        """Clients stand for each other if they answer alike; keys tell them apart."""
        assert Cohere("m").token == Cohere(model="m", timeout=1).token
        assert Cohere("m").token != Cohere("n").token
        elsewhere = Cohere("m", base_url="https://x.com", api_key=Secret("CO_API_KEY"))
        assert Cohere("m").token != elsewhere.token
        assert Cohere("m").token != Cohere("m", api_key=Secret("OTHER")).token
        assert Cohere("m", api_key="one").token != Cohere("m", api_key="two").token
        assert Cohere("m").account != Cohere("m", api_key=Secret("OTHER")).account

    def test_preflight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key must be there before anything is sent; a server on this machine needs none."""
        with pytest.raises(errors.MissingKey, match="CO_API_KEY"):
            Cohere("m").preflight()
        Cohere("m", base_url="http://localhost").preflight()
        local = Cohere("m", base_url="http://localhost", api_key="")
        local.preflight()
        assert pickle.loads(pickle.dumps(local)).token == local.token
        Cohere("m", api_key="k").preflight()
        monkeypatch.setenv("CO_API_KEY", "k")
        Cohere("m").preflight()

    @pytest.mark.parametrize("key", [f"{CANARY}\n", f"Bearer {CANARY}", f"{CANARY}é"])
    def test_a_key_that_is_none(self, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key that no header can carry is refused, and not shown, by tools that print locals too."""
        monkeypatch.setenv("MY_KEY", key)
        for llm in (Cohere("m", api_key=key), Cohere("m", api_key=Secret("MY_KEY"))):
            request = chat_request(llm)
            for ask in (llm.preflight, lambda: asyncio.run(llm.chat.send(request))):  # noqa: B023
                with pytest.raises(errors.ConfigError) as caught:
                    ask()
                assert caught.tb is not None
                frames = traceback.TracebackException(
                    type(caught.value), caught.value, caught.tb.tb_next, capture_locals=True
                )
                assert CANARY not in "".join(frames.format())


def chat_payload(**changed: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}
    return {"id": "x", "finish_reason": "COMPLETE", "message": message, **changed}


def parsed(operation: str, payload: Any, params: Any = None, **more: Any) -> Any:
    call = getattr(Cohere("m"), operation)
    arguments = ["Hi", params or call.operation.defaults[1], *more.values()]
    if operation == "chat" and not more:
        arguments.append(None)
    return call.parse(Response(payload), arguments)


class TestChatReply:
    @pytest.mark.parametrize(
        ("said", "meant"),
        [
            ("COMPLETE", "stop"),
            ("MAX_TOKENS", "length"),
            ("TOOL_CALL", "tool_calls"),
            ("STOP_SEQUENCE", "stop_sequence"),
            ("ERROR", "error"),
            ("TIMEOUT", "timeout"),
            ("ERROR_TOXIC", "error_toxic"),
        ],
    )
    def test_finish_reason(self, said: str, meant: str) -> None:
        """Why the model stopped is said in the words that all backends use."""
        reply = parsed("chat", chat_payload(finish_reason=said))
        assert reply == "Hello" and reply.finish_reason == meant
        assert reply.truncated == (said in ("MAX_TOKENS", "ERROR", "TIMEOUT", "ERROR_TOXIC"))

    @pytest.mark.parametrize("said", ["ERROR", "TIMEOUT"])
    def test_nothing_came(self, said: str) -> None:
        """A chat that broke off with no answer at all is an error; half an answer is kept."""
        message = {"role": "assistant", "content": []}
        with pytest.raises(errors.MalformedResponse, match=said):
            parsed("chat", chat_payload(finish_reason=said, message=message))

    def test_what_is_kept(self) -> None:
        """A reply is the text, with message, billed tokens, log-probabilities and model."""
        counted = {"input_tokens": 9.0, "output_tokens": 2.0}
        more = {"usage": {"billed_units": counted, "cached_tokens": 4.0}, "logprobs": [{"x": 1}]}
        reply = parsed("chat", chat_payload(**more), ChatParams(model="n"))
        assert (reply, reply.model, reply.logprobs) == ("Hello", "n", [{"x": 1}])
        assert reply.usage == Usage(9, 2, 4)
        assert reply.message == chat_payload()["message"]

    def test_thoughts_are_no_text(self) -> None:
        """Only text counts as the answer; what the model thought stays in the message."""
        parts = [
            {"type": "thinking", "thinking": "Hm"},
            {"type": "text", "text": "A"},
            {"type": "text", "text": "B"},
        ]
        reply = parsed("chat", chat_payload(message={"role": "assistant", "content": parts}))
        assert reply == "AB" and reply.message["content"] == parts

    def test_tool_calls(self) -> None:
        """A call of a tool is a reply without text."""
        calls = [{"id": "1", "type": "function", "function": {"name": "go", "arguments": "{}"}}]
        reply = parsed("chat", chat_payload(message={"tool_calls": calls, "tool_plan": "Go."}))
        assert reply == "" and reply.tool_calls == calls
        assert reply.message == {"role": "assistant", "tool_calls": calls, "tool_plan": "Go."}

    @pytest.mark.parametrize(
        "payload",
        [
            None,
            [],
            {},
            chat_payload(message=None),
            chat_payload(message="Hello"),
            chat_payload(finish_reason=None),
            chat_payload(message={"content": 3}),
            chat_payload(message={"content": ["Hello"]}),
            chat_payload(message={"content": [{"type": "text"}]}),
            chat_payload(message={"tool_calls": {"name": "go"}}),
            chat_payload(message={"tool_calls": ["go"]}),
        ],
    )
    def test_malformed(self, payload: Any) -> None:
        """A reply of another shape is an error that says so, and that it was paid."""
        with pytest.raises(errors.MalformedResponse) as caught:
            parsed("chat", payload)
        assert caught.value.billed == "yes"

    @pytest.mark.parametrize("usage", [None, 3, {}, {"billed_units": None}, {"billed_units": {}}])
    def test_no_usage(self, usage: Any) -> None:
        """A reply that counts nothing is still an answer."""
        assert parsed("chat", chat_payload(usage=usage)).usage is None

    def test_output(self) -> None:
        """JSON that fits the model becomes an instance of it; any other is an error."""

        def of(text: str, reason: str = "COMPLETE") -> Any:
            message = {"content": [{"type": "text", "text": text}]}
            payload = chat_payload(message=message, finish_reason=reason)
            return parsed("chat", payload, output=City)

        assert of('{"name": "Oslo", "size": 7}') == City(name="Oslo", size=7)
        with pytest.raises(errors.MalformedResponse, match="no City: size: "):
            of('{"name": "Oslo", "size": "big"}')
        with pytest.raises(errors.MalformedResponse, match="no City"):
            of("Oslo")
        for reason in ("MAX_TOKENS", "TIMEOUT"):
            with pytest.raises(errors.MalformedResponse, match="cut off"):
                of('{"name": "Os', reason)


class TestGenerations:
    def test_one_and_many(self) -> None:
        """One generation is a reply, several are a list in their order; usage is of the whole."""
        meta = {"billed_units": {"input_tokens": 3, "output_tokens": 4}}
        one = parsed("generate", {"generations": [{"text": "A"}], "meta": meta})
        assert (one, one.finish_reason, one.usage) == ("A", None, Usage(3, 4))
        made = [{"text": t, "index": i, "finish_reason": "COMPLETE"} for i, t in enumerate("AB")]
        payload = {"generations": made[::-1], "meta": meta}
        many = parsed("generate", payload, GenerateParams(num_generations=2))
        assert many == ["A", "B"] and [r.usage for r in many] == [None, None]
        assert {r.finish_reason for r in many} == {"stop"}

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_count(self, count: int) -> None:
        """As many generations must come as were asked for."""
        with pytest.raises(errors.CountMismatch):
            payload = {"generations": [{"text": "A"}] * count}
            parsed("generate", payload, GenerateParams(num_generations=2))

    @pytest.mark.parametrize("made", [None, "A", ["A"], [{"text": None}], [{}]])
    def test_malformed(self, made: Any) -> None:
        """A reply of another shape is an error that says so."""
        with pytest.raises(errors.MalformedResponse):
            parsed("generate", {"generations": made})


class TestVectors:
    def test_forms(self) -> None:
        """A vector is an array of the form's own numbers; several forms are a dict."""
        forms = {
            "float": [[0.5, -1.0]],
            "int8": [[-128, 127]],
            "ubinary": [[0, 255]],
            "base64": ["AAAAPwAAgL8="],
        }
        assert parsed("embed", {"embeddings": forms}) == array("f", [0.5, -1.0])
        many = parsed("embed", {"embeddings": forms}, EmbedParams(embedding_types=list(forms)))
        assert {kind: (v.typecode, v.tolist()) for kind, v in many.items()} == {
            "float": ("f", [0.5, -1.0]),
            "int8": ("b", [-128, 127]),
            "ubinary": ("B", [0, 255]),
            "base64": ("f", [0.5, -1.0]),
        }

    @pytest.mark.parametrize(
        "embeddings",
        [None, [[1.0]], {}, {"float": 1.0}, {"float": [1.0]}, {"float": [["a"]]}, {"float": [[]]}],
    )
    def test_malformed(self, embeddings: Any) -> None:
        """A reply of another shape is an error that says so."""
        with pytest.raises(errors.MalformedResponse):
            parsed("embed", {"embeddings": embeddings})

    @pytest.mark.parametrize(
        ("kind", "vector"), [("int8", [128]), ("int8", [0.5]), ("base64", "AA"), ("base64", "?")]
    )
    def test_wrong_numbers(self, kind: str, vector: Any) -> None:
        """Numbers that the form cannot hold are no vector."""
        with pytest.raises(errors.MalformedResponse):
            parsed("embed", {"embeddings": {kind: [vector]}}, EmbedParams(embedding_types=[kind]))

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_count(self, count: int) -> None:
        """A packed reply must hold one vector a text, or no call may have any of them."""
        llm = Cohere("m")
        rule = llm.embed.rule
        assert rule is not None
        request = rule.pack(llm, [llm.embed.prepare([t, EmbedParams()]) for t in "ab"])
        payload = {"embeddings": {"float": [[1.0]] * count}}
        with pytest.raises(errors.CountMismatch, match=f"{count} vectors came for 2"):
            rule.unpack(llm, request, Response(payload))


LIGHT = """
import sys
from feste.backend import create
from feste.plugins import registry

(info,) = [p for p in registry().plugins if p.name == "cohere"]
assert info.state == "loaded" and info.offers == {"backends": ["cohere"]}, info
llm = create("cohere", model="m")
node = llm.chat("Hi")
import feste.backend.cohere
heavy = {"cohere", "httpx", "pydantic"} & set(sys.modules)
assert type(llm) is feste.backend.cohere.Cohere
print(sorted(heavy))
"""


def test_finding_and_using_it_is_light(tmp_path: Path) -> None:
    """An installed plugin is found by its entry point; neither that nor a call imports an SDK."""
    info = tmp_path / "feste_backend_cohere-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: feste-backend-cohere\nVersion: 0.1.0\n"
    )
    (info / "entry_points.txt").write_text("[feste]\ncohere = feste.backend.cohere._hooks\n")
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "FESTE_LOAD_PLUGINS": "cohere"}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
