"""Send requests on an event loop of their own, and turn whatever a backend raises into an error of a call."""

from __future__ import annotations

import asyncio
import contextvars
import traceback
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

from feste.backend import Backend, Call, OnChunk, Request, redact
from feste.errors import (
    AuthFailed,
    CallError,
    CallTimeout,
    ConnectionLost,
    Interrupted,
    MissingKey,
    Rejected,
)
from feste.scheduler.hands.loops import LoopThread
from feste.scheduler.work import describe

__all__ = ["Requests"]

#: Seconds after which the time limit of an attempt holds for a backend that does not keep it itself.
_GRACE = 1.0

Sent = Callable[[int, bool, Any, float], None]


class Requests:
    """The requests under way in this process.

    :param sent: receives the end of each on the loop: handle, whether a response arrived, the response
        or the :class:`~feste.errors.CallError`, and its seconds; see
        :meth:`feste.scheduler.Reporter.sent`.
    """

    def __init__(self, sent: Sent) -> None:
        self._sent = sent
        self.loop = LoopThread("feste-requests", "backend")
        #: By kind of client, and by loop: one that broke may have left a lock behind, closed for good.
        self._warm_ups: defaultdict[tuple[asyncio.AbstractEventLoop, type[Backend]], _WarmUp]
        self._warm_ups = defaultdict(_WarmUp)

    def start(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request, in a copy of the caller's context; may be called from any thread.

        :param handle: a number for it.
        :param call: the operation that sends it.
        :param request: the request.
        :param on_chunk: receives pieces of the response's text, or None.
        """
        here = contextvars.copy_context()
        self.loop.start(handle, lambda: self._send(handle, call, request, on_chunk), here)

    def cancel(self, handle: int) -> None:
        """Stop waiting for a request, which then ends with :class:`~feste.errors.Interrupted`.

        :param handle: its number.
        """
        self.loop.cancel(handle)

    def close(self) -> None:
        """Cancel all requests, close the clients of backends, and end the loop."""
        self.loop.close()

    async def _send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None
    ) -> None:
        begun = perf_counter()
        ok = False
        value: Any = None
        limit: asyncio.Timeout | None = None
        try:
            warm_up = self._warm_ups[asyncio.get_running_loop(), type(call.client)]
            await warm_up.of(call.client)
            begun = perf_counter()
            async with asyncio.timeout(request.timeout and request.timeout + _GRACE) as limit:
                value = await call.send(request, on_chunk)
            ok = True
        except TimeoutError as error:
            if limit is not None and limit.expired():
                value = CallTimeout(f"no whole answer within {request.timeout:g} seconds")
            else:
                value = _broken(call, request, error)
        except CallError as error:
            value = error
        except MissingKey as error:  # the key was removed during the run
            value = AuthFailed(str(error))
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                value = Interrupted("the run was stopped while the request was under way")
            else:  # code inside the backend cancelled itself
                value = ConnectionLost(f"{call.name} of {request.plugin} cancelled itself")
        except BaseException as error:  # a bug in the plugin: the call fails, the run continues
            value = _broken(call, request, error)
        self._sent(handle, ok, value, perf_counter() - begun)


class _WarmUp:
    """Lets the clients of a kind warm up before their first request; those that wait share its error.

    They pass one by one, so that requests leave in the order in which they came.
    """

    __slots__ = ("_error", "_failed", "_is_done", "_lock")

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._is_done = False
        #: How many have failed, and the error of the last one.
        self._failed = 0
        self._error: Exception | None = None

    async def of(self, client: Backend) -> None:
        failed = self._failed
        async with self._lock:
            if self._is_done:
                return
            if self._error is not None and failed < self._failed:  # it was tried in the meantime
                raise self._error
            try:
                await asyncio.to_thread(client.warm_up)
            except Exception as error:
                self._failed, self._error = self._failed + 1, error
                raise
            self._is_done, self._error = True, None


def _broken(call: Call[Any], request: Request, error: BaseException) -> Rejected:
    """Return the error for what no plugin should raise: redacted text, for it may hold the API key."""
    secrets = call.client.secrets
    told = redact(str(describe(error).args[0]), *secrets)
    broken = Rejected(
        f"{call.name} of the backend {request.plugin} broke: {told}", billed="unknown"
    )
    trace = "".join(traceback.format_exception(error))
    broken.add_note(redact(trace, *secrets, limit=4000))
    return broken
