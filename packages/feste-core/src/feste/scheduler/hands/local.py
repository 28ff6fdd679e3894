"""The executor of this machine: a loop for requests, one for async tasks, threads, processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from feste import blocking
from feste.backend import Call, OnChunk, Request
from feste.scheduler.executor import QUICK, Executor, PyTask, Reporter
from feste.scheduler.hands.loops import LoopThread
from feste.scheduler.hands.processes import ProcessPool
from feste.scheduler.hands.requests import Requests
from feste.scheduler.hands.threads import Begun, ThreadPool, run_chunk
from feste.scheduler.work import await_task, context_of, describe, result_of

__all__ = ["LocalExecutor"]

#: How many of users' async tasks may run at once; they mostly wait.
_ASYNC = 1000


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Coroutines:
    """The limit on concurrent async tasks; each task that awaits a nested run adds one.

    :param report: receives the reports.
    """

    def __init__(self, report: Reporter) -> None:
        self.size = _ASYNC
        self._report = report

    def waiting(self, more: int) -> None:
        """Adjust the limit when a task starts (+1) or stops (-1) waiting for a run.

        :param more: +1 or -1.
        """
        self.size += more
        self._report.capacity("async")


class LocalExecutor(Executor):
    """Run everything in this process and its child processes.

    :param target: the value of the setting ``scheduler``.
    """

    def start(self, report: Reporter) -> None:
        """Prepare for work; threads, loops and processes are started when first needed.

        :param report: receives all reports.
        """
        self._report = report
        cores = _cores()
        self.requests = Requests(report.sent)
        self.coroutines = _Coroutines(report)
        self.tasks = LoopThread("feste-tasks", "pool", places=self.coroutines)
        self.threads = ThreadPool("thread", min(32, cores + 4), report)
        # short pieces that hold the GIL: more threads than cores would only switch more
        self.quick = ThreadPool(QUICK, min(8, cores + 1), report)
        self.processes = ProcessPool(cores, report)

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once.

        :param where: ``"thread"``, :data:`QUICK`, ``"process"``, ``"async"`` or ``"inline"``.
        """
        if where in ("thread", QUICK):
            return self._pool(where).size
        if where == "inline":  # the brain waits for each chunk, so a second one would only wait
            return 1
        return self.processes.size if where == "process" else self.coroutines.size

    def call(self, where: str, chunk: list[PyTask]) -> None:
        """Run tasks in order.

        :param where: as for :meth:`capacity`.
        :param chunk: the tasks, in order.
        """
        if where in ("thread", QUICK):
            self._pool(where).run(chunk)
        elif where == "process":
            self.processes.run(chunk)
        elif where == "async":
            self.tasks.start(id(chunk), lambda: self._await(chunk))
        else:
            with blocking.inside("brain"):
                run_chunk(Begun(chunk), self._report)
            self._report.free(where, chunk)

    def reclaim(self, chunk: list[PyTask]) -> None:
        """Return the unstarted tasks of a chunk if it has made no progress since the last call.

        :param chunk: the list given to :meth:`call`.
        """
        self.threads.reclaim(chunk)
        self.quick.reclaim(chunk)

    def _pool(self, where: str) -> ThreadPool:
        return self.threads if where == "thread" else self.quick

    def abandon(self, chunk: list[PyTask]) -> None:
        """Cancel an async task or kill the process that runs the chunk; a thread runs on.

        :param chunk: the list given to :meth:`call`.
        """
        self.threads.abandon(chunk)
        self.quick.abandon(chunk)
        self.tasks.cancel(id(chunk))
        self.processes.abandon(chunk)

    async def _await(self, chunk: list[PyTask]) -> None:
        loop = asyncio.get_running_loop()
        for task in chunk:
            begun = perf_counter()
            try:
                ok, result = await loop.create_task(_outcome(task), context=context_of(task))
            except asyncio.CancelledError as error:  # cancelled before it started
                ok, result = False, describe(error)
            self._report.done(task, ok, result, perf_counter() - begun)
        self._report.free("async", chunk)

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request.

        :param handle: the brain's number for the request.
        :param call: the operation that sends it.
        :param request: the request.
        :param on_chunk: receives pieces of the response's text, or None.
        """
        self.requests.start(handle, call, request, on_chunk)

    def cancel(self, handle: int) -> None:
        """Stop waiting for a request.

        :param handle: the brain's number for the request.
        """
        self.requests.cancel(handle)

    def has_lost(self, work: int | list[PyTask]) -> bool:
        """Return whether the loop ended that a request or an async task was on.

        :param work: the handle of a request, or a chunk.
        """
        if isinstance(work, int):
            return self.requests.loop.has_lost(work)
        return self.tasks.has_lost(id(work))

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Report values as they are: local references are the results themselves.

        :param handle: the brain's number for the fetch.
        :param refs: results that were reported earlier.
        """
        self._report.fetched(handle, list(refs))

    def close(self) -> None:
        """Stop the loops, threads and processes."""
        self.requests.close()
        self.tasks.close()
        self.threads.close()
        self.quick.close()
        self.processes.close()


async def _outcome(task: PyTask) -> tuple[bool, Any]:
    """Await a user's coroutine; return the error rather than raise it into the loop."""
    try:
        return True, result_of(await await_task(task))
    except BaseException as error:  # see run_chunk; cancellation ends here too
        return False, describe(error)
