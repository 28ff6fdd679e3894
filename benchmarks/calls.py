"""What a chat call costs the client: CPU of the process over real sockets, beside hand-written code.

    python benchmarks/calls.py [--calls 3000] [--rounds 3] [--profile]

A server in another process answers at once. The others are the official SDK with `asyncio.gather` and a
semaphore, on its default transport and on its aiohttp transport. All run in one process in turn, so
their ratios hold when the machine's speed drifts. The best round of each is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import openai

import feste
from feste.backend import Limits
from feste.backend.openai import ChatParams, OpenAI
from feste.testing import SimServer

WIRE = "feste.backend.openai.testing:OpenAIWire"
LANES = 64


async def by_hand(url: str, calls: int, client: Any = None) -> None:
    """Ask the questions with the SDK, so many at a time."""
    lanes = asyncio.Semaphore(LANES)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=client) as sdk:

        async def ask(number: int) -> str:
            async with lanes:
                reply = await sdk.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": f"question {number}"}],
                    max_tokens=16,
                )
            return reply.choices[0].message.content or ""

        await asyncio.gather(*map(ask, range(calls)))


async def by_hand_aiohttp(url: str, calls: int) -> None:
    await by_hand(url, calls, openai.DefaultAioHttpClient())


def with_feste(url: str, calls: int, **settings: Any) -> None:
    """Ask them in one run."""
    llm = OpenAI(model="m", base_url=url, api_key="none", limits=Limits(concurrency=LANES))
    params = ChatParams(max_tokens=16)
    nodes = [llm.chat(f"question {i}", params) for i in range(calls)]
    feste.compute(nodes, progress=False, **settings)


WAYS: dict[str, Callable[[str, int], Any]] = {
    "AsyncOpenAI and gather": lambda url, n: asyncio.run(by_hand(url, n)),
    "the same on aiohttp": lambda url, n: asyncio.run(by_hand_aiohttp(url, n)),
    "Feste": with_feste,
}


def measure(calls: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of CPU a call, for each way."""
    best: dict[str, float] = {}
    with SimServer(WIRE, log_bodies=False) as server:
        url = server.url + "/v1"
        for way in WAYS.values():  # imports, connections, caches
            way(url, 200)
        for _ in range(rounds):
            for name, way in WAYS.items():
                begun = time.process_time()
                way(url, calls)
                spent = 1000 * (time.process_time() - begun) / calls
                best[name] = min(spent, best.get(name, spent))
    return best


def profile(calls: int) -> None:
    """Show where Feste's CPU goes, for each of its threads."""
    profiles: list[tuple[str, cProfile.Profile]] = []
    run = threading.Thread.run

    def profiled(thread: threading.Thread) -> None:
        own = cProfile.Profile()
        profiles.append((thread.name, own))
        own.runcall(run, thread)

    own = cProfile.Profile()
    with (
        mock.patch.object(threading.Thread, "run", profiled),
        SimServer(WIRE, log_bodies=False) as server,
    ):
        own.runcall(with_feste, server.url + "/v1", calls)
    for name, one in [("main", own), *profiles]:
        one.disable()
        print(f"--- {name}")
        pstats.Stats(one).sort_stats("tottime").print_stats(14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if given.profile:
        profile(given.calls)
        return
    best = measure(given.calls, given.rounds)
    baseline = best["AsyncOpenAI and gather"]
    for name, spent in best.items():
        print(f"{name:24}{spent:6.2f} ms of CPU a call{spent / baseline:8.2f} of hand-written")


if __name__ == "__main__":
    main()
