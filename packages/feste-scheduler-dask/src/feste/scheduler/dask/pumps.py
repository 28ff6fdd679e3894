"""Requests that go out from workers, as the client sees them: each worker's pump, and its window.

All of it lives on the event loop of the Dask client. A request goes to the worker with the fewest under
way, never more than the window allows. What a worker had when it died is lost: it may have been billed,
and the brain decides whether it is sent again.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from feste.backend import Backend, Call, OnChunk, Request
from feste.errors import (
    CallError,
    CallTimeout,
    ConfigError,
    FesteError,
    Interrupted,
    Rejected,
    WorkerLost,
)
from feste.node import process_name
from feste.scheduler import Reporter
from feste.scheduler.dask.link import Link
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.preparing import Prepare
from feste.scheduler.dask.pump import SILENCE, Pump, Shipment

__all__ = ["Pumps"]

#: Seconds between two looks at the cluster; for which a worker is asked for outcomes before it is asked
#: anew; and for which one that the scheduler still knows may not answer.
_LOOK, _POLL, _SILENCE = 0.5, 10.0, 30.0
#: Seconds after its time limit until the answer of a request is waited for no more.
_GRACE = 30.0

_BROKE = "the connection to the Dask scheduler is lost"

_numbers = itertools.count()


@dataclass(eq=False, slots=True)
class _Shipped:
    """A request that goes out from a worker."""

    number: int
    call: Call[Any]
    request: Request
    on_chunk: OnChunk | None
    #: When its answer is waited for no more; infinite without a time limit.
    until: float = float("inf")


@dataclass(eq=False)
class _Worker:
    """A worker, as far as its pump is concerned."""

    address: str
    name: str
    life: str
    problem: FesteError | None
    #: Requests that it has or will have, by number; those among them still to be sent there, and the
    #: numbers of those to be given up.
    flying: dict[int, _Shipped] = field(default_factory=dict)
    outgoing: list[_Shipped] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    #: The names of the backends that it has.
    backends: set[str] = field(default_factory=set)
    #: The number of the last event that came from it.
    seen: int = 0
    #: Whether it takes no more, since the scheduler has let it go.
    leaves: bool = False
    sending: bool = False
    collecting: bool = False
    #: Since when it does not answer.
    silent: float | None = None


class Pumps:
    """The pumps of all workers of a cluster.

    :param link: the connection.
    :param report: receives the outcomes.
    :param window: the most requests under way on one worker.
    :param prepare: the setting ``prepare_worker``.
    """

    def __init__(self, link: Link, report: Reporter, window: int, prepare: Prepare | None) -> None:
        self._link = link
        self._client = link.client
        self._report = report
        self._window = window
        #: The name of the pumps of this client.
        self.name = f"feste-{process_name()}-{next(_numbers)}"
        self._pump = dumps(Pump(self.name, prepare))
        self._workers: dict[str, _Worker] = {}
        self._meeting: set[str] = set()
        self._queue: deque[_Shipped] = deque()
        self._names: dict[Hashable, tuple[str, bytes]] = {}
        self._checked: set[Hashable] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    # --- from other threads -----------------------------------------------------------------------

    def start(self) -> None:
        """Make all workers ready, now and those that come later.

        :raises FesteError: if a worker cannot be prepared.
        """
        self._wait(self._start())

    def check(self, clients: Sequence[Backend]) -> None:
        """Raise what would keep backends from sending requests from any of the workers.

        :param clients: the backends.
        :raises ConfigError: if a key is literal, or missing on a worker.
        """
        new = [client for client in clients if client.token not in self._checked]
        if new:
            data = dumps([dumps(client) for client in new])
            for errors in self._wait(self._ask_all("check", data)):
                for error in errors:
                    if error is not None:
                        raise error
            self._checked.update(client.token for client in new)

    def send(
        self, number: int, call: Call[Any], request: Request, on_chunk: OnChunk | None
    ) -> None:
        """Send a request from one of the workers.

        :param number: its number.
        :param call: the operation.
        :param request: the request.
        :param on_chunk: receives pieces of the response's text, or None.
        """
        shipped = _Shipped(number, call, request, on_chunk)
        if not self._on_loop(self._add, shipped):
            self._lose([shipped], "the client of the Dask cluster is closed", billed="no")

    def cancel(self, number: int) -> None:
        """Stop waiting for a request.

        :param number: its number.
        """
        self._on_loop(self._cancel, number)

    def close(self) -> None:
        """Give up all requests, and remove the pumps."""
        if not self._closed and not self._link.closed:
            with suppress(Exception):  # of a cluster that is gone
                self._wait(self._stop(), timeout=5.0)
        self._closed = True

    @property
    def window(self) -> int:
        """How many requests all workers take at once."""
        return self._window * sum(not worker.leaves for worker in list(self._workers.values()))

    def _on_loop(self, function: Callable[..., None], *args: Any) -> bool:
        try:
            self._client.loop.asyncio_loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has ended
            return False
        return True

    def _wait(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        loop = self._client.loop.asyncio_loop
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout)

    # --- on the loop: workers ---------------------------------------------------------------------

    async def _start(self) -> None:
        listed = await self._client.scheduler.ncores()
        await asyncio.gather(*map(self._meet, listed))
        for worker in self._workers.values():
            if worker.problem is not None:
                raise worker.problem
        self._begin(self._look())

    async def _stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for worker in list(self._workers.values()):
            self._drop(worker, "the run was closed")
        await self._ask_all("farewell", b"")
        message = {"op": "plugin-remove", "name": self.name}
        await self._client.scheduler.broadcast(msg=message, on_error="ignore")

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self) -> None:
        """Notice workers that come and go, answers that do not come, and the end of the cluster."""
        heard = time.monotonic()
        while not self._link.closed:
            await asyncio.sleep(_LOOK)
            now = time.monotonic()
            if now - heard > SILENCE / 6:
                heard = now
                for worker in [w for w in self._workers.values() if w.life]:
                    self._begin(self._ping(worker))
            for worker in list(self._workers.values()):
                for shipped in [s for s in worker.flying.values() if s.until < now]:
                    self._missed(worker, shipped)
            with suppress(Exception):  # of a scheduler that is gone: the next look tells
                listed = set(await self._client.scheduler.ncores())
                for address in listed - self._workers.keys() - self._meeting:
                    self._begin(self._meet(address))
                for address in self._workers.keys() - listed:
                    self._leaves(self._workers[address])
        self._report.broken(self._link.lost)  # first, so that nothing is sent again
        for worker in list(self._workers.values()):
            self._drop(worker, _BROKE)
        self._lose(self._queue, _BROKE, billed="no")
        self._queue.clear()

    async def _ping(self, worker: _Worker) -> None:
        await self._exchange(worker, "hello", b"")

    async def _meet(self, address: str) -> None:
        """Give a worker its pump.

        Not with ``Client.register_plugin``: the scheduler would give it to all later workers, even
        when this client is gone.
        """
        self._meeting.add(address)
        message = {"op": "plugin-add", "name": self.name, "plugin": self._pump}
        try:
            await self._client.scheduler.proxy(worker=address, msg=message)
            life, name, problem = await self._ask(address, "hello")
        except ImportError as error:
            life, name = "", address
            problem = ConfigError(
                f"the Dask worker {address} cannot run Feste: {type(error).__name__}: {error}. Install "
                "feste-scheduler-dask there, in the version of the client"
            )
        except Exception:  # it is gone again, or does not answer: the next look tries again
            return
        finally:
            self._meeting.discard(address)
        self._workers[address] = _Worker(address, name, life, problem)
        self._report.capacity("request")
        self._spread()

    def _leaves(self, worker: _Worker) -> None:
        """Give a worker nothing more; if it retires, it still answers what it has."""
        if not worker.leaves:
            worker.leaves = True
            self._report.capacity("request")
        if not worker.flying:
            self._workers.pop(worker.address, None)

    def _drop(self, worker: _Worker, why: str) -> None:
        """Give up a worker: what it had may have been billed."""
        if self._workers.get(worker.address) is not worker:
            return
        del self._workers[worker.address]
        unsent = {shipped.number for shipped in worker.outgoing}
        self._lose([s for s in worker.flying.values() if s.number not in unsent], why)
        self._queue.extendleft(reversed(worker.outgoing))
        worker.flying.clear()
        worker.outgoing.clear()
        self._report.capacity("request")
        self._spread()

    def _lose(self, shipments: Sequence[_Shipped] | deque[_Shipped], why: str, **more: Any) -> None:
        for shipped in shipments:
            self._report.sent(shipped.number, False, WorkerLost(why, **more), 0.0)

    # --- on the loop: requests --------------------------------------------------------------------

    def _add(self, shipped: _Shipped) -> None:
        if self._link.closed:
            self._lose([shipped], _BROKE, billed="no")
            return
        self._queue.append(shipped)
        self._spread()

    def _spread(self) -> None:
        """Hand requests to the workers that have the fewest."""
        while self._queue:
            open_ = [w for w in self._workers.values() if not w.leaves]
            ready = [w for w in open_ if w.problem is None]
            if open_ and not ready:  # all of them came after the run had begun
                told = str(open_[0].problem)
                shipped = self._queue.popleft()
                self._report.sent(shipped.number, False, Rejected(told, billed="no"), 0.0)
                continue
            worker = min(ready, key=lambda w: len(w.flying), default=None)
            if worker is None or len(worker.flying) >= self._window:
                return
            shipped = self._queue.popleft()
            worker.flying[shipped.number] = shipped
            worker.outgoing.append(shipped)
            if not worker.sending:
                worker.sending = True
                self._begin(self._send(worker))

    def _cancel(self, number: int) -> None:
        for shipped in self._queue:
            if shipped.number == number:
                self._queue.remove(shipped)
                told = Interrupted("the run was stopped before it was sent", billed="no")
                self._report.sent(number, False, told, 0.0)
                return
        for worker in self._workers.values():
            if number in worker.flying:
                worker.cancelled.append(number)
                if not worker.sending:
                    worker.sending = True
                    self._begin(self._send(worker))

    def _missed(self, worker: _Worker, shipped: _Shipped) -> None:
        del worker.flying[shipped.number]
        told = f"the Dask worker {worker.name} did not tell of an answer in time"
        self._report.sent(shipped.number, False, CallTimeout(told), 0.0)

    async def _send(self, worker: _Worker) -> None:
        """Send a worker what has gathered for it, until there is no more."""
        try:
            while worker.outgoing or worker.cancelled:
                shipments, worker.outgoing = worker.outgoing, []
                cancelled, worker.cancelled = worker.cancelled, []
                backends: dict[str, bytes] = {}
                message = [self._packed(worker, s, backends) for s in shipments]
                data = dumps((backends, [m for m in message if m is not None], cancelled))
                if not worker.collecting:
                    worker.collecting = True
                    self._begin(self._collect(worker))
                if await self._exchange(worker, "send", data) is not None:
                    worker.backends.update(backends)
        finally:
            worker.sending = False

    def _packed(
        self, worker: _Worker, shipped: _Shipped, backends: dict[str, bytes]
    ) -> Shipment | None:
        client, request = shipped.call.client, shipped.request
        shipped.until = time.monotonic() + (request.timeout or float("inf")) + _GRACE
        try:
            known = self._names.get(client.token)
            if known is None:
                known = (f"backend-{len(self._names)}", dumps(client))
                self._names[client.token] = known
        except Exception as error:  # a literal key, or a backend that cannot be pickled
            worker.flying.pop(shipped.number, None)
            told = error if isinstance(error, CallError) else Rejected(str(error), billed="no")
            self._report.sent(shipped.number, False, told, 0.0)
            return None
        name, data = known
        if name not in worker.backends:
            backends[name] = data
        return shipped.number, name, shipped.call.name, request, shipped.on_chunk is not None

    async def _collect(self, worker: _Worker) -> None:
        """Take outcomes from a worker, as long as there are any to come."""
        try:
            more = True
            while more:  # once more than there are outcomes, to confirm the last ones
                more = bool(worker.flying)
                asked = dumps((worker.seen, _POLL if more else 0.0))
                told = await self._exchange(worker, "collect", asked)
                if told is None:
                    return
                for number, event in told[0]:
                    if number > worker.seen:
                        worker.seen = number
                        self._arrived(worker, event)
                more = more or bool(worker.flying)
        finally:
            worker.collecting = False
            if worker.leaves:
                self._leaves(worker)

    def _arrived(self, worker: _Worker, data: bytes) -> None:
        what, number, *told = pickle.loads(data)
        shipped = worker.flying.get(number)
        if shipped is None:
            return  # it was given up
        if what == "piece":
            if shipped.on_chunk is not None:
                shipped.on_chunk(*told)
            return
        del worker.flying[number]
        ok, value, seconds = told
        self._report.sent(number, ok, value, seconds, worker.name)
        self._spread()

    async def _exchange(self, worker: _Worker, do: str, data: bytes) -> Any:
        """Ask a worker's pump until it answers; give the worker up, and return None, if it is gone."""
        while self._workers.get(worker.address) is worker:
            try:
                answer = await self._ask(worker.address, do, data)
                life, *told = answer
                if life == worker.life:
                    worker.silent = None
                    return told
                why = f"the Dask worker {worker.name} was started again"
            except Exception as error:
                why = await self._gone(worker, error)
            if why:
                self._drop(worker, f"{why}; what it had sent may have been billed")
        return None

    async def _gone(self, worker: _Worker, error: Exception) -> str:
        """Return why a worker that did not answer is gone; an empty text, after a while, if it is not."""
        now = time.monotonic()
        worker.silent = worker.silent or now
        if self._link.closed or now - worker.silent > _SILENCE:
            return f"the Dask worker {worker.name} does not answer: {type(error).__name__}: {error}"
        with suppress(Exception):  # the scheduler is gone: the next attempt tells
            if worker.address not in await self._client.scheduler.ncores():
                return f"the Dask worker {worker.name} died"
        await asyncio.sleep(0.1)
        return ""

    async def _ask(self, address: str, do: str, data: bytes = b"") -> Any:
        message = {"op": self.name, "do": do, "data": data}
        answer = await self._client.scheduler.proxy(worker=address, msg=message)
        return pickle.loads(answer) if answer else None

    async def _ask_all(self, do: str, data: bytes) -> list[Any]:
        message = {"op": self.name, "do": do, "data": data}
        answers = await self._client.scheduler.broadcast(
            msg=message, workers=list(self._workers), on_error="ignore"
        )
        return [pickle.loads(answer) for answer in answers.values() if answer]
