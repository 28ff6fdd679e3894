"""Tasks on the workers of a cluster: sent, watched until they end, their outcomes sorted."""

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
from feste.scheduler.dask.link import Link
from feste.scheduler.dask.pickling import was_here
from feste.scheduler.dask.refs import Fetcher, Promises, Ref, lost
from feste.scheduler.dask.remote import Emitted, Held, packed, work

__all__ = ["Workers"]

#: Seconds between two looks at the size of the cluster.
_REFRESH = 1.0

Chunk = list[PyTask]
End = Callable[[bool, Any], None]


class Workers:
    """The workers, and the thread that talks to them: pickling and Dask may take their time.

    :param link: the connection.
    :param report: whom to tell what happened.
    """

    def __init__(self, link: Link, report: Reporter) -> None:
        self._link = link
        self._client = link.client
        self._report = report
        #: How many threads there are.
        self.size = link.threads()
        self._looked = monotonic()
        self._promises = Promises()
        self.fetcher = Fetcher(self._client, self._promises)
        self._backends: WeakKeyDictionary[Any, dict[Hashable, Backend]] = WeakKeyDictionary()
        self._futures: dict[int, Any] = {}
        self._queue: SimpleQueue[Chunk | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="feste-dask", daemon=True)
        self._thread.start()

    def run(self, chunk: Chunk) -> None:
        """Run a task.

        :param chunk: a list with the task.
        """
        if not self._link.closed:
            self._queue.put(chunk)
        elif chunk:
            self._end(chunk, perf_counter(), False, lost(None))

    def abandon(self, chunk: Chunk) -> None:
        """Let Dask forget a task.

        :param chunk: any list of tasks; one that is not here is not heeded.
        """
        future = self._futures.pop(id(chunk), None)
        if future is not None:
            self.fetcher.on_loop(self._client.cancel([future], asynchronous=True))

    def close(self) -> None:
        """Give up what is under way, and close the link."""
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
            chunk = None  # an idle thread keeps nobody's values alive

    def _look(self) -> None:
        """See how large the cluster is; give up what waits if it is gone."""
        if self._link.closed:
            self._promises.give_up(lost(None))
        elif monotonic() - self._looked > _REFRESH:
            self._looked = monotonic()
            try:
                size = self._link.threads()
            except Exception:  # closing just now: the next look will see it
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
            # in the user's context, for dask.annotate() and the like
            future = context_of(task).run(self._submit, task)
            self._futures[id(chunk)] = future
            if self.fetcher.on_loop(self._watch(chunk, future, number, end)):
                return
        except Exception as error:  # the objects of others do not pickle, or Dask refuses
            refused = describe(error)
        if self._promises.keep(number):
            end(False, refused)

    def _submit(self, task: PyTask) -> Any:
        node = task.node
        holes = [i for i, value in enumerate(task.values) if type(value) is Ref]
        values = [None if type(value) is Ref else value for value in task.values]
        try:
            data = packed(node.op, task.args, task.kwargs, values, holes)
        except Exception as error:  # anything can go wrong in the objects of others
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
        """Report when a task has ended on its worker."""
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
        if type(ref.outcome) is not Emitted:  # a value, where Dask did not tell its class
            end(ref.ok, ref if ref.ok else ref.value)
            return
        try:
            self._adopt(task.run, ref.value)
        except Exception as error:  # a client that cannot tell its configuration
            end(False, describe(error))
        else:
            end(True, ref.value)

    def _end(self, chunk: Chunk, begun: float, ok: bool, value: Any) -> None:
        self._futures.pop(id(chunk), None)
        self._report.done(chunk[0], ok, value, perf_counter() - begun)
        self._report.free("worker", chunk)

    def _adopt(self, run: Any, emission: Emission) -> None:
        """Give emitted calls of clients that were made on workers equal ones, if the run has them."""
        here = self._backends.get(run)
        if here is None:
            here = self._backends[run] = {c.token: c for c in run.clients()}
        for node in topological(emission.nodes):
            op = node.op
            if isinstance(op, Call) and not was_here(op.client):
                client = here.setdefault(op.client.token, op.client)
                node.op = op if client is op.client else getattr(client, op.name)


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
