"""Add up the reports of runs that follow each other, in memory that does not grow with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any, TypeVar

from feste.events import RequestFinished
from feste.report import Closing, OperationRow, RunReport, Span
from feste.report.operations import sum_if_known
from feste.report.workers import busiest
from feste.scheduler.request_log import RequestLog
from feste.wording import kinds_first

__all__ = ["total"]

_Timed = TypeVar("_Timed", Span, Closing)

#: The most requests, spans and errors that a sum of reports has: the last ones.
_MOST = 10_000


def total(before: RunReport | None, after: RunReport, offset: float) -> RunReport:
    """Return the report of two runs as if they had been one; of their requests, the last ones.

    :param before: the report of what came before, or None.
    :param after: the report of the run that follows.
    :param offset: how many seconds later that one began.
    """
    if before is None:
        return after
    summed = {
        name: getattr(before, name) + getattr(after, name)
        for name in (
            *("nodes", "reused", "reused_input_tokens", "reused_output_tokens"),
            *("damaged", "resampled", "unpriced", "perhaps_billed", "breaker_openings", "begun"),
            "inner_runs",
        )
    }
    counted: dict[str, Any] = {
        name: dict(Counter(getattr(before, name)) + Counter(getattr(after, name)))
        for name in ("states", "tasks", "passed_on", "failures", "retries", "sizes", "waits")
    }
    dollars = _plus(before.dollars, after.dollars)
    return replace(
        after,
        **summed,
        **counted,
        run=before.run,
        seconds=max(before.seconds, offset + after.seconds),
        operations=_rows([*before.operations, *after.operations]),
        requests=RequestLog(
            before.run,
            [*before.requests, *(_moved(r, offset) for r in after.requests)][-_MOST:],
        ),
        task_spans=_together(before.task_spans, after.task_spans, offset),
        closings=_together(before.closings, after.closings, offset),
        workers=busiest([*before.workers, *after.workers]),
        peak=max(before.peak, after.peak),
        dollars_possible=sum_if_known(before.dollars_possible, after.dollars_possible),
        dollars_saved=sum_if_known(before.dollars_saved, after.dollars_saved),
        errors=kinds_first([*before.errors, *after.errors])[:20],
        unknown=[*before.unknown, *after.unknown][-_MOST:],
        cancelled=before.cancelled or after.cancelled,
        dollars=dollars if dollars or not summed["unpriced"] else None,
    )


def _moved(request: RequestFinished, offset: float) -> RequestFinished:
    at, ready, sent = request.at + offset, request.ready + offset, request.sent + offset
    return replace(request, at=at, ready=ready, sent=sent)


def _together(before: list[_Timed], after: list[_Timed], offset: float) -> list[_Timed]:
    moved = before[:]
    for timed in after:
        moved.append(replace(timed, start=timed.start + offset, end=timed.end + offset))
    return moved[-_MOST:]


def _rows(rows: list[OperationRow]) -> list[OperationRow]:
    found: dict[tuple[str, str], OperationRow] = {}
    for row in rows:
        name = (row.operation, row.model)
        found[name] = _sum(found[name], row) if name in found else row
    return list(found.values())


def _sum(one: OperationRow, other: OperationRow) -> OperationRow:
    own = ("operation", "model", "longest", "dollars_possible", "waits")
    names = [f.name for f in fields(OperationRow) if f.name not in own]
    summed: dict[str, Any] = {
        name: _plus(getattr(one, name), getattr(other, name)) for name in names
    }
    return replace(
        one,
        **summed,
        longest=max(one.longest, other.longest),
        dollars_possible=sum_if_known(one.dollars_possible, other.dollars_possible),
        waits=dict(Counter(one.waits) + Counter(other.waits)),
    )


def _plus(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other
