"""What planning and explaining cost: CPU seconds by the number of nodes, and how they grow.

    python benchmarks/explain.py [--sizes 1000,10000,30000,100000]

Two programs: a map of prompts, calls, tasks, prompts and calls, written in one line; and a chain in
which each call needs the one before. Prints CPU seconds (all threads of the process) of collecting
a graph, optimizing it as `compute` does, `feste.explain` (which does both, too), and writing its
text. The last column is the cost of a node, explained and written, in proportion to that of the
smallest size: 1.0 is linear.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import feste
from feste.backend import Latency, Price, Profile
from feste.graph import FesteGraph
from feste.optimization import Optimizer
from feste.prompt import Prompt
from feste.testing import FakeBackend

KNOWN = Profile(latency=Latency(base=0.5, token=0.01), price=Price(input=1.0, output=4.0))
llm = FakeBackend("small-1", profile=KNOWN)
ask = Prompt("About {{ x }}")
again = Prompt("More about {{ x }}")


@feste.task
def passed(text: str) -> str:
    return text


def wide(n: int) -> Any:
    return [llm.chat(again(x=passed(llm.chat(ask(x=i))))) for i in range(n // 5)]


def chain(n: int) -> Any:
    x: Any = "start"
    for _ in range(n // 2):
        x = llm.chat(ask(x=x))
    return x


def measure(program: Callable[[int], Any], n: int) -> list[float]:
    nodes = program(n)
    gc.collect()
    marks = [time.process_time()]
    graph, _, _ = FesteGraph.collect(nodes)
    marks.append(time.process_time())
    Optimizer().run(graph)
    marks.append(time.process_time())
    explained = feste.explain(nodes)
    marks.append(time.process_time())
    assert len(str(explained).splitlines()) < 100
    marks.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,10000,30000,100000")
    sizes = [int(size) for size in parser.parse_args().sizes.split(",")]
    measure(wide, 100)  # imports
    for program in (wide, chain):
        print(f"{program.__name__:>6}  nodes    collect  optimize   explain      text  growth")
        first = 0.0
        for n in sizes:
            seconds = measure(program, n)
            whole = (seconds[-2] + seconds[-1]) / n
            first = first or whole
            cells = "".join(f"{s:10.3f}" for s in seconds)
            print(f"{n:>14,}{cells}{whole / first:8.2f}")


if __name__ == "__main__":
    main()
