"""A process pool for ``@feste.task(executor="process")``.

Workers are fresh interpreters that do not import the user's main script. Work is sent by value
(cloudpickle) over a private socket pair. A worker that dies is replaced and its task is started
once more; if that worker dies too, the task fails with :class:`~feste.errors.WorkerLost`.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from queue import SimpleQueue
from time import monotonic, perf_counter
from types import FunctionType
from typing import Any

from feste.delayed import Task, importable
from feste.errors import ConfigError, FesteError, Interrupted, NodeError, WorkerLost
from feste.fused import tasks_of
from feste.node import Node
from feste.scheduler.executor import PyTask, Reporter
from feste.scheduler.hands.messages import Parts, dumped, loaded, receive, send
from feste.scheduler.work import describe, evaluate, result_of

__all__ = ["ProcessPool", "check_picklable"]

_TRIES = 2
#: Seconds between two checks whether a worker is alive.
_LOOK = 0.5
#: Seconds that a worker gets to end by itself.
_PATIENCE = 1.0


class ProcessPool:
    """Worker processes, started on demand, each with a thread that talks to it.

    :param size: the maximum number of workers.
    :param report: receives the reports.
    """

    def __init__(self, size: int, report: Reporter) -> None:
        self.size = size
        self._report = report
        self._queue: SimpleQueue[list[PyTask] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._at: dict[int, _Worker | None] = {}  # by the chunk's id, from run() until it is free
        self._given_up: set[int] = set()
        self._lock = threading.Lock()

    def run(self, chunk: list[PyTask]) -> None:
        """Run one task in a worker.

        :param chunk: a list that holds the task.
        """
        with self._lock:
            self._at[id(chunk)] = None
            if len(self._at) > len(self._threads) and len(self._threads) < self.size:
                name = f"feste-process-{len(self._threads)}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put(chunk)

    def _serve(self) -> None:
        worker: _Worker | None = None
        while (chunk := self._queue.get()) is not None:
            for task in chunk:
                begun = perf_counter()
                try:
                    worker, ok, value = self._ask(worker, chunk, task)
                except Exception as error:  # no process could be started
                    worker, ok, value = None, False, describe(error)
                self._report.done(task, ok, value, perf_counter() - begun)
            with self._lock:
                del self._at[id(chunk)]
                self._given_up.discard(id(chunk))
            self._report.free("process", chunk)
            del chunk, task, value  # so that an idle thread keeps no values alive
        if worker is not None:
            worker.close()

    def _ask(
        self, worker: _Worker | None, chunk: list[PyTask], task: PyTask
    ) -> tuple[_Worker | None, bool, Any]:
        """Run a task in a worker; return the worker to use next, success, and the value."""
        node = task.node
        try:
            work = _pickled(node, (node.op, task.args, task.kwargs, task.values))
        except ConfigError as error:
            return worker, False, error
        code = None
        for _ in range(_TRIES):
            if worker is not None and worker.is_gone():  # it died while idle
                worker.close()
                worker = None
            worker = worker or _Worker()
            with self._lock:
                stopped = id(chunk) in self._given_up
                self._at[id(chunk)] = None if stopped else worker
            if stopped:
                return worker, False, Interrupted("the run was stopped", origin=node.where)
            try:
                answer = worker.ask(work)
            except (EOFError, OSError):  # it died
                code = worker.close()
                worker = None
            else:
                return worker, *_read(answer)
            finally:
                with self._lock:
                    self._at[id(chunk)] = None
        lost = WorkerLost(
            f"the process that ran {node.op.name} died {_TRIES} times (exit code {code}); it may "
            "need more memory than there is",
            origin=node.where,
            billed="no",
        )
        return worker, False, lost

    def abandon(self, chunk: list[PyTask]) -> None:
        """Kill the worker that runs a chunk.

        :param chunk: any list of tasks; one that does not run here is ignored.
        """
        self._abandon(id(chunk))

    def _abandon(self, name: int) -> None:
        with self._lock:
            if name in self._at:
                self._given_up.add(name)
                worker = self._at[name]
                if worker is not None:
                    worker.process.kill()

    def close(self) -> None:
        """End the workers and give up their tasks."""
        for _ in self._threads:
            self._queue.put(None)
        for name in list(self._at):
            self._abandon(name)
        deadline = monotonic() + 2 * _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))


class _Worker:
    """One worker process and the socket to it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(_LOOK)
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with theirs:
            fd = theirs.fileno()
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "feste.scheduler.hands.worker", str(fd)],
                    pass_fds=[fd],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": path},
                )
            except BaseException:
                self.socket.close()
                raise
        _workers.add(self)

    def is_gone(self) -> bool:
        """Whether it died while idle: then its socket is readable, though it sends nothing."""
        readable = select.poll()
        readable.register(self.socket, select.POLLIN)
        return bool(readable.poll(0)) or self.process.poll() is not None

    def ask(self, work: Parts) -> list[bytearray]:
        """Send work and return the answer.

        :param work: the work.
        :raises OSError: if the worker dies; EOFError likewise.
        """
        send(self.socket, work, self._check)
        return receive(self.socket, self._check)

    def _check(self) -> None:
        if self.process.poll() is not None:  # a child of the worker may keep its end open
            raise EOFError

    def close(self) -> int:
        """End the worker and return its exit code."""
        with suppress(OSError):
            send(self.socket, [])  # needed if a forked child keeps our end open
        self.socket.close()
        try:
            return self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


def _forget() -> None:
    """Close our socket ends in a forked child: a worker ends only when all of them are closed."""
    for worker in list(_workers):
        worker.socket.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _read(answer: list[bytearray]) -> tuple[bool, Any]:
    try:
        ok, value = loaded(answer)
        return ok, value
    except Exception as error:  # users' objects may fail to unpickle here
        return False, describe(error)


def _pickled(node: Node, work: Any) -> Parts:
    try:
        return dumps(work)
    except Exception as error:  # users' objects may raise anything
        raise ConfigError(
            f"{node.op.name} runs in another process, but an argument cannot be sent there: "
            f"{type(error).__name__}: {error}. Give it plain data, or use executor='thread'",
            origin=node.where,
        ) from None


def dumps(work: Any) -> Parts:
    """Pickle work; tasks, functions and classes of modules that workers cannot import go by value.

    :param work: the object to pickle.
    """
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            home = obj.fn if isinstance(obj, Task) else obj
            if isinstance(home, (FunctionType, type)):
                module = home.__module__
                if module in sys.modules and module != "__main__" and not importable(module):
                    cloudpickle.register_pickle_by_value(sys.modules[module])
                    if isinstance(obj, Task):
                        return obj.by_value()
            return super().reducer_override(obj)

    return dumped(work, Pickler)


def check_picklable(node: Node) -> None:
    """Refuse a process task whose known arguments cannot be pickled, before anything runs.

    :param node: the node.
    :raises ConfigError: if they cannot be pickled.
    """
    if sys.platform == "win32":
        raise ConfigError("executor='process' needs a POSIX system; use executor='thread'")
    for task in tasks_of(node):
        _pickled(task, (task.op, task.args, task.kwargs))


def answer(work: list[bytearray]) -> Parts:
    """Run the work that a worker received, and return the pickled outcome.

    :param work: the pickled work. It must come from the socket of our own parent process only.
    """
    import cloudpickle

    try:
        op, args, kwargs, values = loaded(work)
        work.clear()  # what the task does not keep is free while it runs
        ok, value = True, result_of(evaluate(op.fn, args, kwargs, values))
    except BaseException as error:  # a task may raise anything, even SystemExit
        ok, value = False, describe(error)
    try:
        return dumped((ok, value), cloudpickle.Pickler)
    except Exception as error:  # see _pickled
        told = f"the result cannot be sent back: {type(error).__name__}: {error}"
        kind = type(value if isinstance(value, FesteError) else error).__name__
        told_all = NodeError(told if ok else str(value), cause_type=kind)
        return dumped((False, told_all), cloudpickle.Pickler)
