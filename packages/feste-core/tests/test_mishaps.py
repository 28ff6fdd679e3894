"""Bad items and odd replies on the virtual clock: they cost themselves, and cross no answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from feste.backend import BatchRule, Operation, Request, Response, SampleRule
from feste.errors import CountMismatch, InvalidRequest
from feste.testing import FakeBackend, FakeParams, VirtualClock


@pytest.mark.parametrize("operation", ["embed", "complete"])
def test_one_bad_item_of_many_costs_itself(operation: str, restart: Callable[[], None]) -> None:
    """63 of 64 calls get the answers that they get without the bad one, in a few requests more."""
    llm = FakeBackend()

    def refuses_poison(request: Request) -> Response:
        if "poison" in str(request.body):
            raise InvalidRequest("poisoned")
        return llm.answer(request)

    for place in (0, 1, 31, 32, 40, 63):
        texts = [f"text {i}" for i in range(64)]
        restart()
        clean = VirtualClock(llm.answer).compute([getattr(llm, operation)(t) for t in texts])
        texts[place] = "poison"
        restart()
        clock = VirtualClock(refuses_poison)
        values = clock.compute([getattr(llm, operation)(t) for t in texts], on_error="return")
        bad = values.pop(place)
        del clean[place]

        assert isinstance(bad, InvalidRequest) and "poisoned" in str(bad)
        assert values == clean
        assert len(clock.sent) <= 14


def _by_index(response: Response, count: int) -> list[str]:
    found = dict(response.payload["choices"])
    if len(response.payload["choices"]) != count or found.keys() != set(range(count)):
        raise CountMismatch("the choices are not those that were asked for")
    return [found[i] for i in range(count)]


class Indexed(FakeBackend):
    """A backend whose replies number their choices, prompt after prompt."""

    plugin = "indexed"

    def _parse(self, response: Response, arguments: Any) -> list[str]:
        return _by_index(response, arguments["params"].n or 1)

    @staticmethod
    def _unpack_list(backend: Any, request: Request, response: Response) -> list[Response]:
        n, prompts = request.body.get("n") or 1, len(request.body["prompt"])
        texts = _by_index(response, n * prompts)
        parts = [texts[i * n : i * n + n] for i in range(prompts)]
        return [Response({"choices": list(enumerate(part))}) for part in parts]

    @staticmethod
    def _unpack_draws(backend: Any, request: Request, response: Response) -> list[Response]:
        found = {i: text for i, text in response.payload["choices"] if 0 <= i < request.samples}
        return [Response({"choices": [(0, text)]}) for text in found.values()]

    complete = Operation(
        prepare=FakeBackend._prepare_complete,
        send=FakeBackend._send,
        parse=_parse,
        samples=SampleRule(_unpack_draws),
        batch=BatchRule("prompt", "prompt", 16, pack=FakeBackend._pack, unpack=_unpack_list),
    )


class Careless:
    """A server that spoils some replies; each text that it makes names its prompt and a number."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.made = 0
        self.spoilt: Counter[str] = Counter()

    def answer(self, request: Request) -> Response:
        given = request.body["prompt"]
        prompts = given if isinstance(given, list) else [given]
        texts = []
        for prompt in prompts:
            for _ in range(request.body.get("n") or 1):
                self.made += 1
                texts.append(f"{prompt}#{self.made}")
        choices = list(enumerate(texts))
        mishaps = [self._shuffled, self._shorter, self._longer, self._doubled, self._renumbered]
        if len(request.draws) > 1:
            mishap = self.rng.choice(mishaps)
            self.spoilt[mishap.__name__] += 1
            choices = mishap(choices)
        return Response({"choices": choices})

    def _shuffled(self, choices: list[Any]) -> list[Any]:
        return self.rng.sample(choices, len(choices))

    def _shorter(self, choices: list[Any]) -> list[Any]:
        return self.rng.sample(choices, self.rng.randrange(len(choices)))

    def _longer(self, choices: list[Any]) -> list[Any]:
        return [*choices, (len(choices), "nobody's")]

    def _doubled(self, choices: list[Any]) -> list[Any]:
        return [*choices[1:], self.rng.choice(choices[1:])]

    def _renumbered(self, choices: list[Any]) -> list[Any]:
        moved = self.rng.randint(1, 2)
        return [(index + moved, text) for index, text in choices]


def test_odd_replies_never_cross_answers() -> None:
    """Whatever a server does to its replies, each call gets an answer to its own prompt, or none."""
    spoilt: Counter[str] = Counter()
    for seed in range(2_000):
        rng = random.Random(seed)
        llm, server = Indexed(), Careless(rng)
        texts = [rng.choice("abcd") for _ in range(rng.randint(2, 7))]
        given = [FakeParams(n=rng.choice([None, None, 2])) for _ in texts]
        values = VirtualClock(server.answer).compute(
            [llm.complete(text, params) for text, params in zip(texts, given)]
        )
        spoilt += server.spoilt
        answers = [answer for value in values for answer in value]

        for text, params, value in zip(texts, given, values):
            assert [answer.partition("#")[0] for answer in value] == [text] * (params.n or 1), seed
        assert len(set(answers)) == len(answers), seed
    assert len(spoilt) == 5 and spoilt.total() > 2_000
