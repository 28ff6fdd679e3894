"""What a user wants done on each worker first is done once in each process, before any work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import feste
from feste.errors import ConfigError, NodeError, RunFailed
from feste.scheduler.dask.preparing import Preparation
from feste.testing import FakeBackend


class Diary:
    """A file to which workers write what they do, and in which process."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def note(self, what: str) -> None:
        """Add a line."""
        with open(self.path, "a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def lines(self, what: str) -> list[str]:
        """The processes that did it."""
        lines = Path(self.path).read_text().splitlines() if os.path.exists(self.path) else []
        return [line.split()[1] for line in lines if line.split()[0] == what]


@pytest.fixture
def diary(tmp_path: Path) -> Iterator[Diary]:
    """An empty diary; workers get its class with it, since they lack this module."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield Diary(tmp_path / "diary")
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def looks(diary: Diary) -> Any:
    """A task that tells its process, and whether that was prepared."""

    @feste.task
    def look(x: int) -> tuple[str, bool]:
        time.sleep(0.05)
        return str(os.getpid()), str(os.getpid()) in diary.lines("ready")

    return look


def test_tasks_find_their_worker_prepared(client: Any, diary: Diary) -> None:
    """Functions, sync and async, are called in each process once, for tasks and requests together."""

    def ready() -> None:
        diary.note("ready")

    async def later() -> None:
        diary.note("later")

    look = looks(diary)
    llm = FakeBackend()
    for options in ({}, {"requests_on": "workers"}):
        diary.path += "+"
        for i in range(2):
            nodes = [look(i) for i in range(6)]
            found, _ = feste.compute(
                nodes, llm.chat(f"{i}"), scheduler=client, prepare_worker=ready, **options
            )
            assert {one for one, _ in found} <= {*diary.lines("ready")}
            assert all(prepared for _, prepared in found)
        assert len(diary.lines("ready")) == len({*diary.lines("ready")}) == 2
        assert feste.compute(look(9), scheduler=client, prepare_worker=later, **options)
        assert len(diary.lines("later")) == 2
        assert len(diary.lines("ready")) == 2


def test_threads_wait_for_it(diary: Diary) -> None:
    """While one thread of a worker prepares it, the others begin nothing."""
    together = threading.Barrier(8)

    def ready() -> None:
        time.sleep(0.1)
        diary.note("ready")

    preparation = Preparation("of this test", ready)

    def work(_: int) -> tuple[object, int]:
        together.wait()
        return preparation.done("here"), len(diary.lines("ready"))

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(work, range(8))] == [(None, 1)] * 8


def test_processes_that_come_later_are_prepared(client: Any, diary: Diary) -> None:
    """A worker that was started again is prepared before its first task."""

    def ready() -> None:
        diary.note("ready")

    @feste.task
    def end(x: int) -> bool:
        if not diary.lines("ended"):
            diary.note("ended")
            os.kill(os.getpid(), signal.SIGKILL)
        return str(os.getpid()) in diary.lines("ready")

    look = looks(diary)
    assert feste.compute(end(1), scheduler=client, prepare_worker=ready) == (True,)
    client.wait_for_workers(2, timeout=60)
    (found,) = feste.compute(
        [look(i) for i in range(12)], scheduler=client, prepare_worker=ready, optimize=False
    )
    assert all(prepared for _, prepared in found)
    assert len({one for one, _ in found}) == 2
    assert len(diary.lines("ready")) == len({*diary.lines("ready")}) == 3


@pytest.mark.parametrize("where", ["client", "workers"])
def test_what_fails_is_told_before_anything_is_sent(client: Any, where: str) -> None:
    """A run does not begin if a worker cannot be prepared; the error has the user's traceback."""
    llm = FakeBackend()

    def broken() -> None:
        inner()

    def inner() -> None:
        raise FileNotFoundError("no model here")

    async def leaves() -> None:
        raise SystemExit(3)

    def computes() -> None:
        llm.chat("from a worker").compute()

    options: dict[str, Any] = {"scheduler": client, "requests_on": where}
    with pytest.raises(
        NodeError, match=r"prepare_worker failed on the Dask worker .*no model"
    ) as told:
        llm.chat("x").compute(prepare_worker=broken, **options)
    assert "in inner" in told.value.traceback
    assert isinstance(told.value.__cause__, FileNotFoundError)
    with pytest.raises(NodeError, match="SystemExit"):
        llm.chat("x").compute(prepare_worker=leaves, **options)
    with pytest.raises(NodeError, match="return the node"):
        llm.chat("x").compute(prepare_worker=computes, **options)
    with pytest.raises(NodeError, match="no_such_module"):
        llm.chat("x").compute(prepare_worker="no_such_module:f", **options)
    lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"prepare_worker=.* cannot be sent to Dask workers"):
        llm.chat("x").compute(prepare_worker=lambda: lock, **options)
    assert not llm.requests


def test_a_worker_that_comes_later_and_cannot_be_prepared_fails_its_tasks(
    client: Any, diary: Diary
) -> None:
    """Its tasks have the error of the preparation, with the user's traceback."""

    def once() -> None:
        if len(diary.lines("ready")) > 1:
            raise RuntimeError("too late")
        diary.note("ready")

    @feste.task
    def end(x: int) -> str:
        if str(os.getpid()) in diary.lines("ready"):
            os.kill(os.getpid(), signal.SIGKILL)  # until only new ones are left
        return "?"

    with pytest.raises(RunFailed, match="too late") as caught:
        feste.compute(end(1), scheduler=client, prepare_worker=once)
    error = caught.value.errors[0]
    assert isinstance(error, NodeError)
    assert "in once" in error.traceback
    client.wait_for_workers(2, timeout=60)


PROGRAM = """
import os, sys
import feste

def ready():
    os.environ["PREPARED"] = "by main"

@feste.task
def look(x):
    return os.environ.get("PREPARED")

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    print(feste.compute(look(1), scheduler="dask", prepare_worker=ready))
    print(feste.compute(look(2), scheduler="dask", prepare_worker="beside:ready"))
"""


def test_functions_of_the_main_program_and_by_name(
    script: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """A function of ``__main__`` goes by value; a name is imported on the worker."""
    (tmp_path / "beside.py").write_text(
        "import os\ndef ready(): os.environ['PREPARED'] = 'by name'\n"
    )
    done = subprocess.run(script(PROGRAM), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["('by main',)", "('by name',)"]
