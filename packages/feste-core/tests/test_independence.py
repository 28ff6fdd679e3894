"""Equal SAMPLE calls get independent answers, though one request asks for both."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

from feste.backend import Request, Response
from feste.testing import FakeBackend, VirtualClock

CHOICES, WEIGHTS = ("x", "y", "z"), (0.5, 0.3, 0.2)
PAIRS, ALPHA = 1_500, 1e-6


class Sampler:
    """A provider that answers with one of three texts, by known probabilities.

    :param seed: the seed of its choices.
    :param repeats: whether all answers to one request are the same, as they must not be.
    """

    def __init__(self, seed: int, repeats: bool = False) -> None:
        self.rng = random.Random(seed)
        self.repeats = repeats

    def answer(self, request: Request) -> Response:
        made = self.rng.choices(CHOICES, WEIGHTS, k=request.samples)
        if self.repeats:
            made = made[:1] * request.samples
        return Response({"answers": [made if request.samples > 1 else made[0]]})


def pairs(sampler: Sampler, **settings: Any) -> tuple[Counter[str], int]:
    """How often two equal calls got which two answers, and the number of requests."""
    llm = FakeBackend()
    clock = VirtualClock(sampler.answer)
    values = clock.compute([llm.chat(str(i // 2)) for i in range(2 * PAIRS)], **settings)
    told = [value.removeprefix("fake-1:") for value in values]
    return Counter(map("".join, zip(told[::2], told[1::2]))), len(clock.sent)


def chance(g: float) -> float:
    """The probability of at least this G by chance alone, with eight degrees of freedom."""
    return math.exp(-g / 2) * sum((g / 2) ** k / math.factorial(k) for k in range(4))


def fits(found: Counter[str], expected: dict[str, float]) -> float:
    """The p-value of a G-test: do the nine counts come from the expected ones?"""
    return chance(2 * sum(n * math.log(n / expected[pair]) for pair, n in found.items()))


def agree(one: Counter[str], two: Counter[str]) -> float:
    """The p-value of a G-test: do the nine counts of both, equally many, come from one distribution?"""
    half = {pair: n / 2 for pair, n in (one + two).items()}
    return chance(
        2 * sum(n * math.log(n / half[pair]) for some in (one, two) for pair, n in some.items())
    )


INDEPENDENT = {
    a + b: PAIRS * p * q for a, p in zip(CHOICES, WEIGHTS) for b, q in zip(CHOICES, WEIGHTS)
}


def test_answers_to_one_request_are_independent_draws() -> None:
    """Two equal calls get two independent answers, whether they share a request or not."""
    apart, twice = pairs(Sampler(1), optimize=False)
    fused, once = pairs(Sampler(2))

    assert (twice, once) == (2 * PAIRS, PAIRS)
    assert fits(apart, INDEPENDENT) > ALPHA
    assert fits(fused, INDEPENDENT) > ALPHA
    assert agree(apart, fused) > ALPHA


def test_a_provider_that_repeats_itself_is_found_out() -> None:
    """The test above can fail: repeated answers to one request are no independent draws."""
    apart, _ = pairs(Sampler(1), optimize=False)
    repeated, _ = pairs(Sampler(2, repeats=True))

    assert fits(repeated, INDEPENDENT) < ALPHA
    assert agree(apart, repeated) < ALPHA
