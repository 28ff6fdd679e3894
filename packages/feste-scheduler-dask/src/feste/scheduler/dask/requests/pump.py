"""The pump of a worker: it sends the requests that a client has shipped here, and keeps what came back.

A pump is a handler of the worker's own server, added by a plugin. So it waits for none of the worker's
threads, is not stolen or run again as tasks are, and needs nothing but the connection through the
scheduler that Dask has anyway. The client hands requests down with ``send``, and always has one
``collect`` waiting here that brings back many outcomes at once.

A message may come twice, or late, where a connection broke before its answer. So ``send`` is numbered,
and each message names the life of the pump that it is for: a request is never sent a second time.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

from distributed import WorkerPlugin
from distributed.core import Status

from feste import errors
from feste.backend import Backend, Request, redact
from feste.errors import CallError, ConfigError, FesteError, MissingKey, Rejected
from feste.scheduler import Requests
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.preparing import Preparation, prepare
from feste.scheduler.dask.requests.outbox import Outbox

__all__ = ["Pump", "Shipment"]

#: How often a pump looks whether it has heard of its client, and after how many looks it gives up.
_LOOKS = 8
#: Seconds that a worker which leaves gives its requests to end and to be collected.
_PATIENCE = 20.0


class Shipment(NamedTuple):
    """A request on its way.

    :param number: its number.
    :param backend: the name of its backend.
    :param operation: the name of its operation.
    :param request: the request.
    :param streams: whether its pieces are wanted.
    """

    number: int
    backend: str
    operation: str
    request: Request
    streams: bool


class Pump(WorkerPlugin):
    """The plugin that makes a worker ready for one client.

    :param name: the name of its handler.
    :param preparation: what a worker does before all else, or None.
    :param silence: seconds without a word of the client after which its requests are given up, whose
        answers nobody would get. Time for which the worker itself stood still does not count.
    """

    def __init__(
        self, name: str, preparation: Preparation | None = None, silence: float = 120.0
    ) -> None:
        self.name = name
        self.preparation = preparation
        self.silence = silence

    async def setup(self, worker: Any) -> None:
        """Prepare the worker, and listen.

        :param worker: the worker.
        """
        failed = await prepare(self.preparation, worker) if self.preparation else None
        self.problem: FesteError | None = failed.error if failed else None
        self.worker = worker
        #: Tells this pump from one that a restarted worker has under the same address.
        self.life = uuid4().hex
        self.outbox = Outbox(asyncio.get_running_loop())
        self.requests = Requests(self._sent)
        #: The backends by name, or why they cannot be made here.
        self.backends: dict[str, Backend | FesteError] = {}
        #: The number of the last ``send`` that was taken.
        self.taken = 0
        self.leaves = False
        self._listen(_LOOKS)
        worker.handlers[self.name] = self.serve

    async def teardown(self, worker: Any) -> None:
        """Stop; as the worker leaves, first let requests end that are under way.

        :param worker: the worker.
        """
        self.leaves = True
        self.alarm.cancel()
        if worker.status is Status.closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await self.outbox.is_empty.wait()
        self._give_up()
        worker.handlers.pop(self.name, None)
        await asyncio.to_thread(self.requests.close)

    def _listen(self, looks: int) -> None:
        """Go when the client is gone; what it had sent is given up with that."""
        self.looks = looks
        if looks:
            self.alarm = asyncio.get_running_loop().call_later(
                self.silence / _LOOKS, lambda: self._listen(self.looks - 1)
            )
        else:
            self.worker.loop.add_callback(self.worker.plugin_remove, self.name)

    def _give_up(self) -> None:
        for number in self.outbox.give_up():
            self.requests.cancel(number)

    # --- what the client asks for -----------------------------------------------------------------

    async def serve(self, do: str, life: str, data: bytes) -> bytes:
        """Handle a message of the client.

        :param do: ``"hello"``, ``"send"`` or ``"collect"``.
        :param life: the life of the pump that it is for; empty for ``"hello"``.
        :param data: its pickled arguments.
        :returns: the pickled life of this pump, and the answer if it is the one that was meant.
        """
        self.looks = _LOOKS
        answer: Any = None
        if do == "hello":
            problem = await asyncio.to_thread(self._met, *pickle.loads(data))
            answer = (str(self.worker.name), problem)
        elif life == self.life and do == "send":
            answer = self._send(*pickle.loads(data))
        elif life == self.life:
            answer = await self.outbox.take(*pickle.loads(data))
        return dumps((self.life, answer))

    def _met(self, backends: Mapping[str, bytes]) -> FesteError | None:
        """Take backends; return what keeps them from sending requests from here; may import SDKs."""
        problems = [self._checked(name, data) for name, data in backends.items()]
        return self.problem or next(filter(None, problems), None)

    def _checked(self, name: str, data: bytes) -> FesteError | None:
        backend = self._made(name, data)
        if isinstance(backend, FesteError):
            return backend
        try:
            backend.preflight()
            backend.warm_up()
        except MissingKey as error:
            return self._no_key(backend, error)
        except ConfigError as error:
            return ConfigError(f"on the Dask worker {self.worker.name}: {error}")
        except Exception as error:  # a user's backend may raise anything
            return self._unfit(error)
        return None

    def _made(self, name: str, data: bytes) -> Backend | FesteError:
        try:
            self.backends[name] = pickle.loads(data)
        except Exception as error:  # the class of a user's backend may not exist here
            self.backends[name] = self._unfit(error)
        return self.backends[name]

    def _no_key(self, backend: Backend, error: MissingKey) -> MissingKey:
        names = " and ".join(secret.name for secret in backend.secrets if not secret.is_set)
        if not names:  # a plugin has its own reason
            return MissingKey(f"on the Dask worker {self.worker.name}: {error}")
        return MissingKey(
            f"no API key on the Dask worker {self.worker.name}: the environment variable {names} is not set "
            'there. With requests_on="workers" keys are read where requests leave: set it where the worker '
            "is started, or in prepare_worker"
        )

    def _unfit(self, why: object) -> ConfigError:
        return ConfigError(
            f"the Dask worker {self.worker.name} cannot make a backend of the run: "
            f"{type(why).__name__}: {redact(str(why))}. Install what it needs on the workers"
        )

    def _send(
        self,
        ordinal: int,
        backends: Mapping[str, bytes],
        shipments: Sequence[Shipment],
        cancelled: Sequence[int],
    ) -> bool:
        """Return whether this message was taken, now or before."""
        if ordinal > self.taken and not self.leaves:
            self.taken = ordinal
            for name, data in backends.items():
                self._made(name, data)
            for shipment in shipments:
                self._begin(*shipment)
        for number in cancelled:
            self.requests.cancel(number)
        return ordinal <= self.taken

    def _begin(
        self, number: int, name: str, operation: str, request: Request, streams: bool
    ) -> None:
        self.outbox.expect(number)
        backend = self.backends.get(name)
        call = getattr(backend, operation, None)
        if call is None:
            if not isinstance(backend, FesteError):
                backend = self._unfit(AttributeError(f"{request.plugin}.{operation}"))
            self._sent(number, False, Rejected(str(backend), billed="no"), 0.0)
        else:
            pieces = partial(self._piece, number) if streams else None
            self.requests.start(number, call, request, pieces)

    # --- on the thread of requests ----------------------------------------------------------------

    def _piece(self, number: int, text: str) -> None:
        self.outbox.put(number, True, dumps((True, text, 0.0)))

    def _sent(self, number: int, ok: bool, value: Any, seconds: float) -> None:
        try:
            data = dumps((ok, value, seconds))
            if not ok:
                pickle.loads(data)  # the errors of plugins may be made in any way
        except Exception as error:
            data = dumps((False, _plain(value, error), seconds))
        self.outbox.put(number, False, data)


def _plain(value: Any, why: Exception) -> CallError:
    """Return what can be told instead of a response or an error that cannot be pickled."""
    if not isinstance(value, CallError):
        told = f"the answer cannot be sent to the client: {type(why).__name__}: {why}"
        return Rejected(told, billed="yes")
    kind = next(k for k in type(value).__mro__ if k.__module__ == errors.__name__)
    made: CallError = kind(f"{type(value).__name__}: {value.message}", billed=value.billed)
    for name in ("status", "code", "request_id", "retry_after", "rate_limits"):
        setattr(made, name, getattr(value, name))
    return made
