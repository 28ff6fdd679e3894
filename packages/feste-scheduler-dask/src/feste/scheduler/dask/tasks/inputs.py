"""Dask collections and futures as inputs: computed on the cluster of the run, and left there.

A collection becomes a future of a :class:`~feste.scheduler.dask.tasks.outcomes.Held`, like the result of a
task, so that tasks, prompts and the caller take both in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any
from uuid import uuid4

import distributed
from distributed.scheduler import KilledWorker

from feste.errors import ConfigError, FesteError, WorkerLost
from feste.scheduler import Later, PyTask, Reporter, describe
from feste.scheduler.dask.tasks.outcomes import Failed, Held
from feste.scheduler.dask.tasks.refs import FIRST, Fetcher, Promises, Ref, Result, lost

__all__ = ["INPUT", "Inputs"]

#: The place of inputs; they wait for the cluster, and take none of its windows.
INPUT = "input"

Chunk = list[PyTask]
End = Callable[[bool, Any], None]


class Inputs:
    """The collections and futures among the inputs of runs.

    :param client: a ``distributed.Client``.
    :param promises: records the pending results.
    :param fetcher: the fetcher of the same client.
    :param report: receives the reports.
    """

    def __init__(self, client: Any, promises: Promises, fetcher: Fetcher, report: Reporter) -> None:
        self._client = client
        self._promises = promises
        self._fetcher = fetcher
        self._report = report
        #: What stops each chunk that is waited for.
        self._stops: dict[int, Callable[[], None]] = {}

    def start(self, inputs: Sequence[Any]) -> list[Any]:
        """Start the computation of collections, all in one call.

        :param inputs: collections, and futures.
        :returns: a :class:`~feste.scheduler.Later` for each. What cannot be started with the others is
            left to its node, which tells why.
        """
        ours = {
            id(given): given
            for given in inputs
            if not self.is_foreign(given) and not self._may_be_unknown(given)
        }
        try:
            futures = dict(zip(ours, self._start(list(ours.values())), strict=True))
        except Exception:  # of one of the collections: its own node will raise it
            return [Later(given) for given in inputs]
        return [Later(_Started(futures[id(g)]) if id(g) in futures else g) for g in inputs]

    def _start(self, inputs: Sequence[Any]) -> list[Any]:
        # Client.compute takes several kinds of collections only if equal kinds stand together
        kinds: dict[Any, list[int]] = {}
        for i, given in enumerate(inputs):
            if not isinstance(given, distributed.Future):
                kinds.setdefault(getattr(given, "__dask_optimize__", None), []).append(i)
        order = [i for places in kinds.values() for i in places]
        sources = list(inputs)
        if order:
            computed = self._client.compute([inputs[i] for i in order])
            for i, future in zip(order, computed, strict=True):
                sources[i] = future
        keys = [f"input-{uuid4().hex}" for _ in sources]
        futures: list[Any] = self._client.map(held, sources, key=keys, pure=False, priority=FIRST)
        return futures

    def is_foreign(self, given: Any) -> bool:
        """Whether an input is a future of another cluster.

        :param given: the input.
        """
        if not isinstance(given, distributed.Future) or given.client is self._client:
            return False
        scheduler = getattr(given.client, "scheduler", None)
        return scheduler is None or scheduler.address != self._client.scheduler.address

    def _may_be_unknown(self, given: Any) -> bool:
        """Whether the scheduler may not have heard of a future yet, since another client has made it.

        It cancels all that comes together with what needs a task that it does not know.
        """
        is_future = isinstance(given, distributed.Future)
        return is_future and given.client is not self._client and given.status == "pending"

    def run(self, chunk: Chunk) -> None:
        """Wait for an input, without a thread, and report it.

        :param chunk: a list that holds its task.
        """
        number = self._promises.make(lambda error: end(False, error))
        end = partial(self._end, chunk, perf_counter())
        handle = self._fetcher.on_loop(self._wait(chunk[0], number, end))
        if handle is None:
            self._give_up(number, end)
            return

        def stop() -> None:
            handle.cancel()
            self._give_up(number, end)

        self._stops[id(chunk)] = stop

    def abandon(self, chunk: Chunk) -> None:
        """Wait for an input no more; Dask stops what nobody else holds.

        :param chunk: any list of tasks; one that is not waited for is ignored.
        """
        stop = self._stops.pop(id(chunk), None)
        if stop is not None:
            stop()

    def _give_up(self, number: int, end: End) -> None:
        if self._promises.keep(number):
            end(False, lost(None))

    def _end(self, chunk: Chunk, begun: float, ok: bool, value: Any) -> None:
        self._stops.pop(id(chunk), None)
        self._report.done(chunk[0], ok, value, perf_counter() - begun)
        self._report.free(INPUT, chunk)

    async def _wait(self, task: PyTask, number: int, end: End) -> None:
        ok, value = await self._outcome(task)
        if self._promises.keep(number):
            end(ok, value)

    async def _outcome(self, task: PyTask) -> tuple[bool, Any]:
        (given,) = task.args
        if type(given) is _Started:
            future = given.take()
        else:  # of a node that a task returned; or it could not be started with others
            if self._may_be_unknown(given):
                with suppress(Exception):  # what has become of it is found below
                    await asyncio.to_thread(given.exception)
            try:
                (future,) = await asyncio.to_thread(self._start, [given])
            except Exception as refused:  # Dask, or a method of the collection, may raise anything
                return False, _refused(task, given, refused)
        error: BaseException | None = await future.exception(asynchronous=True)
        if isinstance(error, KilledWorker):
            error = await self._fetcher.run_alone(future)
        if future.status == "finished":
            return True, Ref(Result(future))
        return False, await _told(task, future, error)


def held(value: Any) -> Held:
    """Keep a result of Dask's own in the form in which workers keep results of tasks.

    :param value: the result.
    """
    return Held(value)


class _Started:
    """The future of an input, held until its node is run and then by its Ref alone."""

    __slots__ = ("_future",)

    def __init__(self, future: Any) -> None:
        self._future = future

    def take(self) -> Any:
        """Return the future, and hold it no more."""
        future, self._future = self._future, None
        return future


def _refused(task: PyTask, given: Any, error: Exception) -> ConfigError:
    cause = error.__cause__ or error  # Dask's own error does not say what it could not send
    return ConfigError(
        f"the input {task.key}, a {type(given).__name__} of Dask, cannot be computed on the cluster: "
        f"{type(cause).__name__}: {cause}"
    )


async def _told(task: PyTask, future: Any, error: BaseException | None) -> FesteError:
    if isinstance(error, KilledWorker):
        return WorkerLost(
            f"the Dask workers that computed the input {task.key} died, "
            f"{error.allowed_failures + 1} in a row; it may need more memory than there is",
            billed="no",
        )
    if error is None or future.status in ("cancelled", "lost"):
        return WorkerLost(
            f"the input {task.key} is lost: its Dask future is {future.status}. It, or what it "
            "needs, was cancelled, was lost by the cluster, or belongs to another one",
            billed="no",
        )
    trace = await future.traceback(asynchronous=True)
    return Failed.of(describe(error.with_traceback(trace))).raised()
