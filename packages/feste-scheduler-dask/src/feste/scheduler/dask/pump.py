"""The pump of a worker: it sends the requests that a client has shipped here, and keeps what came back.

A pump is a handler of the worker's own server, added by a plugin. So it waits for none of the worker's
threads, is not stolen or run again as tasks are, and needs nothing but the connection through the
scheduler that Dask has anyway. The client hands requests down with ``send``, and always has one
``collect`` waiting here that brings back many outcomes at once. An outcome is kept until the client has
confirmed it, so that a broken connection loses no answer.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

from distributed import WorkerPlugin

from feste.backend import Backend, Request
from feste.errors import ConfigError, FesteError, MissingKey, Rejected
from feste.scheduler import Requests
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.preparing import Prepare, prepared

__all__ = ["SILENCE", "Pump", "Shipment"]

#: Seconds for which outcomes gather before they go together.
_LINGER = 0.002
#: Seconds without a word of the client after which its requests are given up.
SILENCE = 120.0
#: Seconds that a worker which leaves gives its requests to end and to be collected.
_PATIENCE = 20.0

#: A request on its way: its number, the name of its backend, its operation, and whether its pieces are
#: wanted.
Shipment = tuple[int, str, str, Request, bool]


class Pump(WorkerPlugin):
    """The plugin that makes a worker ready for one client.

    :param name: the name of its handler.
    :param prepare: the setting ``prepare_worker``.
    """

    def __init__(self, name: str, prepare: Prepare | None = None) -> None:
        self.name = name
        self.prepare = prepare

    async def setup(self, worker: Any) -> None:
        """Prepare the worker, and listen.

        :param worker: the worker.
        """
        # it may take minutes, and the worker has to live on
        self.problem = await asyncio.to_thread(prepared, self.name, self.prepare)
        self.worker = worker
        #: Tells this pump from one that a restarted worker has under the same address.
        self.life = uuid4().hex
        self.outbox = Outbox(asyncio.get_running_loop())
        self.backends: dict[str, Backend] = {}
        self.requests = Requests(self._sent)
        self.heard = time.monotonic()
        self.alarm = asyncio.get_running_loop().call_later(SILENCE, self._listen)
        worker.handlers[self.name] = self.serve

    async def teardown(self, worker: Any) -> None:
        """Let requests end that are under way, as the worker leaves; then stop.

        :param worker: the worker.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self.outbox.is_empty.wait()
        self.alarm.cancel()
        worker.handlers.pop(self.name, None)
        await asyncio.to_thread(self.requests.close)

    def _listen(self) -> None:
        """Give up the requests of a client that is gone, whose answers nobody would get, and go."""
        left = self.heard + SILENCE - time.monotonic()
        if left > 0:
            self.alarm = asyncio.get_running_loop().call_later(left, self._listen)
        else:
            self._give_up()
            self.worker.loop.add_callback(self.worker.plugin_remove, self.name)

    def _give_up(self) -> None:
        for number in list(self.outbox.open):
            self.requests.cancel(number)
        self.outbox.clear()

    # --- what the client asks for -----------------------------------------------------------------

    async def serve(self, do: str, data: bytes = b"") -> bytes:
        """Handle a message of the client.

        :param do: ``"hello"``, ``"check"``, ``"send"``, ``"collect"`` or ``"farewell"``.
        :param data: its pickled arguments.
        :returns: the pickled answer.
        """
        self.heard = time.monotonic()
        asked = pickle.loads(data) if data else ()
        if do == "collect":
            return dumps((self.life, await self.outbox.take(*asked)))
        if do == "send":
            self._send(*asked)
            return dumps((self.life,))
        if do == "check":
            return dumps([_checked(self.worker, backend) for backend in asked])
        if do == "farewell":
            self._give_up()
            return b""
        return dumps((self.life, str(self.worker.name), self.problem))

    def _send(
        self, backends: dict[str, bytes], shipments: list[Shipment], cancelled: list[int]
    ) -> None:
        broken: dict[str, Exception] = {}
        for name, data in backends.items():
            try:
                self.backends[name] = pickle.loads(data)
            except Exception as error:  # the class of a user's backend may not exist here
                broken[name] = error
        for number, name, operation, request, streams in shipments:
            if not self.outbox.begin(number):
                continue  # the client sent it again, since it missed that it came
            backend = self.backends.get(name)
            if backend is None:
                why = broken.get(name) or ConfigError("it was not sent here")
                self._sent(number, False, self._lacks(request, why), 0.0)
                continue
            pieces = partial(self._piece, number) if streams else None
            self.requests.start(number, getattr(backend, operation), request, pieces)
        for number in cancelled:
            self.requests.cancel(number)

    def _lacks(self, request: Request, why: Exception) -> Rejected:
        return Rejected(
            f"the Dask worker {self.worker.name} cannot make the backend {request.plugin}: "
            f"{type(why).__name__}: {why}. Install what it needs on the workers",
            billed="no",
        )

    def _piece(self, number: int, text: str) -> None:
        self.outbox.put(dumps(("piece", number, text)))

    def _sent(self, number: int, ok: bool, value: Any, seconds: float) -> None:
        try:
            event = dumps(("sent", number, ok, value, seconds))
        except Exception as error:  # a plugin's response may hold anything
            told = f"the answer cannot be sent to the client: {type(error).__name__}: {error}"
            event = dumps(("sent", number, False, Rejected(told, billed="yes"), seconds))
        self.outbox.put(event, ends=number)


class Outbox:
    """Outcomes on their way to the client, which are kept until it has confirmed them.

    :param loop: the loop of the worker, where they are taken; they are put in on any thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[int, bytes, int]] = deque()
        self._numbers = itertools.count(1)
        self._some = asyncio.Event()
        #: The requests that came here and whose outcome is not confirmed; set if there are none.
        self.open: set[int] = set()
        self.is_empty = asyncio.Event()
        self.is_empty.set()

    def begin(self, number: int) -> bool:
        """Note a request; return False if it is here already.

        :param number: its number.
        """
        new = number not in self.open
        self.open.add(number)
        self.is_empty.clear()
        return new

    def put(self, event: bytes, ends: int = 0) -> None:
        """Add an event; may be called from any thread.

        :param event: the pickled event.
        :param ends: the number of the request that ends with it, or 0.
        """
        with suppress(RuntimeError):  # the worker has ended
            self._loop.call_soon_threadsafe(self._add, event, ends)

    def _add(self, event: bytes, ends: int) -> None:
        self._events.append((next(self._numbers), event, ends))
        self._some.set()

    async def take(self, seen: int, patience: float) -> list[tuple[int, bytes]]:
        """Return the events that the client has not seen, each with its number.

        :param seen: the number of the last one that it has.
        :param patience: seconds to wait for one.
        """
        while self._events and self._events[0][0] <= seen:
            self.open.discard(self._events.popleft()[2])
        if not self.open:
            self.is_empty.set()
        if not self._events and patience:
            self._some.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._some.wait()
                    await asyncio.sleep(_LINGER)
        return [(number, event) for number, event, _ in self._events]

    def clear(self) -> None:
        """Forget everything."""
        self._events.clear()
        self.open.clear()
        self.is_empty.set()


def _checked(worker: Any, data: bytes) -> FesteError | None:
    """Return what would keep a backend from sending requests from here, or None."""
    try:
        pickle.loads(data).preflight()
    except MissingKey as error:
        return MissingKey(f"on the Dask worker {worker.name}: {error}")
    except ConfigError as error:
        return ConfigError(f"on the Dask worker {worker.name}: {error}")
    except Exception as error:  # the class of a user's backend may not exist there
        return ConfigError(
            f"the Dask worker {worker.name} cannot make a backend of the run: "
            f"{type(error).__name__}: {error}. Install what it needs on the workers"
        )
    return None
