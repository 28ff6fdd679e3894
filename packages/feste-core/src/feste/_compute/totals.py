"""Add up the reports of runs that follow each other, in memory that does not grow with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

from feste.events import RequestFinished
from feste.report import OperationRow, RunReport

__all__ = ["total"]

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
            *("damaged", "resampled", "unpriced"),
        )
    }
    return replace(
        after,
        **summed,
        run=before.run,
        seconds=max(before.seconds, offset + after.seconds),
        states=dict(Counter(before.states) + Counter(after.states)),
        operations=_rows([*before.operations, *after.operations]),
        tasks=dict(Counter(before.tasks) + Counter(after.tasks)),
        requests=[*before.requests, *(_moved(r, offset) for r in after.requests)][-_MOST:],
        spans=[
            *before.spans,
            *(replace(s, start=s.start + offset, end=s.end + offset) for s in after.spans),
        ][-_MOST:],
        errors=[*before.errors, *after.errors][:20],
        unknown=[*before.unknown, *after.unknown][-_MOST:],
        cancelled=before.cancelled or after.cancelled,
        dollars=_plus(before.dollars, after.dollars),
    )


def _moved(request: RequestFinished, offset: float) -> RequestFinished:
    at, ready, sent = request.at + offset, request.ready + offset, request.sent + offset
    return replace(request, at=at, ready=ready, sent=sent)


def _rows(rows: list[OperationRow]) -> list[OperationRow]:
    found: dict[tuple[str, str], OperationRow] = {}
    for row in rows:
        name = (row.operation, row.model)
        found[name] = _sum(found[name], row) if name in found else row
    return list(found.values())


def _sum(one: OperationRow, other: OperationRow) -> OperationRow:
    names = [
        f.name for f in fields(OperationRow) if f.name not in ("operation", "model", "longest")
    ]
    summed = {name: _plus(getattr(one, name), getattr(other, name)) for name in names}
    return replace(
        one,
        **summed,  # type: ignore[arg-type]
        longest=max(one.longest, other.longest),
    )


def _plus(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other
