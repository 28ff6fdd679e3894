"""Event loops in threads of their own: one for requests, one for users' async tasks."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from feste import blocking
from feste.backend.clients import close_clients

__all__ = ["LoopThread"]

#: Seconds that coroutines get to end when their loop is closed.
_PATIENCE = 2.0


class LoopThread:
    """One asyncio loop, running in a thread that is made on first use.

    :param name: of the thread.
    :param aside: the role of threads that run blocking functions for the loop.
    :param threads: how many of these may run at once.
    :param places: hears of each coroutine that awaits a run, or None.
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
        self._lock = threading.Lock()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; the first look starts it."""
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
        with blocking.inside("loop"):
            while True:
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt):  # of a task that user code began: not ours
                    continue
                return

    def start(self, name: Any, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a coroutine; from any thread.

        :param name: to cancel it by.
        :param make: makes the coroutine, on the loop.
        """
        self.loop.call_soon_threadsafe(self._start, name, make)

    def _start(self, name: Any, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self.loop.create_task(make())
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    def cancel(self, name: Any) -> None:
        """Cancel a coroutine that was started, if it still runs; from any thread.

        :param name: its name.
        """
        loop = self._loop
        if loop is None:
            return

        def stop() -> None:
            task = self._tasks.get(name)
            if task is not None:
                loop.call_soon(task.cancel)  # after its first step: else it could not even report

        loop.call_soon_threadsafe(stop)

    def close(self) -> None:
        """Cancel what runs, close what was opened on the loop, end the thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        with suppress(TimeoutError):  # a coroutine that will not be cancelled ends with its thread
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
    """Threads for what blocks, such as ``asyncio.to_thread``; the base's own are never started.

    They are daemons, since a plain executor's keep Python from ending until the last of them is
    through. One that waits for a run is made up for by one more.

    :param name: what the threads' names begin with.
    :param role: what the threads are; see :mod:`feste.blocking`.
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
        """Hear that one of the threads begins to wait for a run (+1), or ends to (-1).

        :param more: +1 or -1.
        """
        self._change(size=more)

    def _change(self, *, queued: int = 0, busy: int = 0, size: int = 0) -> None:
        """Count, and make a thread if there is work that no idle one will take."""
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
                del item  # an idle thread keeps nobody's values alive
                self._change(busy=-1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads; nobody waits for those that are busy.

        :param wait: not heeded.
        :param cancel_futures: not heeded.
        """
        for _ in range(self._made):
            self._queue.put(None)


def _carry_out(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # whoever awaits it shall see it, whatever it is
        future.set_exception(error)
    else:
        future.set_result(result)
