"""The iterator that hands results out while runs go on, to ``for`` and to ``async for``."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

from feste import blocking
from feste._compute.arrivals import Mailbox
from feste._compute.results import is_last, keep_report, report_later, warn_of
from feste._compute.steps import interruption, stop_gently
from feste._compute.totals import total
from feste.context import Settings
from feste.errors import FesteError
from feste.report import RunReport
from feste.report.headway import Course
from feste.report.progress import Line
from feste.scheduler.driver import driver
from feste.scheduler.run import Run

__all__ = ["Results"]

T = TypeVar("T")

#: Seconds that stopped runs get to end before they are reported.
_PATIENCE = 1.0


class Results(Generic[T]):
    """An iterator over results, sync and async; runs begin with the first step.

    When it is closed, dropped or cancelled, its runs are stopped at once, and requests that nobody
    else waits for are cancelled.

    :param settings: the settings of its runs.
    :param course: what a progress line shows of its runs.
    :param progress: whether one is shown.
    """

    def __init__(
        self, settings: Settings, course: Course | None = None, *, progress: bool = False
    ) -> None:
        self._settings = settings
        self._mail = Mailbox()
        self._ready: deque[T] = deque()
        #: Its runs that have begun and not ended, and the report of those that have ended.
        self._course = course or Course()
        self._line = Line(self._course, progress)
        self._started = 0.0
        self._failure: FesteError | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._process = os.getpid()
        self._thread = threading.get_ident()

    # --- what subclasses say ----------------------------------------------------------------------

    def _work(self) -> Callable[[], None] | None:
        """Return what must be done before anything else can be ready, and may take a while."""
        raise NotImplementedError

    def _take(self, mail: Any) -> None:
        """Take in what a run has handed out."""
        raise NotImplementedError

    def _ended(self, run: Run) -> None:
        """Handle the end of a run."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Raise what is left to raise when all has been handed out."""

    def _pop(self) -> T:
        return self._ready.popleft()

    @property
    def _is_due(self) -> bool:
        """Whether there may be work, although something is ready."""
        return False

    @property
    def _is_over(self) -> bool:
        return not self._course.runs

    # --- iterating --------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __next__(self) -> T:
        with self._alone():
            if not self._has_next():
                with blocking.waiting():
                    try:
                        for step in self._steps():
                            if step is None:
                                self._receive(self._mail.get())
                            else:
                                step()
                    except KeyboardInterrupt:
                        self._interrupt()
                        raise
                    except BaseException:
                        self.close()
                        raise
            if self._ready:
                return self._pop()
            self._stop()
        raise StopIteration

    async def __anext__(self) -> T:
        with self._alone():
            if not self._has_next():
                with blocking.waiting(awaited=True):
                    try:
                        for step in self._steps():
                            if step is None:
                                self._receive(await self._mail.aget())
                            else:
                                await asyncio.to_thread(step)
                    except BaseException:  # a cancellation above all
                        self.close()
                        raise
            if self._ready:
                return self._pop()
            self._stop()
        raise StopAsyncIteration

    def _has_next(self) -> bool:
        if self._closed or self._failure is not None:
            return True
        return bool(self._ready) and not self._is_due

    def _steps(self) -> Iterator[Callable[[], None] | None]:
        """Yield what to do until a result is ready or all is over; None is to wait for a run."""
        while not self._closed:
            for mail in self._mail.arrived():
                self._receive(mail)
            if self._failure is not None:
                return
            work = self._work()
            if work is not None:
                yield work
            elif self._ready or self._is_over:
                return
            else:
                yield None

    def _receive(self, mail: Any) -> None:
        if self._closed:
            return
        if type(mail) is not Run:
            self._take(mail)
        elif mail in self._course.runs:
            try:
                if mail.failure is not None:
                    self._course.runs.remove(mail)
                    raise mail.failure
                self._count(mail)
                warn_of(mail)
                self._ended(mail)
            except FesteError as error:  # raised when what came before it has been handed out
                self._failure = error
        if self._is_over:
            self._line.end()

    def _count(self, run: Run) -> None:
        before = self._course.before
        if before is None:
            self._started = run.started
        report = _report_of([run], before, self._started)
        self._course.ended(run, report)
        keep_report(report)

    def _begin(self, run: Run) -> None:
        """Submit a run, unless this was closed meanwhile."""
        mail = self._mail  # so that a run does not keep this iterator alive
        run.on_finish(lambda: mail.put(run))
        with self._lock:
            if self._closed:
                return
            self._course.begun(run)
            self._line.begin()
            driver().submit(run)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._process != os.getpid():
            if self._course.runs:
                raise FesteError(
                    "these results belong to the process that was forked: its runs do not go on here. "
                    "Begin a new iteration"
                )
            self._process = os.getpid()
        if not self._turn.acquire(blocking=False):
            raise FesteError("another thread or task is waiting for the next of these results")
        self._line.idle(False)
        try:
            yield
        finally:
            self._line.idle(True)
            self._turn.release()

    # --- ending -----------------------------------------------------------------------------------

    def _stop(self) -> None:
        was_closed = self._closed
        self.close()
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error
        if not was_closed:
            self._finish()

    def _interrupt(self) -> None:
        """Stop after Ctrl-C; what has ended and was not handed out goes into the error."""
        self._line.end()
        if not self._course.runs:
            self.close()
            return
        stop_gently(self._course.runs, self._settings)
        for mail in self._mail.arrived():
            if type(mail) is not Run:
                self._take(mail)
        for run in self._course.runs[:]:
            self._count(run)
        partial = tuple(self._ready)
        self._cancel()
        report = self._course.before
        assert report is not None
        raise interruption(partial, report, self._settings) from None

    def close(self) -> None:
        """Stop: nothing new begins, and what is under way is cancelled unless others wait for it."""
        runs = self._cancel()
        self._line.end()
        if runs:
            before = self._course.before
            started = self._started if before else runs[0].started
            report_later(lambda: _report_of(runs, before, started))

    def _cancel(self) -> list[Run]:
        """Stop, and return the runs that had not ended."""
        if self._process != os.getpid():  # the runs are those of the process that was forked
            self._closed = True
            return []
        with self._lock:
            self._closed = True
            runs, self._course.runs = self._course.runs, []
        self._ready.clear()
        self._mail.put(None)  # for a reader on another thread, which waits
        for run in runs:
            driver().stop(run, 0.0)
        return runs

    async def aclose(self) -> None:
        """Do what :meth:`close` does, which does not block; for ``contextlib.aclosing``."""
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_line"):
            self._line.end()
            if self._course.runs:  # who has left the loop in this thread can tell what was sent
                here = threading.get_ident() == self._thread and is_last(self._course.before)
                self.close() if here else self._cancel()


def _report_of(runs: Sequence[Run], before: RunReport | None, started: float) -> RunReport:
    """Add the reports of runs to the one of before; those that were stopped end in a moment."""
    report = before
    for run in runs:
        run.finished.wait(_PATIENCE)
        report = total(report, RunReport.of(run), run.started - started)
    assert report is not None, "there is a run"
    return report
