"""Show the progress of long runs; it polls them, so it costs them nothing.

A terminal shows a bar that disappears when they end, a notebook a line that stays. One thread looks
after all of them. Nobody waits for it but ``compute``, which gives back a terminal without a bar: a
coroutine must not block its loop, and what is collected as garbage no thread at all.
"""

from __future__ import annotations

import atexit
import contextvars
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from html import escape
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from feste.report.bar import Bar, is_terminal
from feste.report.headway import Course, Headway

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["Line", "in_notebook", "in_terminal", "shown"]

#: Seconds that a run must take before it shows a bar that was not asked for.
_PATIENCE = 0.5
_EVERY = 0.1
#: Seconds after which a loop that nobody asks for more gives the terminal to others.
_IDLE = 1.0


class Line:
    """The progress line of some runs, if one is wanted.

    :param course: the runs.
    :param progress: True shows it in a terminal or notebook; False never; ``"auto"`` only in a
        terminal, and only if the runs take a while.
    """

    def __init__(self, course: Course, progress: bool | str) -> None:
        self._course = course
        self._progress = progress
        self._headway = Headway(course)
        #: Where a notebook finds the cell that the output belongs to, and what is shown there.
        self._context = contextvars.copy_context()
        self._cell: Any = None
        self._told = threading.Event()
        self.in_notebook = False
        self._began = -1.0
        self._idle_since = math.inf
        self.over = False

    def begin(self) -> None:
        """Show it from now on, until it is over."""
        if self._began >= 0 or self.over or self._progress is False:
            return
        self.in_notebook = self._progress is True and in_notebook()
        if self.in_notebook or (in_terminal() and os.environ.get("TERM") != "dumb"):
            self._began = time.monotonic()
            _display.add(self)

    def end(self) -> None:
        """Show it no more; waits for nothing, as it may be called while garbage is collected."""
        self.over = True
        if self._began >= 0:
            _display.look()

    def take_down(self) -> None:
        """Do what :meth:`end` does; a terminal has no bar then, and a cell its last words."""
        self.end()
        if self._began < 0:
            return
        if self.in_notebook:
            self._told.wait(_PATIENCE)
        else:
            _display.take_down(self)

    def idle(self, now: bool) -> None:
        """Tell whether nobody waits for its runs, who are those of a loop.

        :param now: whether that begins now, or ends.
        """
        if self._began >= 0:
            self._idle_since = time.monotonic() if now else math.inf

    def is_due(self, now: float, *, is_shown: bool = False) -> bool:
        """Return whether it is to be shown.

        :param now: the monotonic time in seconds.
        :param is_shown: whether it is: one that is not does not begin while nobody waits for its
            runs, since the program may be in the middle of a line then.
        """
        patience = 0.0 if self._progress is True else _PATIENCE
        idle = now - self._idle_since if math.isfinite(self._idle_since) else 0.0
        awaited = idle < _IDLE if is_shown else not idle
        return not self.over and awaited and now - self._began >= patience

    def draw(self, bar: Bar, now: float) -> None:
        """Draw it in a terminal.

        :param bar: what it is drawn with.
        :param now: the monotonic time in seconds.
        """
        at, name = self._headway.look(now), self._course.name
        passed = str(timedelta(seconds=int(now - self._began)))
        words = f"{at.fit(bar.room(name) - len(passed) - 1)} {passed}"
        with bar.lock:
            if not self.over:
                bar.draw(name, at.share, words)

    def tell(self, now: float) -> None:
        """Show or change it in its cell: HTML, or text where the notebook shows no HTML.

        :param now: the monotonic time in seconds.
        """
        self._context.run(self._tell, now, self.over)

    def _tell(self, now: float, over: bool) -> None:
        at = self._headway.look(now)
        told = at.outcome if over else at.words
        words = f"{self._course.name}: {told}, {now - self._began:.1f} s"
        value = "" if at.total is None else f' value="{at.done}" max="{max(1, at.total)}"'
        html = f"<div><progress{value}></progress> {escape(words)}</div>"
        shown = {"text/plain": words, "text/html": html}
        if self._cell is None:
            show = import_module("IPython.display").display
            self._cell = show(shown, raw=True, display_id=True)
        else:
            self._cell.update(shown, raw=True)
        if over:
            self._told.set()


@contextmanager
def shown(run: Run, progress: bool | str, *, awaited: bool = False) -> Iterator[None]:
    """Show the progress of a run during a ``with`` block that waits for it.

    :param run: the run.
    :param progress: as for :class:`Line`.
    :param awaited: whether the block is one of a coroutine, which must not block at its end.
    """
    line = Line(Course([run], run.name), progress)
    line.begin()
    run.on_finish(line.end)  # the block of a coroutine may never end
    try:
        yield
    finally:
        line.end() if awaited else line.take_down()


class _Display:
    """Shows the lines of this process: all in their cells, or one at a time in the terminal."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        #: Wakes the thread; its ``put`` may be called while any lock is held, even by the same thread.
        self._mail: SimpleQueue[None] = SimpleQueue()
        self._bar = Bar()
        self._shown: Line | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._drew = 0.0
        self._closed = False

    def add(self, line: Line) -> None:
        """Show a line until it is over.

        :param line: the line.
        """
        self._lines.append(line)
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                name = "feste-progress"
                self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
                self._thread.start()
                atexit.register(self._close)
        self.look()

    def look(self) -> None:
        """Let the thread look at the lines now."""
        self._mail.put(None)

    def take_down(self, line: Line | None = None) -> None:
        """Give the terminal back.

        :param line: the line whose bar is meant; None is any.
        """
        if line is not None and self._shown is not line:
            return
        with self._bar.lock:
            if line is None or self._shown is line:
                self._bar.close()
                self._shown = None

    def _close(self) -> None:
        self._closed = True
        self.take_down()

    def _watch(self) -> None:
        while True:
            try:
                while True:
                    self._mail.get(timeout=_EVERY if self._lines else None)
                    if self._mail.empty():
                        break
            except Empty:
                pass
            try:
                self._turn(time.monotonic())
            except BaseException:  # a bug here is told, and ends the lines and not the runs
                self._lines.clear()
                self.take_down()
                raise

    def _turn(self, now: float) -> None:
        shown = self._shown
        if shown is None or not shown.is_due(now, is_shown=True):
            lines = [line for line in self._lines if not line.in_notebook]
            shown = next((line for line in lines if line.is_due(now)), None)
        if shown is not self._shown:
            self.take_down()
            with self._bar.lock:
                if shown is not None and not self._closed and in_terminal():
                    self._bar.open(sys.stderr)
                self._shown = shown
            self._drew = 0.0
        is_time = now - self._drew >= _EVERY
        if is_time:
            self._drew = now
            if shown is not None:
                shown.draw(self._bar, now)
        for line in self._lines[:]:
            over = line.over  # before its last words
            if line.in_notebook and (over or (is_time and line.is_due(now))):
                line.tell(now)
            if over:
                self._lines.remove(line)

    def forget(self) -> None:
        """Give back the streams in a forked child, which has no such thread."""
        self._bar.lock = threading.RLock()
        self._bar.drop()


_display = _Display()


def _forget() -> None:
    global _display
    _display.forget()
    _display = _Display()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def in_terminal() -> bool:
    """Whether stderr is a terminal; it may also be missing, closed or replaced."""
    return is_terminal(sys.stderr)


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    python = sys.modules.get("IPython")
    return python is not None and hasattr(python.get_ipython(), "kernel")
