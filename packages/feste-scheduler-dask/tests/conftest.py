"""One cluster of real worker processes with nannies for all tests of this package."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest

from feste.plugins import registry
from feste.scheduler.dask import DaskExecutor
from feste.scheduler.dask._hooks import feste_schedulers, feste_settings
from feste.scheduler.driver import driver

# A LocalCluster gives up a worker, and its nanny, if none with its name is there 15 seconds after one
# died. Where workers are killed again and again, that is so by chance: the next one is just starting.
dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})

# As installing the distribution does; from a checkout the tests run without it.
registry().schedulers.update(feste_schedulers())
registry().settings.update(feste_settings())


def _new_cluster(workers: int, *, threads: int = 1, processes: bool = True) -> Any:
    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=threads,
        processes=processes,
        host="127.0.0.1" if processes else None,
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
        scheduler_kwargs={"dashboard": False},
    )


@pytest.fixture(scope="session")
def new_cluster() -> Callable[..., Any]:
    """Start a cluster: ``new_cluster(workers, threads=1, processes=True)``, processes with nannies."""
    return _new_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Two workers with one thread each."""
    with _new_cluster(2) as made:
        yield made
        _disconnect()


def _disconnect() -> None:
    for hands in list(driver()._executors.values()):
        if isinstance(hands, DaskExecutor) and not hands.stale:
            hands.close()


@pytest.fixture
def disconnect() -> Callable[[], None]:
    """Close what hands have connected by themselves; they would else do it when Python ends."""
    return _disconnect


@pytest.fixture(scope="session")
def client(cluster: Any) -> Iterator[Any]:
    """A client of the cluster; not the default one."""
    with distributed.Client(cluster, set_as_default=False) as made:
        yield made


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], bool]:
    """Wait for something that happens elsewhere; False if it never does."""

    def wait(what: Callable[[], Any]) -> bool:
        deadline = time.monotonic() + 60
        while not what():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    return wait


@pytest.fixture
def heavy() -> Callable[[Path], Any]:
    """Make a class whose objects write down, in a file, each process that they arrive in."""

    def make(path: Path) -> Any:
        class Heavy:
            def __init__(self, number: int) -> None:
                self.number = number

            def __reduce__(self) -> Any:
                return (arrive, (self.number,))

            def __str__(self) -> str:
                return f"heavy {self.number}"

        def arrive(number: int) -> Any:
            with path.open("a") as file:
                print(os.getpid(), file=file)
            return Heavy(number)

        return Heavy

    return make


@pytest.fixture
def script(tmp_path: Any) -> Callable[[str], list[str]]:
    """Make a user's program; return the command that runs it."""
    prelude = (
        "from feste.plugins import registry\n"
        "from feste.scheduler.dask._hooks import feste_schedulers, feste_settings\n"
        "registry().schedulers.update(feste_schedulers())\n"
        "registry().settings.update(feste_settings())\n"
    )

    def make(text: str) -> list[str]:
        path = tmp_path / "program.py"
        path.write_text(prelude + text)
        return [sys.executable, str(path)]

    return make
