"""From the setting ``scheduler`` to a cluster: clients, addresses, a cluster of its own, closing."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest

import feste
from feste.errors import ConfigError, FesteWarning, RunFailed, UnknownName, WorkerLost
from feste.scheduler import Reporter
from feste.scheduler.dask import DaskExecutor, preparing
from feste.scheduler.dask._hooks import feste_settings
from feste.testing import FakeBackend


@feste.task(executor="inline")
def here(x: Any) -> Any:
    return x


signals: dict[str, threading.Event] = {}


def where() -> Any:
    """A node of a task that tells in which process it runs."""

    @feste.task
    def where_am_i(x: int) -> int:
        return os.getpid()

    return where_am_i(1)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc").exists()


@pytest.fixture
def threads(new_cluster: Callable[..., Any]) -> Iterator[Any]:
    """A cluster of threads in this process, quick to start and to lose."""
    with new_cluster(1, threads=2, processes=False) as made:
        yield made


def test_a_client_a_cluster_or_an_address(client: Any, cluster: Any) -> None:
    """A Client object, a cluster object and a loopback address each run the graph on the workers."""
    workers = set(client.run(os.getpid).values())
    for target in (client, cluster, cluster.scheduler_address):
        assert where().compute(scheduler=target) in workers


def test_dask_means_the_current_client(client: Any) -> None:
    """scheduler="dask" takes the client of the context, whichever that is now."""
    workers = set(client.run(os.getpid).values())
    with client.as_current():
        assert where().compute(scheduler="dask") in workers
        assert where().compute(scheduler="distributed") in workers


def test_threads_of_this_process_will_do(threads: Any) -> None:
    """A cluster of threads works like any other, and runs inside it are refused likewise."""

    @feste.task
    def nested(x: int) -> Any:
        return here(x).compute()

    with distributed.Client(threads, set_as_default=False) as client:
        llm = FakeBackend()
        answer = llm.chat(here("x"))
        assert feste.compute(where(), answer, scheduler=client) == (os.getpid(), answer.compute())
        with pytest.raises(RunFailed, match="NestedRunError"):
            nested(1).compute(scheduler=client)


def test_what_is_no_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where nobody is, and an object that is no client, are ConfigErrors."""
    with distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp://", dashboard_address="127.0.0.1:0"
    ) as gone:
        address = gone.scheduler_address
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "300ms"}),
        pytest.raises(ConfigError, match="no connection"),
    ):
        where().compute(scheduler=address)
    with pytest.raises(ConfigError, match="a Client or a cluster"):
        where().compute(scheduler=distributed.Security())
    with pytest.raises(UnknownName):
        where().compute(scheduler="dusk")


def test_a_closed_client_is_noticed(threads: Any) -> None:
    """A run on a closed client is refused, and a new client is a new start."""
    client = distributed.Client(threads, set_as_default=False)
    assert where().compute(scheduler=client) == os.getpid()
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        where().compute(scheduler=client)
    with distributed.Client(threads, set_as_default=False) as other:
        assert where().compute(scheduler=other) == os.getpid()


def test_a_client_that_closes_while_a_run_is_planned() -> None:
    """Its loop has ended by then, so nothing on it would ever answer."""
    client = distributed.Client(
        processes=False, n_workers=1, dashboard_address="127.0.0.1:0", set_as_default=False
    )
    executor = DaskExecutor(client, requests_on="workers")
    executor.start(Reporter([].append, executor))
    client.close()
    with pytest.raises(ConfigError, match=r"the connection to the Dask scheduler .* is lost"):
        executor.preflight([FakeBackend()])
    executor.close()


def test_hands_of_closed_clients_go(threads: Any, until: Callable[..., bool]) -> None:
    """The hands of a closed client go with the next run, and keep nothing: programs may make many."""

    def count() -> int:
        return sum(t.name == "feste-dask" for t in threading.enumerate())

    here(1).compute(scheduler="local")
    before = count()
    kept = []
    for place in ("client", "workers", "client"):
        with distributed.Client(threads, set_as_default=False) as client:
            assert where().compute(scheduler=client, requests_on=place) == os.getpid()
            assert count() == before + 1
        kept.append(weakref.ref(client))
    del client
    here(1).compute(scheduler="local")
    assert count() == before
    assert until(lambda: gc.collect() >= 0 and not any(ref() for ref in kept))


def test_a_client_that_closes_during_a_run(threads: Any) -> None:
    """A run whose client is closed under it ends, with WorkerLost in the places that it cost."""
    client = distributed.Client(threads, set_as_default=False)
    begun = threading.Event()
    release = threading.Event()
    signals.update(begun=begun, release=release)  # the worker is in this process

    @feste.task
    def slow(key: str) -> int:
        signals = __import__(key, fromlist=["signals"]).signals
        signals["begun"].set()
        signals["release"].wait(30)
        return 1

    results: list[Any] = []

    def run() -> None:
        nodes = slow(__name__), here(2)
        results.extend(feste.compute(*nodes, scheduler=client, on_error="return"))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(30)
    client.close()
    thread.join(30)
    release.set()
    assert isinstance(results[0], WorkerLost)
    assert results[1] == 2


def test_a_cluster_without_workers_is_told(new_cluster: Callable[..., Any]) -> None:
    """A run on a cluster that has no workers yet says so, and begins when one comes."""
    with (
        new_cluster(0, processes=False) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        timer = threading.Timer(0.5, lambda: cluster.scale(1))
        timer.start()
        with pytest.warns(FesteWarning, match="no workers yet"):
            assert where().compute(scheduler=client) == os.getpid()


BARE = """
import asyncio, sys
sys.modules["feste"] = None  # as if it was not installed
from distributed import Worker

async def main():
    async with Worker(sys.argv[1], name="bare", host="127.0.0.1", dashboard=False, nthreads=1):
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def test_a_worker_without_feste_is_told(new_cluster: Callable[[int], Any]) -> None:
    """One that comes during a run fails its tasks, and is not ended by them."""
    with (
        new_cluster(0) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        ThreadPoolExecutor(1) as pool,
        pytest.warns(FesteWarning, match="has no workers yet"),
    ):
        run = pool.submit(feste.compute, where(), scheduler=client)
        command = [sys.executable, "-c", BARE, cluster.scheduler_address]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as bare:
            with pytest.raises(RunFailed, match="Install feste-scheduler-dask there"):
                run.result()
            assert client.nthreads()
            with (
                distributed.Client(cluster, set_as_default=False) as other,
                pytest.raises(ConfigError, match="cannot run Feste: ModuleNotFoundError"),
            ):
                feste.compute(where(), scheduler=other)
            assert bare.stdin is not None
            bare.stdin.close()


def test_another_version_of_feste_is_told(
    threads: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    told = iter(["0.0.9"])
    resolve = preparing.resolve_name
    monkeypatch.setattr(preparing, "resolve_name", lambda name: next(told, None) or resolve(name))
    feste.compute(where(), scheduler=threads)
    (warning,) = [str(w.message) for w in recwarn if w.category is FesteWarning]
    assert "has Feste 0.0.9, this process" in warning


def test_requests_alone_start_no_workers_of_an_adaptive_cluster(threads: Any) -> None:
    """It counts tasks, so without a minimum requests could wait forever: that is told."""
    llm = FakeBackend()
    with distributed.Client(threads, set_as_default=False) as client:
        threads.adapt(minimum=0, maximum=1, interval="1h")
        with pytest.warns(FesteWarning, match="give it a minimum"):
            assert feste.compute(llm.chat("Hi"), scheduler=client, requests_on="workers")
        threads.adapt(minimum=1, maximum=1, interval="1h")
        assert feste.compute(
            llm.chat("Hi"), scheduler=client, requests_on="workers", worker_window=2
        )


def test_a_cluster_that_loses_its_last_worker_is_told(
    threads: Any, until: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that waits for a worker says so, once, and goes on when one comes."""
    monkeypatch.setattr("feste.scheduler.dask.tasks.offers._EMPTY", 0.0)
    monkeypatch.setattr("feste.scheduler.dask.tasks.workers._REFRESH", 0.02)
    with distributed.Client(threads, set_as_default=False) as client, ThreadPoolExecutor(1) as pool:
        assert where().compute(scheduler=client) == os.getpid()
        threads.scale(0)
        assert until(lambda: not client.nthreads())
        with pytest.warns(FesteWarning, match="lost all its workers") as told:
            running = pool.submit(where().compute, scheduler=client)
            assert until(lambda: len(told))
            threads.scale(1)
            assert running.result(60) == os.getpid()
        assert len(told) == 1


def test_new_workers_are_used(new_cluster: Callable[..., Any]) -> None:
    """The window grows with the cluster while a run is under way."""

    @feste.task
    def slow(x: int) -> str:
        time.sleep(0.05)
        return str(distributed.get_worker().address)

    with (
        new_cluster(1, processes=False) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        cluster.scale(4)
        client.wait_for_workers(4)
        first = slow(0).compute(scheduler=client)
        workers = set(feste.compute([slow(i) for i in range(60)], scheduler=client)[0])
        assert len(workers | {first}) == 4


def test_asynchronous_clients(cluster: Any) -> None:
    """An asynchronous client works with acompute; a blocking run on its loop is refused."""

    async def main() -> None:
        async with distributed.Client(
            cluster.scheduler_address, asynchronous=True, set_as_default=False
        ) as client:
            (pid,) = await feste.acompute(where(), scheduler=client)
            assert pid != os.getpid()
        async with distributed.Client(
            cluster.scheduler_address, asynchronous=True, set_as_default=False
        ) as client:
            with pytest.raises(ConfigError, match="acompute"):
                where().compute(scheduler=client)

    asyncio.run(main())


def test_a_cluster_of_its_own_goes_with_its_hands(until: Callable[..., bool]) -> None:
    """Where there is no client, hands start worker processes, and close() ends them all."""
    executor = DaskExecutor("dask")
    reports: list[Any] = []
    executor.start(Reporter(reports.append, executor))
    client = executor._link.client
    pids = {*client.run(os.getpid).values(), *client.run(os.getppid).values()}
    assert os.getpid() not in pids
    addresses = [client.scheduler.address, *client.run(lambda dask_worker: dask_worker.address)]
    assert all("://127.0.0.1:" in a for a in addresses)
    with pytest.raises(ValueError):
        distributed.default_client()  # it is nobody's default
    executor.close()
    assert until(lambda: not any(alive(pid) for pid in pids))


def test_hands_share_the_cluster_of_their_own(until: Callable[..., bool]) -> None:
    """Hands with other options use the same worker processes; the last one that closes ends them."""
    first, second = DaskExecutor("dask"), DaskExecutor("dask", requests_on="workers")
    for executor in (first, second):
        executor.start(Reporter([].append, executor))
    client = first._link.client
    assert second._link.client is client
    pids = {*client.run(os.getpid).values()}
    first.close()
    first.close()
    assert client.status == "running" and all(alive(pid) for pid in pids)
    second.close()
    assert until(lambda: not any(alive(pid) for pid in pids))


def test_the_program_of_its_workers_is_killed() -> None:
    """Runs end, and do not wait for workers that nobody starts; the next run has another cluster."""

    @feste.task
    def kill_all(x: int) -> int:
        os.killpg(os.getppid(), signal.SIGKILL)
        return x

    executor = DaskExecutor("dask")
    with pytest.raises(RunFailed, match=r"connection to the Dask scheduler .* is lost"):
        feste.compute(kill_all(1), scheduler=executor)
    assert feste.compute(feste.task(abs)(-2), scheduler=executor) == (2,)
    executor.close()


PROGRAM = """
import os, sys
import feste

@feste.task
def where_am_i(x):
    return os.getpid(), os.getppid()

print("main")
pids = feste.compute([where_am_i(i) for i in range(4)], scheduler="dask")[0]
print("pids", *{pid for pair in pids for pid in pair}, flush=True)
if "kill" in sys.argv:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["ends", "kill"])
def test_a_program_without_a_guard(
    script: Callable[..., list[str]], until: Callable[..., bool], how: str
) -> None:
    """A main script is run once, whatever it lacks; its workers end with it, also if it is killed."""
    done = subprocess.run(
        [*script(PROGRAM), how], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == (-9 if how == "kill" else 0), done.stderr
    main, pids = done.stdout.splitlines()
    assert main == "main"
    if how == "ends":
        assert done.stderr == ""
    assert until(lambda: not any(alive(int(pid)) for pid in pids.split()[1:]))


#: Loads the plugin as an installation does, and uses all that needs no cluster.
LIGHT = """
import sys, time
import feste, feste.plugins, feste.scheduler
from feste.testing import FakeBackend
begun = time.process_time()
import feste.scheduler.dask
import feste.scheduler.dask._hooks as hooks
schedulers, settings = hooks.feste_schedulers(), hooks.feste_settings()
spent = time.process_time() - begun
registry = feste.plugins.registry()
registry.schedulers.update(schedulers)
registry.settings.update(settings)
node = FakeBackend().chat(feste.task(str)(1))
with feste.context.set(requests_on="workers", worker_window=3, prepare_worker=print):
    feste.explain(node)
    node.compute(scheduler="local", allow_insecure=True)
    feste.task(abs)(-1).compute(prepare_worker="module:name")
print(sorted(schedulers), {"distributed", "dask"} & set(sys.modules), spent)
"""


def test_hooks_are_light() -> None:
    """What the plugin offers, its settings, plans and local runs import neither distributed nor dask."""
    spent = []
    for _ in range(3):  # the best of three: load on the machine only makes one longer
        done = subprocess.run(
            [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=True
        )
        told, _, seconds = done.stdout.strip().rpartition(" ")
        assert told == "['dask', 'distributed', 'tcp', 'tls'] set()"
        spent.append(float(seconds))
    assert min(spent) < 0.02


@pytest.mark.parametrize("text", ["", "many", "0", "-1", "1.5"])
def test_a_window_in_the_environment_that_is_none_is_told(text: str) -> None:
    window = feste_settings()["worker_window"]
    assert window.parse("worker_window", " 8 ") == 8
    with pytest.raises(ConfigError, match=f"FESTE_WORKER_WINDOW='{text}': .* whole number from 1"):
        window.parse("worker_window", text)
