"""Calls through the official SDK over real sockets, with a simulated Cohere."""

from __future__ import annotations

import asyncio
import ssl
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cohere
import httpx
import pydantic
import pytest

import feste
from feste import context, errors
from feste.backend import Limits, Reply, Secret, Usage
from feste.backend.clients import close_clients
from feste.backend.cohere import ChatParams, Cohere, EmbedParams, GenerateParams, transport
from feste.backend.cohere.testing import answer, embedding
from feste.prompt import ChatPrompt, Prompt
from feste.testing.sim_server import Fault, SimServer

WIRE = "feste.backend.cohere.testing:CohereWire"
KEY = "test-key-0123456789"


class City(pydantic.BaseModel):
    city: str
    size: int = pydantic.Field(ge=2)


@pytest.fixture(scope="module")
def running() -> Iterator[SimServer]:
    with SimServer(WIRE, wire_options={"require_key": KEY}) as server:
        yield server


@pytest.fixture
def server(running: SimServer, monkeypatch: pytest.MonkeyPatch) -> SimServer:
    monkeypatch.setenv("CO_API_KEY", KEY)
    running.reset()
    return running


@pytest.fixture
def llm(server: SimServer) -> Cohere:
    return Cohere("m", base_url=server.url)


def singles(values: list[float]) -> array[float]:
    """The values as the 32-bit floats that they become."""
    return array("f", struct.unpack(f"{len(values)}f", struct.pack(f"{len(values)}f", *values)))


class TestEmbed:
    def test_texts_share_requests(self, server: SimServer, llm: Cohere) -> None:
        """200 texts go in 3 requests of at most 96, and each call gets its own vector."""
        texts = [f"text {i}" for i in range(200)]
        vectors = feste.compute(*[llm.embed(t) for t in texts])
        assert sorted(len(r.body["texts"]) for r in server.requests()) == [52, 52, 96]
        assert list(vectors) == [singles(embedding(t, 16)) for t in texts]
        assert vectors[0].typecode == "f"
        assert Counter(item["prompt"] for item in server.ledger()) == Counter(texts)
        report = feste.last_report()
        assert report is not None and len(report.requests) == 3
        assert sum(r.input_tokens or 0 for r in report.requests) == 400

    def test_limits(self, server: SimServer) -> None:
        """The user's limit of items goes before Cohere's."""
        llm = Cohere("m", base_url=server.url, limits=Limits(max_items=50))
        feste.compute(*[llm.embed(f"text {i}") for i in range(100)])
        assert [len(r.body["texts"]) for r in server.requests()] == [50, 50]

    def test_equal_texts_are_one(self, server: SimServer, llm: Cohere) -> None:
        """A vector depends on its text alone, so equal calls cost one."""
        one, two = feste.compute(llm.embed("a"), llm.embed("a"))
        assert one == two and [r.body["texts"] for r in server.requests()] == [["a"]]

    def test_only_equal_parameters_share(self, server: SimServer, llm: Cohere) -> None:
        """Texts embedded for different ends go in different requests."""
        query = EmbedParams(input_type="search_query")
        feste.compute(
            [llm.embed("a"), llm.embed("b"), llm.embed("a", query), llm.embed("b", query)]
        )
        sent = sorted((r.body["input_type"], r.body["texts"]) for r in server.requests())
        assert sent == [("search_document", ["a", "b"]), ("search_query", ["a", "b"])]

    def test_forms(self, server: SimServer, llm: Cohere) -> None:
        """The forms of the vectors are the caller's choice, in a shared request too."""
        params = EmbedParams(embedding_types=["base64", "int8"], output_dimension=4)
        made: list[Any] = list(feste.compute(*[llm.embed(t, params) for t in "ab"]))
        assert len(server.requests()) == 1
        for text, forms in zip("ab", made, strict=True):
            exact = embedding(text, 4)
            assert forms["base64"] == singles(exact)
            assert forms["int8"] == array("b", [round(127 * x) for x in exact])

    def test_a_server_that_answers_short(self, server: SimServer, llm: Cohere) -> None:
        """A reply with too few vectors is given to nobody: the texts go again, one by one."""
        server.add(Fault(kind="garbage", body={"embeddings": {"float": [[1.0]]}}))
        vectors = feste.compute(*[llm.embed(t) for t in "abc"])
        assert list(vectors) == [singles(embedding(t, 16)) for t in "abc"]
        assert [len(r.body["texts"]) for r in server.requests()] == [3, 1, 1, 1]

    def test_one_bad_text(self, server: SimServer, llm: Cohere) -> None:
        """A text that Cohere refuses costs its own call only."""
        good, bad = feste.compute(llm.embed("a"), llm.embed(""), on_error="return")
        assert good == singles(embedding("a", 16))
        assert isinstance(bad, errors.InvalidRequest) and bad.status == 400


class TestChat:
    def test_text(self, server: SimServer, llm: Cohere) -> None:
        """A text is what the user says; two calls are two draws."""
        replies = feste.compute(llm.chat("one two"), llm.chat("one two"))
        assert Counter(replies) == Counter([answer("one two", 0), answer("one two", 1)])
        (reply, _) = replies
        assert isinstance(reply, Reply) and reply.finish_reason == "stop"
        assert reply.usage == Usage(2, 8) and reply.model == "m"
        (request, _) = server.requests()
        assert request.body == {
            "model": "m",
            "messages": [{"role": "user", "content": "one two"}],
            "stream": False,
        }

    def test_messages(self, server: SimServer, llm: Cohere) -> None:
        """A conversation goes as it is: the reply's own message, a prompt, a node inside it."""
        first = llm.chat(ChatPrompt("Be brief.", "{{ q }}")(q="Why?")).compute()
        script = [
            {"role": "user", "content": "Why?"},
            first.message,
            {"role": "user", "content": Prompt("And {{ x }}?")(x="how")},
        ]
        assert llm.chat(script, ChatParams(temperature=0)).compute()
        system, second = [r.body["messages"] for r in server.requests()]
        assert system == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why?"},
        ]
        assert second == [script[0], first.message, {"role": "user", "content": "And how?"}]

    def test_parameters(self, server: SimServer, llm: Cohere) -> None:
        """Parameters reach Cohere under their own names; an answer cut off is flagged."""
        params = ChatParams(max_tokens=2, k=5, extra={"later": True}, logprobs=True)
        reply = llm.chat("REPLY: a b c", params).compute()
        assert (reply, reply.truncated) == ("a b", True) and len(reply.logprobs) == 2
        body = server.requests()[0].body
        assert (body["max_tokens"], body["k"], body["later"]) == (2, 5, True)

    def test_tools(self, llm: Cohere) -> None:
        """A model may call tools; its message goes back with their results."""
        schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
        params = ChatParams(
            tools=[{"type": "function", "function": {"name": "go", "parameters": schema}}]
        )
        script: list[Any] = [{"role": "user", "content": 'CALL: go {"x": 7}\nREPLY: done'}]
        reply = llm.chat(script, params).compute()
        assert reply == "" and reply.finish_reason == "tool_calls"
        (call,) = reply.tool_calls
        assert call["function"] == {"name": "go", "arguments": '{"x": 7}'}
        script += [reply.message, {"role": "tool", "tool_call_id": call["id"], "content": "7"}]
        assert llm.chat(script, params).compute() == "done"

    def test_output(self, server: SimServer, llm: Cohere) -> None:
        """With `output=` the answer is an instance of the model."""
        city = llm.chat("Which city? As JSON.", ChatParams(seed=1), output=City).compute()
        assert isinstance(city, City) and city.size == 2
        form = server.requests()[0].body["response_format"]
        assert form == {"type": "json_object", "json_schema": City.model_json_schema()}

    def test_a_mistake_in_a_validator(self, server: SimServer, llm: Cohere) -> None:
        """It is told as what it is, and the answer is not bought again."""

        class Fruit(pydantic.BaseModel):
            name: str

            @pydantic.field_validator("name")
            @classmethod
            def check(cls, name: Any) -> Any:
                return name.length

        with pytest.raises(errors.RunFailed) as failed:
            llm.chat('REPLY: {"name": "fig"}', output=Fruit).compute()
        (error,) = failed.value.errors
        assert isinstance(error, errors.OutputMismatch) and "name.length" in error.traceback
        assert "validators of Fruit raised AttributeError: 'str' object" in str(error)
        assert len(server.requests()) == 1


class TestGenerate:
    def test_one_and_many(self, server: SimServer, llm: Cohere) -> None:
        """The legacy endpoint gives one text, or with `num_generations` a list of draws."""
        one = llm.generate("Once").compute()
        assert (one, one.finish_reason, one.usage) == (answer("Once"), "stop", Usage(1, 8))
        many = llm.generate("Once", GenerateParams(num_generations=3)).compute()
        assert many == [answer("Once", i) for i in (1, 2, 3)]
        assert [r.path for r in server.requests()] == ["/v1/generate"] * 2


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 3}])
def test_eager_is_lazy(llm: Cohere, params: dict[str, Any]) -> None:
    """A call that asks for determinism gives the same eager and lazy, alone and among others."""

    def program() -> list[Any]:
        chats = [llm.chat(f"chat {i}", ChatParams(**params)) for i in range(3)]
        texts = [llm.generate("Once", GenerateParams(num_generations=2, **params))]
        last = llm.chat(
            Prompt("{% for c in chats %}{{ c }}{% endfor %}")(chats=chats), ChatParams(**params)
        )
        return [*chats, *texts, last, *[llm.embed(t) for t in "abc"]]

    lazy = feste.compute(program())[0]
    with context.set(eager=True):
        eager = program()
    assert lazy == eager == feste.compute(program())[0]
    assert lazy[0] == answer("chat 0", seed=params.get("seed"))


class TestClient:
    def test_the_body_is_the_sdks(self, server: SimServer, llm: Cohere) -> None:
        """What is sent is what the SDK's own methods send: same path, same body."""
        feste.compute(
            llm.chat("Hi", ChatParams(temperature=0.5, stop_sequences=("x",))),
            llm.embed("Hi", EmbedParams(truncate="END")),
            llm.generate("Hi", GenerateParams(k=3)),
        )
        ours = {r.path: r for r in server.requests()}
        server.reset()
        with httpx.Client() as http:
            sdk = cohere.ClientV2(KEY, base_url=server.url, httpx_client=http)
            said: Any = [{"role": "user", "content": "Hi"}]
            sdk.chat(model="m", messages=said, temperature=0.5, stop_sequences=["x"])
            sdk.embed(
                model="m",
                texts=["Hi"],
                input_type="search_document",
                embedding_types=["float"],
                truncate="END",
            )
            sdk.generate(model="m", prompt="Hi", k=3)
        for theirs in server.requests():
            assert ours[theirs.path].body == theirs.body
            for name in ("user-agent", "x-fern-sdk-name", "authorization", "content-type"):
                assert ours[theirs.path].headers[name] == theirs.headers[name]

    def test_the_key(self, server: SimServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key is read when the call is made: by its name, or as it was given."""
        by_name = Cohere("m", base_url=server.url, api_key=Secret("MY_KEY"))
        monkeypatch.setenv("MY_KEY", "another key".replace(" ", "-"))
        failed = feste.compute(by_name.chat("Hi"), on_error="return")[0]
        assert isinstance(failed, errors.AuthFailed)
        monkeypatch.setenv("MY_KEY", KEY)
        assert by_name.chat("Hi").compute()
        assert Cohere("m", base_url=server.url, api_key=KEY).chat("Hi").compute()

    def test_two_keys_never_share_a_request(self, server: SimServer) -> None:
        """Texts of two accounts go in two requests."""
        one = Cohere("m", base_url=server.url, api_key=KEY)
        two = Cohere("m", base_url=server.url, api_key="wrong-key")
        made = feste.compute(one.embed("a"), two.embed("b"), on_error="return")
        assert made[0] == singles(embedding("a", 16)) and isinstance(made[1], errors.AuthFailed)

    def test_missing_key(self, server: SimServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a key nothing is sent, not even what needs none, and eager says the same."""
        monkeypatch.delenv("CO_API_KEY")
        remote, local = Cohere("m"), Cohere("m", base_url=server.url)
        with pytest.raises(errors.MissingKey, match="CO_API_KEY"):
            feste.compute(local.chat("Hi"), remote.chat("Hi"))
        with context.set(eager=True), pytest.raises(errors.MissingKey, match="CO_API_KEY"):
            remote.chat("Hi")
        request = remote.chat.prepare(["Hi", ChatParams(), None])
        with pytest.raises(errors.MissingKey, match="CO_API_KEY"):
            asyncio.run(remote.chat.send(request))
        assert server.requests() == []

    def test_no_key_on_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server on this machine is asked without a key, and never through a proxy."""
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        monkeypatch.delenv("CO_API_KEY", raising=False)

        async def alone(llm: Cohere) -> Any:  # on a loop whose connections are yet to be opened
            response = await llm.chat.send(llm.chat.prepare(["REPLY: yes", ChatParams(), None]))
            await close_clients(asyncio.get_running_loop())
            return response.payload["message"]["content"][0]["text"]

        with SimServer(WIRE) as server:
            assert asyncio.run(alone(Cohere("m", base_url=server.url))) == "yes"

    def test_redirects_are_not_followed(self, server: SimServer, llm: Cohere) -> None:
        """A key goes to the server it is for, and to no other that it names."""
        elsewhere = {"location": f"{server.url}/v2/chat"}
        server.add(Fault(status=307, headers=elsewhere, times=None))
        failed = feste.compute(llm.chat("Hi"), on_error="return")[0]
        assert isinstance(failed, errors.InvalidRequest) and failed.status == 307
        assert len(server.requests()) == 1

    def test_cookies_are_not_kept(self, server: SimServer, llm: Cohere) -> None:
        """Accounts share connections, so no cookie of one may go with another's request."""
        server.add(Fault(status=500, headers={"set-cookie": "who=me", "retry-after": "0"}))
        assert llm.chat("Hi").compute()
        assert all("cookie" not in r.headers for r in server.requests())
        assert len(server.requests()) == 2

    def test_one_tls_context(self, llm: Cohere, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reading the certificates takes long: the process does it once, for all loops and clients."""
        made: list[int] = []
        create = ssl.create_default_context

        def counted(*args: Any, **kwargs: Any) -> ssl.SSLContext:
            made.append(1)
            return create(*args, **kwargs)

        monkeypatch.setattr(ssl, "create_default_context", counted)
        monkeypatch.setattr(transport, "_tls", None)

        async def several() -> None:
            request = llm.chat.prepare(["Hi", ChatParams(), None])
            again = Cohere("m", base_url=llm.base_url)
            await asyncio.gather(*[c.chat.send(request) for c in (llm, again, llm)])
            await close_clients(asyncio.get_running_loop())

        for _ in range(2):
            asyncio.run(several())
        assert len(made) == 1
