"""What each worker did, in a report: the busiest first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from feste.report.table import telling
from feste.scheduler.workers import WorkerRow
from feste.wording import counted, printable

__all__ = ["WorkerRow", "busiest", "workers_table"]

#: How many workers a table names; a last row adds up the others.
_NAMED = 10
_OPTIONAL = {"tasks", "busy s", "requests", "in flight s"}


def busiest(rows: Iterable[WorkerRow]) -> list[WorkerRow]:
    """Return one new row for each worker, the busiest first.

    :param rows: the rows, perhaps several of a worker, which are added up.

    >>> one, two = WorkerRow("one", tasks=1, busy=2.0), WorkerRow("two", requests=3, in_flight=9.0)
    >>> [(row.worker, row.tasks, row.requests) for row in busiest([one, two, one])]
    [('two', 0, 3), ('one', 2, 0)]
    """
    found: dict[str, WorkerRow] = {}
    for row in rows:
        _add(found.setdefault(row.worker, WorkerRow(row.worker)), row)
    return sorted(found.values(), key=lambda row: (-row.busy - row.in_flight, row.worker))


def workers_table(rows: Sequence[WorkerRow]) -> list[list[str]]:
    """Return a table of workers, the heading first; empty columns are omitted.

    :param rows: the workers, the busiest first.
    """
    shown = list(rows)
    if len(rows) > _NAMED + 1:
        others = WorkerRow(counted(len(rows) - _NAMED, "other"))
        for row in rows[_NAMED:]:
            _add(others, row)
        shown = [*rows[:_NAMED], others]
    heading = ["worker", "tasks", "busy s", "requests", "in flight s"]
    return telling([heading, *map(_cells, shown)], _OPTIONAL, {"0", "0.00"})


def _cells(row: WorkerRow) -> list[str]:
    tasks, requests = f"{row.tasks:,}", f"{row.requests:,}"
    return [printable(row.worker), tasks, f"{row.busy:,.2f}", requests, f"{row.in_flight:,.2f}"]


def _add(to: WorkerRow, row: WorkerRow) -> None:
    to.tasks += row.tasks
    to.busy += row.busy
    to.requests += row.requests
    to.in_flight += row.in_flight
