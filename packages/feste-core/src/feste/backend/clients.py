"""SDK clients: built on first use, one per event loop, closed with their loop.

An async SDK client is bound to the loop where it was first used, cannot be pickled, and after a
fork belongs to the parent. So a backend holds configuration, and a :class:`PerLoop` holds its SDK
clients.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

__all__ = ["PerLoop", "close_clients"]

C = TypeVar("C")

_all: weakref.WeakSet[PerLoop[Any]] = weakref.WeakSet()


class PerLoop(Generic[C]):
    """One SDK client for each running event loop.

    :param make: builds a client; called on the loop.
    :param close: closes a client.
    """

    def __init__(self, make: Callable[[], C], close: Callable[[C], Awaitable[Any]]) -> None:
        self._make = make
        self._close = close
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[int, C]] = (
            weakref.WeakKeyDictionary()
        )
        _all.add(self)

    def get(self) -> C:
        """Return the client of the running loop."""
        loop = asyncio.get_running_loop()
        process, client = self._clients.get(loop, (0, None))
        if process != os.getpid() or client is None:
            client = self._make()
            self._clients[loop] = (os.getpid(), client)
        return client

    async def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the client of a loop, if there is one.

        :param loop: the running loop.
        """
        _, client = self._clients.pop(loop, (0, None))
        if client is not None:
            await self._close(client)


async def close_clients(loop: asyncio.AbstractEventLoop) -> None:
    """Close the clients of all backends on one loop.

    :param loop: the running loop.
    """
    for clients in list(_all):
        await clients.close(loop)
