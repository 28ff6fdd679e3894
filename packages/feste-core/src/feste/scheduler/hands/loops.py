"""Event loops in their own threads: one for requests, one for users' async tasks."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from queue import SimpleQueue
from typing import Any

from feste import blocking
from feste.backend.clients import close_clients

__all__ = ["LoopThread"]

#: Seconds that coroutines get to end when their loop is closed.
_PATIENCE = 2.0


class LoopThread:
    """One asyncio loop that runs in its own thread, started on first use.

    :param name: the name of the thread.
    :param aside: the role of the threads that run blocking functions for the loop.
    :param threads: how many of these may run at once.
    :param places: is notified when a coroutine waits for a run, or None.
    """

    def __init__(
        self,
        name: str,
        aside: blocking.Role = "",
        threads: int = 64,
        places: blocking.Waits | None = None,
    ) -> None:
        self.name = name
        self._places = places
        self._aside = aside
        self._threads = threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: dict[Any, asyncio.Task[Any]] = {}
        #: The names of coroutines that were to start and have not ended.
        self._open: set[Any] = set()
        #: Those of loops that broke; collected as garbage, they would report that they were closed.
        self._lost: list[dict[Any, asyncio.Task[Any]]] = []
        #: Coroutines to start, and whether the loop was woken for them.
        self._coming: deque[tuple[Any, Callable[[], Coroutine[Any, Any, None]], Context | None]] = (
            deque()
        )
        self._woken = False
        self._lock = threading.Lock()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; started on first access."""
        with self._lock:
            if self._loop is None:
                ready = threading.Event()
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(_Aside(self.name, self._aside, self._threads))
                self._thread = threading.Thread(
                    target=self._run, args=(self._loop, ready), name=self.name, daemon=True
                )
                self._thread.start()
                ready.wait()
            return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop, ready: threading.Event) -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(ready.set)
        if self._places is not None:
            blocking.belong(self._places)
        try:
            with blocking.inside("loop"):
                while self._loop is loop:  # else it was closed here; anybody else's stop is undone
                    with suppress(SystemExit, KeyboardInterrupt):  # from a user's own asyncio task
                        loop.run_forever()
        finally:
            with self._lock:
                if self._loop is loop:  # it broke: the next coroutine gets a new one
                    self._loop = self._thread = None
                    self._lost.append(self._tasks)
                    self._tasks = {}
                    self._woken = False

    def start(
        self,
        name: Any,
        make: Callable[[], Coroutine[Any, Any, None]],
        context: Context | None = None,
    ) -> None:
        """Start a coroutine; may be called from any thread.

        :param name: identifies the coroutine for :meth:`cancel`.
        :param make: makes the coroutine, on the loop.
        :param context: what it runs in; None where that does not matter.
        """
        self._open.add(name)
        self._coming.append((name, make, context))
        if not self._woken:  # waking the loop costs a system call: once for all that come together
            self._woken = True
            self.loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        self._woken = False  # first: what comes from here on wakes the loop again
        while self._coming:
            name, make, context = self._coming.popleft()
            task = self.loop.create_task(make(), context=context)
            self._tasks[name] = task
            task.add_done_callback(functools.partial(self._forget, name))

    def _forget(self, name: Any, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(name, None)
        self._open.discard(name)

    def has_lost(self, name: Any) -> bool:
        """Return whether a coroutine will never end, since its loop broke; from any thread.

        :param name: its name.
        """
        return name in self._open and name not in self._tasks and not self._woken

    def cancel(self, name: Any) -> None:
        """Cancel a coroutine if it still runs; may be called from any thread.

        :param name: its name.
        """
        loop = self._loop
        if loop is None:
            return

        def stop() -> None:
            task = self._tasks.get(name)
            if task is not None:
                loop.call_soon(task.cancel)  # after its first step, or it could not report

        loop.call_soon_threadsafe(stop)

    def close(self) -> None:
        """Cancel all coroutines, close the clients opened on the loop, and end the thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            self._coming.clear()
            self._open.clear()
            self._woken = False
        if loop is None or thread is None:
            return
        with suppress(TimeoutError):  # a coroutine that ignores its cancellation is abandoned
            asyncio.run_coroutine_threadsafe(self._wind_up(loop), loop).result(_PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_PATIENCE)
        if not thread.is_alive():
            loop.close()

    async def _wind_up(self, loop: asyncio.AbstractEventLoop) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_clients(loop)
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()


class _Aside(ThreadPoolExecutor):
    """Threads for blocking functions, such as ``asyncio.to_thread``; the base class starts none.

    They are daemons, because a plain executor's threads keep Python from exiting until the last one
    has finished. While a thread waits for a run, one extra thread replaces it.

    :param name: the prefix of the threads' names.
    :param role: the role of the threads; see :mod:`feste.blocking`.
    :param size: how many run at once.
    """

    def __init__(self, name: str, role: blocking.Role, size: int) -> None:
        super().__init__(1)
        self._name = name
        self._role = role
        self._size = size
        self._made = self._busy = self._queued = 0
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._changing = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function in one of the threads.

        :param fn: the function.
        :param args: its arguments.
        :param kwargs: its keyword arguments.
        """
        future: Future[Any] = Future()
        self._change(queued=1)
        self._queue.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def waiting(self, more: int) -> None:
        """Adjust the pool's size when a thread starts (+1) or stops (-1) waiting for a run.

        :param more: +1 or -1.
        """
        self._change(size=more)

    def _change(self, *, queued: int = 0, busy: int = 0, size: int = 0) -> None:
        """Update the counts, and start a thread if there is work that no idle one will take."""
        with self._changing:
            self._queued += queued
            self._busy += busy
            self._size += size
            if self._queued > self._made - self._busy and self._made < self._size:
                name = f"{self._name}-aside-{self._made}"
                self._made += 1
                threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        with blocking.inside(self._role):
            if self._role == "pool":
                blocking.belong(self)
            while (item := self._queue.get()) is not None:
                self._change(queued=-1, busy=1)
                _carry_out(*item)
                del item  # so that an idle thread keeps no values alive
                self._change(busy=-1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads without waiting for busy ones.

        :param wait: ignored.
        :param cancel_futures: ignored.
        """
        for _ in range(self._made):
            self._queue.put(None)


def _carry_out(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # passed on to the awaiting coroutine, whatever it is
        future.set_exception(error)
    else:
        future.set_result(result)
