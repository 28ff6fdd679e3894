"""The same program gives the same answers however it is run, here or on workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

import feste
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws


class Kit:
    """The parts of random programs. Tasks are injective: what went in can be told from the result."""

    def __init__(self) -> None:
        fresh_draws()
        self.llm = llm = FakeBackend()

        @feste.task
        def join(*values: Any) -> str:
            return "(" + ",".join(map(str, values)) + ")"

        @feste.task(pure=True)
        def split(value: Any, at: int) -> list[str]:
            text = str(value)
            return [text[:at], text[at:]]

        @feste.task
        async def later(value: Any) -> dict[str, Any]:
            import asyncio

            await asyncio.sleep(0)
            return {"later": value}

        @feste.task(executor="inline")
        def here(value: Any) -> str:
            return f"here {value}"

        @feste.task(emits=True)
        def agent(value: Any, depth: int) -> Any:
            first, second = llm.chat(f"{value}"), llm.complete(f"{value}")
            if depth:
                return {"first": first, "more": agent(join(first, second), depth - 1)}
            return [join(first, second), later(first), value]

        self.join, self.split, self.later, self.here, self.agent = join, split, later, here, agent
        self.ask = Prompt("Tell of {{ this }} and {{ that }}.")

    def program(self, seed: int, size: int = 14) -> list[Any]:
        """A random program: the same for the same seed."""
        rng = random.Random(seed)
        nodes: list[Any] = [self.join(f"seed {seed}")]
        makers: list[Callable[[], Any]] = [
            lambda: self.join(*rng.choices(nodes, k=rng.randint(1, 3))),
            lambda: self.join([rng.choice(nodes)], {"k": (rng.choice(nodes), 1)}),
            lambda: self.split(rng.choice(nodes), rng.randint(0, 9))[rng.randint(0, 1)],
            lambda: self.later(rng.choice(nodes))["later"],
            lambda: self.here(rng.choice(nodes)),
            lambda: self.llm.chat(self.ask(this=rng.choice(nodes), that=rng.choice(nodes))),
            lambda: self.llm.chat("alike"),
            lambda: self.llm.chat("sure", FakeParams(temperature=0)).upper(),
            lambda: self.llm.complete(self.ask(this=rng.choice(nodes), that="batch")),
            lambda: self.llm.embed(self.join(rng.choice(nodes))).tolist()[0] * 2,
            lambda: self.agent(rng.choice(nodes), rng.randint(0, 2)),
        ]
        for _ in range(size):
            nodes.append(rng.choice(makers)())
        return [rng.sample(nodes, k=4), {"last": nodes[-1]}]


def run(seed: int, **settings: Any) -> tuple[Any, int]:
    """The values of a program, and how many calls it made."""
    kit = Kit()
    values = feste.compute(*kit.program(seed), **settings)
    report = feste.last_report()
    assert report is not None
    # equal calls that happen to be in flight together share one answer
    return values, sum(r.items for r in report.requests) + report.states.get("shared", 0)


@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize("place", ["client", "workers"])
def test_random_programs(client: Any, place: str, part: int) -> None:
    """A random program gives equal values and makes equally many calls here and on workers."""
    there: dict[str, Any] = {"scheduler": client, "requests_on": place}
    for seed in range(5 * part, 5 * part + 5):
        here = run(seed)
        assert run(seed, **there) == here
    assert run(seed, optimize=False, **there)[0] == here[0]


def test_lazy_eager_and_distributed(client: Any) -> None:
    """One program text, lazy, eager and distributed: the same answers to the bit."""

    def program() -> Any:
        kit = Kit()
        topics = kit.split(kit.join("alpha", "beta"), 6)
        drafts = [kit.llm.chat(kit.ask(this=topics[i], that=i)) for i in (0, 1)]
        again = kit.llm.chat(kit.ask(this=topics[0], that=0))
        best = kit.agent(kit.join(*drafts, again), 1)
        return kit.later(kit.join(best["first"], again.upper()))

    lazy = feste.compute(program())
    with feste.context.set(eager=True):
        eager = feste.compute(program())
    assert lazy == eager == feste.compute(program(), scheduler=client)


def test_wide_and_deep_programs(client: Any) -> None:
    """Hundreds of tasks side by side, and chains of them, come out right and in order."""
    kit = Kit()
    wide = [kit.join(i) for i in range(150)]
    deep = kit.join(0)
    for i in range(60):
        deep = kit.join(deep, i)
    total = kit.join(*wide)
    assert feste.compute(wide, deep, total, scheduler=client) == feste.compute(wide, deep, total)
