"""Replies that a server spoils: each call gets an answer to its own prompt, or the reply is not used."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from feste.backend import Request, Response
from feste.backend.openai import CompleteParams, OpenAI
from feste.backend.openai.answers import unpack_choices, unpack_vectors
from feste.errors import CountMismatch
from feste.testing import VirtualClock

REPLIES, RUNS = 2_000, 300
LLM: Any = OpenAI("m", base_url="http://127.0.0.1:9/v1", api_key="k")

Items = list[dict[str, Any]]


def nothing(rng: random.Random, items: Items) -> Items:
    return items


def shuffled(rng: random.Random, items: Items) -> Items:
    return rng.sample(items, len(items))


def shorter(rng: random.Random, items: Items) -> Items:
    return rng.sample(items, rng.randrange(len(items)))


def longer(rng: random.Random, items: Items) -> Items:
    return [*items, {**rng.choice(items), "index": len(items)}]


def doubled(rng: random.Random, items: Items) -> Items:
    """One of them twice, with or without the loss of another."""
    left = items[rng.randrange(2) :]
    return [*left, rng.choice(left)]


def exchanged(rng: random.Random, items: Items) -> Items:
    """One of them with the number of another."""
    numbers = [item["index"] for item in items]
    place = rng.randrange(len(items))
    numbers[place] = rng.choice([-1, len(items), *numbers[:place], *numbers[place + 1 :]])
    return [{**item, "index": number} for item, number in zip(items, numbers)]


def unnumbered(rng: random.Random, items: Items) -> Items:
    return [{**item, "index": rng.choice([None, "0", 0.5])} for item in items]


HARMLESS = [nothing, shuffled]
MISHAPS = [*HARMLESS, shorter, longer, doubled, exchanged, unnumbered]


def choices_of(prompts: list[str], n: int) -> Items:
    """What a server answers: each choice names its prompt."""
    texts = [f"{prompt}:{j}" for prompt in prompts for j in range(n)]
    return [{"index": i, "text": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_spoilt_list_of_choices_is_used_in_order_or_not_at_all(
    mishap: Callable[[random.Random, Items], Items],
) -> None:
    """Prompts times n: a complete set of numbers gives each prompt its own n choices."""
    rng = random.Random(mishap.__name__)
    for _ in range(REPLIES // len(MISHAPS)):
        n, prompts = rng.choice([1, 1, 2, 3]), [f"p{i}" for i in range(rng.randint(2, 9))]
        request = Request(
            "openai", "complete", "", {"prompt": prompts, **({"n": n} if n > 1 else {})}
        )
        spoilt = mishap(rng, choices_of(prompts, n))
        reply = Response({"choices": spoilt, "model": "m"})
        if mishap not in HARMLESS:
            with pytest.raises(CountMismatch):
                unpack_choices(LLM, request, reply)
            continue
        outcomes = unpack_choices(LLM, request, reply)

        assert [o.payload["choices"] for o in outcomes] == [choices_of([p], n) for p in prompts]


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_spoilt_list_of_vectors_is_used_in_order_or_not_at_all(
    mishap: Callable[[random.Random, Items], Items],
) -> None:
    """A complete set of numbers gives each text its own vector."""
    rng = random.Random(mishap.__name__)
    for _ in range(REPLIES // len(MISHAPS)):
        texts = [f"t{i}" for i in range(rng.randint(2, 20))]
        request = Request("openai", "embed", "", {"input": texts})
        vectors = [{"index": i, "embedding": [float(i), 1.0]} for i in range(len(texts))]
        reply = Response({"data": mishap(rng, vectors)})
        if mishap not in HARMLESS:
            with pytest.raises(CountMismatch):
                unpack_vectors(LLM, request, reply)
            continue
        outcomes = unpack_vectors(LLM, request, reply)

        assert [o.payload["data"] for o in outcomes] == [[vector] for vector in vectors]


def test_a_run_on_a_careless_server_never_crosses_answers() -> None:
    """Lists whose replies cannot be used are sent again one by one; every answer is to its prompt."""
    spoilt: Counter[str] = Counter()
    for seed in range(RUNS):
        rng = random.Random(seed)

        def answer(request: Request, rng: random.Random = rng) -> Response:
            given, n = request.body["prompt"], request.body.get("n") or 1
            choices = choices_of(given if isinstance(given, list) else [given], n)
            if len(choices) > n:
                mishap = rng.choice(MISHAPS)
                spoilt[mishap.__name__] += 1
                choices = mishap(rng, choices)
            return Response({"choices": choices, "model": "m"})

        wanted = [rng.choice([1, 1, 2, 3]) for _ in range(rng.randint(4, 9))]
        params = [CompleteParams(n=n) for n in wanted]
        values = VirtualClock(answer).compute(
            [LLM.complete(f"p{i}", given) for i, given in enumerate(params)]
        )

        for i, (n, value) in enumerate(zip(wanted, values)):
            replies = value if n > 1 else [value]
            assert [str(reply) for reply in replies] == [f"p{i}:{j}" for j in range(n)], seed
    assert len(spoilt) == len(MISHAPS)
