"""Calls of the backend through the real SDK and real sockets, one to a request or many to one."""

from __future__ import annotations

import gc
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, Field, field_validator

import feste
from feste import context
from feste.backend import Limits, Reply
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.backend.openai.testing import answer, embedding, json_answer
from feste.errors import (
    InvalidRequest,
    MalformedResponse,
    OutputMismatch,
    ParameterError,
    RunFailed,
)
from feste.prompt import ChatPrompt, Prompt
from feste.testing.sim_server import SimServer

WIRE = "feste.backend.openai.testing:OpenAIWire"
CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def shared() -> Iterator[SimServer]:
    with SimServer(WIRE, base=0.02) as server:
        yield server


_models = itertools.count()


def client(server: SimServer, **given: Any) -> OpenAI:
    """A client with a model of its own, so that no test meets the gate that another one moved."""
    return OpenAI(f"m{next(_models)}", base_url=f"{server.url}/v1", **given)


def paths(server: SimServer) -> Counter[str]:
    return Counter(request.path for request in server.requests())


class City(BaseModel):
    name: str
    inhabitants: int = Field(ge=1000)


class TestChat:
    def test_it_sends_messages_and_returns_a_reply(self, server: SimServer) -> None:
        """A text becomes the user's message; the reply says all that the provider said."""
        llm = client(server)
        reply = llm.chat("one two three", ChatParams(temperature=0, max_tokens=3)).compute()
        assert isinstance(reply, Reply)
        assert reply == " ".join(answer("one two three").split()[:3])
        assert (reply.finish_reason, reply.truncated, reply.model) == ("length", True, llm.model)
        assert reply.usage is not None and (reply.usage.input, reply.usage.output) == (3, 3)
        (sent,) = server.requests()
        assert sent.path == CHAT
        assert sent.body == {
            "model": llm.model,
            "messages": [{"role": "user", "content": "one two three"}],
            "temperature": 0,
            "max_tokens": 3,
        }

    def test_conversations_and_prompts(self, server: SimServer) -> None:
        """Messages go as they are, from a list or from a ChatPrompt; a reply goes back as message."""
        llm = client(server)
        ask = ChatPrompt("You are {{ who }}.", "{{ question }}")
        first = llm.chat(ask(who="a poet", question="Why?"))
        again = llm.chat(
            [{"role": "user", "content": "Why?"}, first.message, {"role": "user", "content": "So?"}]
        )
        again.compute()
        one, two = (request.body["messages"] for request in server.requests())
        assert one == [
            {"role": "system", "content": "You are a poet."},
            {"role": "user", "content": "Why?"},
        ]
        assert two[1] == {"role": "assistant", "content": str(first.compute())}

    def test_64_calls_are_64_requests_side_by_side(self, server: SimServer) -> None:
        """A chat endpoint takes one conversation a request; many are in flight at once."""
        llm = client(server)
        nodes = [llm.chat(f"question {i}", ChatParams(temperature=0)) for i in range(64)]
        replies = feste.compute(*nodes)
        assert list(replies) == [answer(f"question {i}") for i in range(64)]
        assert paths(server) == {CHAT: 64}
        assert server.totals().peak > 1

    def test_n_gives_a_list_of_different_draws(self, server: SimServer) -> None:
        """n above 1 is one request and a list of replies; tokens are not known for each of them."""
        replies: Any = client(server).chat("hello", ChatParams(n=3)).compute()
        assert list(replies) == [answer("hello", i) for i in range(3)]
        assert [reply.usage for reply in replies] == [None] * 3
        assert [request.items for request in server.requests()] == [3]

    def test_output_is_an_instance(self, server: SimServer) -> None:
        """With a pydantic model the server is asked for JSON of its schema, and the value is typed."""
        llm = client(server)
        node = llm.chat("Name a city.", ChatParams(temperature=0), output=City)
        city = node.compute()
        schema = server.requests()[0].body["response_format"]["json_schema"]
        assert schema["strict"] is True and schema["name"] == "City"
        assert schema["schema"]["additionalProperties"] is False
        assert city == City.model_validate_json(json_answer("Name a city.", schema["schema"]))

    def test_output_with_n_is_a_list_of_instances(self, server: SimServer) -> None:
        """n and output together give one instance for each choice."""
        made = client(server).chat("Name cities.", ChatParams(n=2), output=City).compute()
        assert isinstance(made, list) and [type(city) for city in made] == [City, City]

    def test_output_that_cannot_be_had_names_the_fix(self, server: SimServer) -> None:
        """What is no instance, or was cut off, is an error with the text's beginning, never a guess."""
        llm = client(server)
        for prompt, limit, words in (
            ('REPLY: {"name": "Ulm", "inhabitants": 3}', None, ["City", "inhabitants", "'{"]),
            ("REPLY: plain words", None, ["no City", "plain words", "schema"]),
            ("REPLY: one two three", 1, ["cut off", "max_completion_tokens", "'one'"]),
        ):
            node = llm.chat(prompt, ChatParams(max_completion_tokens=limit), output=City)
            with pytest.raises(RunFailed) as failed:
                node.compute()
            (error,) = failed.value.errors
            assert isinstance(error, MalformedResponse) and error.billed == "yes"
            assert all(word in str(error) for word in words), str(error)
        assert len(server.requests()) == 3  # a paid answer that cannot be read is not bought again

    def test_a_mistake_in_a_validator_is_no_fault_of_the_answer(self, server: SimServer) -> None:
        """The error leads to the line; after the correction the kept answer is read, not bought again."""
        known: dict[str, int] = {}

        class Fruit(BaseModel):
            name: str

            @field_validator("name")
            @classmethod
            def check(cls, name: str) -> str:
                known[name]
                return name

        node = client(server).chat('REPLY: {"name": "fig"}', output=Fruit)
        with pytest.raises(RunFailed) as failed:
            node.compute()
        (error,) = failed.value.errors
        line = Fruit.check.__func__.__code__.co_firstlineno + 3  # type: ignore[attr-defined]
        assert isinstance(error, OutputMismatch) and isinstance(error.__cause__, KeyError)
        assert f"validators of Fruit raised KeyError: 'fig' at {__file__}:{line}." in str(error)
        assert "known[name]" in error.traceback and "pydantic" not in error.traceback
        known["fig"] = 1
        assert node.compute().name == "fig"
        assert len(server.requests()) == 1

    def test_tools_pass_through(self, server: SimServer) -> None:
        """Tools are sent as given; the reply holds the calls, and a message to go on with."""
        tool = {
            "type": "function",
            "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
        }
        params = ChatParams(tools=[tool], tool_choice="auto")
        reply = client(server).chat('CALL: add {"a": 1}', params).compute()
        assert reply == "" and reply.finish_reason == "tool_calls"
        (call,) = reply.tool_calls
        assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
        assert reply.message["tool_calls"] == [call] and "refusal" not in reply.message
        assert server.requests()[0].body["tools"] == [tool]

    def test_logprobs(self, server: SimServer) -> None:
        """Log-probabilities come as the provider gives them."""
        reply = client(server).chat("hello", ChatParams(logprobs=True)).compute()
        assert "".join(token["token"] for token in reply.logprobs["content"]) == reply

    def test_extra_reaches_the_body(self, server: SimServer) -> None:
        """What only some servers know goes into the body as it is."""
        params = ChatParams(extra={"cache_prompt": False, "top_k": 40})
        client(server).chat("hello", params).compute()
        body = server.requests()[0].body
        assert (body["cache_prompt"], body["top_k"]) == (False, 40) and "extra" not in body

    def test_the_model_of_the_call_goes_first(self, server: SimServer) -> None:
        """A model in the parameters overrides the client's."""
        reply = client(server).chat("hello", ChatParams(model="other")).compute()
        assert reply.model == "other" == server.requests()[0].body["model"]

    def test_text_that_is_no_unicode_can_be_sent(self, server: SimServer) -> None:
        """Half a character, as cut or scraped text has, breaks neither the request nor the run."""
        reply = client(server).chat("half \ud83d of it", ChatParams(temperature=0)).compute()
        assert reply == answer("half \ud83d of it")


class TestComplete:
    def test_64_calls_share_requests_up_to_the_limit(self, server: SimServer) -> None:
        """Calls written one by one go as ceil(64 / limit) requests, each answer to its own prompt."""
        llm = client(server, limits=Limits(max_items=10))
        nodes = [llm.complete(f"word {i}", CompleteParams(temperature=0)) for i in range(64)]
        replies = feste.compute(*nodes)
        assert list(replies) == [answer(f"word {i}") for i in range(64)]
        assert [reply.usage for reply in replies] == [None] * 64
        assert paths(server) == {COMPLETE: 7}
        assert max(request.items for request in server.requests()) == 10
        report = feste.last_report()
        assert report is not None
        assert sum(request.input_tokens or 0 for request in report.requests) == 128

    def test_one_request_takes_64(self, server: SimServer) -> None:
        """Without a limit of the user's, 64 prompts are one request and 65 are two."""
        for count, wanted in ((64, 1), (65, 2)):
            server.reset()
            llm = client(server)
            feste.compute([llm.complete(f"word {i}") for i in range(count)])
            assert paths(server) == {COMPLETE: wanted}

    def test_a_single_call_sends_a_text_and_knows_its_usage(self, server: SimServer) -> None:
        """Alone, a call sends a plain string: servers that take no lists serve it."""
        reply = client(server).complete("one two", CompleteParams(max_tokens=2)).compute()
        assert server.requests()[0].body["prompt"] == "one two"
        assert reply.usage is not None and (reply.usage.input, reply.usage.output) == (2, 2)
        assert reply.truncated and reply.message["content"] == reply

    def test_n_in_a_list(self, server: SimServer) -> None:
        """n choices of each prompt come as lists, prompt by prompt."""
        llm = client(server)
        params = CompleteParams(n=3, temperature=0)
        replies = feste.compute(*[llm.complete(f"word {i}", params) for i in range(4)])
        assert [list(some) for some in replies] == [
            [answer(f"word {i}", j) for j in range(3)] for i in range(4)
        ]
        assert [(request.path, request.items) for request in server.requests()] == [(COMPLETE, 12)]

    def test_other_parameters_do_not_share(self, server: SimServer) -> None:
        """Only calls with equal parameters share a request; a seed is for one call alone."""
        llm = client(server)
        feste.compute(
            [llm.complete(f"a{i}", CompleteParams(max_tokens=5)) for i in range(3)],
            [llm.complete(f"b{i}", CompleteParams(max_tokens=6)) for i in range(3)],
            [llm.complete(f"c{i}", CompleteParams(seed=1)) for i in range(3)],
        )
        sent = [request.body for request in server.requests()]
        lists = [body["prompt"] for body in sent if isinstance(body["prompt"], list)]
        assert sorted(lists) == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
        assert sorted(b["prompt"] for b in sent if b.get("seed") == 1) == ["c0", "c1", "c2"]

    def test_suffix_echo_and_logprobs(self, server: SimServer) -> None:
        """Parameters of completions are sent as given, for all prompts of a request."""
        llm = client(server)
        params = CompleteParams(suffix="end", echo=False, logprobs=1, best_of=2)
        one, _ = feste.compute(llm.complete("a", params), llm.complete("b", params))
        body = server.requests()[0].body
        assert (body["suffix"], body["echo"], body["logprobs"], body["best_of"]) == (
            "end",
            False,
            1,
            2,
        )
        assert "".join(one.logprobs["tokens"]) == one


class TestEmbed:
    def test_1000_calls_written_one_by_one_are_one_request(self, server: SimServer) -> None:
        """A thousand texts go as one request, and every vector is its own text's."""
        llm = client(server)
        texts = [f"text number {i}" for i in range(1000)]
        vectors = feste.compute(*[llm.embed(t, EmbedParams(dimensions=8)) for t in texts])
        assert paths(server) == {EMBED: 1}
        assert server.requests()[0].body["input"] == texts
        assert [list(v) for v in vectors] == [embedding(t, 8) for t in texts]

    def test_a_vector_is_an_array_that_numpy_does_not_copy(self, server: SimServer) -> None:
        """The value is an array of 32-bit floats whose memory numpy shares."""
        numpy = pytest.importorskip("numpy")
        value = client(server).embed("hello").compute()
        assert type(value) is array
        assert value.typecode == "f"
        shared = numpy.asarray(value)
        assert shared.dtype == numpy.float32
        value[0] = 0.5
        assert shared[0] == 0.5

    def test_base64_is_asked_for_unless_the_user_chose(self, server: SimServer) -> None:
        """base64 and numbers give the same vector; what the user asks for is sent."""
        llm = client(server)
        compact = llm.embed("hello").compute()
        plain = llm.embed("hello", EmbedParams(encoding_format="float")).compute()
        assert compact == plain == array("f", embedding("hello"))
        asked = [request.body["encoding_format"] for request in server.requests()]
        assert asked == ["base64", "float"]

    def test_equal_texts_are_embedded_once(self, server: SimServer) -> None:
        """An embedding is PURE: equal calls are one, each place gets the vector."""
        llm = client(server)
        one, two, three = feste.compute(llm.embed("same"), llm.embed("same"), llm.embed("other"))
        assert one == two != three
        assert [request.body["input"] for request in server.requests()] == [["same", "other"]]

    def test_the_limits_of_the_endpoint_are_kept(self, server: SimServer) -> None:
        """No request holds more than 2,048 texts, or more than 300,000 tokens by estimate."""
        llm = client(server)
        feste.compute([llm.embed(f"t{i}", EmbedParams(dimensions=1)) for i in range(2049)])
        assert sorted(len(r.body["input"]) for r in server.requests()) == [1024, 1025]
        server.reset()
        long = "word " * 20_000  # some 25,000 tokens
        feste.compute([llm.embed(f"{i} {long}", EmbedParams(dimensions=1)) for i in range(22)])
        assert sorted(len(r.body["input"]) for r in server.requests()) == [11, 11]
        for request in server.requests():  # some servers take no body without its length
            assert int(request.headers["content-length"]) > 1_000_000
            assert "transfer-encoding" not in request.headers

    def test_an_empty_text_is_refused_before_anything_is_sent(self, server: SimServer) -> None:
        """One empty text would make the provider refuse the whole list: it never gets there."""
        llm = client(server)
        run = feste.compute(llm.embed(""), llm.embed("good"), on_error="return")
        assert "leave empty texts out" in str(run[0])
        assert list(run[1]) == embedding("good")
        assert [request.body["input"] for request in server.requests()] == ["good"]


class TestOtherServers:
    """Servers that call themselves compatible; answers never cross, and every call is answered."""

    @pytest.mark.parametrize("lists", ["first_only", "refuse"])
    def test_servers_without_lists_get_single_calls(self, lists: str) -> None:
        """A server that drops or refuses lists is noticed, and its calls go one by one."""
        with SimServer(WIRE, wire_options={"lists": lists}) as server:
            llm = client(server)
            params = CompleteParams(temperature=0)
            nodes = [llm.complete(f"word {i}", params) for i in range(9)]
            assert list(feste.compute(*nodes)) == [answer(f"word {i}") for i in range(9)]
            sizes = [isinstance(r.body["prompt"], list) for r in server.requests()]
            # a wrong count tells at once; a refusal may be about the length: 9, 5, 3 and 2 are tried
            assert sizes == [True] * (1 if lists == "first_only" else 4) + [False] * 9
            server.reset()
            feste.compute([llm.complete(f"more {i}", params) for i in range(5)])
            assert not any(isinstance(r.body["prompt"], list) for r in server.requests())

    def test_a_lower_limit_of_the_server_still_answers_all(self) -> None:
        """A list that is longer than the server takes is sent in shorter ones."""
        with SimServer(WIRE, wire_options={"max_prompts": 4}) as server:
            llm = client(server)
            nodes = [llm.complete(f"w{i}", CompleteParams(temperature=0)) for i in range(6)]
            assert list(feste.compute(*nodes)) == [answer(f"w{i}") for i in range(6)]

    def test_answers_out_of_order_reach_their_own_calls(self) -> None:
        """Choices and vectors are told apart by index, never by where they stand."""
        with SimServer(WIRE, wire_options={"lists": "shuffled", "order": "shuffled"}) as server:
            llm = client(server)
            params = CompleteParams(temperature=0, n=2)
            texts = [f"word {i}" for i in range(20)]
            replies = feste.compute(*[llm.complete(t, params) for t in texts])
            assert [list(r) for r in replies] == [[answer(t, 0), answer(t, 1)] for t in texts]
            vectors = feste.compute(*[llm.embed(t) for t in texts])
            assert [list(v) for v in vectors] == [embedding(t) for t in texts]
            assert paths(server) == {COMPLETE: 1, EMBED: 1}


class TestConnections:
    def test_clients_come_and_go(self, server: SimServer) -> None:
        """A client that is collected as garbage leaves nothing open: connections are the loop's."""
        for i in range(5):
            assert client(server).chat(f"question {i}").compute()
            gc.collect()  # an open session would warn, and a warning fails the test
        assert len(server.requests()) == 5

    def test_hundreds_are_in_flight_at_once(self) -> None:
        """No pool of connections bounds what the gate lets through."""
        with SimServer(WIRE, base=1.0) as slow:
            llm = client(slow, limits=Limits(concurrency=300))
            feste.compute([llm.chat(f"question {i}") for i in range(300)])
            assert slow.totals().peak > 100  # what pools allow unless they are told otherwise


class TestOneMeaning:
    def test_eager_is_lazy_is_unoptimized(self, server: SimServer) -> None:
        """GREEDY calls give the same bits eager, lazy, and with no optimization."""
        llm = client(server)

        def program() -> Any:
            seen = [
                llm.complete(f"w{i}", CompleteParams(temperature=0, max_tokens=6)) for i in range(5)
            ]
            merged = llm.chat(Prompt("Merge {{ parts }}")(parts=seen), ChatParams(temperature=0))
            city = llm.chat("Name a city.", ChatParams(temperature=0, n=2), output=City)
            return [*seen, merged, city, llm.embed("hello")]

        lazy = feste.compute(program())[0]
        plain = feste.compute(program(), optimize=False)[0]
        with context.set(eager=True):
            eager = program()
        assert lazy == plain == eager
        assert [type(value) for value in lazy] == [type(value) for value in eager]
        lists = [r for r in server.requests() if isinstance(r.body.get("prompt"), list)]
        assert len(lists) == 1  # the optimized run alone shared a request

    def test_samples_are_bought_as_often_as_they_are_written(self, server: SimServer) -> None:
        """Equal SAMPLE calls are separate draws; none is merged away or bought twice."""
        llm = client(server)
        for make in (llm.chat, llm.complete):
            server.reset()
            draws = feste.compute(*[make("same") for _ in range(6)])
            assert Counter(map(str, draws)) == Counter(answer("same", i) for i in range(6))
            assert len(server.ledger()) == 6

    def test_a_misspelt_parameter_never_becomes_a_call(self, server: SimServer) -> None:
        """A word that no endpoint knows is refused where it is written, with the nearest one."""
        llm = client(server)
        with pytest.raises(ParameterError, match="Did you mean 'max_tokens'"):
            llm.complete("x", CompleteParams(max_token=5))  # type: ignore[call-arg]
        with pytest.raises(ParameterError, match="'outptu'"):
            llm.chat("x", outptu=City)  # type: ignore[call-overload]
        with context.set(eager=True), pytest.raises(ParameterError, match=r"ChatParams\(\.\.\.\)"):
            llm.chat("x", {"temperature": 0})  # type: ignore[call-overload]
        assert server.requests() == []

    def test_the_error_of_an_eager_call_is_its_own(self, server: SimServer) -> None:
        """In eager mode the provider's refusal is raised at the line of the call."""
        with context.set(eager=True), pytest.raises(InvalidRequest, match="expected an integer"):
            client(server).chat("hello", ChatParams(n=1000))
