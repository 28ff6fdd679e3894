"""Which worker runs a task, and when: resources, priorities, workers that come and go."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest

import feste
from feste.errors import FesteWarning
from feste.scheduler.dask import DaskExecutor
from feste.scheduler.driver import driver


def hands_of(client: Any) -> Any:
    """The executor of runs with this client."""
    (hands,) = [
        hands
        for hands in driver()._executors.values()
        if type(hands) is DaskExecutor and hands.target is client
    ]
    return hands


# --- resources ------------------------------------------------------------------------------------


@pytest.fixture
def offer(client: Any) -> Iterator[Any]:
    """Let the first worker offer some of a resource, which the tests take back."""
    names: set[str] = set()
    address = sorted(client.run(os.getpid))[0]

    def give(**amounts: float) -> int:
        names.update(amounts)
        client.run(set_resources, amounts, workers=[address])
        return int(client.run(os.getpid, workers=[address])[address])

    yield give
    client.run(set_resources, dict.fromkeys(names, 0), workers=[address])


async def set_resources(amounts: dict[str, float], dask_worker: Any) -> None:
    await dask_worker.set_resources(**amounts)


set_resources.__module__ = "__main__"  # so that it goes to workers by value


def test_resources_choose_the_worker(client: Any, offer: Any) -> None:
    """A task runs where a worker has what it needs; async ones and chains do, too."""
    pid = offer(GPU=1)

    @feste.task(resources={"GPU": 1})
    def heavy(x: int) -> list[int]:
        return [os.getpid()]

    @feste.task(resources={"GPU": 1})
    async def heavy_async(x: int) -> list[int]:
        return [os.getpid()]

    @feste.task(resources={"GPU": 0.5})
    def also(pids: list[int]) -> list[int]:
        return [*pids, os.getpid()]

    nodes = [*[heavy(i) for i in range(20)], heavy_async(1), *[also(heavy(i)) for i in range(3)]]
    pids = {pid for pids in feste.compute(nodes, scheduler=client)[0] for pid in pids}
    assert pids == {pid}


def test_what_waits_for_a_resource_is_told_and_holds_up_nothing(client: Any) -> None:
    """If no worker has it there is one warning; the others run, and the task when a worker has it."""

    @feste.task(resources={"TPU": 2})
    def special(x: int) -> int:
        return x

    @feste.task
    def plain(x: int) -> int:
        return -x

    command = [sys.executable, "-m", "distributed.cli.dask_worker", client.scheduler.address]
    command += ["--resources", "TPU=2", "--nthreads", "1", "--no-dashboard"]
    nodes = [*[special(i) for i in range(100)], *[plain(i) for i in range(1, 31)]]
    seen: list[int] = []
    joined = None
    try:
        with pytest.warns(FesteWarning, match="special needs resources={'TPU': 2}") as warned:
            for _, value in feste.as_completed(nodes, scheduler=client):
                seen.append(value)
                if len(seen) == 30:
                    joined = subprocess.Popen(
                        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                    )
    finally:
        if joined is not None:
            joined.terminate()
            joined.wait()
    assert len([w for w in warned if "resources" in str(w.message)]) == 1
    assert sorted(seen[:30]) == [-x for x in range(30, 0, -1)]
    assert sorted(seen[30:]) == list(range(100))


def test_many_may_run_where_there_is_much(client: Any, offer: Any) -> None:
    """As many tasks are in flight as the workers' resources allow, whatever waits beside them."""
    offer(SLOT=3)

    @feste.task(resources={"SLOT": 1})
    def slot(x: int) -> int:
        return x

    assert feste.compute([slot(i) for i in range(10)], scheduler=client)[0] == list(range(10))
    room = hands_of(client)._workers._offers.room({"SLOT": 1})
    assert room == 1  # its one thread


# --- priorities -----------------------------------------------------------------------------------


def test_the_longest_path_goes_first(client: Any) -> None:
    """Dask gets the rank of a task as its priority, unless the user has set one."""

    @feste.task
    def priority(*given: Any) -> list[int]:
        import distributed

        worker = distributed.get_worker()
        mine = worker.state.tasks[worker.get_current_task()].priority[0]
        return [*(p for got in given for p in got), -mine]

    node = priority()
    for _ in range(3):
        node = priority(node)
    lone = priority()
    ranks, alone = feste.compute(node, lone, scheduler=client, optimize=False)
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1]
    assert alone[0] < ranks[0]
    with dask.annotate(priority=77):
        assert feste.compute(priority(), scheduler=client) == ([77],)


# --- workers that come and go ---------------------------------------------------------------------


@contextmanager
def own_cluster(new_cluster: Callable[..., Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """A cluster of worker processes for one test, and its client."""
    with (
        new_cluster(workers) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


def test_a_retired_worker_takes_nothing_along(
    tmp_path: Path, until: Any, new_cluster: Callable[..., Any]
) -> None:
    """What a worker holds that is retired in the middle of a run goes to others; nothing runs twice."""
    log, go_on = tmp_path / "ran", tmp_path / "retired"

    @feste.task
    def make(x: int) -> tuple[int, int]:
        import time

        time.sleep(0.1)  # so that both workers make some
        with log.open("a") as file:
            file.write(f"{x} {os.getpid()}\n")
        return x, os.getpid()

    @feste.task
    def wait(x: int) -> int:
        import time

        deadline = time.monotonic() + 60
        while not go_on.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return x

    @feste.task
    def total(waited: int, *made: Any) -> int:
        return waited + sum(x for x, _ in made)

    def retire() -> None:
        assert until(lambda: log.exists() and len(log.read_text().splitlines()) == 8)
        made = {int(line.split()[1]) for line in log.read_text().splitlines()}
        pids = {pid: address for address, pid in client.run(read_pid).items()}
        client.retire_workers([pids[max(made)]])
        go_on.touch()

    def read_pid() -> int:
        import os

        return os.getpid()

    with own_cluster(new_cluster, 2) as (_, client):
        thread = threading.Thread(target=retire)
        thread.start()
        made = [make(i) for i in range(8)]
        assert total(wait(100), *made).compute(scheduler=client) == 128
        thread.join()
    assert len(log.read_text().splitlines()) == 8


def test_a_cluster_may_grow_from_nothing(new_cluster: Callable[..., Any]) -> None:
    """On an adaptive cluster without workers a run waits for the first, and lets it go."""

    @feste.task
    def pid(x: int) -> int:
        import os

        return os.getpid()

    with own_cluster(new_cluster, 0) as (cluster, client):
        cluster.adapt(minimum=0, maximum=1, interval="50ms")
        with pytest.warns(FesteWarning, match="no workers yet"):
            pids = feste.compute([pid(i) for i in range(50)], scheduler=client)[0]
    assert os.getpid() not in pids


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_adaptive_cluster_sees_the_work(
    client: Any, adaptive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long tasks few are in flight; where Dask decides by them whether to grow, seconds of work."""
    feste.compute(feste.task(abs)(-1), scheduler=client)
    hands = hands_of(client)
    if adaptive:
        monkeypatch.setattr(client.cluster, "_adaptive", object())
    windows = []
    for pace in (30.0, 1.0, 0.1, 0.001):
        monkeypatch.setattr(hands._workers.known, "pace", pace)
        windows.append(hands.capacity("worker") / 2)
    assert windows == ([2, 10, 16, 16] if adaptive else [2, 2, 10, 16])


# --- large values ---------------------------------------------------------------------------------


def bytes_received() -> int:
    """Return how many bytes the sockets of this process have received over TCP, as the kernel says."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                    total += struct.unpack_from("=Q", info, 128)[0]
        except OSError:  # no socket, or none of TCP
            continue
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_large_values_do_not_come_to_the_client(client: Any, tmp_path: Path) -> None:
    """A chain over arrays of 100 MB moves none through the client, neither its bytes nor an object."""
    pytest.importorskip("numpy")
    log = tmp_path / "arrived"

    class Block:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __reduce__(self) -> Any:
            return (arrive, (self.array,))

    def arrive(array: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return Block(array)

    @feste.task
    def make(n: int) -> Any:
        import numpy

        return Block(numpy.ones(n * 125_000))

    @feste.task
    def step(*blocks: Any) -> Any:
        return Block(sum(b.array for b in blocks))

    @feste.task
    def first(block: Any) -> float:
        return float(block.array[0])

    node = step(make(100), make(100))
    for _ in range(3):
        node = step(node)
    feste.compute(make(0), scheduler=client)
    before = bytes_received()
    assert first(node).compute(scheduler=client, optimize=False) == 2
    received = bytes_received() - before
    here = str(os.getpid())
    arrived = log.read_text().split() if log.exists() else []

    assert received < 1_000_000
    assert arrived.count(here) <= 1  # the empty one before
    fetched = make(100).compute(scheduler=client)
    assert fetched.array.nbytes == 100_000_000
    assert bytes_received() - before > 100_000_000  # so it is counted


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_large_values_stay_where_they_are_if_a_task_beside_them_fails(client: Any) -> None:
    """Of a chunk with an error, the client gets the error and not the values of the others."""

    @feste.task
    def make_or_fail(n: int) -> Any:
        if n < 0:
            raise ValueError("no")
        return b"x" * n

    @feste.task
    def size(data: bytes) -> int:
        return len(data)

    def run(sizes: list[int]) -> Any:
        nodes = [size(make_or_fail(n)) for n in sizes]
        return feste.compute(nodes, scheduler=client, on_error="return", optimize=False)[0]

    run([1] * 40)  # so it is known as short and small
    before = bytes_received()
    values = run([30_000_000 if n == 7 else -1 if n % 5 == 0 else n for n in range(40)])

    assert values[7] == 30_000_000 and values[8] == 8
    assert all(isinstance(value, feste.errors.FesteError) for value in values[::5])
    assert bytes_received() - before < 1_000_000
