"""Requests that go out from workers, as the client sees them: each worker's pump, and its window.

All of it lives on the event loop of the Dask client. A request goes to the worker with the fewest under
way, never more than the window allows. What a worker had when it died is lost: it may have been billed,
and the brain decides whether it is sent again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Iterable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from typing import Any

from feste.backend import Backend, Call, OnChunk, Request
from feste.errors import (
    CallTimeout,
    ConfigError,
    FesteError,
    FesteWarning,
    Interrupted,
    Rejected,
    WorkerLost,
)
from feste.node import process_name
from feste.scheduler import Reporter
from feste.scheduler.dask.cluster.link import Link
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.preparing import Preparation
from feste.scheduler.dask.requests.line import Line, Shipped, unpacked
from feste.scheduler.dask.requests.pump import Pump

__all__ = ["Pumps"]

#: Seconds between two looks at the cluster; that one may take; for which the workers that are there may
#: take to get their pumps; and that pumps may take to be removed.
_LOOK, _PATIENCE, _MEET, _END = 0.5, 2.0, 30.0, 5.0

_BROKE = "the connection to the Dask scheduler is lost"
_BILLED = "what it had sent may have been billed"

_numbers = itertools.count()


class Pumps:
    """The pumps of all workers of a cluster.

    :param link: the connection.
    :param report: receives the outcomes.
    :param window: the most requests under way on one worker.
    :param preparation: what a worker does before all else, or None.
    """

    def __init__(
        self, link: Link, report: Reporter, window: int, preparation: Preparation | None = None
    ) -> None:
        self._link = link
        self._client = link.client
        self._report = report
        self._window = window
        #: The name of the pumps of this client.
        self.name = f"feste-{process_name()}-{next(_numbers)}"
        self._pump = dumps(Pump(self.name, preparation))
        self._lines: dict[str, Line] = {}
        self._meeting: set[str] = set()
        self._queue: deque[Shipped] = deque()
        #: What backends are called on workers, and how they get there; and those that were checked.
        self._named: dict[Hashable, tuple[str, bytes]] = {}
        self._checked: dict[str, bytes] = {}
        self._count = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    # --- from other threads -----------------------------------------------------------------------

    def start(self) -> None:
        """Make all workers ready, now and those that come later.

        :raises FesteError: if a worker cannot be prepared.
        """
        adaptive = getattr(self._client.cluster, "_adaptive", None)
        if adaptive is not None and not adaptive.minimum:
            warnings.warn(
                'with requests_on="workers" requests wait until there are workers, but an adaptive cluster '
                "starts none for them, since it counts tasks alone: give it a minimum, as in "
                "cluster.adapt(minimum=1)",
                FesteWarning,
                stacklevel=3,
            )
        self._wait(self._start())

    def check(self, clients: Sequence[Backend]) -> None:
        """Raise what would keep backends from sending requests from any of the workers in use.

        :param clients: the backends.
        :raises ConfigError: if a key is literal, or missing on a worker.
        """
        new = dict(map(self._name, clients))
        new = {name: data for name, data in new.items() if name not in self._checked}
        problem = self._wait(self._check(new))
        if problem is not None:
            raise problem

    def send(
        self, number: int, call: Call[Any], request: Request, on_chunk: OnChunk | None
    ) -> None:
        """Send a request from one of the workers.

        :param number: its number.
        :param call: the operation.
        :param request: the request.
        :param on_chunk: receives pieces of the response's text, or None.
        """
        try:
            name, data = self._name(call.client)
        except ConfigError as error:  # it cannot be pickled any more
            self._report.sent(number, False, Rejected(str(error), billed="no"), 0.0)
            return
        shipped = Shipped(number, call, request, on_chunk, name, data)
        if not self._on_loop(self._add, shipped):
            self._lose([shipped], _BROKE, billed="no")

    def cancel(self, number: int) -> None:
        """Stop waiting for a request.

        :param number: its number.
        """
        self._on_loop(self._cancel, number)

    def close(self) -> None:
        """Give up all requests, and remove the pumps."""
        if not self._closed:
            self._closed = True
            if not self._link.closed:
                with suppress(Exception):  # of a cluster that is gone
                    self._wait(self._stop(), timeout=_END)

    @property
    def window(self) -> int:
        """How many requests all workers take at once."""
        return self._window * len(self._open())

    def _open(self) -> list[Line]:
        """Return the workers that take requests; where none can send them, those that would fail them."""
        lines = self._staying()
        return [line for line in lines if line.problem is None] or lines

    def _staying(self) -> list[Line]:
        return [one for one in list(self._lines.values()) if not one.leaves and not one.is_silent]

    def _on_loop(self, function: Callable[..., None], *args: Any) -> bool:
        try:
            self._client.loop.asyncio_loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has ended
            return False
        return True

    def _wait(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        loop = self._client.loop.asyncio_loop
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError:  # the loop has ended
            coroutine.close()
            raise self._link.lost from None
        try:
            while wait([future], timeout or _PATIENCE).not_done:
                if timeout is not None:
                    raise TimeoutError
                if self._link.closed:  # the loop may have been stopped
                    raise self._link.lost
            return future.result()
        finally:
            future.cancel()  # Ctrl-C

    # --- on the loop: workers ---------------------------------------------------------------------

    async def _start(self) -> None:
        if meetings := [
            self._begin(self._meet(one)) for one in await self._client.scheduler.ncores()
        ]:
            met, _ = await asyncio.wait(
                meetings, timeout=_MEET
            )  # one that stands still may join later
            await asyncio.gather(*met)
        for line in self._lines.values():
            if line.problem is not None:
                raise line.problem
        self._begin(self._watch())

    async def _check(self, new: dict[str, bytes]) -> FesteError | None:
        """Return what the workers in use lack for new backends; ask those anew that are left out."""
        with suppress(Exception):  # of a scheduler that is gone, which :meth:`_watch` tells
            self._look(set(await self._client.scheduler.ncores()), time.monotonic())
        left_out = [line for line in self._lines.values() if line.problem is not None]
        checked = set[Line]()
        while new and (lines := {*self._staying()} - checked - {*left_out}):  # some may join
            for problem in await asyncio.gather(*(line.check(new) for line in lines)):
                if problem is not None:
                    return problem
            checked |= lines
        self._checked.update(new)  # also if there is no worker yet: those that join are asked then
        for line in left_out:
            line.problem = await line.check({**self._checked, **new})
        self._spread()
        usable = self._open()
        return usable[0].problem if usable else None

    async def _stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        message = {"op": "plugin-remove", "name": self.name}
        await self._client.scheduler.broadcast(msg=message, on_error="ignore")

    def _begin(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self) -> None:
        """Notice workers that come and go, answers that do not come, and the end of the cluster."""
        try:
            while not self._link.closed:
                with suppress(Exception):  # of a scheduler that is gone: the next look tells
                    async with asyncio.timeout(_PATIENCE):  # connecting to it would take longer
                        listed = set(await self._client.scheduler.ncores())
                    self._look(listed, time.monotonic())
                await asyncio.sleep(_LOOK)
        finally:
            if not self._closed:
                self._report.broken(self._link.lost)  # first, so that nothing is sent again
            for line in list(self._lines.values()):
                self._drop(line, _BROKE)
            self._lose(self._queue, _BROKE, billed="no")
            self._queue.clear()

    def _look(self, listed: set[str], now: float) -> None:
        for line in list(self._lines.values()):
            if line.address not in listed:
                self._leaves(line)
                if not line.sought:
                    line.sought = True
                    self._begin(self._seek(line))
            if line.is_silent is line.listens(now):
                line.is_silent = not line.is_silent
                self._withhold(line)
            for shipped in [s for s in line.flying.values() if s.until < now]:
                told = CallTimeout(f"the Dask worker {line.name} did not tell of an answer in time")
                del line.flying[shipped.number]
                self._report.sent(shipped.number, False, told, 0.0)
                line.cancelled.append(shipped.number)
                self._wake(line)
        for address in listed - self._lines.keys() - self._meeting:
            self._begin(self._join(address))
        self._spread()

    async def _seek(self, line: Line) -> None:
        """Give a worker up that the scheduler has let go, unless it still answers."""
        if not await line.is_there():
            self._drop(line, f"the Dask worker {line.name} died; {_BILLED}")
        line.sought = False

    async def _join(self, address: str) -> None:
        """Give a worker that has joined its pump."""
        line = await self._meet(address)
        if line is not None and line.problem is not None:
            warnings.warn(f"no requests go out from {address}: {line.problem}", FesteWarning, 1)

    async def _meet(self, address: str) -> Line | None:
        self._meeting.add(address)
        line = Line(self._client, self.name, address)
        try:
            known = len(self._checked)
            if not await line.meet(self._pump, self._checked):
                return None  # it is gone again, or is just starting: the next look tries again
            while known < len(self._checked):  # meanwhile there are more
                known = len(self._checked)
                line.problem = await line.check(self._checked)
        finally:
            self._meeting.discard(address)
        self._lines[address] = line
        if line.has_pump:
            self._begin(self._collect(line))
        self._report.capacity("request")
        self._spread()
        return line

    def _leaves(self, line: Line) -> None:
        """Give a worker nothing more; if it retires, it still answers what it has."""
        if not line.leaves:
            line.leaves = True
            self._withhold(line)

    def _withhold(self, line: Line) -> None:
        """Give a worker nothing more, be it for a while; others get what has not been sent there."""
        outgoing, line.outgoing = line.outgoing, []
        self._take_back(line, outgoing)
        self._report.capacity("request")

    def _take_back(self, line: Line, shipped: Iterable[Shipped]) -> None:
        """Give requests that a worker has not got to others."""
        for each in reversed(list(shipped)):
            if line.flying.pop(each.number, None) is not None:
                self._queue.appendleft(each)
        self._spread()

    def _drop(self, line: Line, why: str) -> None:
        """Give up a worker: what it had may have been billed."""
        if line.is_over:
            return
        del self._lines[line.address]
        self._leaves(line)
        self._lose(line.end(), why)

    def _lose(self, shipments: Iterable[Shipped], why: str, **more: Any) -> None:
        for shipped in shipments:
            self._report.sent(shipped.number, False, WorkerLost(why, **more), 0.0)

    # --- on the loop: requests --------------------------------------------------------------------

    def _add(self, shipped: Shipped) -> None:
        if self._link.closed:
            self._lose([shipped], _BROKE, billed="no")
        else:
            self._queue.append(shipped)
            self._spread()

    def _spread(self) -> None:
        """Hand requests to the workers that have the fewest."""
        while self._queue:
            line = min(self._open(), key=lambda each: len(each.flying), default=None)
            if line is None or len(line.flying) >= self._window:
                return
            shipped = self._queue.popleft()
            if line.problem is not None:  # all came after the run had begun, and none is fit
                told = Rejected(str(line.problem), billed="no")
                self._report.sent(shipped.number, False, told, 0.0)
            else:
                line.give(shipped)
                self._wake(line)

    def _cancel(self, number: int) -> None:
        for waiting in (self._queue, *(line.outgoing for line in self._lines.values())):
            for shipped in [s for s in waiting if s.number == number]:
                waiting.remove(shipped)
                for line in self._lines.values():
                    line.flying.pop(number, None)
                told = Interrupted("the run was stopped before it was sent", billed="no")
                self._report.sent(number, False, told, 0.0)
                return
        for line in self._lines.values():
            if number in line.flying:
                line.cancelled.append(number)
                self._wake(line)

    def _wake(self, line: Line) -> None:
        if not line.sending:
            line.sending = True
            self._begin(self._send(line))

    async def _send(self, line: Line) -> None:
        try:
            why = await line.send(self._refused)
        finally:
            line.sending = False
        if why:
            self._drop(line, f"{why}; {_BILLED}")

    def _name(self, client: Backend) -> tuple[str, bytes]:
        named = self._named.get(client.token)
        if named is None:
            new = (f"backend-{next(self._count)}", _packed(client))
            named = self._named.setdefault(client.token, new)  # another thread may name it, too
        return named

    def _refused(self, line: Line, shipped: list[Shipped]) -> None:
        self._leaves(line)
        self._take_back(line, shipped)

    async def _collect(self, line: Line) -> None:
        def take(number: int, is_piece: bool, data: bytes) -> None:
            shipped = line.flying.get(number)
            if shipped is None:
                return  # it was given up
            ok, value, seconds = unpacked(line.name, data)
            if is_piece:
                if shipped.on_chunk is not None:
                    shipped.on_chunk(value)
                return
            del line.flying[number]
            self._report.sent(number, ok, value, seconds, line.name)
            self._spread()

        why = await line.collect(take)
        if why:
            self._drop(line, f"{why}; {_BILLED}")


def _packed(client: Backend) -> bytes:
    try:
        return dumps(client)
    except Exception as error:  # a literal key, or whatever a user's backend holds
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(
            f'requests_on="workers" sends {type(client).__name__} to the workers, which cannot be done: '
            f"{kind}{error}"
        ) from None
