"""Results on workers, and how they come here."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import distributed
from distributed.scheduler import KilledWorker

from feste.errors import FesteError, WorkerLost
from feste.scheduler.dask.remote import Emitted, Failed, Held

__all__ = ["Fetcher", "Promises", "Ref", "lost"]


#: How often a task that Dask blames for the death of workers is tried with no other suspect beside it.
_TRIES_ALONE = 3


class Ref:
    """A result on a worker; when nothing holds the Ref any more, Dask lets the result go.

    :param future: Dask's name for it.
    """

    __slots__ = ("future", "loading", "outcome")

    def __init__(self, future: distributed.Future[Any]) -> None:
        self.future = future
        self.loading: asyncio.Task[None] | None = None
        #: What it is, once it has come here; it stays while the Ref lives.
        self.outcome: Held | Emitted | Failed | None = None

    @property
    def value(self) -> Any:
        """What came: the value, or the error."""
        outcome = self.outcome
        return outcome.raised() if isinstance(outcome, Failed) else outcome and outcome.value

    @property
    def ok(self) -> bool:
        """Whether a value came."""
        return isinstance(self.outcome, Held)


class Promises:
    """What is waited for, each with what to do if it will never come."""

    def __init__(self) -> None:
        self._open: dict[int, Callable[[FesteError], None]] = {}
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._open)

    def make(self, give_up: Callable[[FesteError], None]) -> int:
        """Return the number of a new one.

        :param give_up: called with an error if it will never come.
        """
        number = next(self._numbers)
        self._open[number] = give_up
        return number

    def keep(self, number: int) -> bool:
        """Say that it has come; return False if it was given up before.

        :param number: its number.
        """
        return self._open.pop(number, None) is not None

    def give_up(self, error: FesteError) -> None:
        """Give up all of them.

        :param error: why.
        """
        for number in list(self._open):
            give_up = self._open.pop(number, None)
            if give_up is not None:
                give_up(error)


class Fetcher:
    """Brings results here, on the event loop of the client, so that nobody waits.

    :param client: a ``distributed.Client``. It joins requests that are made at the same time.
    :param promises: where to note what is under way.
    """

    def __init__(self, client: Any, promises: Promises) -> None:
        self._client = client
        self._promises = promises
        self._alone = asyncio.Lock()

    def bring(self, refs: Sequence[Ref], then: Callable[[], None]) -> None:
        """Bring results here; their outcomes are set then.

        :param refs: the results.
        :param then: something quick, called on any thread when all are here or have failed.
        """
        missing = [r for r in refs if r.outcome is None]
        if not missing:
            then()
            return

        def give_up(error: FesteError) -> None:
            for ref in missing:
                ref.outcome = ref.outcome or Failed(error)
            then()

        number = self._promises.make(give_up)
        if not self.on_loop(self._bring(missing, number, then)) and self._promises.keep(number):
            give_up(lost(None))

    def on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> bool:
        """Run a coroutine on the loop of the client; return False if there is none any more.

        :param coroutine: the coroutine.
        """
        try:
            asyncio.run_coroutine_threadsafe(coroutine, self._client.loop.asyncio_loop)
        except RuntimeError:
            coroutine.close()
            return False
        return True

    async def _bring(self, refs: list[Ref], number: int, then: Callable[[], None]) -> None:
        for ref in refs:
            if ref.loading is None:
                ref.loading = asyncio.ensure_future(self._load(ref))
        await asyncio.wait([r.loading for r in refs if r.loading is not None])
        if self._promises.keep(number):
            then()

    async def _load(self, ref: Ref) -> None:
        outcome: Held | Emitted | Failed
        try:
            outcome = await self._gather(ref)
        except Exception as error:  # whatever it is, there will be no value
            outcome = Failed(lost(error))
        ref.outcome = ref.outcome or outcome
        ref.loading = None

    async def _gather(self, ref: Ref) -> Any:
        try:
            (outcome,) = await self._client.gather([ref.future], asynchronous=True)
        except KilledWorker:  # the worker that held it died, then those that made it again
            if await self.run_alone(ref.future) is not None:
                raise
            (outcome,) = await self._client.gather([ref.future], asynchronous=True)
        return outcome

    async def run_alone(
        self, future: Any, is_wanted: Callable[[], bool] = lambda: True
    ) -> BaseException | None:
        """Run a suspect again, one suspect at a time; return its last error, or None.

        Dask blames the death of a worker on every task that was assigned to it. One that only
        waited there, beside the guilty one, ends well when it is tried without it.

        :param future: a future that ended with KilledWorker.
        :param is_wanted: asked before each try.
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
                except Exception as lost_scheduler:  # the cluster goes away just now
                    return lost_scheduler
                for key in keys:  # what it needs may have been lost with it
                    if key in self._client.futures:
                        self._client.futures[key].retry()
                error = await future.exception(asynchronous=True)
            return error


def lost(error: BaseException | None) -> WorkerLost:
    """Return the error for a result that the cluster lost.

    :param error: what Dask says; None if Dask itself is gone.
    """
    if error is None:
        told = "the client was closed, or its connection to the scheduler broke"
    else:
        told = f"{type(error).__name__}: {error}"
    return WorkerLost(f"the result on the Dask cluster is lost: {told}", billed="no")
