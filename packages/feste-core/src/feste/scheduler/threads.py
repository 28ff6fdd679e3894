"""A pool of threads that runs chunks of small tasks."""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue
from time import perf_counter

from feste import blocking
from feste.scheduler.executor import Post, PyTask
from feste.scheduler.growth import Emission
from feste.scheduler.work import describe, evaluate, result_of

__all__ = ["ThreadPool", "run_chunk"]

Chunk = list[PyTask]


class ThreadPool:
    """Threads that are made when they are needed and wait for more.

    A thread that waits for a run of its own (a blocking call inside a task) is made up for by one
    more thread as long as it waits.

    :param size: how many run at once.
    :param post: where to report.
    """

    def __init__(self, size: int, post: Post) -> None:
        self.size = size
        self._post = post
        self._queue: SimpleQueue[tuple[Chunk, deque[PyTask]] | None] = SimpleQueue()
        self._begun: dict[int, deque[PyTask]] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()

    def run(self, chunk: Chunk) -> None:
        """Run a chunk in one of the threads.

        :param chunk: the tasks.
        """
        left = deque(chunk)
        self._begun[id(chunk)] = left
        with self._lock:
            if self._idle > 0:
                self._idle -= 1  # promised to this chunk
            else:
                self._spawn()
        self._queue.put((chunk, left))

    def _spawn(self) -> None:
        name = f"feste-worker-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        with blocking.inside("pool"):
            blocking.belong(self)
            while (item := self._queue.get()) is not None:
                chunk, left = item
                run_chunk(left, self._post)
                self._begun.pop(id(chunk), None)
                with self._lock:
                    self._idle += 1
                self._post(("free", "thread", chunk))

    def reclaim(self, chunk: Chunk) -> None:
        """Post as returned what is not begun of a chunk.

        :param chunk: the list given to :meth:`run`.
        """
        left = self._begun.get(id(chunk))
        taken: list[PyTask] = []
        while left:
            try:
                taken.append(left.popleft())
            except IndexError:  # its thread took the last one
                break
        if taken:
            self._post(("returned", taken))

    def waiting(self, more: int) -> None:
        """Hear that one of the threads begins to wait for a run (+1), or ends to (-1).

        :param more: +1 or -1.
        """
        with self._lock:
            self.size += more
        self._post(("capacity", "thread"))

    def close(self) -> None:
        """End the threads when they have finished what they are at."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)


def run_chunk(left: deque[PyTask], post: Post) -> None:
    """Run tasks in order and report each; what depends on a failed one is returned.

    :param left: the tasks; taken from the left as they begin.
    :param post: where to report.
    """
    returned: list[PyTask] = []
    while left:
        try:
            task = left.popleft()
        except IndexError:  # taken back meanwhile
            break
        values = task.values
        for position, value in enumerate(values):
            if type(value) is PyTask:
                if not value.ok:
                    returned.append(task)
                    break
                values[position] = value.result
        else:
            begun = perf_counter()
            try:
                copied = task.run.context.copy()
                result = copied.run(evaluate, task.fn, task.args, task.kwargs, values)
                if task.stage == "run":
                    result = result_of(result)
                task.ok = type(result) is not Emission
                task.result = result
                post(("done", task, True, result, perf_counter() - begun))
            except BaseException as error:  # a task may raise anything, SystemExit too
                task.ok = False
                post(("done", task, False, describe(error), perf_counter() - begun))
    if returned:
        post(("returned", returned))
