"""A pool of threads that runs chunks of small tasks."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Any

from feste import blocking
from feste.scheduler.executor import PyTask, Reporter
from feste.scheduler.growth import Emission
from feste.scheduler.work import context_of, describe, result_of, run_task

__all__ = ["Begun", "ThreadPool", "run_chunk"]

Chunk = list[PyTask]

#: Reports wait at most this many seconds for others; taking back the chunk's tail sends them too.
_TOGETHER = 0.001
#: Seconds that the threads get to finish what they are at when the pool is closed.
_PATIENCE = 1.0


class ThreadPool:
    """Threads that are made when they are needed and wait for more.

    A thread that waits for a run of its own (a blocking call inside a task) is made up for by one
    more thread as long as it waits.

    :param where: the name of the place.
    :param size: how many run at once.
    :param report: whom to tell what happened.
    """

    def __init__(self, where: str, size: int, report: Reporter) -> None:
        self.where = where
        self.size = size
        self._report = report
        self._queue: SimpleQueue[Begun | None] = SimpleQueue()
        self._begun: dict[int, Begun] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()

    def run(self, chunk: Chunk) -> None:
        """Run a chunk in one of the threads.

        :param chunk: the tasks.
        """
        begun = self._begun[id(chunk)] = Begun(chunk)
        with self._lock:
            if self._idle > 0:
                self._idle -= 1  # promised to this chunk
            else:
                self._spawn()
        self._queue.put(begun)

    def _spawn(self) -> None:
        name = f"feste-{self.where}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        with blocking.inside("pool"):
            blocking.belong(self)
            while (begun := self._queue.get()) is not None:
                run_chunk(begun, self._report)
                with self._lock:
                    self._begun.pop(id(begun.chunk), None)
                    self._idle += 1
                if begun.abandoned:
                    self.waiting(-1)
                self._report.free(self.where, begun.chunk)
                begun = None  # an idle thread keeps nobody's values alive

    def reclaim(self, chunk: Chunk) -> None:
        """Return the unstarted tasks of a chunk if it has made no progress since the last call.

        :param chunk: the list given to :meth:`run`.
        """
        begun = self._begun.get(id(chunk))
        if begun is None:
            return
        begun.flush(self._report)
        left = len(begun.left)
        if left != begun.seen:  # it goes on: only what waits behind one long task is taken back
            begun.seen = left
            return
        taken: list[PyTask] = []
        while begun.left:
            try:
                taken.append(begun.left.popleft())
            except IndexError:  # its thread took the last one
                break
        if taken:
            self._report.returned(taken)

    def abandon(self, chunk: Chunk) -> None:
        """Leave a chunk to its thread, which cannot be stopped; another takes its place meanwhile.

        :param chunk: any list of tasks; one that is not under way here is ignored.
        """
        with self._lock:
            begun = self._begun.get(id(chunk))
            if begun is None or begun.abandoned:
                return
            begun.abandoned = True
        begun.left.clear()
        self.waiting(1)

    def waiting(self, more: int) -> None:
        """Hear that one of the threads begins to wait for a run (+1), or ends to (-1).

        :param more: +1 or -1.
        """
        with self._lock:
            self.size += more
        self._report.capacity(self.where)

    def close(self) -> None:
        """End the threads; one that is in the middle of something ends with Python."""
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        deadline = monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))


class Begun:
    """A chunk on its way.

    :param chunk: the tasks as they were given.
    """

    __slots__ = ("abandoned", "chunk", "left", "outcomes", "seen")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.left = deque(chunk)
        self.outcomes: deque[tuple[PyTask, bool, Any, float]] = deque()
        self.seen = -1
        self.abandoned = False

    def flush(self, report: Reporter) -> None:
        """Report what is not reported yet; from any thread.

        :param report: whom to tell.
        """
        outcomes = []
        while self.outcomes:
            try:
                outcomes.append(self.outcomes.popleft())
            except IndexError:  # another thread flushes too
                break
        if outcomes:
            report.done_together(outcomes)


def run_chunk(begun: Begun, report: Reporter) -> None:
    """Run tasks in order and report each; what depends on a failed one is returned.

    Reports of the quickest tasks go together: each would wake the brain's thread, which then fights
    for the interpreter with the work itself.

    :param begun: the chunk; tasks are taken from its left as they begin.
    :param report: whom to tell.
    """
    returned: list[PyTask] = []
    left, outcomes = begun.left, begun.outcomes
    last = perf_counter()
    while left:
        try:
            task = left.popleft()
        except IndexError:  # taken back meanwhile
            break
        if not _inputs_there(task):
            returned.append(task)
            continue
        start = perf_counter()
        try:
            result = context_of(task).run(run_task, task)
            if task.stage == "run":
                result = result_of(result)
            task.ok = type(result) is not Emission
            task.result = result
            now = perf_counter()
            outcomes.append((task, True, result, now - start))
        except BaseException as error:  # a task may raise anything, SystemExit too
            task.ok = False
            now = perf_counter()
            outcomes.append((task, False, describe(error), now - start))
        if now - last > _TOGETHER:
            begun.flush(report)
            last = now
    begun.flush(report)
    if returned:
        report.returned(returned)


def _inputs_there(task: PyTask) -> bool:
    """Put in the results of earlier tasks of the chunk; False if one of them has none."""
    values = task.values
    for position, value in enumerate(values):
        if type(value) is PyTask:
            if not value.ok:
                return False
            values[position] = value.result
    return True
