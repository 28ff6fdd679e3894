"""The conversation with the pump of one worker: requests go down, outcomes come back.

All of it lives on the event loop of the Dask client. A message is repeated until it is answered, or the
worker is gone: then what it had is lost, and may have been billed.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from feste.backend import Call, OnChunk, Request
from feste.errors import FesteError, Rejected
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.preparing import cannot_run
from feste.scheduler.dask.requests.pump import Shipment

__all__ = ["Line", "Shipped", "unpacked"]

#: Seconds for which a pump is asked for outcomes before it is asked anew, and after which one that has
#: no requests hears of its client; for which a worker that the scheduler still knows may not answer; in
#: which it has to, if it is there; and between two attempts.
_POLL, _SILENCE, _PROBE, _PAUSE = 10.0, 30.0, 1.0, 0.1
#: Seconds that a worker may take to import backends, after which it is not waited for.
_CHECK = 30.0
#: Seconds after its time limit until the answer of a request is waited for no more.
_GRACE = 30.0


@dataclass(eq=False, slots=True)
class Shipped:
    """A request that goes out from a worker."""

    number: int
    call: Call[Any]
    request: Request
    on_chunk: OnChunk | None
    #: The name of its backend, and the pickled backend for workers that lack it.
    backend: str
    pickled: bytes
    #: When its answer is waited for no more; infinite without a time limit.
    until: float = float("inf")


class Line:
    """A worker, as far as its pump is concerned.

    :param client: the ``distributed.Client``; all messages go through its scheduler.
    :param pump: the name of the pump.
    :param address: the address of the worker.
    """

    def __init__(self, client: Any, pump: str, address: str) -> None:
        self._client = client
        self._pump = pump
        self.address = address
        #: What the user calls the worker.
        self.name = address
        #: Why it sends no requests, or None.
        self.problem: FesteError | None = None
        #: Requests that it has or will have, by number; those among them still to be sent there, and
        #: the numbers of those to be given up.
        self.flying: dict[int, Shipped] = {}
        self.outgoing: list[Shipped] = []
        self.cancelled: list[int] = []
        #: Whether the scheduler has let it go, so that it gets no more; and is looked for.
        self.leaves = False
        self.sought = False
        #: Whether it was given up.
        self.is_over = False
        #: When it last answered, and whether it has not for so long that it gets no more for now.
        self.heard = time.monotonic()
        self.is_silent = False
        self.sending = False
        #: Whether it got requests, or was given up, since it had none.
        self._stirred = asyncio.Event()
        self._backends: set[str] = set()
        self._life = ""
        self._sends = 0
        self._seen = 0

    @property
    def has_pump(self) -> bool:
        """Whether the worker has a pump, be it one that cannot send requests."""
        return bool(self._life)

    def listens(self, now: float) -> bool:
        """Return whether the worker has answered lately: a suspended one, or one that holds the GIL, has not.

        :param now: the time of the monotonic clock.
        """
        return now - self.heard < _SILENCE or not self.has_pump

    def give(self, shipped: Shipped) -> None:
        """Let the worker have a request, which goes with the next :meth:`send`.

        :param shipped: the request.
        """
        self.flying[shipped.number] = shipped
        self.outgoing.append(shipped)
        self._stirred.set()

    def end(self) -> list[Shipped]:
        """Give the worker up; return the requests that it had."""
        self.is_over = True
        self._stirred.set()
        had, self.flying = self.flying, {}
        return list(had.values())

    async def meet(self, plugin: bytes, backends: Mapping[str, bytes]) -> bool:
        """Give the worker its pump; return False if it does not answer.

        Not with ``Client.register_plugin``: the scheduler would give it to all later workers, even
        when this client is gone.

        :param plugin: the pickled pump.
        :param backends: pickled backends that it shall be able to use, by name.
        """
        message = {"op": "plugin-add", "name": self._pump, "plugin": plugin}
        try:
            await self._client.scheduler.proxy(worker=self.address, msg=message)
            self._life, told = await self._ask("hello", dumps((backends,)))
            self.name, self.problem = told
            self._backends.update(backends)
        except (OSError, TimeoutError):
            return False
        except Exception as error:  # of the worker, which cannot import this, or in another version
            self.problem = cannot_run(self.address, error)
        return True

    async def check(self, backends: Mapping[str, bytes]) -> FesteError | None:
        """Return what keeps the worker from sending requests of backends, or None.

        :param backends: the pickled backends, by name.
        """
        asked = asyncio.ensure_future(self._ask("hello", dumps((backends,))))
        end = time.monotonic() + _CHECK
        while not asked.done() and not self.is_over and time.monotonic() < end:
            await asyncio.wait({asked}, timeout=_PAUSE)
        if not asked.done() or asked.exception() is not None:  # it is gone, or about to go
            asked.cancel()
            return self.problem
        life, told = asked.result()
        if life != self._life:
            return self.problem
        self._backends.update(backends)
        problem: FesteError | None = told[1]
        return problem

    async def send(self, refused: Callable[[Line, list[Shipped]], None]) -> str:
        """Send what has gathered, until there is no more; return why the worker is gone, or nothing.

        :param refused: takes back requests that the worker does not take, since it leaves.
        """
        while (self.outgoing or self.cancelled) and not self.is_over:
            shipped, self.outgoing = self.outgoing, []
            cancelled, self.cancelled = self.cancelled, []
            new = {s.backend: s.pickled for s in shipped if s.backend not in self._backends}
            shipments: list[Shipment] = []
            for each in shipped:
                each.until = time.monotonic() + (each.request.timeout or float("inf")) + _GRACE
                streams = each.on_chunk is not None
                shipments.append(
                    Shipment(each.number, each.backend, each.call.name, each.request, streams)
                )
            self._sends += 1
            taken, why = await self._exchange("send", self._sends, new, shipments, cancelled)
            if why or self.is_over:
                return why
            if taken:
                self._backends.update(new)
            else:
                refused(self, [each for each in shipped if each.number in self.flying])
        return ""

    async def collect(self, take: Callable[[int, bool, bytes], None]) -> str:
        """Take outcomes from the worker until it is gone; return why it is.

        A worker without requests is not asked: Dask's scheduler would log an error for what is still
        open when it ends.

        :param take: takes what :class:`~feste.scheduler.dask.requests.outbox.Told` says, without its ordinal.
        """
        confirmed = 0
        while True:
            if not self.flying and confirmed == self._seen:
                self._stirred.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL):
                        await self._stirred.wait()
            confirmed = self._seen
            patience = _POLL if self.flying else 0.0
            told, why = await self._exchange("collect", confirmed, patience)
            if why or self.is_over:
                return why
            for ordinal, *rest in told:
                if ordinal > self._seen:
                    self._seen = ordinal
                    take(*rest)

    async def _exchange(self, do: str, *asked: Any) -> tuple[Any, str]:
        """Ask until there is an answer; return it, or why the worker is gone."""
        data = dumps(asked)
        why = ""
        while not why and not self.is_over:
            try:
                life, answer = await self._ask(do, data)
            except Exception as error:
                why = await self._gone(error)
                continue
            if life == self._life:
                return answer, ""
            why = f"the Dask worker {self.name} was started again"
        return None, why

    async def is_there(self) -> bool:
        """Return whether the worker answers within a moment."""
        with suppress(Exception):
            async with asyncio.timeout(_PROBE):
                await self._ask("hello", dumps(({},)))
                return True
        return False

    async def _gone(self, error: Exception) -> str:
        """Return why a worker that did not answer is gone; an empty text if it answers after all.

        The scheduler lets go of a worker that retires, and breaks its connections, before that has ended.
        """
        end = time.monotonic() + _SILENCE
        while time.monotonic() < end and not self.is_over:
            if await self.is_there():
                return ""
            with suppress(Exception):  # the scheduler is gone: the client ends the run
                if self.address not in await self._client.scheduler.ncores():
                    return f"the Dask worker {self.name} died"
            await asyncio.sleep(_PAUSE)
        return f"the Dask worker {self.name} does not answer: {type(error).__name__}: {error}"

    async def _ask(self, do: str, data: bytes) -> Any:
        message = {"op": self._pump, "do": do, "life": self._life, "data": data}
        answer = await self._client.scheduler.proxy(worker=self.address, msg=message)
        self.heard = time.monotonic()
        # where there is no pump, Dask answers nothing
        return pickle.loads(answer) if answer else ("", None)


def unpacked(name: str, data: bytes) -> tuple[bool, Any, float]:
    """Return what a worker told: whether a response arrived, the response or error, and its seconds.

    :param name: the name of the worker.
    :param data: what it told.
    """
    try:
        told: tuple[bool, Any, float] = pickle.loads(data)
    except Exception as error:  # it is of a class that exists on the worker only
        text = f"the answer that came to the Dask worker {name} cannot be read here: "
        return False, Rejected(f"{text}{type(error).__name__}: {error}", billed="yes"), 0.0
    return told
