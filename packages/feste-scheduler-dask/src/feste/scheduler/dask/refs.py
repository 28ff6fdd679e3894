"""Results on workers, and how they come here."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import distributed

from feste.errors import FesteError, WorkerLost
from feste.scheduler.dask.remote import Emitted, Failed, Held

__all__ = ["Fetcher", "Promises", "Ref", "lost"]


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
            (outcome,) = await self._client.gather([ref.future], asynchronous=True)
        except Exception as error:  # whatever it is, there will be no value
            outcome = Failed(lost(error))
        ref.outcome = ref.outcome or outcome
        ref.loading = None


def lost(error: BaseException | None) -> WorkerLost:
    """Return the error for a result that the cluster lost.

    :param error: what Dask says; None if Dask itself is gone.
    """
    if error is None:
        told = "the client was closed, or its connection to the scheduler broke"
    else:
        told = f"{type(error).__name__}: {error}"
    return WorkerLost(f"the result on the Dask cluster is lost: {told}", billed="no")
