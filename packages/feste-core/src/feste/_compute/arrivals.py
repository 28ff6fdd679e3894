"""Pass what arrives on Feste's threads to the thread or the event loop of a consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from feste.blocking import Cancellations

__all__ = ["Mailbox"]

#: Seconds between checks for a signal in a waiting thread.
_LOOK = 0.25


class Mailbox:
    """A queue that one consumer reads, from a thread or from a coroutine."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._wake: Callable[[], None] | None = None
        self._cancellations = Cancellations()

    def put(self, mail: Any) -> None:
        """Add something; may be called from any thread.

        :param mail: what has arrived.
        """
        self._queue.put(mail)
        wake = self._wake
        if wake is not None:
            wake()

    def arrived(self) -> list[Any]:
        """Return all that is here, without waiting."""
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    def get(self) -> Any:
        """Wait for something, and return it."""
        self._cancellations.check()
        while True:  # a signal that arrives just before a thread blocks does not wake it, so poll
            with suppress(Empty):
                return self._queue.get(timeout=_LOOK)
            self._cancellations.check()

    async def aget(self) -> Any:
        """Do what :meth:`get` does, without blocking the running event loop."""
        loop = asyncio.get_running_loop()
        while True:  # polls, too: a loop about to sleep can miss a signal
            with suppress(Empty):
                return self._queue.get_nowait()
            called: asyncio.Future[None] = loop.create_future()
            self._wake = _caller(loop, called)
            try:
                if self._queue.empty():  # else it came before the loop could be called
                    await asyncio.wait([called], timeout=_LOOK)
            finally:
                self._wake = None


def _caller(loop: asyncio.AbstractEventLoop, called: asyncio.Future[None]) -> Callable[[], None]:
    def wake() -> None:
        if not called.done():
            called.set_result(None)

    def call() -> None:
        with suppress(RuntimeError):  # the loop is closed, so nothing waits any more
            loop.call_soon_threadsafe(wake)

    return call
