"""What a trivial node costs: CPU of building, planning and running it, beside other engines.

    python benchmarks/nodes.py [--sizes 1000,10000,100000,300000]

Prints microseconds of CPU (all threads of the process) a node, for graphs that are wide (independent
nodes, in threads and inline), a chain (each needs the one before) and a tree (a reduction). Then what
Python holds for a node of a wide graph that was run, in bytes. The others are Dask's threaded
scheduler on a raw graph, made and run, and for wide graphs `asyncio.gather` over coroutines. All run
in one process, one after the other, so their ratio holds when the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import resource
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import dask.threaded
from dask.task_spec import Task, TaskRef

import feste
from feste import context
from feste.graph import FesteGraph
from feste.optimization import Optimizer
from feste.optimization.optimizer import Plan
from feste.scheduler.choice import choose
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor
from feste.scheduler.program import Program
from feste.scheduler.run import Run


@feste.task
def increment(x: int) -> int:
    return x + 1


@feste.task(executor="inline")
def increment_inline(x: int) -> int:
    return x + 1


@feste.task
def add(a: int, b: int) -> int:
    return a + b


def wide(n: int) -> Any:
    return [increment(i) for i in range(n)]


def inline(n: int) -> Any:
    return [increment_inline(i) for i in range(n)]


def chain(n: int) -> Any:
    x: Any = 0
    for _ in range(n):
        x = increment(x)
    return x


def tree(n: int) -> Any:
    level: list[Any] = [increment(i) for i in range(n // 2)]
    while len(level) > 1:
        pairs = [add(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def compiled(plan: Plan, settings: context.Settings) -> Run:
    hands = choose(settings)
    assert isinstance(hands, Executor)
    return Run(Program(plan.graph, plan.before.nodes), settings, hands)


def with_feste(build: Callable[[int], Any], n: int) -> list[float]:
    """CPU seconds of each step: build, collect, optimize, compile, run."""
    marks = [time.process_time()]
    value = build(n)
    marks.append(time.process_time())
    settings = context.settings()
    graph, _, _ = FesteGraph.collect(value)
    marks.append(time.process_time())
    plan = Optimizer().run(graph, settings)
    marks.append(time.process_time())
    run = compiled(plan, settings)
    marks.append(time.process_time())
    driver().submit(run)
    run.finished.wait()
    marks.append(time.process_time())
    assert run.count_states() == {"done": len(plan.graph.nodes)}
    return [after - before for before, after in itertools.pairwise(marks)]


def dask_graph(shape: str, n: int) -> tuple[dict[str, Any], Any]:
    plus = lambda x: x + 1  # noqa: E731
    if shape in ("wide", "inline"):
        return {f"x{i}": Task(f"x{i}", plus, i) for i in range(n)}, [f"x{i}" for i in range(n)]
    if shape == "chain":
        graph: dict[str, Any] = {"x0": Task("x0", plus, 0)}
        for i in range(1, n):
            graph[f"x{i}"] = Task(f"x{i}", plus, TaskRef(f"x{i - 1}"))
        return graph, f"x{n - 1}"
    graph = {f"x{i}": Task(f"x{i}", plus, i) for i in range(n // 2)}
    level = list(graph)
    while len(level) > 1:
        pairs = []
        for a, b in zip(level[::2], level[1::2], strict=False):
            key = f"x{len(graph)}"
            graph[key] = Task(key, lambda a, b: a + b, TaskRef(a), TaskRef(b))
            pairs.append(key)
        level = pairs + level[len(pairs) * 2 :]
    return graph, level[0]


def with_dask(shape: str, n: int) -> float:
    began = time.process_time()
    graph, keys = dask_graph(shape, n)
    dask.threaded.get(graph, keys)
    return time.process_time() - began


def with_gather(n: int) -> float:
    async def one(x: int) -> int:
        return x + 1

    async def everything() -> None:
        await asyncio.gather(*[one(i) for i in range(n)])

    began = time.process_time()
    asyncio.run(everything())
    return time.process_time() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sizes", default="1000,10000,100000,300000")
    sizes = [int(size) for size in options.parse_args().sizes.split(",")]
    with_feste(wide, 200)  # imports, threads
    print(f"{'':16}build collect optimize compile   run |  feste   dask gather   (us CPU a node)")
    for build in (wide, inline, chain, tree):
        for n in sizes:
            gc.collect()
            steps = [1e6 * seconds / n for seconds in with_feste(build, n)]
            others = [1e6 * with_dask(build.__name__, n) / n]
            if build is wide:
                others.append(1e6 * with_gather(n) / n)
            row = "".join(f"{step:8.1f}" for step in steps)
            beside = "".join(f"{other:7.1f}" for other in others)
            print(f"{build.__name__:6}{n:8,}{row} |{sum(steps):7.1f}{beside}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024:,} MiB")
    print(f"{held(sizes[-1]):,.0f} bytes held for a node")


def held(n: int) -> float:
    """Return the bytes that Python holds for a node of a wide graph when it has been run."""
    gc.collect()
    tracemalloc.start()
    value = wide(n)
    graph, _, _ = FesteGraph.collect(value)
    settings = context.settings()
    run = compiled(Optimizer().run(graph, settings), settings)
    driver().submit(run)
    run.finished.wait()
    gc.collect()
    bytes_held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return bytes_held / n


if __name__ == "__main__":
    main()
