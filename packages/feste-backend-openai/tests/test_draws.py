"""Several draws in one request: which calls may, and that each gets an answer of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import feste
from feste.backend import Profile, Request, Response
from feste.backend.openai import ChatParams, CompleteParams, OpenAI
from feste.backend.openai.answers import unpack_choices, unpack_draws
from feste.errors import CountMismatch
from feste.testing import SimServer
from feste.testing.backend_contract import sent

WIRE = "feste.backend.openai.testing:OpenAIWire"

#: Any value of each field, and whether calls with it may become draws of one request.
COMMON: dict[str, tuple[Any, bool]] = {
    "model": ("m", True),
    "user": ("u", True),
    "extra": ({"top_k": 40}, True),
    "frequency_penalty": (0.5, True),
    "logit_bias": ({"50256": -100}, True),
    "max_tokens": (16, True),
    "n": (2, False),
    "presence_penalty": (0.5, True),
    "seed": (7, False),
    "stop": (["\n"], True),
    "stream_options": ({"include_usage": True}, True),  # sent with streams only
    "temperature": (0.7, True),
    "top_p": (0.9, True),
}
CHAT = COMMON | {
    "audio": ({"voice": "alloy", "format": "wav"}, False),
    "function_call": ("auto", True),
    "functions": ([{"name": "f"}], True),
    "logprobs": (True, True),
    "max_completion_tokens": (16, True),
    "metadata": ({"k": "v"}, True),
    "modalities": (["text"], True),
    "moderation": ({"model": "omni-moderation-latest"}, False),
    "parallel_tool_calls": (True, True),
    "prediction": ({"type": "content", "content": "x"}, False),
    "prompt_cache_key": ("k", True),
    "prompt_cache_options": ({"mode": "implicit"}, True),
    "prompt_cache_retention": ("24h", True),
    "reasoning_effort": ("low", True),
    "response_format": ({"type": "json_object"}, True),
    "safety_identifier": ("s", True),
    "service_tier": ("flex", True),
    "store": (True, False),
    "tool_choice": ("auto", True),
    "tools": ([{"type": "function", "function": {"name": "f"}}], True),
    "top_logprobs": (2, True),
    "verbosity": ("low", True),
    "web_search_options": ({}, False),
}
COMPLETE = COMMON | {
    "best_of": (3, False),
    "echo": (True, True),
    "logprobs": (2, True),
    "suffix": ("x", True),
}


class TestParameters:
    @pytest.mark.parametrize(("kind", "fields"), [(ChatParams, CHAT), (CompleteParams, COMPLETE)])
    def test_each_parameter_is_decided(self, kind: Any, fields: dict[str, Any]) -> None:
        """What acts on each answer by itself may be shared; what acts on a request may not."""
        assert kind.__dataclass_fields__.keys() == fields.keys()
        for name, (value, fuses) in fields.items():
            assert kind(**{name: value}).may_repeat() is fuses, name

    @pytest.mark.parametrize("kind", [ChatParams, CompleteParams])
    def test_values_that_say_no_more_than_the_default(self, kind: Any) -> None:
        """One answer, and nothing stored."""
        assert kind().may_repeat() and kind(n=1).may_repeat()
        assert ChatParams(store=False).may_repeat()

    @pytest.mark.parametrize("name", ["use_beam_search", "n_cmpl", "random_seed", "id_slot", "new"])
    def test_what_only_a_server_knows_may_act_on_the_request(self, name: str) -> None:
        """A beam search returns the best few, not draws; of unknown parameters nothing is known."""
        for kind in (ChatParams, CompleteParams):
            assert not kind(extra={"top_k": 1, name: 1}).may_repeat()
            assert kind(extra={"top_k": 1, "min_p": 0.1, "cache_prompt": True}).may_repeat()


# --- unpacking --------------------------------------------------------------------------------------


def asked(n: int, **body: Any) -> Request:
    return Request("openai", "chat", "http://x/v1", {"model": "m", "n": n, **body})


@st.composite
def payloads(draw: Any) -> tuple[int, dict[str, Any]]:
    """A number of draws, and what some server may answer: each choice with a text of its own."""
    n = draw(st.integers(1, 6))
    index = st.integers(-2, n + 2) | st.sampled_from([None, "0", 0.0, 1.0, True, False, [0]])
    indexes = draw(st.lists(index, max_size=10) | st.permutations(list(range(n))))
    choices = [{"index": index, "text": f"text {i}"} for i, index in enumerate(indexes)]
    for choice in choices:
        if choice["index"] is None and draw(st.booleans()):
            del choice["index"]
    more = draw(st.lists(st.sampled_from([None, 5, "choice", []]), max_size=2))
    usage = {"prompt_tokens": 3, "completion_tokens": 8}
    return n, {"model": "m", "usage": usage, "choices": draw(st.permutations([*choices, *more]))}


@given(payloads())
def test_each_draw_gets_a_choice_of_its_own(case: tuple[int, dict[str, Any]]) -> None:
    """One response for each distinct index, no choice twice, nothing of the whole's usage."""
    n, payload = case
    usable = [
        c
        for c in payload["choices"]
        if isinstance(c, dict) and type(c.get("index")) is int and 0 <= c["index"] < n
    ]
    responses = unpack_draws(None, asked(n), Response(payload, request_id="r"))

    texts = [choice["text"] for r in responses for choice in r.payload["choices"]]
    assert len(texts) == len(set(texts)) == len(responses) == len({c["index"] for c in usable})
    assert set(texts) <= {c["text"] for c in usable}
    for response in responses:
        (choice,) = response.payload["choices"]
        assert choice == {"index": 0, "text": choice["text"]}
        assert response.payload.keys() == {"model", "choices"}
        assert (response.usage, response.request_id) == (None, "r")


@pytest.mark.parametrize("payload", [None, [], "text", {}, {"choices": 5}, {"choices": [1]}])
def test_what_is_no_answer_has_no_draws(payload: Any) -> None:
    """The calls are then asked again, as if fewer had come."""
    assert unpack_draws(None, asked(3), Response(payload)) == []


@given(st.integers(1, 4), st.integers(1, 4), st.randoms())
def test_draws_of_a_list_of_prompts(prompts: int, n: int, rng: random.Random) -> None:
    """First the choices of each prompt, then its draws; never those of another prompt."""
    choices: list[Any] = [
        {"index": i * n + j, "text": f"{i}.{j}"} for i in range(prompts) for j in range(n)
    ]
    rng.shuffle(choices)
    request = asked(n, prompt=[f"p{i}" for i in range(prompts)])

    outcomes = unpack_choices(None, request, Response({"model": "m", "choices": choices}))

    for i, outcome in enumerate(outcomes):
        assert [c["index"] for c in outcome.payload["choices"]] == list(range(n))
        draws = unpack_draws(None, request, outcome)
        assert [d.payload["choices"][0]["text"] for d in draws] == [f"{i}.{j}" for j in range(n)]
    choices[0] = {**choices[0], "index": choices[-1]["index"] if len(choices) > 1 else 9}
    with pytest.raises(CountMismatch):
        unpack_choices(None, request, Response({"model": "m", "choices": choices}))


# --- over a socket ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[SimServer]:
    with SimServer(WIRE, wire_options={"lists": "shuffled"}) as server:
        yield server


@pytest.mark.parametrize("operation", ["chat", "complete"])
def test_draws_are_answers_of_calls(server: SimServer, operation: str) -> None:
    """Each response parses as that of a single call does; the prompt was sent once."""
    server.reset()
    call: Any = getattr(OpenAI("m", base_url=f"{server.url}/v1"), operation)
    arguments = [*call.operation.bind(["Name a fruit."], {})]
    rule, request = call.operation.samples, call.prepare(arguments)

    packed = rule.pack(request, 5)
    draws = rule.unpack(call.client, packed, sent(call, packed))

    values = [call.parse(response, arguments) for response in draws]
    assert sorted(values) == sorted(entry["answer"] for entry in server.ledger())
    assert len(set(values)) == 5 and {value.usage for value in values} == {None}
    assert [entry.body.get("n") for entry in server.requests()] == [5]
    assert "n" not in request.body and rule.max_draws == 128


def test_draws_of_a_list_over_a_socket(server: SimServer) -> None:
    """Prompts and draws share one request, and each answer comes back to its prompt."""
    server.reset()
    call: Any = OpenAI("m", base_url=f"{server.url}/v1").complete
    rule, lists = call.operation.samples, call.rule
    prompts = [f"prompt {i}" for i in range(3)]
    singles = [call.prepare([prompt, CompleteParams()]) for prompt in prompts]

    packed = lists.pack(call.client, [rule.pack(request, 4) for request in singles])
    outcomes = lists.unpack(call.client, packed, sent(call, packed))

    for prompt, outcome in zip(prompts, outcomes, strict=True):
        draws = rule.unpack(call.client, packed, outcome)
        made = [str(call.parse(draw, [prompt, CompleteParams()])) for draw in draws]
        wanted = [e["answer"] for e in server.ledger() if e["prompt"] == prompt]
        assert made == wanted and len(made) == 4
    assert len(server.requests()) == 1


@pytest.mark.parametrize(
    ("params", "asked_for"),
    [
        (ChatParams(), [6]),
        (ChatParams(extra={"top_k": 3}), [6]),
        (ChatParams(store=True), [None] * 6),
        (ChatParams(extra={"use_beam_search": True}), [None] * 6),
    ],
)
def test_equal_chats_become_draws_of_one_request(
    server: SimServer, params: ChatParams, asked_for: list[int | None]
) -> None:
    """A vote costs its prompt once, unless a parameter acts on the request as a whole."""
    server.reset()
    llm = OpenAI("m", base_url=f"{server.url}/v1")
    (votes,) = feste.compute([llm.chat("Name a fruit.", params) for _ in range(6)])

    assert sorted(votes) == sorted(entry["answer"] for entry in server.ledger())
    assert len(set(votes)) == 6
    assert [entry.body.get("n") for entry in server.requests()] == asked_for


def test_a_model_that_gives_one_answer_is_asked_for_one(server: SimServer) -> None:
    """The user's profile decides for his server."""
    server.reset()
    llm = OpenAI("m", base_url=f"{server.url}/v1", profile=Profile(max_draws=1))
    feste.compute([llm.chat("Name a fruit.") for _ in range(3)])

    assert [entry.body.get("n") for entry in server.requests()] == [None] * 3
