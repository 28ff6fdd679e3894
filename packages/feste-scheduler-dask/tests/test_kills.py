"""Processes are killed while requests are under way: nothing is lost, and little is bought twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import pytest

import feste
from feste.errors import ConfigError, RunFailed
from feste.scheduler import stalls
from feste.scheduler.dask.requests import line
from feste.testing import SimServer

openai = pytest.importorskip("feste.backend.openai")

WIRE = "feste.backend.openai.testing:OpenAIWire"
WINDOW = 8
Until = Callable[[Callable[[], Any]], bool]


@feste.task
def shout(text: str) -> str:
    return f"{text}!"


@pytest.fixture
def cluster_of_programs(tmp_path: Path, until: Until) -> Iterator[Any]:
    """A scheduler and two workers with nannies, each a program of its own: all of it may be killed."""
    where = tmp_path / "scheduler.json"
    programs: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        quiet = {"DASK_LOGGING__DISTRIBUTED": "critical", "DASK_DISTRIBUTED__DASHBOARD__LINK": ""}
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        made = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "distributed.cli.dask_" + command[0],
                *command[1:],
                "--no-dashboard",
            ],
            env={**os.environ, **quiet, "PYTHONPATH": path},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=tmp_path,
        )
        programs.append(made)

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(where))
        assert until(lambda: where.exists() and where.read_text().endswith("}"))
        address = json.loads(where.read_text())["address"]
        host = ["--host", "127.0.0.1", "--nworkers", "2", "--nthreads", "1"]
        start("worker", address, *host, "--local-directory", str(tmp_path))
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, programs[0]
    finally:
        for program in programs:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()


def test_six_workers_are_killed(
    new_cluster: Callable[[int], Any], tmp_path: Path, until: Until, restart: Callable[[], None]
) -> None:
    """600 requests: none is lost, none delivered twice, and each kill costs a window at most."""
    cluster = new_cluster(2)
    settings: dict[str, Any] = {"requests_on": "workers", "worker_window": WINDOW}

    def kill(server: SimServer) -> int:
        done = 0
        for point in (40, 140, 240, 340, 440, 540):
            until(lambda point=point: server.totals().generated >= point)
            nannies = [n for n in cluster.workers.values() if n.process and n.process.pid]
            os.kill(nannies[done % len(nannies)].process.pid, signal.SIGKILL)
            done += 1
        return done

    with (
        SimServer(WIRE, base=0.05) as server,
        cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        ThreadPoolExecutor() as pool,
        feste.context.set(store=tmp_path / "runs.db"),
    ):
        llm = openai.OpenAI("m", base_url=f"{server.url}/v1")
        killing = pool.submit(kill, server)
        chats = [llm.chat(f"REPLY: {i}") for i in range(600)]
        values = feste.compute(chats, scheduler=client, **settings)[0]
        report = feste.last_report()

        assert killing.result() == 6
        assert values == [str(i) for i in range(600)]
        bought = len(server.ledger())
        assert report is not None
        assert bought - 600 <= report.perhaps_billed <= 6 * WINDOW
        assert report.perhaps_billed > 0

        restart()
        again = [llm.chat(f"REPLY: {i}") for i in range(600)]
        assert feste.compute(again, scheduler=client, **settings)[0] == values
        assert len(server.ledger()) == bought


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["workers", "client"])
def test_the_scheduler_is_killed(
    place: str, cluster_of_programs: Any, tmp_path: Path, until: Until, restart: Callable[[], None]
) -> None:
    """The run ends with one clear error; what was answered is kept, and a local run buys the rest."""
    address, scheduler = cluster_of_programs
    store = tmp_path / "runs.db"

    def program(server: SimServer) -> list[Any]:
        llm = openai.OpenAI(
            "m", base_url=f"{server.url}/v1", limits=feste.backend.Limits(concurrency=8)
        )
        if place == "workers":
            return [llm.chat(f"REPLY: {i}!") for i in range(200)]
        return [shout(llm.chat(f"REPLY: {i}")) for i in range(200)]

    with (
        SimServer(WIRE, base=0.1) as server,
        ThreadPoolExecutor() as pool,
        feste.context.set(store=store),
    ):
        running = pool.submit(
            feste.compute, program(server), scheduler=address, requests_on=place, worker_window=4
        )
        assert until(lambda: server.totals().generated >= 100)
        scheduler.kill()
        with pytest.raises(
            RunFailed, match=r"the connection to the Dask scheduler .* is lost"
        ) as failed:
            running.result(timeout=60)
        assert isinstance(failed.value.__cause__, ConfigError)
        assert until(lambda: not server.totals().in_flight)
        bought = len(server.ledger())
        assert 100 <= bought < 200

        restart()
        assert feste.compute(program(server))[0] == [f"{i}!" for i in range(200)]
        report = feste.last_report()
        assert report is not None
        kept = report.states["replayed"]
        assert bought - kept <= 2 * 4
        assert len(server.ledger()) - bought == 200 - kept


def test_a_silent_worker_is_given_up_before_the_run() -> None:
    """A call that a worker never told of ends, and may be sent again, before all counts as stalled."""
    assert line._GRACE + line._POLL < stalls.OVERDUE
