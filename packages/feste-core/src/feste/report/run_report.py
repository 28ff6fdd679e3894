"""The report of a run: what was asked, sent, answered, paid; as text, HTML, JSON, timeline."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feste.events import SCHEMA, RequestFinished
from feste.report.timeline import Span, draw_timeline

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["OperationRow", "RunReport"]


@dataclass(slots=True)
class OperationRow:
    """What one operation of one model did.

    :param operation: ``plugin.operation``.
    :param model: the model.
    :param calls: logical calls answered.
    :param requests: requests sent, refused ones too.
    :param refused: requests that ended in an error.
    :param input_tokens: tokens read, as far as the provider said; None if it never did.
    :param output_tokens: tokens generated, likewise.
    :param seconds: time in flight, summed over requests.
    :param longest: the longest request, in seconds.
    """

    operation: str
    model: str
    calls: int = 0
    requests: int = 0
    refused: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float = 0.0
    longest: float = 0.0


@dataclass(slots=True)
class RunReport:
    """What happened in one run.

    :param run: its name.
    :param seconds: how long it took.
    :param nodes: how many nodes it had, those that tasks emitted among them.
    :param states: how many ended in which state; they add up to ``nodes``.
    :param operations: a row for each operation and model.
    :param tasks: seconds of Python by the name of the task, halves of operations too.
    :param requests: every request, in the order they ended.
    :param errors: the first errors, as text.
    :param cancelled: whether it was stopped.
    """

    run: str
    seconds: float
    nodes: int
    states: dict[str, int]
    operations: list[OperationRow] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)
    requests: list[RequestFinished] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    cancelled: bool = False
    spans: list[Span] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, run: Run) -> RunReport:
        """Return the report of a run that has ended, or that nobody waits for any longer.

        :param run: the run.
        """
        ended = time.monotonic() if run.ended is None else run.ended
        requests = list(run.requests)
        spans = [_request_span(r) for r in requests]
        spans += [
            Span(lane, label, begun, end, ok, wait)
            for lane, label, begun, end, wait, ok in run.spans
        ]
        return cls(
            run=run.name,
            seconds=ended - run.started,
            nodes=len(run.state),
            states=run.count_states(),
            operations=_rows(requests),
            tasks=dict(sorted(run.seconds.items(), key=lambda item: -item[1])),
            requests=requests,
            errors=[f"{type(run.errors[i]).__name__}: {run.errors[i]}" for i in run.failed[:20]],
            cancelled=run.cancelled,
            spans=spans,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, with the schema's version."""
        data = {name: getattr(self, name) for name in self.__slots__ if name != "spans"}
        data["operations"] = [asdict(row) for row in self.operations]
        data["requests"] = [r.to_json() for r in self.requests]
        return {"schema": SCHEMA, **data}

    def save(self, path: str | Path) -> None:
        """Write the report: ``.json``, ``.txt``, or the timeline as ``.svg``.

        :param path: where to.
        """
        path = Path(path)
        if path.suffix == ".svg":
            text = self.timeline()
        elif path.suffix == ".json":
            text = json.dumps(self.to_json(), indent=1)
        else:
            text = str(self)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # errors quote anything

    def timeline(self, path: str | Path | None = None) -> str:
        """Return when each request and each task was under way, as SVG.

        :param path: where to write it too, or None.
        """
        svg = draw_timeline(self.spans, title=self._headline())
        if path is not None:
            Path(path).write_text(svg, encoding="utf-8")
        return svg

    def _headline(self) -> str:
        sent = len(self.requests)
        calls = sum(row.calls for row in self.operations)
        stopped = ", stopped" if self.cancelled else ""
        return (
            f"{self.run}: {self.nodes:,} nodes, {calls:,} calls answered by {sent:,} requests "
            f"in {self.seconds:.2f} s{stopped}"
        )

    def table(self) -> list[list[str]]:
        """Return the rows of the table of operations, the heading first."""
        heading = "operation,model,calls,requests,refused,tokens in,tokens out,cost,mean s,max s"
        rows = [heading.split(",")]
        for row in self.operations:
            mean = row.seconds / row.requests if row.requests else 0.0
            rows.append(
                [
                    row.operation,
                    row.model,
                    f"{row.calls:,}",
                    f"{row.requests:,}",
                    f"{row.refused:,}",
                    _count(row.input_tokens),
                    _count(row.output_tokens),
                    "unknown",
                    f"{mean:.2f}",
                    f"{row.longest:.2f}",
                ]
            )
        return rows

    def __str__(self) -> str:
        lines = [self._headline()]
        lines.append("  " + ", ".join(f"{count:,} {name}" for name, count in self.states.items()))
        if self.operations:
            lines += ["", *_aligned(self.table())]
        if self.errors:
            lines += ["", "errors:", *(f"  {e}" for e in self.errors[:5])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heading, *rows = self.table()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p>{html.escape(self._headline())}</p>{table}{self.timeline()}"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _request_span(request: RequestFinished) -> Span:
    return Span(
        f"{request.operation} {request.model}".rstrip(),
        request.operation,
        request.sent,
        request.at,
        not request.error,
        request.sent - request.ready,
        request.items,
    )


def _rows(requests: Sequence[RequestFinished]) -> list[OperationRow]:
    rows: dict[tuple[str, str], OperationRow] = {}
    for request in requests:
        name = (f"{request.backend}.{request.operation}", request.model)
        row = rows.setdefault(name, OperationRow(*name))
        row.requests += 1
        row.refused += bool(request.error)
        row.calls += 0 if request.error else request.items
        if request.input_tokens is not None:
            row.input_tokens = (row.input_tokens or 0) + request.input_tokens
        if request.output_tokens is not None:
            row.output_tokens = (row.output_tokens or 0) + request.output_tokens
        row.seconds += request.at - request.sent
        row.longest = max(row.longest, request.at - request.sent)
    return list(rows.values())


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows as text: the first two columns to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
