"""Workers and the scheduler of a Dask cluster are killed under a program: each kill costs a window."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.chaos.driver import CANARY, LONG, Chaos

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.timeout(600)

WORKERS, THREADS, WINDOW = 2, 4, 8
#: Where requests leave from; the short form tries one place each.
PLACES = ["workers", "client"] if os.environ.get("CHAOS") == "full" else []


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the cluster's processes: the key, which is not sent to them, and no words about kills."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    quiet = tmp_path_factory.mktemp("dask") / "logging.yaml"
    quiet.write_text("logging: {distributed: critical, distributed.client: critical}")
    monkeypatch.setenv("DASK_CONFIG", str(quiet.parent))


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two workers with nannies, which start a worker again that was killed."""
    # else a nanny is given up if its worker is not back after 15 seconds, on a busy machine
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"}),
        distributed.LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=THREADS,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            scheduler_kwargs={"dashboard": False},
        ) as made,
    ):
        yield made


def settings(address: str, place: str) -> dict[str, Any]:
    return {"scheduler": address, "requests_on": place, "worker_window": WINDOW}


def kill_one(cluster: Any, killed: set[int], rng: Random) -> None:
    """Kill a worker that is alive: for a moment a nanny still names one that was killed before."""
    while True:
        named = {nanny.process.pid for nanny in cluster.workers.values() if nanny.process}
        if pids := sorted(named - killed - {None}):
            pid = rng.choice(pids)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                return
        time.sleep(0.01)


@pytest.mark.parametrize("place", PLACES or ["workers"])
def test_workers_are_killed(
    place: str,
    cluster: Any,
    tmp_path: Path,
    seed: int,
    amount: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    """Nothing is lost or delivered twice; only what was in flight on the worker is bought again."""
    kills, rng = amount(2, 6), Random(seed)
    chaos = Chaos(
        tmp_path,
        "chains",
        amount(148, 600),
        seed=seed,
        window=WINDOW,
        equal=1,
        base=0.05,
        settings=settings(cluster.scheduler_address, place),
    )
    points = sorted(rng.sample(range(10, len(chaos.steps) * 9 // 10), kills))
    killed: set[int] = set()

    def kill(process: subprocess.Popen[bytes]) -> None:
        for point in points:
            chaos.ledger.wait_for(max(point, chaos.ledger.made() + 1), process)
            kill_one(cluster, killed, rng)
            chaos.workers_killed += 1

    with chaos:
        evidence = chaos.check(chaos.run(kill))

    assert evidence.delivered == len(chaos.steps)
    assert evidence.extra <= (kills * WINDOW if place == "workers" else 0)
    tally(evidence, **{"kills of workers": kills})


@contextmanager
def programs_of_a_cluster(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a scheduler and its workers, each a program of its own."""
    where = folder / "scheduler.json"
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    started: list[subprocess.Popen[bytes]] = []

    def start(what: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *options]
        env = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(
            command, env=env, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder
        )
        started.append(process)
        return process

    try:
        host = ["--host", "127.0.0.1"]
        scheduler = start("scheduler", *host, "--port", "0", "--scheduler-file", str(where))
        deadline = time.monotonic() + LONG
        while not (where.exists() and where.read_text().endswith("}")):
            assert time.monotonic() < deadline and scheduler.poll() is None
            time.sleep(0.01)
        address = json.loads(where.read_text())["address"]
        size = ["--nworkers", str(WORKERS), "--nthreads", str(THREADS)]
        start("worker", address, *host, *size, "--local-directory", str(folder))
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(WORKERS, timeout=LONG)
        yield address, scheduler
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("place", PLACES or ["client"])
def test_the_scheduler_is_killed(
    place: str,
    tmp_path: Path,
    seed: int,
    amount: Callable[..., int],
    tally: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The run ends with an error, soon; one without a cluster buys only what is missing."""
    calls = amount(100, 300)
    # not where the key must not be: the workers' processes have it in their environment
    with programs_of_a_cluster(tmp_path_factory.mktemp("cluster")) as (address, scheduler):
        chaos = Chaos(
            tmp_path,
            "chains",
            calls,
            seed=seed,
            window=WINDOW,
            equal=1,
            base=0.05,
            settings=settings(address, place),
        )
        killed: list[float] = []

        def kill(process: subprocess.Popen[bytes]) -> None:
            chaos.ledger.wait_for(calls // 2, process)
            scheduler.kill()
            killed.append(time.monotonic())

        with chaos:
            failed = chaos.run(kill, on_error="raise")
            took = time.monotonic() - killed[0]
            chaos.workers_killed = WORKERS  # what they had in flight has no way back
            made = len(chaos.server.ledger())
            told = chaos.run(settings={"scheduler": "local"})
            evidence = chaos.check(told)

    assert took < 30
    assert "the connection to the Dask scheduler" in failed["error"]
    assert calls // 2 <= made < calls
    assert evidence.delivered == calls
    assert len(evidence.ledger) - made == calls - told["report"]["states"]["replayed"]
    if place == "client":
        assert evidence.extra == 0
    tally(evidence, **{"kills of schedulers": 1})
