"""The hands of a Dask cluster: workers run users' Python, the rest stays in the client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Any, NoReturn
from uuid import uuid4
from weakref import WeakSet, WeakValueDictionary

import distributed

from feste.backend import Backend, Call, Request
from feste.errors import ConfigError, FesteError, WorkerLost
from feste.node import topological
from feste.scheduler.growth import Emission
from feste.scheduler.dask.link import Link, check_target
from feste.scheduler.dask.refs import Fetcher, Promises, Ref, lost
from feste.scheduler.dask.remote import Emitted, Held, packed, work
from feste.scheduler.executor import Post, PyTask
from feste.scheduler.local import LocalExecutor
from feste.scheduler.run import Run
from feste.scheduler.work import describe

__all__ = ["DaskExecutor"]

#: Tasks under way for each thread of the cluster: one runs, one waits beside it.
_WINDOW = 2
#: Seconds between two looks at the size of the cluster.
_REFRESH = 1.0

Chunk = list[PyTask]


class DaskExecutor(LocalExecutor):
    """Runs ``@feste.task`` functions on the workers of a Dask cluster.

    Their results stay there and go from worker to worker; what feeds a prompt, a request or an
    ``executor="inline"`` task is brought here first. Operators on values that are here run here.

    :param target: a ``distributed.Client`` or cluster, an address, or ``"dask"``: the current
        client, else a cluster of its own on this machine.
    :raises ConfigError: for an address on the network without TLS.
    """

    remote = True

    def __init__(self, target: Any = None) -> None:
        super().__init__(target)
        check_target(target)

    def start(self, post: Post) -> None:
        """Connect, before anything is paid for.

        :param post: where to report.
        :raises ConfigError: if there is no cluster, or the client is closed.
        """
        self._link = Link(self.target)
        self._client = self._link.client
        self._size = self._link.threads()
        self._looked = monotonic()
        self._report = post
        self._moved: dict[int, str] = {}
        self._running: dict[int, distributed.Future[Any]] = {}
        self._promises = Promises()
        self._fetcher = Fetcher(self._client, self._promises)
        self._backends: WeakValueDictionary[Hashable, Backend] = WeakValueDictionary()
        self._known: WeakSet[Run] = WeakSet()
        self._queue: SimpleQueue[Chunk | None] = SimpleQueue()
        super().start(self._tell)
        self._thread = threading.Thread(target=self._serve, name="feste-dask", daemon=True)
        self._thread.start()

    def _tell(self, report: tuple[Any, ...]) -> None:
        """Post a report; a chunk that ran elsewhere than it was meant to is free where it counts."""
        if report[0] == "free":
            report = ("free", self._moved.pop(id(report[2]), report[1]), report[2])
        self._report(report)

    @property
    def stale(self) -> bool:
        """Whether the client is closed, or another one is the current one now."""
        return self._link.stale

    def place(self, task: Any) -> str:
        """Return ``"worker"`` for users' tasks, sync and async.

        :param task: the op.
        """
        if task.kind == "task" and task.executor != "inline":
            return "worker"
        return super().place(task)

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once; on workers more than they have threads.

        :param where: what :meth:`place` said, or ``"thread"``.
        """
        if where == "worker":
            return _WINDOW * max(1, self._size)
        return super().capacity(where)

    def call(self, where: str, chunk: Chunk) -> None:
        """Run tasks; those that stay here wait for the results that they need from workers.

        :param where: as for :meth:`capacity`.
        :param chunk: the tasks; on workers it is one.
        """
        refs = list(_refs(chunk))
        if where == "worker" and (refs or not _is_operator(chunk[0])):
            self._queue.put(chunk)
        elif refs:
            self._fetcher.bring(refs, lambda: self._call_here(where, chunk))
        elif where == "worker":
            self._call_here(where, chunk)
        else:
            super().call(where, chunk)

    def _call_here(self, where: str, chunk: Chunk) -> None:
        """Run tasks in this process, with what they need in place; on any thread."""
        for task in chunk:
            for values in _values(task):
                for position, value in enumerate(values):
                    if type(value) is Ref:
                        values[position] = value.value
                        if not value.ok:
                            task.fn, task.args, task.kwargs = _raise, (value.value,), {}
        if where in ("worker", "inline"):
            self._moved[id(chunk)] = where
            where = "thread"
        super().call(where, chunk)

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Bring results here.

        :param handle: the brain's number for it.
        :param refs: results that were posted; those that are here already too.
        """

        def then() -> None:
            values = [r.value if type(r) is Ref else r for r in refs]
            self._report(("fetched", handle, values))

        self._fetcher.bring([r for r in refs if type(r) is Ref], then)

    def send(self, handle: int, call: Call[Any], request: Request) -> None:
        """Send a request from here, and remember its client for calls that workers emit.

        :param handle: the brain's number for it.
        :param call: the operation to send it with.
        :param request: the request.
        """
        self._backends.setdefault(call.client.token, call.client)
        super().send(handle, call, request)

    def abandon(self, chunk: Chunk) -> None:
        """Let Dask forget a task that has not begun; one that runs on a worker runs to its end.

        :param chunk: the list that was given to :meth:`call`.
        """
        super().abandon(chunk)
        future = self._running.get(id(chunk))
        if future is not None:
            self._fetcher.on_loop(self._client.cancel([future], asynchronous=True))

    def release(self, ref: Any) -> None:
        """Do nothing: another run may share the result, and Dask lets it go with the last Ref.

        :param ref: a result that was posted.
        """

    def close(self) -> None:
        """Stop all of it, and what was started or connected here."""
        self._queue.put(None)
        self._thread.join(timeout=5)
        self._link.close()
        self._promises.give_up(lost(None))
        super().close()

    # --- towards the cluster, on a thread of its own: pickling and Dask may take their time ---------

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
                self._submit(chunk)

    def _look(self) -> None:
        """See how large the cluster is; give up what waits if it is gone."""
        if self._link.closed:
            self._promises.give_up(
                WorkerLost("the distributed.Client was closed during the run", billed="no")
            )
        elif monotonic() - self._looked > _REFRESH:
            self._looked = monotonic()
            try:
                size = self._link.threads()
            except Exception:  # closing just now: the next look will see it
                return
            if size != self._size:
                self._size = size
                self._report(("capacity", "worker"))

    def _submit(self, chunk: Chunk) -> None:
        (task,) = chunk
        begun = perf_counter()
        end = partial(self._end, chunk, begun)
        number = self._promises.make(lambda error: end(False, error))
        try:
            # in the user's context, for dask.annotate() and the like
            future = task.run.context.copy().run(self._send_task, task)
            self._running[id(chunk)] = future
            there = self._fetcher.on_loop(self._watch(task, future, number, end))
        except Exception as error:  # the objects of others do not pickle, or Dask refuses
            there, refused = False, describe(error)
        else:
            refused = lost(None)
        if not there and self._promises.keep(number):
            end(False, refused)

    def _send_task(self, task: PyTask) -> distributed.Future[Any]:
        node = task.run.program.nodes[task.index]
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
        return self._client.submit(
            work,
            data,
            *[task.values[i].future for i in holes],
            key=f"{node.op.name}-{uuid4().hex}",
            pure=False,
        )

    async def _watch(
        self,
        task: PyTask,
        future: distributed.Future[Any],
        number: int,
        end: Callable[[bool, Any], None],
    ) -> None:
        """Report when a task has ended on its worker."""
        error = await future.exception(asynchronous=True)
        if not self._promises.keep(number):
            return
        ref = Ref(future)
        if future.status != "finished":
            end(False, _lost(task, error))
        elif future.type is Held:
            end(True, ref)
        else:  # nodes or an error: small, and needed here
            self._fetcher.bring([ref], lambda: self._look_at(task, ref, end))

    def _look_at(self, task: PyTask, ref: Ref, end: Callable[[bool, Any], None]) -> None:
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
        self._running.pop(id(chunk), None)
        self._report(("done", chunk[0], ok, value, perf_counter() - begun))
        self._report(("free", "worker", chunk))

    def _adopt(self, run: Run, emission: Emission) -> None:
        """Give emitted calls the clients that are here already, with their connections."""
        if run not in self._known:
            self._known.add(run)
            for op in [n.op for n in run.program.nodes]:
                if isinstance(op, Call):
                    self._backends.setdefault(op.client.token, op.client)
        for node in topological(emission.nodes):
            op = node.op
            if isinstance(op, Call):
                client = self._backends.setdefault(op.client.token, op.client)
                node.op = op if client is op.client else getattr(client, op.name)


def _values(task: PyTask) -> Iterator[list[Any]]:
    """Where the results that a task needs may be: also among the arguments of a call's halves."""
    yield task.values
    if task.stage != "run":
        yield from (a for a in task.args if type(a) is list)


def _refs(chunk: Chunk) -> Iterator[Ref]:
    for task in chunk:
        for values in _values(task):
            yield from (value for value in values if type(value) is Ref)


def _is_operator(task: PyTask) -> bool:
    return task.run.program.nodes[task.index].op.identity.startswith("operator.")


def _raise(error: FesteError) -> NoReturn:
    raise error


def _lost(task: PyTask, error: BaseException | None) -> FesteError:
    if isinstance(error, distributed.scheduler.KilledWorker):
        return WorkerLost(
            f"the Dask workers that ran {task.name} died, the last of {error.allowed_failures + 1}; "
            "it may need more memory than there is",
            billed="no",
        )
    if isinstance(error, ImportError):
        return ConfigError(
            f"the Dask workers cannot run tasks of Feste: {type(error).__name__}: {error}. Install "
            "feste-scheduler-dask there, in the version of the client"
        )
    return lost(error)
