"""What a worker has to tell the client, kept until the client has confirmed it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import NamedTuple

__all__ = ["Outbox", "Told"]

#: Seconds for which outcomes gather before they go together.
_LINGER = 0.002


class Told(NamedTuple):
    """Something about a request: a piece of its text, or its end.

    :param ordinal: its number in the outbox.
    :param request: the number of the request.
    :param is_piece: whether it is a piece.
    :param data: the pickled text, or the pickled arguments of ``sent``.
    """

    ordinal: int
    request: int
    is_piece: bool
    data: bytes


class Outbox:
    """The outcomes of requests on their way to the client.

    :param loop: the loop where they are taken; they are put in on any thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._told: deque[Told] = deque()
        self._count = 0
        self._some = asyncio.Event()
        #: The requests that came here and whose end is not confirmed; set if there are none.
        self.open: set[int] = set()
        self.is_empty = asyncio.Event()
        self.is_empty.set()

    def expect(self, request: int) -> None:
        """Note a request that is to end.

        :param request: its number.
        """
        self.open.add(request)
        self.is_empty.clear()

    def put(self, request: int, is_piece: bool, data: bytes) -> None:
        """Add something; may be called from any thread.

        :param request: the number of the request.
        :param is_piece: whether it goes on.
        :param data: what is told.
        """
        with suppress(RuntimeError):  # the worker has ended
            self._loop.call_soon_threadsafe(self._add, request, is_piece, data)

    def _add(self, request: int, is_piece: bool, data: bytes) -> None:
        if request in self.open:  # it was not given up
            self._count += 1
            self._told.append(Told(self._count, request, is_piece, data))
            self._some.set()

    async def take(self, seen: int, patience: float) -> list[Told]:
        """Return what the client has not seen.

        :param seen: the number of the last that it has.
        :param patience: seconds to wait for something.
        """
        while self._told and self._told[0].ordinal <= seen:
            told = self._told.popleft()
            if not told.is_piece:
                self.open.discard(told.request)
        if not self.open:
            self.is_empty.set()
        if not self._told:
            self._some.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._some.wait()
                    await asyncio.sleep(_LINGER)
        return list(self._told)

    def give_up(self) -> list[int]:
        """Forget everything; return the numbers of the requests that had not ended."""
        numbers = list(self.open)
        self._told.clear()
        self.open.clear()
        self.is_empty.set()
        self._some.set()  # who waits for more need not
        return numbers
