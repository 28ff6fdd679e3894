"""Show the progress of long runs; it polls the run, so it costs the run nothing.

A terminal shows a bar that disappears when the run ends, a notebook a line that stays.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

from feste.report.headway import Headway

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["in_terminal", "shown"]

#: Seconds that a run must take before it shows a bar that was not asked for.
_PATIENCE = 0.5
_EVERY = 0.1
#: The columns of the bar, and of the time that has passed, with the spaces between.
_BAR, _CLOCK = 12, 11


@contextmanager
def shown(run: Run, progress: bool | str) -> Iterator[None]:
    """Show the progress of a run during a ``with`` block that waits for it.

    :param run: the run.
    :param progress: True shows it in a terminal or notebook; False never; ``"auto"`` only in a
        terminal, and only if the run takes a while.
    """
    if progress is False or (progress == "auto" and not in_terminal()):
        yield
        return
    ended = threading.Event()
    patience = 0.0 if progress is True else _PATIENCE
    # in the context of the block, where a notebook finds the cell that the output belongs to
    inside = contextvars.copy_context()
    watcher = threading.Thread(
        target=inside.run, args=(_watch, run, ended, patience), name="feste-progress", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


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


def _watch(run: Run, ended: threading.Event, patience: float) -> None:
    if ended.wait(patience):
        return
    if _in_notebook():
        _show_line(run, ended)
    else:
        _show_bar(run, ended)


def _show_bar(run: Run, ended: threading.Event) -> None:
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
        headway = Headway(run)
        at = headway.look()
        row = bar.add_task(run.name, total=at.total, completed=at.done, words=at.parts[0])
        while True:
            over = ended.wait(_EVERY)
            at = headway.look()
            words = at.fit(console.width - len(run.name) - _BAR - _CLOCK)
            bar.update(row, total=at.total, completed=at.done, words=words)
            if over:
                return


def _show_line(run: Run, ended: threading.Event) -> None:
    """Show a line of HTML, or of text where the notebook shows no HTML; it needs no widgets."""
    show = import_module("IPython.display").display
    begun = time.monotonic()
    headway = Headway(run)

    def line() -> dict[str, str]:
        at = headway.look()
        words = f"{run.name}: {at.words}, {time.monotonic() - begun:.1f} s"
        bar = f'<progress value="{at.done}" max="{max(1, at.total)}"></progress>'
        return {"text/plain": words, "text/html": f"<div>{bar} {escape(words)}</div>"}

    handle = show(line(), raw=True, display_id=True)
    while True:
        over = ended.wait(_EVERY)
        handle.update(line(), raw=True)
        if over:
            return
