"""Show the progress of long runs; it polls them, so it costs them nothing.

A terminal shows a bar that disappears when they end, a notebook a line that stays.
"""

from __future__ import annotations

import atexit
import contextvars
import functools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

from feste.report.headway import Course, Headway

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["Line", "in_terminal", "shown"]

#: Seconds that a run must take before it shows a bar that was not asked for.
_PATIENCE = 0.5
_EVERY = 0.1
#: The columns of the bar, and of the time that has passed, with the spaces between.
_BAR, _CLOCK = 12, 11
#: Whose turn it is to show a bar: two at a time would overwrite each other.
_terminal = threading.Lock()


class Line:
    """The progress line of some runs, in a thread of its own; there is none where none is wanted.

    :param course: the runs.
    :param progress: True shows it in a terminal or notebook; False never; ``"auto"`` only in a
        terminal, and only if the runs take a while.
    """

    def __init__(self, course: Course, progress: bool | str) -> None:
        self._course = course
        self._progress = progress
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None

    def begin(self) -> None:
        """Show it from now on; once."""
        if self._watcher is not None or self._over.is_set():
            return
        if self._progress is False or (self._progress == "auto" and not in_terminal()):
            return
        patience = 0.0 if self._progress is True else _PATIENCE
        # in the context of the caller, where a notebook finds the cell that the output belongs to
        watch = functools.partial(contextvars.copy_context().run, self._watch, patience)
        self._watcher = threading.Thread(target=watch, name="feste-progress", daemon=True)
        atexit.register(self.end)  # an iterator that was left may live as long as its program
        self._watcher.start()

    def end(self, *, wait: bool = True) -> None:
        """Take it away.

        :param wait: return when it is gone.
        """
        self._over.set()
        if wait and self._watcher is not None:
            self._watcher.join()

    def _watch(self, patience: float) -> None:
        try:
            if not self._over.wait(patience):
                _show(self._course, self._over)
        finally:
            atexit.unregister(self.end)


@contextmanager
def shown(run: Run, progress: bool | str) -> Iterator[None]:
    """Show the progress of a run during a ``with`` block that waits for it.

    :param run: the run.
    :param progress: as for :class:`Line`.
    """
    line = Line(Course([run], run.name), progress)
    line.begin()
    try:
        yield
    finally:
        line.end()


def in_terminal() -> bool:
    """Whether stderr is a terminal."""
    return _is_terminal(sys.stderr)


def _is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; it may also be missing, closed or replaced."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    python = sys.modules.get("IPython")
    return python is not None and hasattr(python.get_ipython(), "kernel")


def _show(course: Course, over: threading.Event) -> None:
    if _in_notebook():
        _show_line(course, over)
        return
    while not _terminal.acquire(timeout=_EVERY):
        if over.is_set():
            return
    try:
        _show_bar(course, over)
    finally:
        _terminal.release()


def _show_bar(course: Course, over: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # what the program prints meanwhile goes above the bar, just as it is
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        return
    also_stdout = _is_terminal(sys.stdout)  # a file gets all that is printed to it
    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, redirect_stdout=also_stdout) as bar:
        headway = Headway(course)
        at = headway.look()
        name = course.name
        row = bar.add_task(name, total=at.total, completed=at.done, words=at.parts[0])
        while True:
            ends = over.wait(_EVERY)
            at = headway.look()
            words = at.fit(console.width - len(name) - _BAR - _CLOCK)
            bar.update(row, total=at.total, completed=at.done, words=words)
            if ends:
                return


def _show_line(course: Course, over: threading.Event) -> None:
    """Show a line of HTML, or of text where the notebook shows no HTML; it needs no widgets."""
    show = import_module("IPython.display").display
    begun = time.monotonic()
    headway = Headway(course)

    def line() -> dict[str, str]:
        at = headway.look()
        words = f"{course.name}: {at.words}, {time.monotonic() - begun:.1f} s"
        whole = "" if at.total is None else f' value="{at.done}" max="{max(1, at.total)}"'
        html = f"<div><progress{whole}></progress> {escape(words)}</div>"
        return {"text/plain": words, "text/html": html}

    handle = show(line(), raw=True, display_id=True)
    while True:
        ends = over.wait(_EVERY)
        handle.update(line(), raw=True)
        if ends:
            return
