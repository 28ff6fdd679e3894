"""References to results on workers, and fetching them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import distributed
from distributed.scheduler import KilledWorker

from feste.errors import FesteError, WorkerLost
from feste.scheduler.dask.tasks.outcomes import Failed, Held, Outcome, Several

__all__ = ["FIRST", "Fetcher", "Promises", "Ref", "Result", "lost"]

#: Dask's priority of what many tasks wait for and takes no time.
FIRST = 10**12
#: The number of attempts, without another suspect, of a task blamed for the death of workers.
_TRIES_ALONE = 3


class Result:
    """What a task of Dask gave, on a worker; Dask releases it with the last Ref.

    :param future: Dask's future for it.
    """

    __slots__ = ("future", "loading", "outcome")

    def __init__(self, future: distributed.Future[Any]) -> None:
        self.future = future
        self.loading: asyncio.Task[None] | None = None
        #: The outcome, once it is fetched; kept as long as a Ref.
        self.outcome: Outcome | Several | None = None


class Ref:
    """A reference to the result of one of our tasks.

    :param result: the result of Dask's task.
    :param at: its place there, if that ran several of ours; -1 is the whole.
    """

    __slots__ = ("at", "result")

    def __init__(self, result: Result, at: int = -1) -> None:
        self.result = result
        self.at = at

    @property
    def outcome(self) -> Any:
        """The fetched outcome, or None."""
        whole = self.result.outcome
        return whole.outcomes[self.at] if self.at >= 0 and isinstance(whole, Several) else whole

    @property
    def value(self) -> Any:
        """The fetched value or error."""
        outcome = self.outcome
        if not isinstance(outcome, Failed):
            return outcome and outcome.value
        error = outcome.raised()
        return error if self.at < 0 else error.copy()  # others may have the same

    @property
    def ok(self) -> bool:
        """Whether a value was fetched."""
        return isinstance(self.outcome, Held)


class Promises:
    """Pending results, each with a function to call if it will never arrive."""

    def __init__(self) -> None:
        self._open: dict[int, Callable[[FesteError], None]] = {}
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._open)

    def make(self, give_up: Callable[[FesteError], None]) -> int:
        """Add a pending result and return its number.

        :param give_up: called with an error if it will never arrive.
        """
        number = next(self._numbers)
        self._open[number] = give_up
        return number

    def keep(self, number: int) -> bool:
        """Mark a result as arrived; return False if it was given up before.

        :param number: its number.
        """
        return self._open.pop(number, None) is not None

    def give_up(self, error: FesteError) -> None:
        """Give up all pending results.

        :param error: the reason.
        """
        for number in list(self._open):
            give_up = self._open.pop(number, None)
            if give_up is not None:
                give_up(error)


class Fetcher:
    """Fetches results on the event loop of the client, without blocking a thread.

    :param client: a ``distributed.Client``.
    :param promises: records the pending results.
    """

    def __init__(self, client: Any, promises: Promises) -> None:
        self._client = client
        self._promises = promises
        self._alone = asyncio.Lock()

    def bring(self, refs: Sequence[Ref], then: Callable[[], None]) -> None:
        """Fetch results and set their outcomes.

        :param refs: the results.
        :param then: a quick function, called on any thread when all have arrived or failed.
        """
        missing = list({id(r.result): r.result for r in refs if r.result.outcome is None}.values())
        if not missing:
            then()
            return

        def give_up(error: FesteError) -> None:
            for result in missing:
                result.outcome = result.outcome or Failed(error)
            then()

        number = self._promises.make(give_up)
        if not self.on_loop(self._bring(missing, number, then)) and self._promises.keep(number):
            give_up(lost(None))

    def on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any] | None:
        """Run a coroutine on the client's loop; return what can cancel it, or None: the loop has ended.

        :param coroutine: the coroutine.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._client.loop.asyncio_loop)
        except RuntimeError:
            coroutine.close()
            return None

    async def _bring(self, results: list[Result], number: int, then: Callable[[], None]) -> None:
        fresh = [r for r in results if r.loading is None and r.outcome is None]
        if fresh:
            loading = asyncio.ensure_future(self._load_all(fresh))
            for result in fresh:
                result.loading = loading
        loads = {r.loading for r in results if r.loading is not None}
        if loads:
            await asyncio.wait(loads)
        if self._promises.keep(number):
            then()

    async def _load_all(self, results: list[Result]) -> None:
        """Fetch results in one go, or, if one of them is lost, each by itself."""
        try:
            got = await self._client.gather([r.future for r in results], asynchronous=True)
        except Exception:
            await asyncio.gather(*map(self._load, results))
        else:
            for result, outcome in zip(results, got, strict=True):
                result.outcome = result.outcome or outcome
        for result in results:
            result.loading = None

    async def _load(self, result: Result) -> None:
        outcome: Outcome | Several
        try:
            outcome = await self._gather(result.future)
        except Exception as error:  # whatever it is, no value will arrive
            outcome = Failed(lost(error))
        result.outcome = result.outcome or outcome

    async def _gather(self, future: Any) -> Any:
        try:
            (outcome,) = await self._client.gather([future], asynchronous=True)
        except KilledWorker:  # the worker that held it died, then those that recomputed it
            if await self.run_alone(future) is not None:
                raise
            (outcome,) = await self._client.gather([future], asynchronous=True)
        return outcome

    async def run_alone(
        self, future: Any, is_wanted: Callable[[], bool] = lambda: True
    ) -> BaseException | None:
        """Run a suspected task again, one suspect at a time; return its last error, or None.

        Dask blames the death of a worker on every task assigned to it. A task that only waited
        there succeeds when it is run without the guilty one.

        :param future: a future that ended with KilledWorker.
        :param is_wanted: called before each attempt; False stops.
        """
        async with self._alone:
            error: BaseException | None = await future.exception(asynchronous=True)
            for _ in range(_TRIES_ALONE):
                if not isinstance(error, KilledWorker) or not is_wanted():
                    break
                try:
                    keys = await self._client.scheduler.retry(
                        keys=[future.key], client=self._client.id
                    )
                except Exception as lost_scheduler:  # the cluster is closing
                    return lost_scheduler
                for key in keys:  # its lost inputs are retried too
                    if key in self._client.futures:
                        self._client.futures[key].retry()
                error = await future.exception(asynchronous=True)
            return error


def lost(error: BaseException | None) -> WorkerLost:
    """Return the error for a result that the cluster lost.

    :param error: Dask's error; None if Dask itself is gone.
    """
    if error is None:
        told = "the client was closed, or its connection to the scheduler broke"
    else:
        told = f"{type(error).__name__}: {error}"
    return WorkerLost(f"the result on the Dask cluster is lost: {told}", billed="no")
