"""The long form of the optimizer's proof by examples: random graphs with and without optimizations.

    python benchmarks/soundness.py [--graphs 100000] [--first 0]

Each graph is run without optimizations, and with a random choice of passes in a random order.
Prints every difference, with the seed that brings it back.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial

from feste.plugins import registry
from feste.testing import differences, random_graph
from feste.testing.soundness import shuffled


def differences_of(seed: int) -> list[str]:
    rng = random.Random(seed)
    passes = shuffled(rng)
    switches = {name: rng.random() < 0.7 for name in sorted(registry().optimizations)}
    return differences(partial(random_graph, seed), passes, optimize=switches)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graphs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    wrong = 0
    for seed in range(given.first, given.first + given.graphs):
        found = differences_of(seed)
        if found:
            wrong += 1
            print(f"seed {seed}:", *found, sep="\n  ", flush=True)
    seconds = time.process_time()
    print(f"{given.graphs:,} graphs, {wrong:,} with differences, {seconds:,.0f} s of CPU")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
