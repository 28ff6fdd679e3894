"""The official OpenAI SDK against `SimServer` over a real socket."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

import feste
from feste.backend import PromptCache, Usage
from feste.backend.openai import ChatParams, OpenAI
from feste.backend.openai.testing import OpenAIWire, answer, embedding, json_answer
from feste.testing import Billed, Fault, ServerLimits, SimServer
from feste.testing.wire import Remaining

WIRE = "feste.backend.openai.testing:OpenAIWire"


EXPLICIT: Any = {"prompt_cache_options": {"mode": "explicit"}}


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@contextmanager
def connected(
    prompt_cache: PromptCache | None = None, **options: Any
) -> Iterator[tuple[SimServer, openai.OpenAI]]:
    """A server with these wire options, and a client that does not retry."""
    with (
        SimServer(WIRE, wire_options=options, prompt_cache=prompt_cache) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="test", max_retries=0) as client,
    ):
        yield server, client


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon; the deadline only ends a test that is broken."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[SimServer, openai.OpenAI]]:
    with connected() as both:
        yield both


@pytest.fixture
def server(pair: tuple[SimServer, openai.OpenAI]) -> SimServer:
    pair[0].reset()
    return pair[0]


@pytest.fixture
def client(pair: tuple[SimServer, openai.OpenAI], server: SimServer) -> openai.OpenAI:
    return pair[1]


class TestChat:
    def test_a_greedy_chat(self, server: SimServer, client: openai.OpenAI) -> None:
        for _ in range(2):
            reply = client.chat.completions.create(
                model="m", messages=user("one two three"), temperature=0
            )
            assert reply.choices[0].message.content == answer("one two three", 0)
            assert reply.choices[0].finish_reason == "stop"
            assert reply.usage is not None
            assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 8)
            assert reply.usage.total_tokens == 11
            assert (reply.model, reply.object) == ("m", "chat.completion")
        assert [entry.body["model"] for entry in server.requests()] == ["m", "m"]
        assert {entry.headers["authorization"] for entry in server.requests()} == {"Bearer ***"}

    def test_sampled_chats_and_n(self, server: SimServer, client: openai.OpenAI) -> None:
        texts = []
        for n in (3, 1):
            reply = client.chat.completions.create(model="m", messages=user("hi"), n=n)
            assert [choice.index for choice in reply.choices] == list(range(n))
            assert reply.usage is not None and reply.usage.completion_tokens == 8 * n
            texts += [choice.message.content for choice in reply.choices]

        assert texts == [answer("hi", i) for i in range(4)]
        assert [entry["answer"] for entry in server.ledger()] == texts
        assert [entry.items for entry in server.requests()] == [3, 1]

    def test_a_seed_makes_it_greedy(self, client: openai.OpenAI) -> None:
        replies = [
            client.chat.completions.create(model="m", messages=user("hi"), seed=5, n=2)
            for _ in range(2)
        ]
        for reply in replies:
            texts = [choice.message.content for choice in reply.choices]
            assert texts == [answer("hi", i, seed=5) for i in range(2)]

    def test_a_talk_and_a_scripted_reply(self, client: openai.OpenAI) -> None:
        talk: list[Any] = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Who?\nREPLY: The Fool"}]},
        ]
        reply = client.chat.completions.create(model="m", messages=talk)
        assert reply.choices[0].message.content == "The Fool" == answer(talk)
        assert reply.usage is not None and reply.usage.prompt_tokens == 6

        talk[1]["content"] = "Who?"
        reply = client.chat.completions.create(model="m", messages=talk, temperature=0)
        assert reply.choices[0].message.content == answer(talk) != answer("Who?")

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_max_tokens_cuts(self, client: openai.OpenAI, name: str) -> None:
        limit: Any = {name: 3}
        reply = client.chat.completions.create(model="m", messages=user("REPLY: a b c d"), **limit)
        assert reply.choices[0].message.content == "a b c"
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage is not None and reply.usage.completion_tokens == 3

    def test_json_of_a_schema(self, client: openai.OpenAI) -> None:
        class Author(BaseModel):
            name: str
            born: int = Field(ge=1500)

        class Play(BaseModel):
            title: str
            acts: list[str]
            author: Author
            year: int | None

        parse = client.chat.completions.parse
        message = user("Which play?")
        reply = parse(model="m", messages=message, response_format=Play, temperature=0)
        mark = answer(message).split()[0]
        author = Author(name=mark, born=1500)
        assert reply.choices[0].message.parsed == Play(
            title=mark, acts=[], author=author, year=None
        )
        schema = Play.model_json_schema()
        assert reply.choices[0].message.content == json_answer(message, schema)

        scripted = author.model_copy(update={"name": "Shakespeare"}).model_dump_json()
        reply_2 = parse(model="m", messages=user("REPLY: " + scripted), response_format=Author)
        assert reply_2.choices[0].message.parsed == Author(name="Shakespeare", born=1500)

        with pytest.raises(openai.LengthFinishReasonError):
            parse(model="m", messages=message, response_format=Play, max_tokens=1)

    def test_any_json(self, client: openai.OpenAI) -> None:
        reply = client.chat.completions.create(
            model="m", messages=user("hi"), response_format={"type": "json_object"}, seed=1
        )
        text = reply.choices[0].message.content
        assert text and json.loads(text) == {"echo": answer("hi", seed=1).split()[0]}

    def test_tools(self, server: SimServer, client: openai.OpenAI) -> None:
        def tool(name: str) -> Any:
            city = {"type": "object", "properties": {"city": {"type": "string"}}}
            parameters = {**city, "required": ["city"]}
            return {"type": "function", "function": {"name": name, "parameters": parameters}}

        def ask(messages: list[Any], choice: Any) -> Any:
            return client.chat.completions.create(
                model="m",
                messages=messages,
                tools=[tool("weather"), tool("map")],
                tool_choice=choice,
                temperature=0,
            ).choices[0]

        for choice, name in [
            ("required", "weather"),
            ({"type": "function", "function": {"name": "map"}}, "map"),
        ]:
            made = ask(user("hi"), choice)
            assert (made.finish_reason, made.message.content) == ("tool_calls", None)
            (call,) = made.message.tool_calls
            assert (call.type, call.function.name) == ("function", name)
            assert json.loads(call.function.arguments).keys() == {"city"}
        assert server.ledger()[1]["answer"].startswith('map({"city": "echo:')

        for choice in ("auto", "none"):
            assert ask(user("hi"), choice).message.content == answer("hi")

        script = user('Go\nCALL: map {"city": "Rome"}\nREPLY: done')
        made = ask(script, "auto")
        assert json.loads(made.message.tool_calls[0].function.arguments) == {"city": "Rome"}
        call_id = made.message.tool_calls[0].id
        script += [made.message, {"role": "tool", "tool_call_id": call_id, "content": "a map"}]
        assert ask(script, "auto").message.content == "done"

    def test_logprobs(self, client: openai.OpenAI) -> None:
        reply = client.chat.completions.create(
            model="m", messages=user("REPLY: a b"), logprobs=True
        )
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert [part.token for part in logprobs.content] == ["a ", "b"]

    def test_a_stream(self, server: SimServer, client: openai.OpenAI) -> None:
        stream = client.chat.completions.create(
            model="m",
            messages=user("hi"),
            temperature=0,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts: Counter[int] = Counter()
        found = {0: "", 1: ""}
        reasons = []
        chunks = list(stream)
        for chunk in chunks[:-1]:
            (part,) = chunk.choices
            found[part.index] += part.delta.content or ""
            texts[part.index] += bool(part.delta.content)
            reasons += [part.finish_reason] if part.finish_reason else []

        assert found == {0: answer("hi", 0), 1: answer("hi", 1)}
        assert texts == {0: 8, 1: 8}
        assert reasons == ["stop", "stop"]
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 17
        assert [entry["answer"] for entry in server.ledger()] == list(found.values())

    def test_the_sdk_collects_a_stream(self, client: openai.OpenAI) -> None:
        tools: Any = [{"type": "function", "function": {"name": "go", "parameters": {}}}]
        with client.chat.completions.stream(model="m", messages=user("hi"), seed=1) as stream:
            text = stream.get_final_completion().choices[0].message.content
        with client.chat.completions.stream(
            model="m", messages=user('CALL: go {"x": 1}'), tools=tools
        ) as stream:
            calls = stream.get_final_completion().choices[0].message.tool_calls

        assert text == answer("hi", seed=1)
        assert calls and (calls[0].function.name, calls[0].function.arguments) == ("go", '{"x": 1}')


class TestCompletions:
    def test_a_list_is_prompt_major(self, server: SimServer, client: openai.OpenAI) -> None:
        reply = client.completions.create(model="m", prompt=["a", "b c"], n=2, temperature=0)

        expected = [answer(prompt, j) for prompt in ("a", "b c") for j in range(2)]
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 32)
        assert server.requests()[0].items == 4
        assert [entry["prompt"] for entry in server.ledger()] == ["a", "a", "b c", "b c"]

    def test_a_list_answers_as_its_prompts_alone(self, client: openai.OpenAI) -> None:
        prompts = [f"prompt {i}" for i in range(20)]
        together = client.completions.create(model="m", prompt=prompts, seed=3, max_tokens=2)
        for prompt, choice in zip(prompts, together.choices, strict=True):
            alone = client.completions.create(model="m", prompt=prompt, seed=3, max_tokens=2)
            assert alone.choices[0].text == choice.text
            assert alone.choices[0].finish_reason == choice.finish_reason == "length"

    def test_sampled_prompts_and_tokens(self, client: openai.OpenAI) -> None:
        reply = client.completions.create(model="m", prompt=["a", "a"])
        assert [choice.text for choice in reply.choices] == [answer("a", 0), answer("a", 1)]
        reply = client.completions.create(model="m", prompt=[[1, 2], [3]], temperature=0)
        assert [choice.text for choice in reply.choices] == [answer("1 2"), answer("3")]
        reply = client.completions.create(model="m", prompt=[1, 2], temperature=0)
        assert [choice.text for choice in reply.choices] == [answer("1 2")]

    def test_a_stream_and_logprobs(self, client: openai.OpenAI) -> None:
        found = {0: "", 1: ""}
        for chunk in client.completions.create(model="m", prompt=["a", "b"], seed=1, stream=True):
            found[chunk.choices[0].index] += chunk.choices[0].text
        assert found == {0: answer("a", seed=1), 1: answer("b", seed=1)}

        reply = client.completions.create(model="m", prompt="REPLY: one two", logprobs=1)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert (logprobs.tokens, logprobs.text_offset) == (["one ", "two"], [0, 4])

    def test_servers_that_answer_the_first_prompt_only(self) -> None:
        with connected(lists="first_only") as (server, client):
            reply = client.completions.create(model="m", prompt=["a", "b"], n=2, seed=1)

            assert [c.text for c in reply.choices] == [answer("a", j, seed=1) for j in range(2)]
            assert len(server.ledger()) == 2

    def test_servers_that_refuse_lists(self) -> None:
        with connected(lists="refuse") as (server, client):
            with pytest.raises(openai.BadRequestError) as error:
                client.completions.create(model="m", prompt=["a"])
            assert error.value.param == "prompt"
            assert client.completions.create(model="m", prompt="a").choices[0].text == answer("a")
            assert len(server.ledger()) == 1

    def test_servers_that_shuffle_and_count_the_first(self) -> None:
        prompts = ["a", "b b", "c c c"]
        with connected(lists="shuffled", usage="first", max_prompts=3) as (_, client):
            reply = client.completions.create(model="m", prompt=prompts, temperature=0)
            indexes = [choice.index for choice in reply.choices]
            assert indexes != sorted(indexes) == [0, 1, 2]
            for choice in reply.choices:
                assert choice.text == answer(prompts[choice.index])
            assert reply.usage is not None
            assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (1, 8)

            with pytest.raises(openai.BadRequestError, match="At most 3 prompts"):
                client.completions.create(model="m", prompt=[*prompts, "d"])


class TestEmbeddings:
    def test_both_encodings_give_the_same(self, server: SimServer, client: openai.OpenAI) -> None:
        texts = ["a", "b c", "d"]
        for encoding in ("float", "base64"):
            # The SDK decodes base64 only if it asked for it itself; then it uses no other.
            options: Any = {} if encoding == "base64" else {"encoding_format": encoding}
            reply = client.embeddings.create(model="m", input=texts, **options)
            assert [item.embedding for item in reply.data] == [embedding(text) for text in texts]
            assert [item.index for item in reply.data] == [0, 1, 2]
            assert reply.usage.total_tokens == 4
            assert server.requests()[-1].body["encoding_format"] == encoding
        assert server.requests()[0].items == 3
        answers = [entry["answer"] for entry in server.ledger()]
        assert answers[:3] == answers[3:] and len(set(answers)) == 3

    def test_base64_is_sent_as_such(self, client: openai.OpenAI) -> None:
        raw = client.embeddings.with_raw_response.create(model="m", input="a")
        text = raw.http_response.json()["data"][0]["embedding"]
        assert list(struct.unpack("<16f", base64.b64decode(text))) == embedding("a")

    def test_one_text_tokens_and_dimensions(self, client: openai.OpenAI) -> None:
        reply = client.embeddings.create(model="m", input="a", dimensions=5)
        assert [item.embedding for item in reply.data] == [embedding("a", 5)]
        reply = client.embeddings.create(model="m", input=[[1, 2], [3]])
        assert [item.embedding for item in reply.data] == [embedding("1 2"), embedding("3")]

    def test_limits_and_order(self) -> None:
        with connected(order="shuffled", max_inputs=8, dimensions=3) as (_, client):
            texts = list("abcdefgh")
            reply = client.embeddings.create(model="m", input=texts)
            indexes = [item.index for item in reply.data]
            assert indexes != sorted(indexes) == list(range(8))
            for item in reply.data:
                assert item.embedding == embedding(texts[item.index], 3)
            with pytest.raises(openai.BadRequestError, match="At most 8 inputs"):
                client.embeddings.create(model="m", input=[*texts, "i"])

    def test_what_is_refused(self, server: SimServer, client: openai.OpenAI) -> None:
        bad: list[Any] = ["", ["a", ""], [], [1.5], None]
        for texts in bad:
            with pytest.raises(openai.BadRequestError) as error:
                client.embeddings.create(model="m", input=texts)
            assert error.value.param == "input"
        assert server.ledger() == []


class TestPromptCache:
    """What the provider caches, through the official SDK."""

    def talk(self, own: str, shared: str = "a b c", mark: bool = True) -> list[Any]:
        block: dict[str, object] = {"type": "text", "text": shared}
        if mark:
            block["prompt_cache_breakpoint"] = {"mode": "explicit"}
        return [{"role": "system", "content": [block]}, {"role": "user", "content": own}]

    def ask(self, client: openai.OpenAI, messages: list[Any], **given: Any) -> tuple[Any, ...]:
        """Ask, and return the tokens of the prompt: all, cached, written."""
        reply = client.chat.completions.create(**{"model": "m", "messages": messages, **given})
        assert reply.usage is not None
        details: Any = reply.usage.prompt_tokens_details
        return reply.usage.prompt_tokens, details.cached_tokens, details.cache_write_tokens

    @pytest.mark.parametrize("leader", [False, True], ids=["all at once", "one first"])
    def test_sixty_four_requests_with_a_prefix(self, leader: bool) -> None:
        shared = " ".join(f"rule-{i}" for i in range(4000))
        talks = [self.talk(" ".join([f"item-{k}"] * 200), shared) for k in range(64)]

        async def ask(server: SimServer, some: list[list[Any]]) -> None:
            async with openai.AsyncOpenAI(
                base_url=server.url + "/v1", api_key="test", max_retries=0
            ) as client:
                create = client.chat.completions.create
                calls = [create(model="m", messages=t, extra_body=EXPLICIT) for t in some]
                await asyncio.gather(*calls)

        lag = 0.05 if leader else 600
        with SimServer(WIRE, prompt_cache=PromptCache(write=1.25, lag=lag)) as server:
            if leader:
                asyncio.run(ask(server, talks[:1]))
                until(lambda: server.totals().committed > 0)
            asyncio.run(ask(server, talks[leader:]))
            billed = server.totals().billed

        assert (billed.input_tokens, billed.output_tokens) == (64 * 4200, 64 * 8)
        if leader:
            assert (billed.written_tokens, billed.cached_tokens) == (4000, 63 * 4000)
            assert billed.input_units == pytest.approx(43_000)
        else:
            assert (billed.written_tokens, billed.cached_tokens) == (64 * 4000, 0)
            assert billed.input_units == 332_800 >= 269_000

    def test_a_request_before_the_commit_misses(self) -> None:
        with connected(PromptCache(minimum=2, write=1.25, lag=600)) as (server, client):
            for own in ("d", "e"):
                assert self.ask(client, self.talk(own), extra_body=EXPLICIT) == (4, 0, 3)
            assert server.totals().committed == 0

    def test_a_request_looks_when_it_arrives(self) -> None:
        with (
            SimServer(
                WIRE, slope=0.05, prompt_cache=PromptCache(minimum=1, write=1.25, lag=0)
            ) as server,
            openai.OpenAI(base_url=server.url + "/v1", api_key="test", max_retries=0) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            slow = pool.submit(self.ask, client, user("a b"), n=8)
            until(lambda: server.totals().in_flight == 1)
            assert self.ask(client, user("a b"))[1] == 0

            assert slow.result()[1] == 0  # though the other was committed before its generation
            assert self.ask(client, user("a b")) == (2, 2, 0)

    def test_implicit_and_explicit_caching(self) -> None:
        with connected(PromptCache(minimum=2, write=1.25, lag=0)) as (_, client):
            unmarked = self.talk("d", mark=False)
            for _ in range(2):  # without breakpoints, the explicit mode caches nothing
                assert self.ask(client, unmarked, extra_body=EXPLICIT) == (4, 0, 0)
            assert self.ask(client, self.talk("d"), extra_body=EXPLICIT) == (4, 0, 3)
            assert self.ask(client, self.talk("e"), extra_body=EXPLICIT) == (4, 3, 0)
            assert self.ask(client, self.talk("d")) == (4, 3, 1)
            assert self.ask(client, unmarked) == (4, 4, 0)
            assert self.ask(client, self.talk("d", "a b x")) == (4, 2, 2)
            assert self.ask(client, user("short")) == (1, 0, 0)

    def test_what_the_cache_tells_apart(self) -> None:
        tools: Any = [{"type": "function", "function": {"name": "go", "parameters": {}}}]
        with connected(PromptCache(minimum=1, write=1.25, lag=0)) as (_, client):
            assert self.ask(client, user("a b")) == (2, 0, 2)
            for given in ({"model": "other"}, {"extra_body": {"prompt_cache_key": "k"}}):
                assert [self.ask(client, user("a b"), **given)[1] for _ in range(2)] == [0, 2]
            total, cached, written = self.ask(client, user("a b"), tools=tools)
            assert total == written > 2 and cached == 0
            assert self.ask(client, user("c"), tools=tools) == (total - 1, total - 2, 1)
            assert self.ask(client, [{"role": "developer", "content": "a b"}])[1] == 0

    def test_a_stream_counts_alike(self) -> None:
        with connected(PromptCache(minimum=1, write=1.25, lag=0)) as (server, client):
            self.ask(client, user("a b"))
            *_, last = client.chat.completions.create(
                model="m",
                messages=user("a b c"),
                stream=True,
                stream_options={"include_usage": True},
            )
            assert last.usage is not None and last.usage.prompt_tokens_details is not None
            assert last.usage.prompt_tokens_details.cached_tokens == 2
            assert server.totals().billed.written_tokens == 3
            assert server.totals().billed.output_tokens == 16

    def test_feste_counts_what_was_written(self) -> None:
        with connected(PromptCache(minimum=2, write=1.25, lag=0)) as (server, _):
            llm = OpenAI("m", base_url=server.url + "/v1", api_key="test")
            params = ChatParams(prompt_cache_options={"mode": "explicit"})
            usages = [llm.chat(self.talk(k), params).compute().usage for k in ("d", "e")]

        assert usages == [Usage(4, 8, 0, 3), Usage(4, 8, 3, 0)]

    def test_all_endpoints_are_billed(self, server: SimServer, client: openai.OpenAI) -> None:
        assert self.ask(client, user("one two")) == (2, 0, 0)
        client.completions.create(model="m", prompt=["three four", "five"], n=2)
        client.embeddings.create(model="m", input=["six", "seven"])

        assert server.totals().billed == Billed(7, output_tokens=5 * 8, input_units=7)

    def test_a_mode_that_there_is_not(self, client: openai.OpenAI) -> None:
        for wrong in ({"mode": "none"}, "explicit"):
            with pytest.raises(openai.BadRequestError) as error:
                self.ask(client, user("a"), extra_body={"prompt_cache_options": wrong})
            assert error.value.param == "prompt_cache_options"


class TestQuirks:
    """Servers that get several answers in one reply wrong, and those that refuse one text."""

    def chat(self, client: openai.OpenAI, n: int = 3) -> list[tuple[int, str | None]]:
        reply = client.chat.completions.create(model="m", messages=user("hi"), n=n, seed=1)
        return [(choice.index, choice.message.content) for choice in reply.choices]

    def complete(self, client: openai.OpenAI, prompt: Any, n: int = 1) -> list[tuple[int, str]]:
        reply = client.completions.create(model="m", prompt=prompt, n=n, seed=1)
        return [(choice.index, choice.text) for choice in reply.choices]

    def embed(self, client: openai.OpenAI, texts: Any) -> list[tuple[int, list[float]]]:
        reply = client.embeddings.create(model="m", input=texts)
        return [(item.index, item.embedding) for item in reply.data]

    def test_one_choice_whatever_n_is(self) -> None:
        texts = [answer("hi", i, seed=1) for i in range(2)]
        with connected(choices="one") as (server, client):
            assert self.chat(client) == [(0, texts[0])]
            assert self.complete(client, ["hi", "hi"], n=2) == [(0, texts[0]), (1, texts[0])]
            assert [entry.items for entry in server.requests()] == [1, 2]

    def test_n_is_refused(self) -> None:
        with connected(choices="refuse") as (server, client):
            for ask in (self.chat, lambda c: self.complete(c, "hi", n=2)):
                with pytest.raises(openai.BadRequestError) as error:
                    ask(client)
                assert error.value.param == "n"
            assert len(self.chat(client, n=1)) == len(self.complete(client, "hi")) == 1
            assert len(server.ledger()) == 2

    def test_choices_out_of_order_and_twice(self) -> None:
        texts = list(enumerate(answer("hi", i, seed=1) for i in range(3)))
        with connected(choices="shuffled") as (_, client):
            for found in (self.chat(client), self.complete(client, "hi", n=3)):
                assert found != sorted(found) == texts
        with connected(choices="duplicated") as (server, client):
            for found in (self.chat(client), self.complete(client, "hi", n=3)):
                assert found == [texts[0], texts[1], texts[0]]
            assert self.chat(client, n=1) == texts[:1]
            found = self.complete(client, ["a", "b", "c"])  # a list, but no n
            assert [index for index, _ in found] == [0, 1, 2]
            assert [entry.items for entry in server.requests()] == [3, 3, 1, 3]

    def test_lists_with_one_twice_or_too_many(self) -> None:
        a, b = answer("a", seed=1), answer("b", seed=1)
        with connected(lists="duplicated") as (_, client):
            assert self.complete(client, ["a", "b"]) == [(0, a), (0, a)]
            assert self.complete(client, ["a"]) == self.complete(client, "a") == [(0, a)]
            assert len(set(self.complete(client, "a", n=2))) == 2
        with connected(lists="extra") as (_, client):
            assert self.complete(client, ["a", "b"]) == [(0, a), (1, b), (2, b)]
            assert self.complete(client, ["a"]) == self.complete(client, "a") == [(0, a)]

    @pytest.mark.parametrize("kind", ["shuffled", "duplicated", "extra"])
    def test_faults_of_several_answers(self, kind: Any) -> None:
        """They do once what the option does always, and leave a single answer and a stream alone."""
        with connected(lists=kind) as (_, client):
            always = self.complete(client, ["a", "b"])
        with connected() as (server, client):
            server.add(Fault(kind=kind, times=3))
            single = self.complete(client, "a")
            streamed = list(
                client.chat.completions.create(model="m", messages=user("a"), stream=True)
            )
            once = self.complete(client, ["a", "b"])
            seen = [(entry.fault, entry.delivered) for entry in server.requests()]
            assert server.totals().faults == {kind: 1}

        assert single == [(0, answer("a", seed=1))] and len(streamed) > 2
        assert once == always != [(0, answer("a", seed=1)), (1, answer("b", seed=1))]
        assert seen == [(None, True), (None, True), (kind, kind == "shuffled")]

    def test_vectors_of_some_twice_or_too_many(self) -> None:
        a, b = embedding("a"), embedding("b")
        for order, expected in (
            ("duplicated", [(0, a), (0, a)]),
            ("extra", [(0, a), (1, b), (2, b)]),
            ("first_only", [(0, a)]),
        ):
            with connected(order=order) as (server, client):
                assert self.embed(client, ["a", "b"]) == expected
                assert self.embed(client, ["a"]) == self.embed(client, "a") == [(0, a)]
                assert server.requests()[0].items == (1 if order == "first_only" else 2)

    def test_one_poisoned_item_spoils_a_request(self) -> None:
        block: Any = [{"type": "text", "text": "some bad luck"}]
        with connected(poison="bad luck") as (server, client):
            for ask in (
                lambda: self.complete(client, ["good", "bad luck", "better"]),
                lambda: self.embed(client, ["good", "bad luck"]),
                lambda: client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": block}, *user("hi")]
                ),
            ):
                with pytest.raises(openai.BadRequestError) as error:
                    ask()
                assert error.value.param is None and "luck" not in str(error.value)
            assert server.ledger() == [] and server.totals().billed == Billed()
            assert len(self.complete(client, ["good", "bad", "luck"])) == 3

    def test_feste_finds_the_poisoned_item(self) -> None:
        with connected(poison="bad luck") as (server, _):
            llm = OpenAI("m", base_url=server.url + "/v1", api_key="test")
            texts = ["one", "two", "bad luck", "four"]
            (found,) = feste.compute([llm.embed(text) for text in texts], on_error="return")

            assert [isinstance(one, Exception) for one in found] == [False, False, True, False]
            assert sorted(entry["prompt"] for entry in server.ledger()) == ["four", "one", "two"]


class TestErrors:
    def test_errors_have_the_fields_of_openai(
        self, server: SimServer, client: openai.OpenAI
    ) -> None:
        nothing: Any = []
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="m", messages=nothing)
        assert error.value.type == "invalid_request_error"
        assert (error.value.param, error.value.code) == ("messages", None)
        assert error.value.request_id == server.requests()[0].id

        bad: list[dict[str, Any]] = [
            {"n": 0},
            {"n": True},
            {"n": "2"},
            {"max_tokens": 0},
            {"model": ""},
            {"messages": ["hi"]},
        ]
        for wrong in bad:
            whole: Any = {"model": "m", "messages": user("hi"), **wrong}
            with pytest.raises(openai.BadRequestError) as error:
                client.chat.completions.create(**whole)
            assert error.value.param == next(iter(wrong))
        with pytest.raises(openai.NotFoundError):
            client.moderations.create(input="hi")
        with pytest.raises(openai.NotFoundError):
            client.get("/chat/completions", cast_to=object)

    def test_the_key_and_the_models(self) -> None:
        with connected(require_key="right", models=["a", "b"]) as (server, client):
            with pytest.raises(openai.AuthenticationError) as error:
                client.models.list()
            assert error.value.code == "invalid_api_key"
            with client.with_options(api_key="right") as known:
                assert [model.id for model in known.models.list()] == ["a", "b"]
                assert known.models.retrieve("b").id == "b"
                with pytest.raises(openai.NotFoundError) as missing:
                    known.models.retrieve("c")
                assert missing.value.code == "model_not_found"
                with pytest.raises(openai.NotFoundError):
                    known.completions.create(model="c", prompt="hi")
            assert server.ledger() == []

    def test_any_model_is_good_by_default(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["sim"]
        assert client.models.retrieve("org/any").id == "org/any"

    def test_a_quirk_that_there_is_not(self) -> None:
        wrong: Any
        for wrong in (
            {"lists": "no"},
            {"usage": "none"},
            {"order": "refuse"},
            {"choices": "extra"},
        ):
            with pytest.raises(ValueError, match="is none of"):
                OpenAIWire(**wrong)


class TestFaults:
    def ask(self, client: openai.OpenAI) -> str | None:
        reply = client.chat.completions.create(model="m", messages=user("hi"), temperature=0)
        return reply.choices[0].message.content

    def test_the_sdk_retries_what_it_should(self, server: SimServer, client: openai.OpenAI) -> None:
        server.add(
            Fault(status=429, headers={"retry-after-ms": "1"}),
            Fault(status=500, headers={"retry-after-ms": "1"}),
        )
        assert self.ask(client.with_options(max_retries=2)) == answer("hi")
        assert [entry.status for entry in server.requests()] == [429, 500, 200]
        counts = [entry.headers["x-stainless-retry-count"] for entry in server.requests()]
        assert counts == ["0", "1", "2"]

    @pytest.mark.parametrize(
        ("fault", "error", "billed"),
        [
            (Fault(status=429), openai.RateLimitError, 0),
            (Fault(status=503), openai.InternalServerError, 0),
            (Fault(status=403), openai.PermissionDeniedError, 0),
            (Fault(kind="reset_before"), openai.APIConnectionError, 0),
            (Fault(kind="reset_after"), openai.APIConnectionError, 1),
            (Fault(kind="truncated"), openai.APIConnectionError, 1),
            (Fault(kind="garbage"), json.JSONDecodeError, 1),
            (Fault(kind="hang"), openai.APITimeoutError, 0),
            (Fault(kind="drip", pause=600), openai.APITimeoutError, 1),
        ],
        ids=lambda value: getattr(value, "kind", None),
    )
    def test_what_the_sdk_makes_of_a_fault(
        self,
        server: SimServer,
        client: openai.OpenAI,
        fault: Fault,
        error: type[Exception],
        billed: int,
    ) -> None:
        server.add(fault)
        patience = 0.5 if error is openai.APITimeoutError else 60
        with pytest.raises(error):
            self.ask(client.with_options(timeout=patience))
        assert server.requests()[0].fault == fault.kind
        assert len(server.ledger()) == billed
        assert self.ask(client) == answer("hi")

    def test_a_scripted_error_has_the_fields_of_openai(
        self, server: SimServer, client: openai.OpenAI
    ) -> None:
        body = {"error": {"message": "You exceeded your quota.", "code": "insufficient_quota"}}
        server.add(Fault(status=429), Fault(status=429, body=body))
        for code in ("rate_limit_exceeded", "insufficient_quota"):
            with pytest.raises(openai.RateLimitError) as error:
                self.ask(client)
            assert error.value.code == code

    @pytest.mark.parametrize("kind", ["truncated", "reset_after"])
    def test_a_broken_stream(self, server: SimServer, client: openai.OpenAI, kind: Any) -> None:
        server.add(Fault(kind=kind))
        text = ""
        with pytest.raises(openai.OpenAIError):
            for chunk in client.chat.completions.create(
                model="m", messages=user("hi"), temperature=0, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
        assert answer("hi").startswith(text) and len(text) < len(answer("hi"))
        assert bool(text) == (kind == "truncated")

    def test_a_dripping_stream_is_whole(self, server: SimServer, client: openai.OpenAI) -> None:
        server.add(Fault(kind="drip", pause=0.001))
        stream = client.chat.completions.create(
            model="m", messages=user("hi"), temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == answer("hi")


def test_many_requests_at_once() -> None:
    """The async client, on both of its transports: all answered, in flight together."""

    async def ask(server: SimServer, **options: Any) -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="test", max_retries=0, **options
        ) as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="m", messages=user(f"hi {i}"), temperature=0
                    )
                    for i in range(60)
                )
            )
            return [reply.choices[0].message.content for reply in replies]

    with SimServer(WIRE, base=0.5) as server:
        for options in ({}, {"http_client": openai.DefaultAioHttpClient()}):
            server.reset()
            assert asyncio.run(ask(server, **options)) == [answer(f"hi {i}") for i in range(60)]
            assert len(server.ledger()) == 60
            assert 1 < server.totals().peak <= 60


class TestLimits:
    def test_limits_are_told_in_headers(self) -> None:
        limits = ServerLimits(requests_per_minute=600, tokens_per_minute=6_000)
        with (
            SimServer(WIRE, limits=limits) as server,
            openai.OpenAI(base_url=server.url + "/v1", api_key="test", max_retries=0) as client,
        ):
            reply = client.chat.completions.with_raw_response.create(
                model="m", messages=user("four words are these"), max_tokens=500
            )
        told = {name: text for name, text in reply.headers.items() if "ratelimit" in name}

        assert told.pop("x-ratelimit-reset-requests").endswith("ms")  # one request: 100 of them
        assert told.pop("x-ratelimit-reset-tokens").endswith("ms")  # the 500 were given back
        assert told == {
            "x-ratelimit-limit-requests": "600",
            "x-ratelimit-remaining-requests": "599",
            "x-ratelimit-limit-tokens": "6000",
            "x-ratelimit-remaining-tokens": "5988",
        }

    @pytest.mark.parametrize(
        ("seconds", "spelled"),
        [
            (0, "0s"),
            (0.0001, "1ms"),
            (0.012, "12ms"),
            (1, "1s"),
            (8.64, "8.64s"),
            (59.9999, "1m0s"),
            (360, "6m0s"),
            (3_661.5, "1h1m1.5s"),
        ],
    )
    def test_times_are_spelled_as_go_does(self, seconds: float, spelled: str) -> None:
        headers = OpenAIWire().limit_headers(200, Remaining(60, 1, seconds), None)

        assert headers["x-ratelimit-reset-requests"] == spelled

    def test_an_account_without_money_is_no_rate_limit(
        self, server: SimServer, client: openai.OpenAI
    ) -> None:
        server.add(Fault(kind="quota"))
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="m", messages=user("hi"))

        assert (error.value.code, error.value.type) == ("insufficient_quota", "insufficient_quota")
        assert "retry-after" not in error.value.response.headers
