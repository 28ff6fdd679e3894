"""The hands of this machine: a loop for requests, one for async tasks, threads, processes."""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from feste import blocking
from feste.backend import Call, OnChunk, Request, redact
from feste.errors import (
    AuthFailed,
    CallError,
    ConnectionLost,
    Interrupted,
    MissingKey,
    Rejected,
)
from feste.scheduler.executor import QUICK, Executor, PyTask, Reporter
from feste.scheduler.loops import LoopThread
from feste.scheduler.processes import ProcessPool
from feste.scheduler.threads import Begun, ThreadPool, run_chunk
from feste.scheduler.work import arguments, context_of, describe, result_of

__all__ = ["LocalExecutor"]

#: Users' async tasks at once; they wait more than they work.
_ASYNC = 1000


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Coroutines:
    """How many async tasks may run at once: one more for each that awaits a run of its own.

    :param report: whom to tell what happened.
    """

    def __init__(self, report: Reporter) -> None:
        self.size = _ASYNC
        self._report = report

    def waiting(self, more: int) -> None:
        """Hear that one of them begins to wait for a run (+1), or ends to (-1); on their loop.

        :param more: +1 or -1.
        """
        self.size += more
        self._report.capacity("async")


class LocalExecutor(Executor):
    """Runs everything in this process and its own child processes.

    :param target: what the setting ``scheduler`` was.
    """

    def start(self, report: Reporter) -> None:
        """Get ready; threads, loops and processes are made when they are first needed.

        :param report: whom to tell what happened.
        """
        self._report = report
        cores = _cores()
        self.requests = LoopThread("feste-requests", "backend")
        self.coroutines = _Coroutines(report)
        self.tasks = LoopThread("feste-tasks", "pool", places=self.coroutines)
        self.threads = ThreadPool("thread", min(32, cores + 4), report)
        self.quick = ThreadPool(QUICK, min(8, cores + 1), report)
        self.processes = ProcessPool(cores, report)

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once.

        :param where: ``"thread"``, :data:`QUICK`, ``"process"``, ``"async"`` or ``"inline"``.
        """
        if where in ("thread", QUICK):
            return self._pool(where).size
        return self.processes.size if where == "process" else self.coroutines.size

    def call(self, where: str, chunk: list[PyTask]) -> None:
        """Run tasks one after the other.

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
        """Take back what is not begun of a chunk.

        :param chunk: the list that was given to :meth:`call`.
        """
        self.threads.reclaim(chunk)
        self.quick.reclaim(chunk)

    def _pool(self, where: str) -> ThreadPool:
        return self.threads if where == "thread" else self.quick

    def abandon(self, chunk: list[PyTask]) -> None:
        """Cancel an async task, kill the process at one; a thread is left to itself.

        :param chunk: the list that was given to :meth:`call`.
        """
        self.threads.abandon(chunk)
        self.tasks.cancel(id(chunk))
        self.processes.abandon(chunk)

    async def _await(self, chunk: list[PyTask]) -> None:
        loop = asyncio.get_running_loop()
        for task in chunk:
            begun = perf_counter()
            try:
                ok, result = await loop.create_task(_outcome(task), context=context_of(task))
            except asyncio.CancelledError as error:  # before it began
                ok, result = False, describe(error)
            self._report.done(task, ok, result, perf_counter() - begun)
        self._report.free("async", chunk)

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request.

        :param handle: the brain's number for it.
        :param call: the operation to send it with.
        :param request: the request.
        :param on_chunk: gets pieces of the answer's text, or None.
        """
        self.requests.start(handle, lambda: self._send(handle, call, request, on_chunk))

    async def _send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None
    ) -> None:
        begun = perf_counter()
        ok = False
        value: Any = None
        try:
            value = await call.send(request, on_chunk)
            ok = True
        except CallError as error:
            value = error
        except MissingKey as error:  # it was there before the run
            value = AuthFailed(str(error))
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                value = Interrupted("the run was stopped while the request was under way")
            else:  # something inside the backend gave up
                value = ConnectionLost(f"{call.name} of {request.plugin} cancelled itself")
        except BaseException as error:  # a plugin's own mistake: the call fails, the run goes on
            # as text: what the exception holds may show the key
            secrets = call.client.secrets
            told = redact(str(describe(error).args[0]), *secrets)
            value = Rejected(
                f"{call.name} of the backend {request.plugin} broke: {told}", billed="unknown"
            )
            trace = "".join(traceback.format_exception(error))
            value.add_note(redact(trace, *secrets, limit=4000))
        self._report.sent(handle, ok, value, perf_counter() - begun)

    def cancel(self, handle: int) -> None:
        """Stop waiting for a request.

        :param handle: the brain's number for it.
        """
        self.requests.cancel(handle)

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Report values as they are: here they are the results themselves.

        :param handle: the brain's number for it.
        :param refs: results that were reported.
        """
        self._report.fetched(handle, list(refs))

    def close(self) -> None:
        """Stop all of it."""
        self.requests.close()
        self.tasks.close()
        self.threads.close()
        self.quick.close()
        self.processes.close()


async def _outcome(task: PyTask) -> tuple[bool, Any]:
    """Await a user's coroutine; whatever it raises is told, not raised into the loop."""
    try:
        args, kwargs = arguments(task.args, task.kwargs, task.values)
        return True, result_of(await task.fn(*args, **kwargs))
    except BaseException as error:  # see run_chunk; a cancelled task ends here too
        return False, describe(error)
