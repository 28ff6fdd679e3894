"""What a Dask cluster costs and brings: calls and tasks on workers, beside Dask alone and one process.

    python benchmarks/cluster.py [calls cpu tasks requests brain memory] [--calls 1000] ...

Each part is named by a word; all of them run by default, in small sizes. Scheduler and workers are
processes of their own, and so is the simulated provider. What is compared runs in turn within one
process, so that ratios hold when the machine's speed drifts; CPU is that of all threads of a process.

- calls: 200 ms each, from two workers of two threads, beside one process that has as many in flight.
- cpu: a map of tasks that only compute, on one worker process and on two, beside a plain loop.
- tasks: tasks that do nothing, beside `Client.map`, `Client.submit` and `dask.delayed`.
- requests: calls that are answered at once, beside a `Client.map` of a function with the SDK in it.
- brain: how many calls one brain carries if they are answered at once, without a network.
- memory: what a call leaves in memory, from the peaks of processes of two sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dask
import distributed
import openai
import psutil

import feste
from feste.backend import Limits
from feste.backend.openai import OpenAI
from feste.testing import FakeBackend, SimServer

WIRE = "feste.backend.openai.testing:OpenAIWire"
#: Requests in flight: on one worker, and in all.
WINDOW, LANES = 32, 64
WORKERS, THREADS = 2, 2
#: Seconds that a task takes which is no short one.
WAIT = 0.05


@contextlib.contextmanager
def cluster(workers: int = WORKERS, threads: int = THREADS) -> Iterator[distributed.Client]:
    """Start a scheduler and workers in processes of their own."""
    with (
        distributed.SubprocessCluster(
            n_workers=workers,
            threads_per_worker=threads,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as made,
        distributed.Client(made, set_as_default=False) as client,
    ):
        client.wait_for_workers(workers)
        yield client


class Meter:
    """Seconds, and CPU seconds of the client, the scheduler and the workers, of a ``with`` block.

    :param client: a client of the cluster; None if there is none.
    """

    def __init__(self, client: distributed.Client | None = None) -> None:
        self._scheduler: list[int] = []
        self._workers: list[int] = []
        if client is not None:
            self._scheduler = [client.run_on_scheduler(os.getpid)]
            self._workers = list(client.run(os.getpid).values())

    def _now(self) -> list[float]:
        def of(pids: list[int]) -> float:
            return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)

        return [time.perf_counter(), time.process_time(), of(self._scheduler), of(self._workers)]

    def __enter__(self) -> Meter:
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        pairs = zip(self._now(), self._began, strict=True)
        self.wall, *self.cpu = (after - before for after, before in pairs)


def compare(
    what: str,
    ways: dict[str, Callable[[int], Any]],
    n: int,
    client: distributed.Client | None = None,
    rounds: int = 1,
    warm: int = 100,
) -> dict[str, float]:
    """Run each way in turn; print and return the seconds of its fastest round.

    :param what: the name of one thing that they do `n` of.
    :param ways: functions of the number of things, by the names to print.
    :param n: the number of things.
    :param client: a client of the cluster; without one, CPU is not shown.
    :param rounds: how many times each way runs.
    :param warm: the number of things that each does first, for imports, connections and caches.
    """
    for way in ways.values():
        way(min(n, warm))
    best: dict[str, Meter] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            with Meter(client) as meter:
                way(n)
            if name not in best or meter.wall < best[name].wall:
                best[name] = meter
    first = next(iter(best.values())).wall
    columns = f" | ms of CPU a {what}: client scheduler workers" if client else ""
    print(f"{'':36}      s  ratio   {what}s/s{columns}")
    for name, meter in best.items():
        cpu = "".join(f"{1000 * seconds / n:9.2f}" for seconds in meter.cpu)
        cells = f"{meter.wall:7.2f}{meter.wall / first:7.2f}{n / meter.wall:10,.1f}"
        print(f"{name:36}{cells}{f' |{cpu}' if client else ''}")
    return {name: meter.wall for name, meter in best.items()}


# --- requests -------------------------------------------------------------------------------------


def chats(url: str, **settings: Any) -> Callable[[int], Any]:
    """Return a function that makes so many chat calls in one run."""
    llm = OpenAI(model="m", base_url=url, limits=Limits(concurrency=LANES))

    def run(n: int) -> None:
        feste.compute([llm.chat(f"question {i}") for i in range(n)], progress=False, **settings)

    return run


def calls(given: argparse.Namespace) -> None:
    """Calls of 200 ms, from one process and from workers."""
    n = given.calls
    print(f"{n:,} calls of 200 ms, {LANES} in flight; {WORKERS} workers of {THREADS} threads")
    print(f"(no way can be faster than {0.2 * n / LANES:.2f} s)\n")
    with SimServer(WIRE, base=0.2, log_bodies=False) as server, cluster() as client:
        url = server.url + "/v1"
        on_workers = {"scheduler": client, "requests_on": "workers", "worker_window": WINDOW}
        ways = {
            "one process": chats(url),
            "Dask, from the client": chats(url, scheduler=client),
            "Dask, from the workers": chats(url, **on_workers),
        }
        compare("call", ways, n, client, given.rounds)


def ask(number: int, url: str) -> str:
    """Ask with the SDK, as a function for `Client.map` would; one client for a worker."""
    worker = distributed.get_worker()
    if not hasattr(worker, "sdk"):
        worker.sdk = openai.OpenAI(base_url=url, api_key="none")
    reply = worker.sdk.chat.completions.create(
        model="m", messages=[{"role": "user", "content": f"question {number}"}]
    )
    return reply.choices[0].message.content or ""


def requests(given: argparse.Namespace) -> None:
    """Calls that are answered at once: what each way adds."""
    n = given.requests
    print(f"{n:,} calls that are answered at once; {WORKERS} workers of {THREADS} threads\n")
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as folder,
        SimServer(WIRE, log_bodies=False) as server,
        cluster() as client,
    ):
        url = server.url + "/v1"
        on_workers = {"scheduler": client, "requests_on": "workers", "worker_window": WINDOW}
        ways = {
            f"Client.map of the SDK ({WORKERS * THREADS} at once)": lambda n: client.gather(
                client.map(ask, range(n), url=url, pure=False)
            ),
            "one process": chats(url),
            "one process, with a store": stored(Path(folder), partial(chats, url)),
            "Dask, from the client": chats(url, scheduler=client),
            "Dask, from the workers": chats(url, **on_workers),
        }
        compare("call", ways, n, client, given.rounds)


# --- tasks ----------------------------------------------------------------------------------------


def spin(loops: int) -> float:
    """Compute, and return the seconds that it took."""
    began, total = time.perf_counter(), 0
    for i in range(loops):
        total += i * i
    return time.perf_counter() - began


def cpu(given: argparse.Namespace) -> None:
    """A map of tasks that only compute.

    Beside the ratio of times it prints how many workers computed at once: the seconds of all tasks by
    the seconds of the run. That holds also on a machine whose cores are wanted by others.
    """
    spin(1_000_000)
    with Meter() as meter:
        spin(1_000_000)
    loops = int(1_000_000 * given.seconds / meter.cpu[0])
    n = given.spins
    print(f"{n} tasks of {given.seconds} s of CPU; this machine has {os.cpu_count()} cores\n")
    task = feste.task(spin)
    took: dict[str, float] = {}

    def noted(name: str, run: Callable[[int], list[float]]) -> Callable[[int], Any]:
        def way(n: int) -> None:
            with Meter() as meter:
                seconds = sum(run(n))
            if n == given.spins:  # not the first ones
                took[name] = max(took.get(name, 0.0), seconds / meter.wall)

        return way

    def by_dask(client: distributed.Client) -> Callable[[int], list[float]]:
        return lambda n: client.gather(client.map(spin, [loops] * n, pure=False))

    def by_feste(client: distributed.Client) -> Callable[[int], list[float]]:
        return lambda n: feste.compute(
            [task(loops) for _ in range(n)], scheduler=client, progress=False
        )[0]

    with cluster(1, 1) as one, cluster(2, 1) as two:
        runs = {
            "a plain loop": lambda n: [spin(loops) for _ in range(n)],
            "Client.map, 1 worker process": by_dask(one),
            "Feste, 1 worker process": by_feste(one),
            "Client.map, 2 worker processes": by_dask(two),
            "Feste, 2 worker processes": by_feste(two),
        }
        ways = {name: noted(name, run) for name, run in runs.items()}
        walls = compare("task", ways, n, rounds=given.rounds, warm=2)
    print()
    for name, wall in walls.items():
        ratio = walls["a plain loop"] / wall
        print(f"{name:36}{ratio:6.2f} x one core, {took[name]:.2f} computed at once")


def increment(x: int) -> int:
    return x + 1


def pause(x: int) -> int:
    time.sleep(WAIT)
    return x


def tasks(given: argparse.Namespace) -> None:
    """Tasks that do nothing, independent of each other and in a chain, and tasks that take a while."""
    n = given.tasks
    plus = feste.task(increment)
    delayed = dask.delayed(increment, pure=False)

    def chain(first: Callable[[Any], Any], n: int) -> Any:
        x: Any = 0
        for _ in range(n):
            x = first(x)
        return x

    with cluster() as client:

        def run(value: Any, **settings: Any) -> None:
            feste.compute(value, scheduler=client, progress=False, **settings)

        def submit(x: Any) -> Any:
            return client.submit(increment, x, pure=False)

        print(f"{n:,} tasks that do nothing; {WORKERS} workers of {THREADS} threads\n")
        wide = {
            "Client.map": lambda n: client.gather(client.map(increment, range(n), pure=False)),
            "Client.submit": lambda n: client.gather([submit(i) for i in range(n)]),
            "dask.delayed": lambda n: client.compute([delayed(i) for i in range(n)], sync=True),
            "Feste": lambda n: run([plus(i) for i in range(n)]),
        }
        compare("task", wide, n, client, given.rounds)
        print(f"\n{n // 4:,} tasks that wait {WAIT} s, {WORKERS * THREADS} at once\n")
        rest = feste.task(pause)
        waits = {
            "Client.map": lambda n: client.gather(client.map(pause, range(n), pure=False)),
            "Feste": lambda n: run([rest(i) for i in range(n)]),
        }
        compare("task", waits, n // 4, client, given.rounds, warm=20)
        print(f"\ntasks that do nothing in a chain of {n // 4:,}\n")
        chains = {
            "Client.submit": lambda n: chain(submit, n).result(),
            "dask.delayed": lambda n: client.compute(chain(delayed, n), sync=True),
            "Feste, fused": lambda n: run(chain(plus, n)),
            "Feste, not fused": lambda n: run(chain(plus, n), optimize={"fuse": False}),
        }
        compare("task", chains, n // 4, client, given.rounds)


# --- the brain ------------------------------------------------------------------------------------


class Forgetful(list[Any]):
    """Takes the place of a list that the fake backend keeps for tests, which would grow."""

    def append(self, item: Any) -> None:
        pass


def fake() -> FakeBackend:
    llm = FakeBackend(limits=Limits(concurrency=LANES))
    llm.requests = Forgetful()
    return llm


def instant(**settings: Any) -> Callable[[int], Any]:
    """Return a function that makes so many calls which are answered at once, without a network."""
    llm = fake()

    def run(n: int) -> None:
        feste.compute([llm.chat(f"question {i}") for i in range(n)], progress=False, **settings)

    return run


def mapped(n: int) -> None:
    """The same from a stream of items, as for inputs of any length."""
    llm = fake()
    for _ in feste.map(lambda i: llm.chat(f"question {i}"), range(n), progress=False):
        pass


def stored(folder: Path, ways: Callable[..., Callable[[int], Any]]) -> Callable[[int], Any]:
    """Return what `ways` makes of the setting `store`, each time another file."""
    stores = itertools.count()

    def run(n: int) -> None:
        store = folder / f"{next(stores)}.db"
        ways(store=store)(n)
        feste.store.close()
        if n > 100:
            print(f"(store: {store.stat().st_size / n:,.0f} bytes a call)")

    return run


def brain(given: argparse.Namespace) -> None:
    """The most that one brain carries."""
    n = given.brain
    print(f"{n:,} calls that are answered at once, without a network\n")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, cluster() as client:
        on_workers = {"scheduler": client, "requests_on": "workers", "worker_window": WINDOW}
        ways = {
            "one process": instant(),
            "one process, feste.map": mapped,
            "one process, with a store": stored(Path(folder), instant),
            "Dask, from the client": instant(scheduler=client),
            "Dask, from the workers": instant(**on_workers),
        }
        compare("call", ways, n, client, given.rounds)


WHOLE = {"one graph": instant(), "feste.map": mapped}


def peak(way: str, n: int) -> int:
    """Return the peak of memory, in bytes, of a process that makes so many calls."""
    command = [sys.executable, __file__, "peak", "--way", way, "--peak", str(n)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(given: argparse.Namespace) -> None:
    WHOLE[given.way](given.peak)
    status = Path("/proc/self/status")  # on Linux, `getrusage` counts the process that started this
    if status.exists():
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        print(int(line.split()[1]) * 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory(given: argparse.Namespace) -> None:
    """What each further call adds to the peak of memory."""
    few, many = given.memory // 4, given.memory
    print(f"peaks of processes with {few:,} and {many:,} calls\n")
    for way in WHOLE:
        low, high = peak(way, few), peak(way, many)
        each = (high - low) / (many - few)
        print(f"{way:36}{low / 2**20:6.0f} and {high / 2**20:,.0f} MiB: {each:7,.0f} bytes a call")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "calls": calls,
    "cpu": cpu,
    "tasks": tasks,
    "requests": requests,
    "brain": brain,
    "memory": memory,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    options.add_argument("--calls", type=int, default=1000, help="calls of 200 ms")
    options.add_argument("--spins", type=int, default=12, help="tasks that only compute")
    options.add_argument("--seconds", type=float, default=0.25, help="CPU seconds of each of them")
    options.add_argument("--tasks", type=int, default=1000, help="tasks that do nothing")
    options.add_argument("--requests", type=int, default=1000, help="calls answered at once")
    options.add_argument("--brain", type=int, default=5000, help="calls without a network")
    options.add_argument("--memory", type=int, default=20_000, help="calls of the larger process")
    options.add_argument("--rounds", type=int, default=1, help="the fastest of so many is shown")
    options.add_argument("--folder", default=".", help="where stores are made, and removed")
    options.add_argument("--way", choices=WHOLE, help=argparse.SUPPRESS)
    options.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.parts == ["peak"]:
        print_peak(given)
        return
    for part in given.parts or PARTS:
        print(f"--- {part}")
        PARTS[part](given)
        print(flush=True)


if __name__ == "__main__":
    main()
