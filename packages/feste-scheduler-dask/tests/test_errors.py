"""What goes wrong on workers is told in the client: as data, in its place, and never by hanging."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest

import feste
from feste.errors import (
    ConfigError,
    FesteError,
    InvalidRequest,
    NestedRunError,
    NodeError,
    RunFailed,
    UpstreamFailed,
    WorkerLost,
)
from feste.testing import FakeBackend


def errors(client: Any, *nodes: Any) -> list[Any]:
    """What stands in the places of the nodes."""
    return list(feste.compute(*nodes, scheduler=client, on_error="return"))


@feste.task(executor="inline")
def local(value: Any) -> Any:
    return value


def test_users_exceptions_come_back(client: Any) -> None:
    """An exception on a worker is a NodeError with its type, text, traceback and cause, as local."""

    @feste.task
    def broken(x: int) -> int:
        return inner(x)

    def inner(x: int) -> int:
        raise KeyError(f"no {x}")

    @feste.task
    async def broken_later(x: int) -> int:
        raise ZeroDivisionError(x)

    with pytest.raises(RunFailed) as caught:
        feste.compute(broken(3), scheduler=client)
    error = caught.value.__cause__
    assert isinstance(error, NodeError)
    assert error.cause_type == "KeyError"
    assert "in inner" in error.traceback
    assert "test_errors.py" in error.origin
    assert isinstance(error.__cause__, KeyError)
    assert error.__cause__.args == ("no 3",)
    assert "in inner" in "".join(error.__cause__.__notes__)
    (later,) = errors(client, broken_later(1))
    assert isinstance(later.__cause__, ZeroDivisionError)
    with pytest.raises(RunFailed) as caught:
        broken(3).compute()
    assert caught.value.errors[0].args == error.args


def test_any_exception_is_told(client: Any) -> None:
    """Exceptions that do not pickle, do not unpickle, or end a program are told by their text."""

    class Locked(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.lock = threading.Lock()

    class Two(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} and {two}")

    class OfOurs(FesteError):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.lock = threading.Lock()

    @feste.task
    def broken(how: int) -> None:
        if how == 0:
            raise Locked("locked")
        if how == 1:
            raise Two("one", "two")
        if how == 2:
            raise SystemExit("leaving")
        if how == 3:
            raise KeyboardInterrupt
        if how == 4:
            raise OfOurs("ours")
        raise InvalidRequest("refused", status=400)

    told = errors(client, *[broken(i) for i in range(6)])
    texts = ["locked", "one and two", "leaving", "KeyboardInterrupt", "ours", "refused"]
    for error, text in zip(told, texts, strict=True):
        assert isinstance(error, FesteError)
        assert text in str(error)
    assert [type(e) for e in told[:5]] == [NodeError] * 5
    assert isinstance(told[5], InvalidRequest)
    assert told[5].status == 400


@pytest.mark.timeout(60)
def test_async_tasks_that_would_end_a_program(client: Any) -> None:
    """They are told like others, and later async tasks of the same workers still run."""

    @feste.task
    async def leave(error: type[BaseException]) -> None:
        raise error("leaving")

    @feste.task
    async def stay(x: int) -> int:
        return x

    kinds = [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit] * 2
    for error, kind in zip(errors(client, *map(leave, kinds)), kinds, strict=True):
        assert isinstance(error, NodeError)
        assert kind.__name__ in str(error) and "leaving" in str(error)
    assert errors(client, *[stay(i) for i in range(8)]) == list(range(8))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_objects_that_would_end_a_program(client: Any, kind: type[BaseException]) -> None:
    """What they raise as they are sent, measured or read is told; it ends neither workers nor threads."""

    class Trap:
        """Raises at one of these."""

        def __init__(self, at: str) -> None:
            self.at = at

        def __sizeof__(self) -> int:
            if self.at == "size":
                raise kind("trap")
            return 1

        def __reduce__(self) -> Any:
            if self.at == "send":
                raise kind("trap")
            return (spring if self.at == "read" else Trap, (self.at,))

    def spring(at: str) -> None:
        raise kind("trap")

    @feste.task
    def make(at: str) -> Any:
        return Trap(at)

    @feste.task
    def where_it_springs(trap: Any) -> str:
        return str(trap.at)

    for at in ("send", "read"):
        made, given = errors(client, local(make(at)), where_it_springs(Trap(at)))
        assert isinstance(made, NodeError)
        assert isinstance(given, ConfigError if at == "send" else NodeError)
        assert f"{kind.__name__}: trap" in str(made) and f"{kind.__name__}: trap" in str(given)
    made, given = errors(client, make("size"), where_it_springs(Trap("size")))
    assert made.at == given == "size"


def test_only_what_needs_a_failed_task_fails(client: Any) -> None:
    """A failure costs its own node and those that need it; all else is delivered."""
    llm = FakeBackend()

    @feste.task
    def half(x: int) -> int:
        if x % 2:
            raise ValueError(x)
        return x // 2

    results = errors(client, *[llm.chat(half(half(x)) * "x" + "?") for x in (0, 1, 2, 4)])
    assert [type(r) for r in results] == [
        type(results[0]),
        UpstreamFailed,
        UpstreamFailed,
        type(results[0]),
    ]
    assert [isinstance(r, str) for r in results] == [True, False, False, True]
    assert len(llm.requests) == 2


def test_runs_on_workers_are_refused(client: Any) -> None:
    """A task on a worker may start no run of its own: it would go round the gate."""
    llm = FakeBackend()

    @feste.task
    def compute(x: int) -> Any:
        return llm.chat("x").compute()

    @feste.task
    async def wait(x: int) -> Any:
        return await llm.chat("x")

    @feste.task
    def eager(x: int) -> Any:
        with feste.context.set(eager=True):
            return llm.chat("x")

    @feste.task
    def loop(x: int) -> Any:
        import asyncio

        return asyncio.run(feste.acompute(llm.chat("x")))

    for error in errors(client, compute(1), wait(1), eager(1), loop(1)):
        assert isinstance(error, NestedRunError)
        assert "return the node" in str(error)
    assert not llm.requests


def test_what_cannot_be_sent_is_refused(client: Any) -> None:
    """An argument that does not pickle is a ConfigError that names the way out."""

    @feste.task
    def use(x: Any) -> int:
        return 1

    lock = threading.Lock()
    (error,) = errors(client, use([lock]))
    assert isinstance(error, ConfigError)
    assert "executor='inline'" in str(error)
    (error,) = errors(client, use(local(lock)))
    assert isinstance(error, ConfigError)


def test_results_that_do_not_travel(client: Any) -> None:
    """A result that does not pickle is an error for whoever needs it elsewhere, and never a hang."""

    @feste.task
    def locked(x: int) -> Any:
        import threading

        time.sleep(0.1)  # so that both workers make some
        return [x, threading.Lock()]

    @feste.task
    def first(*made: Any) -> int:
        return sum(m[0] for m in made)

    made = [locked(i) for i in range(6)]
    results = errors(client, locked(7), first(*made), local(locked(8)), first(locked(9)))
    for error in results[:3]:
        assert isinstance(error, NodeError)
        assert "cannot pickle" in str(error)
    assert results[3] == 9


def test_results_that_do_not_come_to_life(client: Any) -> None:
    """A result that arrives but cannot be unpickled is an error of the node."""

    class Fragile:
        def __reduce__(self) -> Any:
            return (broken, ())

    def broken() -> None:
        raise ValueError("not here")

    @feste.task
    def make(x: int) -> Any:
        return Fragile()

    for error in errors(client, make(1), local(make(2))):
        assert isinstance(error, NodeError)
        assert "not here" in str(error)


def test_modules_that_workers_lack(
    client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A task of a module that only the client can import says what the workers lack."""
    (tmp_path / "only_the_client.py").write_text(
        "import feste\n@feste.task\ndef f(x):\n    return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import only_the_client  # type: ignore[import-not-found]

    (error,) = errors(client, only_the_client.f(1))
    assert isinstance(error, NodeError)
    assert "only_the_client" in str(error)
    assert "upload_file" in str(error)


def test_a_lost_worker_is_made_up_for(client: Any, tmp_path: Path) -> None:
    """What a worker was at when it died is begun once more elsewhere, and its results made again."""
    mark = tmp_path / "died"

    @feste.task
    def fragile(x: int) -> int:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x + 1

    @feste.task
    def plus(x: int, y: int) -> int:
        return x + y

    assert plus(fragile(plus(1, 2)), 5).compute(scheduler=client) == 9


def test_a_task_that_kills_workers_fails(client: Any) -> None:
    """A task that killed more workers than Dask allows is lost, and those that need it."""

    @feste.task
    def deadly(x: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return x

    @feste.task
    def plus(x: int, y: int) -> int:
        return x + y

    node = deadly(1)
    lost, poisoned, fine = errors(client, node, plus(node, 1), plus(1, 2))
    assert isinstance(lost, WorkerLost)
    assert lost.billed == "no"
    assert "deadly" in str(lost)
    assert isinstance(poisoned, UpstreamFailed)
    assert fine == 3


def test_who_waits_beside_a_killer_is_not_lost_with_it(new_cluster: Callable[..., Any]) -> None:
    """Dask blames a worker's death on all tasks it was given; those that only waited are run again."""

    @feste.task
    def deadly(x: int) -> int:
        time.sleep(0.5)  # so that others are given to the same worker
        os.kill(os.getpid(), signal.SIGKILL)
        return x

    @feste.task
    def plus(x: int, y: int) -> int:
        return x + y

    with one_worker(new_cluster) as client:
        lost, *fine = errors(client, deadly(1), *[plus(i, 1) for i in range(4)])
        assert isinstance(lost, WorkerLost)
        assert fine == [1, 2, 3, 4]


def test_a_result_that_died_beside_a_killer_is_made_again(
    tmp_path: Path, new_cluster: Callable[..., Any]
) -> None:
    """A result on a worker that died is made anew, and blamed if that one dies too: it is tried alone."""
    mark = tmp_path / "made"

    @feste.task
    def make(x: int) -> int:
        if mark.exists():
            time.sleep(1.0)  # so that the next death meets it
        mark.touch()
        return x

    @feste.task
    def deadly(x: int) -> int:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
        return x

    with one_worker(new_cluster, threads=2) as client:
        made, lost = errors(client, make(7), deadly(1))
        assert isinstance(lost, WorkerLost)
        assert made == 7


@contextmanager
def one_worker(new_cluster: Callable[..., Any], threads: int = 1) -> Iterator[Any]:
    """A client of a cluster with one worker process, which may not die twice."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        new_cluster(1, threads=threads) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client
