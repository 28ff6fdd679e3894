"""The executor for a Dask cluster: workers run users' Python, the client does all else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from feste.errors import FesteError
from feste.packing import COLLECTION
from feste.scheduler import LocalExecutor, PyTask, Reporter
from feste.scheduler.dask.inputs import INPUT
from feste.scheduler.dask.link import Link, check_target
from feste.scheduler.dask.refs import Ref
from feste.scheduler.dask.workers import Workers

__all__ = ["DaskExecutor"]

#: Tasks in flight for each thread of the cluster: one runs and one waits.
_WINDOW = 2

Chunk = list[PyTask]


class DaskExecutor(LocalExecutor):
    """Runs ``@feste.task`` functions on the workers of a Dask cluster.

    Results stay on the workers and move between them. Results that a prompt, a request or an
    ``executor="inline"`` task needs are fetched first. Operators on local values run locally.

    :param target: a ``distributed.Client`` or cluster, an address, or ``"dask"``: the current
        client, or else a new cluster on this machine.
    :raises ConfigError: for a network address without TLS.
    """

    remote = True

    def __init__(self, target: Any = None) -> None:
        super().__init__(target)
        check_target(target)

    def start(self, report: Reporter) -> None:
        """Connect, before anything is paid for.

        :param report: receives all reports.
        :raises ConfigError: if there is no cluster, or the client is closed.
        """
        self._link = Link(self.target)
        self._workers = Workers(self._link, report)
        self._moved: dict[int, str] = {}
        super().start(_MovedReporter(report, self._moved))

    @property
    def stale(self) -> bool:
        """Whether the client is closed, or is no longer the current one."""
        return self._link.stale

    def place(self, task: Any) -> str:
        """Return ``"worker"`` for users' tasks, sync and async.

        Tasks with ``once=True`` run in the client, where the store is.

        :param task: the op.
        """
        if task is COLLECTION:
            return INPUT
        if task.kind == "task" and task.executor != "inline" and not task.once:
            return "worker"
        return super().place(task)

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once; for workers, more than their threads.

        :param where: the result of :meth:`place`, or ``"thread"``.
        """
        if where == "worker":
            return _WINDOW * max(1, self._workers.size)
        if where == INPUT:
            return sys.maxsize
        return super().capacity(where)

    def compute_collections(self, inputs: Sequence[Any]) -> list[Any]:
        """Start the computation of inputs on the cluster, in one call; values stay there.

        :param inputs: Dask collections, and futures, of which those of this cluster are not moved.
        """
        return self._workers.inputs.start(inputs)

    def call(self, where: str, chunk: Chunk) -> None:
        """Run tasks; local tasks wait until the results that they need are fetched.

        :param where: as for :meth:`capacity`.
        :param chunk: the tasks; a single one on workers.
        """
        refs = list(_refs(chunk))
        if where == INPUT and not self._workers.inputs.is_foreign(chunk[0].args[0]):
            self._workers.inputs.run(chunk)
        elif where == INPUT:
            self._call_here(where, chunk)
        elif where == "worker" and (refs or not chunk[0].is_operator):
            self._workers.run(chunk)
        elif refs:
            self._workers.fetcher.bring(refs, lambda: self._call_here(where, chunk))
        elif where == "worker":
            self._call_here(where, chunk)
        else:
            super().call(where, chunk)

    def _call_here(self, where: str, chunk: Chunk) -> None:
        """Run tasks in this process with the fetched values; may be called from any thread."""
        for task in chunk:
            for values in _values(task):
                for position, value in enumerate(values):
                    if type(value) is Ref:
                        values[position] = value.value
                        if not value.ok:
                            task.fn, task.args, task.kwargs = _raise, (value.value,), {}
        if where in ("worker", "inline", INPUT):
            self._moved[id(chunk)] = where
            where = "thread"
        super().call(where, chunk)

    def abandon(self, chunk: Chunk) -> None:
        """Cancel a task that has not started; one that runs on a worker runs to its end.

        :param chunk: the list given to :meth:`call`.
        """
        super().abandon(chunk)
        self._workers.abandon(chunk)
        self._workers.inputs.abandon(chunk)

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
        self._workers.close()
        super().close()


class _MovedReporter(Reporter):
    """Reports a moved chunk as free at the place where the brain counts it.

    :param report: the reporter to forward to.
    :param moved: the original place of each moved chunk, by its id.
    """

    __slots__ = ("_moved",)

    def __init__(self, report: Reporter, moved: dict[int, str]) -> None:
        super().__init__(report.put, report.executor)
        self._moved = moved

    def free(self, where: str, chunk: Chunk) -> None:
        """Report that a chunk has finished.

        :param where: the place where it ran.
        :param chunk: the chunk.
        """
        super().free(self._moved.pop(id(chunk), where), chunk)


def _values(task: PyTask) -> Iterator[list[Any]]:
    """Yield the lists that may contain Refs: a task's values, and arguments of a call's halves."""
    yield task.values
    if task.stage != "run":
        yield from (a for a in task.args if type(a) is list)


def _refs(chunk: Chunk) -> Iterator[Ref]:
    for task in chunk:
        for values in _values(task):
            yield from (value for value in values if type(value) is Ref)


def _raise(error: FesteError) -> NoReturn:
    raise error
