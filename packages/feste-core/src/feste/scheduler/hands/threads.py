"""A thread pool that runs chunks of small tasks."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Any

from feste import blocking
from feste.fused import Halted
from feste.scheduler.emission import Emission
from feste.scheduler.executor import PyTask, Reporter
from feste.scheduler.work import context_of, describe, result_of, run_task

__all__ = ["Begun", "ThreadPool", "run_chunk"]

Chunk = list[PyTask]

#: Reports are batched for at most this many seconds; ``reclaim`` sends them too.
_TOGETHER = 0.001
#: Seconds that the threads get to finish their current task when the pool is closed.
_PATIENCE = 1.0


class ThreadPool:
    """Daemon threads, started on demand and reused.

    While a thread waits for a nested run (a blocking call inside a task), one extra thread replaces
    it.

    :param where: the name of the executor's place.
    :param size: how many threads may run at once.
    :param report: receives the reports.
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
                begun = None  # so that an idle thread keeps no values alive

    def reclaim(self, chunk: Chunk) -> None:
        """Return the unstarted tasks of a chunk if it has made no progress since the last call.

        :param chunk: the list given to :meth:`run`.
        """
        begun = self._begun.get(id(chunk))
        if begun is None:
            return
        begun.flush(self._report)
        left = len(begun.left)
        if left != begun.seen:  # progress: take tasks back only from behind one long task
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
        """Stop waiting for a chunk; its thread cannot be stopped, so one extra thread replaces it.

        :param chunk: any list of tasks; one that does not run here is ignored.
        """
        with self._lock:
            begun = self._begun.get(id(chunk))
            if begun is None or begun.abandoned:
                return
            begun.abandoned = True
        begun.left.clear()
        self.waiting(1)

    def waiting(self, more: int) -> None:
        """Adjust the pool's size when a thread starts (+1) or stops (-1) waiting for a run.

        :param more: +1 or -1.
        """
        with self._lock:
            self.size += more
        self._report.capacity(self.where)

    def close(self) -> None:
        """End the threads; a busy one runs on as a daemon until Python exits."""
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        deadline = monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))


class Begun:
    """A chunk that has been started.

    :param chunk: the tasks, as given to :meth:`ThreadPool.run`.
    """

    __slots__ = ("abandoned", "chunk", "left", "outcomes", "seen")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.left = deque(chunk)
        self.outcomes: deque[tuple[PyTask, bool, Any, float]] = deque()
        self.seen = -1
        self.abandoned = False

    def flush(self, report: Reporter) -> None:
        """Send the outcomes that are not reported yet; may be called from any thread.

        :param report: receives them.
        """
        outcomes = []
        while self.outcomes:
            try:
                outcomes.append(self.outcomes.popleft())
            except IndexError:  # another thread is flushing too
                break
        if outcomes:
            report.done_together(outcomes)


def run_chunk(begun: Begun, report: Reporter) -> None:
    """Run tasks in order and report each; return those that depend on a failed one.

    Reports of the quickest tasks are batched: each would wake the brain's thread, which then
    competes with the work for the GIL.

    :param begun: the chunk; tasks are popped from its ``left`` as they start.
    :param report: receives the reports.
    """
    returned: list[PyTask] = []
    left, outcomes = begun.left, begun.outcomes
    last = perf_counter()
    while left:
        try:
            task = left.popleft()
        except IndexError:  # reclaimed in the meantime
            break
        if not _inputs_there(task):
            returned.append(task)
            continue
        start = perf_counter()
        try:
            result = context_of(task).run(run_task, task)
            if task.stage == "run":
                result = result_of(result)
            task.ok = type(result) not in (Emission, Halted)
            task.result = result
            now = perf_counter()
            outcomes.append((task, True, result, now - start))
        except BaseException as error:  # a task may raise anything, even SystemExit
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
    """Fill in the results of earlier tasks of the chunk; return False if one of them has none."""
    values = task.values
    for position, value in enumerate(values):
        if type(value) is PyTask:
            if not value.ok:
                return False
            values[position] = value.result
    return True
