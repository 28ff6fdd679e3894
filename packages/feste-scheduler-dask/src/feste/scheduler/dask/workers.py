"""Run tasks on the workers of a cluster: send them, watch them, and report their outcomes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from distributed.scheduler import KilledWorker

from feste.backend import Backend, Call
from feste.errors import ConfigError, FesteError, WorkerLost
from feste.node import topological
from feste.scheduler import Emission, PyTask, Reporter, context_of, describe
from feste.scheduler.dask.inputs import Inputs
from feste.scheduler.dask.link import Link
from feste.scheduler.dask.pickling import was_here
from feste.scheduler.dask.refs import Fetcher, Promises, Ref, lost
from feste.scheduler.dask.remote import Emitted, Held, packed, work

__all__ = ["Workers"]

#: Seconds between two checks of the cluster's size.
_REFRESH = 1.0

Chunk = list[PyTask]
End = Callable[[bool, Any], None]


class Workers:
    """The workers, with a thread that talks to them, because pickling and Dask may be slow.

    :param link: the connection.
    :param report: receives the reports.
    """

    def __init__(self, link: Link, report: Reporter) -> None:
        self._link = link
        self._client = link.client
        self._report = report
        #: The number of threads of all workers.
        self.size = link.threads()
        self._looked = monotonic()
        self._promises = Promises()
        self.fetcher = Fetcher(self._client, self._promises)
        self.inputs = Inputs(self._client, self._promises, self.fetcher, report)
        self._backends: WeakKeyDictionary[Any, dict[Hashable, Backend]] = WeakKeyDictionary()
        self._futures: dict[int, Any] = {}
        self._queue: SimpleQueue[Chunk | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="feste-dask", daemon=True)
        self._thread.start()

    def run(self, chunk: Chunk) -> None:
        """Run a task.

        :param chunk: a list that holds the task.
        """
        if not self._link.closed:
            self._queue.put(chunk)
        elif chunk:
            self._end(chunk, perf_counter(), False, lost(None))

    def abandon(self, chunk: Chunk) -> None:
        """Cancel a task.

        :param chunk: any list of tasks; one that does not run here is ignored.
        """
        future = self._futures.pop(id(chunk), None)
        if future is not None:
            self.fetcher.on_loop(self._client.cancel([future], asynchronous=True))

    def close(self) -> None:
        """Give up work under way, and close the link."""
        self._queue.put(None)
        self._thread.join(timeout=1.0)
        self._link.close()
        self._promises.give_up(lost(None))
        with suppress(Empty):
            while True:
                self.run(self._queue.get_nowait() or [])

    def _serve(self) -> None:
        while True:
            try:
                chunk = self._queue.get(timeout=_REFRESH)
            except Empty:
                chunk = []
            if chunk is None:
                return
            if chunk or self._promises:
                self._look()
            if chunk:
                self._send(chunk)
            chunk = None  # so that an idle thread keeps no values alive

    def _look(self) -> None:
        """Update the size of the cluster; give up waiting tasks if the cluster is gone."""
        if self._link.closed:
            self._promises.give_up(lost(None))
        elif monotonic() - self._looked > _REFRESH:
            self._looked = monotonic()
            try:
                size = self._link.threads()
            except Exception:  # it is closing; the next check notices that
                return
            if size != self.size:
                self.size = size
                self._report.capacity("worker")

    def _send(self, chunk: Chunk) -> None:
        (task,) = chunk
        end = partial(self._end, chunk, perf_counter())
        number = self._promises.make(lambda error: end(False, error))
        refused: FesteError = lost(None)
        try:
            # in the user's context, so that dask.annotate() and similar apply
            future = context_of(task).run(self._submit, task)
            self._futures[id(chunk)] = future
            if self.fetcher.on_loop(self._watch(chunk, future, number, end)):
                return
        except Exception as error:  # pickling users' objects failed, or Dask refused
            refused = describe(error)
        if self._promises.keep(number):
            end(False, refused)

    def _submit(self, task: PyTask) -> Any:
        node = task.node
        holes = [i for i, value in enumerate(task.values) if type(value) is Ref]
        values = [None if type(value) is Ref else value for value in task.values]
        try:
            data = packed(node.op, task.args, task.kwargs, values, holes)
        except Exception as error:  # users' objects may raise anything
            raise ConfigError(
                f"{node.op.name} runs on a Dask worker, but it or an argument cannot be sent there: "
                f"{type(error).__name__}: {error}. Give it plain data, or keep the task here with "
                "executor='inline'",
                origin=node.where,
            ) from None
        futures = [task.values[i].future for i in holes]
        key = f"{node.op.name}-{uuid4().hex}"
        return self._client.submit(work, data, *futures, key=key, pure=False)

    async def _watch(self, chunk: Chunk, future: Any, number: int, end: End) -> None:
        """Report the end of a task on its worker."""
        (task,) = chunk
        error: BaseException | None = await future.exception(asynchronous=True)
        if isinstance(error, KilledWorker):
            error = await self.fetcher.run_alone(future, lambda: id(chunk) in self._futures)
        if not self._promises.keep(number):
            return
        ref = Ref(future)
        if future.status != "finished":
            end(False, _lost(task, error))
        elif future.type is Held:
            end(True, ref)
        else:  # nodes or an error: small, and needed here
            self.fetcher.bring([ref], lambda: self._sort(task, ref, end))

    def _sort(self, task: PyTask, ref: Ref, end: End) -> None:
        if type(ref.outcome) is not Emitted:  # a value whose class Dask did not report
            end(ref.ok, ref if ref.ok else ref.value)
            return
        try:
            self._adopt(task.run, ref.value)
        except Exception as error:  # a backend whose configuration cannot be read
            end(False, describe(error))
        else:
            end(True, ref.value)

    def _end(self, chunk: Chunk, begun: float, ok: bool, value: Any) -> None:
        self._futures.pop(id(chunk), None)
        self._report.done(chunk[0], ok, value, perf_counter() - begun)
        self._report.free("worker", chunk)

    def _adopt(self, run: Any, emission: Emission) -> None:
        """Replace backends that were made on workers by equal ones of the run, if there are any."""
        here = self._backends.get(run)
        if here is None:
            here = self._backends[run] = {c.token: c for c in run.clients()}
        for node in topological(emission.nodes):
            op = node.op
            if isinstance(op, Call) and not was_here(op.client):
                client = here.setdefault(op.client.token, op.client)
                node.op = op if client is op.client else op.operation.__get__(client, type(client))


def _lost(task: PyTask, error: BaseException | None) -> FesteError:
    if isinstance(error, KilledWorker):
        return WorkerLost(
            f"the Dask workers that ran {task.name} died, {error.allowed_failures + 1} in a row; it "
            "may need more memory than there is",
            billed="no",
        )
    if isinstance(error, ImportError):
        return ConfigError(
            f"the Dask workers cannot run tasks of Feste: {type(error).__name__}: {error}. Install "
            "feste-scheduler-dask there, in the version of the client"
        )
    return lost(error)
