"""What plans save, at a simulated provider over sockets: requests, and tokens to pay."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import feste
from feste.backend import Profile, PromptCache
from feste.backend.openai import ChatParams, OpenAI
from feste.errors import InvalidRequest
from feste.prompt import ChatPrompt
from feste.testing import SimServer

WIRE = "feste.backend.openai.testing:OpenAIWire"
CACHE = PromptCache(minimum=1024, write=1.25, read=0.1, lag=0.2, breakpoints=True, keys=True)


@pytest.fixture(scope="module")
def server() -> Iterator[SimServer]:
    with SimServer(
        WIRE, base=0.02, prompt_cache=CACHE, wire_options={"poison": "poison"}
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def forget(server: SimServer) -> None:
    server.reset()


def backend(server: SimServer, **more: Any) -> OpenAI:
    return OpenAI("sim-1", base_url=f"{server.url}/v1", **more)


def tokens(count: int, seed: int) -> str:
    """A text of that many of the server's tokens, which are words."""
    rng = random.Random(seed)
    return " ".join(f"{rng.randrange(10_000):04d}" for _ in range(count))


answer = ChatPrompt(system="{{ rules }}", user="{{ question }}")


def fan_out(llm: OpenAI) -> list[Any]:
    """64 calls with 4,000 tokens in common and 200 of their own."""
    rules = tokens(4_000, seed=0)
    return [llm.chat(answer(rules=rules, question=tokens(200, seed=i + 1))) for i in range(64)]


def test_eight_samples_pay_their_prompt_once(server: SimServer) -> None:
    """Eight draws of a 2,000-token prompt are one request, and eight different answers."""
    llm = backend(server)
    prompt = tokens(2_000, seed=0)
    (answers,) = feste.compute([llm.chat(prompt) for _ in range(8)])
    together = server.totals().billed

    assert len(server.requests()) == 1
    assert len(set(answers)) == 8
    assert (together.input_tokens, len(server.ledger())) == (2_000, 8)
    server.reset()
    feste.compute([llm.chat(prompt) for _ in range(8)], optimize={"sample_fusion": False})
    assert (len(server.requests()), server.totals().billed.input_tokens) == (8, 16_000)


def test_a_fan_out_pays_its_prefix_once(server: SimServer) -> None:
    """One call goes first, the others wait for the commit: 43,000 units instead of 332,800."""
    llm = backend(server, profile=Profile(prompt_cache=CACHE))
    (answers,) = feste.compute(fan_out(llm))
    planned = server.totals().billed

    assert len(set(answers)) == 64
    assert planned.input_tokens == 64 * 4_200
    assert planned.input_units <= 45_000
    assert (planned.written_tokens, planned.cached_tokens) == (4_000, 63 * 4_000)


def test_the_same_fan_out_without_a_plan() -> None:
    """Sent all at once, each writes the prefix; so the numbers above are earned by the plan."""
    slow = replace(CACHE, lag=60.0)  # so that "at once" does not depend on this machine
    with SimServer(WIRE, base=0.02, prompt_cache=slow) as server:
        llm = backend(server, profile=Profile(prompt_cache=slow))
        feste.compute(fan_out(llm), optimize={"prefix": False})
        billed = server.totals().billed

    assert (billed.cached_tokens, billed.input_units) == (0, 64 * 4_200 * 1.25)


def test_a_fan_out_over_late_prompts(server: SimServer) -> None:
    """Prompts that are made while the graph runs share what is constant in them."""
    llm = backend(server, profile=Profile(prompt_cache=CACHE))
    rules = tokens(4_000, seed=99)  # not what other tests have made warm
    titles = [llm.complete(f"Title {i}:") for i in range(16)]
    feste.compute([llm.chat(answer(rules=rules, question=title)) for title in titles])
    billed = server.totals().billed

    assert (billed.written_tokens, billed.cached_tokens) == (4_000, 15 * 4_000)


def test_one_poisoned_item_of_64(server: SimServer) -> None:
    """The others get their answers, bit by bit; the bad one its error; 13 requests, not 64."""
    llm = backend(server)
    texts = [f"text {i}" for i in range(64)]
    (whole,) = feste.compute([llm.embed(text) for text in texts])
    server.reset()
    texts[37] = "poison"
    (values,) = feste.compute([llm.embed(text) for text in texts], on_error="return")

    assert len(server.requests()) <= 14
    assert isinstance(values[37], InvalidRequest)
    good = [i for i in range(64) if i != 37]
    assert [values[i].tobytes() for i in good] == [whole[i].tobytes() for i in good]
    assert max(Counter(entry["prompt"] for entry in server.ledger()).values()) == 1


@pytest.mark.parametrize("choices", ["one", "refuse", "duplicated", "shuffled"])
def test_servers_that_do_not_know_n_are_noticed(choices: str) -> None:
    """What came is used, the rest is asked for singly, and the server is not asked again."""
    with SimServer(WIRE, wire_options={"choices": choices}) as server:
        llm = backend(server)
        (first,) = feste.compute([llm.chat("Hi") for _ in range(5)])
        before = len(server.requests())
        (second,) = feste.compute([llm.chat("Ho") for _ in range(5)])
        later = [r.body.get("n", 1) for r in server.requests()][before:]

    assert len(set(first)) == len(set(second)) == 5
    assert before == {"one": 5, "refuse": 6, "duplicated": 2, "shuffled": 1}[choices]
    # one answer for each prompt shows that it does not know `n`; fewer than asked may be a mishap
    asked = {"one": [1] * 5, "refuse": [1] * 5, "duplicated": [1, 5], "shuffled": [5]}
    assert sorted(later) == asked[choices]


@pytest.mark.parametrize("choices", ["one", "refuse"])
def test_lists_go_on_at_servers_that_do_not_know_n(choices: str) -> None:
    """Two prompts, three draws of each: the server is then asked for lists of single answers."""
    with SimServer(WIRE, wire_options={"choices": choices}) as server:
        llm = backend(server)
        (first,) = feste.compute([llm.complete(f"say {i % 2}") for i in range(6)])
        server.reset()
        (second,) = feste.compute([llm.complete(f"tell {i % 2}") for i in range(6)])
        asked = [(len(r.body["prompt"]), r.body.get("n", 1)) for r in server.requests()]

    assert len(set(first)) == len(set(second)) == 6
    assert asked == [(6, 1)]


def test_draws_with_a_parameter_of_one_request_stay_single(server: SimServer) -> None:
    """A seed would be the same for all; n is the user's own."""
    llm = backend(server)
    seeded = [llm.chat("Hi", ChatParams(seed=1, top_p=0.5)) for _ in range(2)]
    several = [llm.chat("Hi", ChatParams(n=2)) for _ in range(2)]
    feste.compute(seeded, several, optimize={"cse": False})

    assert sorted(r.body.get("n", 1) for r in server.requests()) == [1, 1, 2, 2]
