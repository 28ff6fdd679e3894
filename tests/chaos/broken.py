"""Executors that lose work, for the programs of the chaos suite."""

from __future__ import annotations

import asyncio
from typing import Any

from feste.backend import Call, OnChunk, Request
from feste.scheduler import LocalExecutor

__all__ = ["BrokenLoop", "ForeignStop", "Silent"]


class Silent(LocalExecutor):
    """Never reports the 50th request: its future was dropped."""

    count = 0

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request, or drop it."""
        self.count += 1
        if self.count != 50:
            super().send(handle, call, request, on_chunk)


class ForeignStop(LocalExecutor):
    """Has its loop stopped with the 50th request, as code of a backend might."""

    count = 0

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request, and perhaps do harm."""
        super().send(handle, call, request, on_chunk)
        self.count += 1
        if self.count == 50:
            self.harm(self.requests.loop.loop)

    def harm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop the loop."""
        loop.call_soon_threadsafe(loop.stop)


class BrokenLoop(ForeignStop):
    """Has the thread of its loop die with the 50th request, as with a descriptor that is closed."""

    def harm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the loop fail as it waits."""

        def fail(*args: Any) -> None:
            raise OSError(9, "Bad file descriptor")

        vars(loop)["_selector"].select = fail
        loop.call_soon_threadsafe(int)
