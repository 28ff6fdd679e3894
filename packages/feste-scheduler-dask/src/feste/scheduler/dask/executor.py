"""The executor for a Dask cluster: workers run users' Python, and send requests if they shall."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from feste.backend import Backend, Call, OnChunk, Request
from feste.errors import FesteError
from feste.scheduler import COLLECTION, LocalExecutor, PyTask, Reporter
from feste.scheduler.dask.cluster.link import Link, check_target
from feste.scheduler.dask.preparing import Prepare, check_workers, prepared
from feste.scheduler.dask.requests.pumps import Pumps
from feste.scheduler.dask.tasks.inputs import INPUT
from feste.scheduler.dask.tasks.parts import PartReporter, lists_of, refs_of, split
from feste.scheduler.dask.tasks.refs import Ref
from feste.scheduler.dask.tasks.workers import Workers

__all__ = ["DaskExecutor"]

#: Seconds of expected work that may share a task of Dask, which costs 1 to 3 ms of the scheduler.
_CHUNK = 0.02

Chunk = list[PyTask]


class DaskExecutor(LocalExecutor):
    """Runs ``@feste.task`` functions on the workers of a Dask cluster, and requests if they shall.

    Results stay on the workers and move between them. Results that a prompt, a request or an
    ``executor="inline"`` task needs are fetched first. Operators on local values run locally.

    :param target: a ``distributed.Client`` or cluster, an address, or ``"dask"``: the current
        client, or else a new cluster on this machine.
    :param requests_on: where requests leave from: ``"client"`` or ``"workers"``.
    :param worker_window: the most requests under way on one worker.
    :param prepare_worker: is called on each worker before all else: a function, or ``"module:name"``.
    :param allow_insecure: allow a cluster on the network without TLS.
    :raises ConfigError: for a network address without TLS.
    """

    remote = True
    options: ClassVar[tuple[str, ...]] = (
        "requests_on",
        "worker_window",
        "prepare_worker",
        "allow_insecure",
    )

    def __init__(
        self,
        target: Any = None,
        *,
        requests_on: str = "client",
        worker_window: int = 32,
        prepare_worker: Prepare | None = None,
        allow_insecure: bool = False,
    ) -> None:
        super().__init__(target)
        check_target(target, allow_insecure)
        self._on_workers = requests_on == "workers"
        self._window = worker_window
        self._prepare = prepare_worker
        self._allow_insecure = allow_insecure
        self._pumps: Pumps | None = None

    def start(self, report: Reporter) -> None:
        """Connect, before anything is paid for.

        :param report: receives all reports.
        :raises ConfigError: if there is no cluster, or the client is closed.
        :raises FesteError: if a worker cannot be prepared.
        """
        self._link = Link(self.target, self._allow_insecure)
        try:
            check_workers(self._link.client)
            preparation = prepared(self._link.client, self._prepare)
            if self._on_workers:
                self._pumps = Pumps(self._link, report, self._window, preparation)
                self._pumps.start()
        except BaseException:
            if self._pumps is not None:
                self._pumps.close()
            self._link.close()
            raise
        self._parts = PartReporter(report)
        self._workers = Workers(self._link, self._parts, preparation)
        self._needs: dict[str, Mapping[str, float]] = {"worker": {}}
        super().start(self._parts)

    @property
    def stale(self) -> bool:
        """Whether the client is closed, or is no longer the current one."""
        return self._link.stale

    def place(self, task: Any) -> str:
        """Return ``"worker"`` for users' tasks, sync and async; with resources, their place.

        So tasks that wait for resources do not fill the window of the others. Tasks with
        ``once=True`` run in the client, where the store is.

        :param task: the op.
        """
        if task is COLLECTION:
            return INPUT
        if task.kind == "task" and task.executor != "inline" and not task.once:
            if not task.resources:
                return "worker"
            where = f"worker with {sorted(task.resources.items())}"
            self._needs[where] = task.resources
            return where
        return super().place(task)

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once; for workers, more than their threads.

        :param where: the result of :meth:`place`, or ``"thread"``.
        """
        if where == INPUT:
            return sys.maxsize
        needs = self._needs.get(where)
        return super().capacity(where) if needs is None else self._workers.capacity(needs)

    def chunk_seconds(self, where: str) -> float:
        """Return how many seconds of expected work may share a chunk.

        :param where: as for :meth:`capacity`.
        """
        return _CHUNK if where in self._needs else super().chunk_seconds(where)

    def compute_collections(self, inputs: Sequence[Any]) -> list[Any]:
        """Start the computation of inputs on the cluster, in one call; values stay there.

        :param inputs: Dask collections, and futures, of which those of this cluster are not moved.
        """
        return self._workers.inputs.start(inputs)

    def call(self, where: str, chunk: Chunk) -> None:
        """Run tasks; local tasks wait until the results that they need are fetched.

        :param where: as for :meth:`capacity`.
        :param chunk: the tasks.
        """
        if where in self._needs:
            self._call_there(where, chunk)
        elif where == INPUT and self._workers.inputs.is_foreign(chunk[0].args[0]):
            self._call_here(where, chunk)
        elif where == INPUT:
            self._workers.inputs.run(chunk)
        elif refs := refs_of(chunk):
            self._workers.fetcher.bring(refs, lambda: self._call_here(where, chunk))
        else:
            super().call(where, chunk)

    def _call_there(self, where: str, chunk: Chunk) -> None:
        here, there, returned = split(chunk, self._workers.known.size)
        self._parts.split(where, chunk, [here, *there] if here else there)
        if returned:
            self._parts.returned(returned)
        if here:
            super().call("thread", here)
        for part in there:
            self._workers.run(where, part)

    def _call_here(self, where: str, chunk: Chunk) -> None:
        """Run tasks in this process with the fetched values; may be called from any thread."""
        for task in chunk:
            for values in lists_of(task):
                for position, value in enumerate(values):
                    if type(value) is Ref:
                        values[position] = value.value
                        if not value.ok:
                            task.fn, task.args, task.kwargs = _raise, (value.value,), {}
        if where in ("inline", INPUT):  # the brain would wait for it
            self._parts.split(where, chunk, [chunk])
            where = "thread"
        super().call(where, chunk)

    def preflight(self, clients: Sequence[Backend]) -> None:
        """Raise what would keep requests from being sent; keys are looked up where they are used.

        :param clients: the backends that the run may use.
        :raises ConfigError: if a key is missing, or literal though its requests leave from workers.
        """
        if self._pumps is not None:
            self._pumps.check(clients)
        else:
            super().preflight(clients)

    @property
    def window(self) -> int | None:
        """How many requests the workers take at once; None where they leave from here."""
        return self._pumps.window if self._pumps is not None else None

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request, from here or from a worker.

        :param handle: the brain's number for the request.
        :param call: the operation that sends it.
        :param request: the request.
        :param on_chunk: receives pieces of the response's text, or None.
        """
        if self._pumps is not None:
            self._pumps.send(handle, call, request, on_chunk)
        else:
            super().send(handle, call, request, on_chunk)

    def cancel(self, handle: int) -> None:
        """Stop waiting for a request.

        :param handle: the brain's number for the request.
        """
        if self._pumps is not None:
            self._pumps.cancel(handle)
        else:
            super().cancel(handle)

    def abandon(self, chunk: Chunk) -> None:
        """Cancel what has not started; a task that runs on a worker runs to its end.

        :param chunk: the list given to :meth:`call`.
        """
        for part in self._parts.parts(chunk):
            super().abandon(part)
            self._workers.abandon(part)
            self._workers.inputs.abandon(part)

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Fetch results into this process.

        :param handle: the brain's number for the fetch.
        :param refs: results that were reported earlier; some may be local already.
        """

        def then() -> None:
            values = [r.value if type(r) is Ref else r for r in refs]
            self._report.fetched(handle, values)

        self._workers.fetcher.bring([r for r in refs if type(r) is Ref], then)

    def release(self, ref: Any) -> None:
        """Do nothing: another run may share the result; Dask releases it with the last Ref.

        :param ref: a result that was reported earlier.
        """

    def close(self) -> None:
        """Stop all work, and close everything that was started or connected here."""
        if self._pumps is not None:
            self._pumps.close()
        self._workers.close()
        super().close()


def _raise(error: FesteError) -> NoReturn:
    raise error
