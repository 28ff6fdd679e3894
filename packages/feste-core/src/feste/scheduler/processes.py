"""A pool of processes for ``@feste.task(executor="process")``.

Workers are fresh interpreters that import Feste and nothing of the user's main script; work travels
to them by value (cloudpickle) over a private socket pair. A worker that dies is replaced, and what it
was at is begun once more; if that one dies too, the task fails with
:class:`~feste.errors.WorkerLost`.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from feste.errors import ConfigError, NodeError, WorkerLost
from feste.node import Node
from feste.scheduler.executor import Post, PyTask
from feste.scheduler.work import describe

__all__ = ["ProcessPool", "check_picklable"]

_TRIES = 2


class ProcessPool:
    """Worker processes, each with the thread that talks to it; made when they are needed.

    :param size: how many there may be.
    :param post: where to report.
    """

    def __init__(self, size: int, post: Post) -> None:
        self.size = size
        self._post = post
        self._queue: SimpleQueue[list[PyTask] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        self._lock = threading.Lock()

    def run(self, chunk: list[PyTask]) -> None:
        """Run one task in a worker.

        :param chunk: a list with the task.
        """
        with self._lock:
            self._busy += 1
            if self._busy > len(self._threads) and len(self._threads) < self.size:
                name = f"feste-process-{len(self._threads)}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put(chunk)

    def _serve(self) -> None:
        worker: _Worker | None = None
        try:
            while (chunk := self._queue.get()) is not None:
                for task in chunk:
                    begun = perf_counter()
                    worker, ok, value = _run_in_worker(worker, task)
                    self._post(("done", task, ok, value, perf_counter() - begun))
                with self._lock:
                    self._busy -= 1
                self._post(("free", "process", chunk))
        finally:
            if worker is not None:
                worker.close()

    def close(self) -> None:
        """End the workers when they have finished what they are at."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=5)


class _Worker:
    """One worker process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "feste.scheduler.worker", str(fd)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self.connection = Connection(ours.detach())

    def ask(self, work: bytes) -> tuple[bool, Any]:
        self.connection.send_bytes(work)
        ok, value = pickle.loads(self.connection.recv_bytes())
        return ok, value

    def close(self) -> None:
        self.connection.close()  # the worker ends when it reads the end of the stream
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _run_in_worker(worker: _Worker | None, task: PyTask) -> tuple[_Worker | None, bool, Any]:
    node = task.run.program.nodes[task.index]
    try:
        work = _pickled(node, (node.op, task.args, task.kwargs, task.values))
    except ConfigError as error:
        return worker, False, error
    code = None
    for _ in range(_TRIES):
        if worker is None:
            worker = _Worker()
        try:
            ok, value = worker.ask(work)
            return worker, ok, value
        except (EOFError, ConnectionError, BrokenPipeError):
            worker.close()
            code = worker.process.returncode
            worker = None
        except Exception as error:  # the answer came but could not be read
            return worker, False, describe(error)
    lost = WorkerLost(
        f"the process that ran {node.op.name} died {_TRIES} times (exit code {code}); it may need "
        "more memory than there is",
        origin=node.where,
        billed="no",
    )
    return worker, False, lost


def _pickled(node: Node, work: Any) -> bytes:
    import cloudpickle

    try:
        pickled: bytes = cloudpickle.dumps(work)
    except Exception as error:  # anything can go wrong in the objects of others
        raise ConfigError(
            f"{node.op.name} runs in another process, but an argument cannot be sent there: "
            f"{type(error).__name__}: {error}. Give it plain data, or use executor='thread'",
            origin=node.where,
        ) from None
    return pickled


def check_picklable(node: Node) -> None:
    """Refuse a process task whose known arguments cannot be sent, before anything runs.

    :param node: the node.
    :raises ConfigError: if they cannot be pickled.
    """
    if sys.platform == "win32":
        raise ConfigError("executor='process' needs a POSIX system; use executor='thread'")
    _pickled(node, (node.op, node.args, node.kwargs))


def reply(run: Callable[[], tuple[bool, Any]]) -> bytes:
    """Return the bytes that a worker answers with; a result that cannot be pickled is an error.

    :param run: does the work.
    """
    import cloudpickle

    ok, value = run()
    try:
        return bytes(cloudpickle.dumps((ok, value)))
    except Exception as error:  # see _pickled
        if ok:
            told = f"the result cannot be sent back: {type(error).__name__}: {error}"
        else:
            told = str(value)
        kind = type(error).__name__
        return pickle.dumps((False, NodeError(told, cause_type=kind)))
