"""The long form of the optimizer's proof by examples: random graphs with and without optimizations.

    python benchmarks/soundness.py [--graphs 100000] [--first 0]

Each graph is run without optimizations, and with a random choice of passes in a random order,
sometimes cut off after some rewrites.
Prints every difference, with the seed that brings it back.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

from feste.testing import differences, random_graph
from feste.testing.soundness import any_optimizer


def differences_of(seed: int) -> list[str]:
    passes, settings = any_optimizer(seed)
    return differences(partial(random_graph, seed), passes, **settings)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graphs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    wrong = 0
    for count in range(1, given.graphs + 1):
        seed = given.first + count - 1
        found = differences_of(seed)
        if found:
            wrong += 1
            print(f"seed {seed}:", *found, sep="\n  ", flush=True)
        if count % 5_000 == 0 or count == given.graphs:
            seconds = time.process_time()
            told = f"{count:,} graphs, {wrong:,} with differences, {seconds:,.0f} s of CPU"
            print(told, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
