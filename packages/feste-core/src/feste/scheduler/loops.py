"""Event loops in threads of their own: one for requests, one for users' async tasks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from feste import blocking
from feste.backend.clients import close_clients

__all__ = ["LoopThread"]


class LoopThread:
    """One asyncio loop, running in a thread that is made on first use.

    :param name: of the thread.
    :param threads: how many blocking functions the loop may run aside at once.
    """

    def __init__(self, name: str, threads: int = 64) -> None:
        self.name = name
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
                self._loop.set_default_executor(
                    concurrent.futures.ThreadPoolExecutor(
                        self._threads, thread_name_prefix=f"{self.name}-aside"
                    )
                )
                self._thread = threading.Thread(
                    target=self._run, args=(self._loop, ready), name=self.name, daemon=True
                )
                self._thread.start()
                ready.wait()
            return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop, ready: threading.Event) -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(ready.set)
        with blocking.inside("loop"):
            loop.run_forever()

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
        """Cancel a coroutine that was started; from any thread.

        :param name: its name.
        """

        def stop() -> None:
            task = self._tasks.get(name)
            if task is not None:
                task.cancel()

        self.loop.call_soon_threadsafe(stop)

    def close(self) -> None:
        """Cancel what runs, close what was opened on the loop, end the thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._wind_up(loop), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        loop.close()

    async def _wind_up(self, loop: asyncio.AbstractEventLoop) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_clients(loop)
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()
