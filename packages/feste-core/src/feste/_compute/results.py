"""Hand results back: values in the user's containers, a report, or an error that says where.

The report of the last run is kept for each context, a thread or an async task.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from feste.errors import FesteError, FesteWarning, RunFailed, StalledError
from feste.report import RunReport
from feste.report.progress import in_notebook
from feste.scheduler.run import Run
from feste.wording import counted

__all__ = [
    "Repack",
    "errors_of",
    "forget_report",
    "hand_back",
    "is_last",
    "keep_report",
    "last_report",
    "make_report",
    "put_back",
    "rescue",
    "warn_of",
]

Repack = Callable[[Sequence[Any]], tuple[Any, ...]]


#: A report, or what makes it, where runs have just been stopped.
_Report = RunReport | Callable[[], RunReport] | None

#: The last report of a context.
_last_report: ContextVar[_Report] = ContextVar("feste_last_report", default=None)


class _Cells(threading.local):
    """In a notebook, the last report of a thread: a cell with ``await`` has a context of its own."""

    report: _Report = None


_cells = _Cells()


def last_report() -> RunReport | None:
    """Return the report of the last run of this context (thread or async task), or None.

    In a notebook it is that of the last run of any cell. It is None, too, after a run that was refused
    before anything started, as for a missing key, so that it never shows an older one.

    >>> import feste
    >>> _ = feste.compute(feste.task(abs)(-1))
    >>> last_report().states
    {'done': 1}
    """
    report = _cells.report if in_notebook() else _last_report.get()
    if report is None or isinstance(report, RunReport):
        return report
    return keep_report(report())


def _keep(report: _Report) -> None:
    _last_report.set(report)
    if in_notebook():
        _cells.report = report


def is_last(report: RunReport | None) -> bool:
    """Return whether a report, or none, is the last one of this context.

    :param report: the report.
    """
    return _last_report.get() is report


def forget_report() -> None:
    """Clear the last report when a run is asked for, so that ``last_report`` shows no older one."""
    _keep(None)


def make_report(run: Run) -> RunReport:
    return keep_report(RunReport.of(run))


def keep_report(report: RunReport) -> RunReport:
    """Let a report be the last one of this context."""
    _keep(report)
    return report


def report_later(make: Callable[[], RunReport]) -> None:
    """Let a report be the last one of this context that is made when it is asked for."""
    _keep(make)


def hand_back(run: Run, repack: Repack) -> tuple[Any, ...]:
    report = make_report(run)
    if run.failure is not None:
        if isinstance(run.failure, StalledError):
            run.failure.partial, run.failure.report = rescue(run, repack, report), report
        raise run.failure
    results = put_back(run, repack, report)
    warn_of(run)
    errors = errors_of(run)
    if run.on_error == "return" or not errors:
        return results
    wanted = len(run.outputs)
    bad = sum(i in run.errors for i in run.outputs)
    if not bad:
        told = "all results are in .partial"
        if run.unwritten is not None:
            told += ", but the store could not keep them"
    elif bad == wanted:
        told = "the result failed" if bad == 1 else f"all {bad:,} results failed"
    else:
        told = f"{bad:,} of {wanted:,} results failed; the others are in .partial"
    if run.series.why:
        told = f"{told}; the run was stopped: {run.series.why}"
    raise RunFailed(
        told, partial=results, report=report, errors=errors, places=_failed_places(run, repack)
    ) from errors[0]


def errors_of(run: Run) -> list[FesteError]:
    """Return what went wrong in a run, the reason of all first."""
    errors = [fault for fault in (run.unwritten, run.fault) if fault is not None]
    errors += [run.errors[i] for i in run.failed]
    # calls may be left that were never tried, since their backend refused those of another run
    return errors or ([] if run.left is None else [run.left])


def warn_of(run: Run) -> None:
    """Warn of what a store could not keep where no error tells it."""
    if run.unwritten is not None and run.on_error == "return":
        warnings.warn(str(run.unwritten), FesteWarning, stacklevel=4)
    if run.unfit:
        warnings.warn(
            f"{counted(run.unfit, 'answer')} cannot be kept in a store, because a response of the "
            "backend is not JSON: a rerun buys them again",
            FesteWarning,
            stacklevel=4,
        )


class _Place:
    """Stands for an output that failed, to find where it is in what the user gave."""

    __slots__ = ("error",)

    def __init__(self, error: FesteError) -> None:
        self.error = error


def _failed_places(run: Run, repack: Repack) -> dict[str, FesteError]:
    """The places of failed outputs in what is handed back; the values themselves are not searched."""
    try:
        shape = repack([_Place(run.errors[i]) if i in run.errors else None for i in run.outputs])
    except Exception:  # a container of the user's own that takes no such thing
        return {}
    return {where: place.error for where, place in _find_places(shape, "")}


def _find_places(shape: Any, where: str) -> Iterator[tuple[str, _Place]]:
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(shape, _Place):
        yield where, shape
    elif isinstance(shape, (list, tuple)):
        parts = ((f"[{i}]", part) for i, part in enumerate(shape))
    elif isinstance(shape, dict):
        parts = ((f"[{name!r}]", part) for name, part in shape.items())
    elif dataclasses.is_dataclass(shape) and not isinstance(shape, type):
        names = [f.name for f in dataclasses.fields(shape) if hasattr(shape, f.name)]
        parts = ((f".{name}", getattr(shape, name)) for name in names)
    for step, part in parts:
        if part is not None and type(part) not in (str, int, float, bool):
            yield from _find_places(part, where + step)


def put_back(run: Run, repack: Repack, report: RunReport) -> tuple[Any, ...]:
    """Put the values into the user's containers; raise if they do not fit, as vectors in a set."""
    results = run.results()
    try:
        return repack(results)
    except Exception as error:
        raise RunFailed(
            f"the values do not fit into what was given to compute: {type(error).__name__}: {error}. "
            "They are in .partial, one after the other; give a list instead of a set",
            partial=tuple(results),
            report=report,
            errors=[run.errors[i] for i in run.failed],
        ) from error


def rescue(run: Run, repack: Repack, report: RunReport) -> tuple[Any, ...]:
    """Return what a run that was cut short has, in the user's containers if it fits."""
    try:
        return put_back(run, repack, report)
    except RunFailed as failed:
        return failed.partial
