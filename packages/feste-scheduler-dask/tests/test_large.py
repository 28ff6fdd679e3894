"""Large values of the client go to the cluster once in a run, however many tasks need them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest

import feste
from feste.errors import ConfigError, NodeError

numpy = pytest.importorskip("numpy")

MB = 1_000_000


class Wire:
    """Passes on the connections to a scheduler, and counts what is sent to it.

    :param target: the scheduler's host and port.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.sent = 0
        self._target = target
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:  # closed
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            threading.Thread(target=self._pass, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                self.sent += len(data) if counted else 0
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # the other side has gone
            pass

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        for one in (self._server, *self._open):
            one.close()


@pytest.fixture
def wire(cluster: Any) -> Iterator[Wire]:
    host, _, port = cluster.scheduler.address.removeprefix("tcp://").rpartition(":")
    made = Wire((host, int(port)))
    yield made
    made.close()


def test_bytes_grow_with_values_not_with_tasks(wire: Wire) -> None:
    """Arrays, texts, results of tasks that ran here: each goes once, wherever in the arguments it is."""
    array, text = numpy.arange(MB // 8), "x" * MB

    @feste.task(executor="inline")
    def listed(count: int) -> list[int]:
        return list(range(count))

    @feste.task
    def total(number: int, given: Any, numbers: list[int]) -> int:
        return number + int(given["a"].sum()) + len(given["t"][0]) + len(numbers)

    def sent(client: Any, tasks: int) -> int:
        before, numbers = wire.sent, listed(300_000)
        nodes = [total(i, {"a": array, "t": (text,)}, numbers) for i in range(tasks)]
        (values,) = feste.compute(nodes, scheduler=client)
        base = int(array.sum()) + MB + 300_000
        assert values == [base + i for i in range(tasks)]
        return wire.sent - before

    with distributed.Client(wire.address, set_as_default=False) as client:
        few, many = sent(client, 3), sent(client, 30)
    assert 2 * MB < few < 4 * MB
    assert many - few < MB / 2


def test_values_are_released_and_may_change_between_runs(
    client: Any, until: Callable[..., bool]
) -> None:
    """A run sends values as they are when it begins, and holds none of them when it has ended."""
    array = numpy.ones(MB // 8)
    total = feste.task(lambda array, number: float(array.sum()) + number)
    nodes = [total(array, i) for i in range(4)]
    first = feste.compute(nodes, scheduler=client)[0]
    array += 1
    second = feste.compute(nodes, scheduler=client)[0]
    assert [b - a for a, b in zip(first, second, strict=True)] == [len(array)] * 4
    assert until(lambda: not [key for key in client.futures if str(key).startswith("value-")])


def test_values_are_made_again_where_a_worker_dies(client: Any, tmp_path: Path) -> None:
    """A value whose workers have died is there again, which Dask does not do for scattered data."""
    array = numpy.ones(MB // 8)

    @feste.task
    def fragile(array: Any, number: int) -> float:
        mark = tmp_path / str(distributed.get_worker().name)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float(array.sum()) + number

    (values,) = feste.compute([fragile(array, i) for i in range(6)], scheduler=client)
    assert values == [len(array) + i for i in range(6)]
    assert len(list(tmp_path.iterdir())) == 2


def test_dask_gives_no_advice_on_sizes(client: Any) -> None:
    """What is large is sent without a warning of Dask's, which names no fix that Feste's users have."""
    array = numpy.ones(12 * MB // 8)
    parts = [bytes([i]) * 200_000 for i in range(60)]
    size = feste.task(lambda value: sum(map(len, value)) if type(value) is list else len(value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert feste.compute(size(array), size(parts), scheduler=client) == (len(array), 12 * MB)


class Bulky:
    """Says that it is large, and is built on workers by a function."""

    def __init__(self, build: Callable[[], Any] | None) -> None:
        self.build = build
        self.lock = threading.Lock()

    def __sizeof__(self) -> int:
        return MB

    def __reduce__(self) -> Any:
        return (self.build, ()) if self.build is not None else object.__reduce__(self)


def test_what_cannot_be_sent_or_read_is_told(client: Any) -> None:
    """A large value that does not pickle, or does not unpickle on workers, fails the tasks with it."""

    def broken() -> None:
        raise KeyError("not here")

    @feste.task
    def take(value: Any, more: Any) -> int:
        return len(more)

    more = b"x" * MB
    nodes = take(Bulky(None), more), take(Bulky(broken), more), take(1, more)
    unsent, unread, fine = feste.compute(*nodes, scheduler=client, on_error="return")
    assert isinstance(unsent, ConfigError)
    assert "take" in str(unsent)
    assert isinstance(unread, NodeError)
    assert "large argument" in str(unread)
    assert "not here" in str(unread)
    assert fine == MB
