"""A progress bar for long runs: it looks at the run now and then, so it costs the run nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["in_terminal", "shown"]

#: A run that is over sooner, in seconds, shows no bar unless it was asked for.
_PATIENCE = 0.5
_EVERY = 0.1


@contextmanager
def shown(run: Run, progress: bool | str) -> Iterator[None]:
    """Show how far a run is while a block waits for it.

    :param run: the run.
    :param progress: True, in a terminal or notebook; False; or ``"auto"``: only in a terminal, and
        only if it takes a while.
    """
    if progress is False or (progress == "auto" and not in_terminal()):
        yield
        return
    ended = threading.Event()
    patience = 0.0 if progress is True else _PATIENCE
    watcher = threading.Thread(
        target=_watch, args=(run, ended, patience), name="feste-progress", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def in_terminal() -> bool:
    """Whether stderr is a terminal; a program may have none, a closed one, or one of its own."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _watch(run: Run, ended: threading.Event, patience: float) -> None:
    if ended.wait(patience):
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[what]}"),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal and not console.is_jupyter:
        return
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task(run.name, total=1, what="", detail="")
        while True:
            over = ended.wait(_EVERY)
            bar.update(row, **_state(run))
            if over:
                return


def _state(run: Run) -> dict[str, Any]:
    tokens = sum(r.output_tokens or 0 for r in run.requests)
    detail = f"{len(run.requests):,} requests"
    if tokens:
        detail += f", {tokens:,} tokens out"
    if run.failed:
        detail += f", {len(run.failed):,} failed"
    if run.calls:
        return {"total": run.calls, "completed": run.calls_done, "what": "calls", "detail": detail}
    nodes = len(run.state)
    return {"total": nodes, "completed": nodes - run.open, "what": "nodes", "detail": detail}
