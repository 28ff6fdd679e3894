"""How few requests, and how soon: calls that become ready at different times, batched by the graph.

    python benchmarks/batching.py [--seeds 5]

First on the virtual clock: eight workloads with any number of requests in flight, a request of k calls
taking 0.5 s + 2 ms k with 15 % noise, and work of uneven length of which only the mean is known. For
each, requests and makespan without batching, with batches that leave a fixed time after their first
call (what DataLoaders, Triton and most queues do), and with the three objectives.

Then over real sockets: 40 questions with six calls each, one request in flight, as for a small local
server. The same pipeline by hand, with the official SDK, `asyncio.gather` and a semaphore, is the
baseline of the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import openai

import feste
from feste.backend import Limits
from feste.backend.openai import CompleteParams, OpenAI
from feste.prompt import Prompt
from feste.scheduler.batching.groups import Groups
from feste.scheduler.batching.queue import Queue
from feste.testing import SimServer, VirtualClock
from feste.testing.workloads import WORKLOADS, Workload, simulate

WIRE = "feste.backend.openai.testing:OpenAIWire"


def with_timer(workload: Workload, seed: int, seconds: float) -> VirtualClock:
    """Run a workload with batches that leave a fixed time after their first call has come."""

    def waits(groups: Groups, queue: Queue) -> bool:
        first = min(queue.run.ready_at[i] for i in queue.present)
        rest = first + seconds - groups.brain.now
        if rest > 1e-9:
            groups.brain.later(rest, lambda now: groups._look_again(queue))
        return rest > 1e-9

    with mock.patch.object(Groups, "_waits", waits):
        return simulate(workload, seed)


POLICIES: dict[str, Callable[[Workload, int], VirtualClock]] = {
    "alone": lambda work, seed: simulate(work, seed, optimize={"batch": False}),
    "after 100 ms": lambda work, seed: with_timer(work, seed, 0.1),
    "after 500 ms": lambda work, seed: with_timer(work, seed, 0.5),
    "after 2 s": lambda work, seed: with_timer(work, seed, 2.0),
    "latency": lambda work, seed: simulate(work, seed, objective="latency"),
    "balanced": lambda work, seed: simulate(work, seed),
    "cost": lambda work, seed: simulate(work, seed, objective="cost"),
}


def on_the_virtual_clock(seeds: int) -> None:
    print("requests / makespan in seconds, mean of", seeds, "seeds\n")
    print(f"{'':16}" + "".join(f"{name:>15}" for name in POLICIES))
    for name, workload in WORKLOADS.items():
        cells = []
        for policy in POLICIES.values():
            clocks = [policy(workload, seed) for seed in range(seeds)]
            requests = sum(len(c.sent) for c in clocks) / seeds
            cells.append(f"{requests:.1f} / {sum(c.now for c in clocks) / seeds:.1f}")
        print(f"{name:16}" + "".join(f"{cell:>15}" for cell in cells))


# --- over sockets ---------------------------------------------------------------------------------

QUESTIONS = 40
KINDS = ("keywords", "extract 1", "extract 2", "extract 3", "synthesis", "verdict")


def text(kind: str, *parts: str) -> str:
    return f"{kind}: {' '.join(parts)}"


async def by_hand(url: str) -> None:
    """The pipeline of each question as a coroutine; all of them at once."""
    slot = asyncio.Semaphore(1)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:

        async def ask(kind: str, *parts: str) -> str:
            async with slot:
                reply = await client.completions.create(
                    model="local", prompt=text(kind, *parts), max_tokens=16
                )
            return reply.choices[0].text

        async def answer(number: int) -> str:
            found = await ask(KINDS[0], str(number))
            extracts = await asyncio.gather(*(ask(kind, found) for kind in KINDS[1:4]))
            return await ask(KINDS[5], await ask(KINDS[4], *extracts))

        await asyncio.gather(*map(answer, range(QUESTIONS)))


def with_feste(url: str, objective: str) -> None:
    llm = OpenAI(model="local", base_url=url, limits=Limits(concurrency=1))
    prompt = Prompt("{{ kind }}:{% for part in parts %} {{ part }}{% endfor %}")
    params = CompleteParams(max_tokens=16)

    def ask(kind: str, *parts: Any) -> Any:
        return llm.complete(prompt(kind=kind, parts=list(parts)), params)

    answers = []
    for number in range(QUESTIONS):
        found = ask(KINDS[0], number)
        extracts = [ask(kind, found) for kind in KINDS[1:4]]
        answers.append(ask(KINDS[5], ask(KINDS[4], *extracts)))
    feste.compute(answers, objective=objective, progress=False)


def over_sockets() -> None:
    calls = QUESTIONS * len(KINDS)
    print(f"\n{calls} calls over sockets, one request at a time, 0.1 s + 0.4 ms a call\n")
    rows: list[tuple[str, Callable[[str], Any]]] = [
        ("AsyncOpenAI and gather", lambda url: asyncio.run(by_hand(url))),
        ("Feste, balanced", lambda url: with_feste(url, "balanced")),
        ("Feste, cost", lambda url: with_feste(url, "cost")),
    ]
    baseline = 0.0
    for name, pipeline in rows:
        with SimServer(WIRE, base=0.1, slope=0.0004) as server:
            begun = time.perf_counter()
            pipeline(server.url + "/v1")
            seconds = time.perf_counter() - begun
            baseline = baseline or seconds
            requests = server.totals().requests
            print(f"{name:24}{requests:6} requests{seconds:8.2f} s   {baseline / seconds:5.1f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    on_the_virtual_clock(parser.parse_args().seeds)
    over_sockets()


if __name__ == "__main__":
    main()
