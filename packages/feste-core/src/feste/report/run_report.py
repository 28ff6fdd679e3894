"""The report of a run: its calls, requests, tokens and errors, as text, HTML, JSON or timeline."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feste.events import SCHEMA, RequestFinished
from feste.optimization.analysis.ranges import Range
from feste.report.figures import dollars, money
from feste.report.files import ending, page, write
from feste.report.prices import prices_of, sum_of
from feste.report.remarks import UnknownRequest, passed_on, remarks, unknown_requests
from feste.report.table import aligned, telling
from feste.report.timeline import Span, draw_timeline
from feste.scheduler.run import KEPT
from feste.wording import counted, wrapped

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["OperationRow", "RunReport"]

#: Columns that are omitted if all their cells are in _NOTHING.
_OPTIONAL = {"model", "failed", "tokens in", "cached", "tokens out", "dollars"}
_NOTHING = {"", "0", "unknown"}


@dataclass(slots=True)
class OperationRow:
    """The totals of one operation and model.

    :param operation: ``plugin.operation``.
    :param model: the model.
    :param calls: the number of calls answered.
    :param requests: the number of requests sent, including failed ones.
    :param failed: the number of requests that ended in an error.
    :param input_tokens: tokens read, where the provider reported them; None if it never did.
    :param output_tokens: tokens generated, likewise.
    :param cached_tokens: how many of the tokens read came from the provider's prompt cache.
    :param written_tokens: how many were written to it.
    :param dollars: the price of the requests whose price is known; None if there is none.
    :param unpriced: the number of requests of unknown price.
    :param seconds: the time in flight, summed over requests.
    :param longest: the duration of the longest request in seconds.
    """

    operation: str
    model: str
    calls: int = 0
    requests: int = 0
    failed: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    written_tokens: int | None = None
    dollars: float | None = None
    unpriced: int = 0
    seconds: float = 0.0
    longest: float = 0.0


@dataclass(slots=True)
class RunReport:
    """The report of one run.

    :param run: the name of the run.
    :param seconds: its duration in seconds.
    :param nodes: the number of its nodes, including those that tasks emitted.
    :param states: the number of nodes in each final state; they add up to ``nodes``.
    :param operations: a row for each operation and model.
    :param tasks: seconds of Python by name of the task, including halves of operations.
    :param requests: all requests, in the order they ended.
    :param errors: the first errors, as text.
    :param cancelled: whether the run was stopped.
    :param unknown: earlier requests for the run's calls whose answers are not known.
    :param reused: how many answers were not bought now, because a store or a cache had them.
    :param reused_input_tokens: tokens read for them, when they were bought.
    :param reused_output_tokens: tokens generated for them.
    :param damaged: how many stored answers were unreadable and so not used.
    :param passed_on: how many calls the next backend was asked for, by what they were refused with:
        ``plugin.operation model: error``.
    :param resampled: how many calls were bought although equal ones had been answered.
    :param dollars: the price of the requests whose price is known; None if there is none.
    :param unpriced: the number of requests of unknown price, which ``dollars`` does not count.
    :param asked: the keys of the nodes whose values were not known before the run.

    >>> import feste
    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend("m-1")
    >>> _ = feste.compute([llm.complete(f"word {i}") for i in range(40)])
    >>> report = feste.last_report()
    >>> report.nodes, report.states, len(report.requests)
    (40, {'done': 40}, 3)
    >>> print(report)  # doctest: +ELLIPSIS
    run-...: 40 nodes, 40 calls answered by 3 requests in ... s
      40 done
    <BLANKLINE>
      operation      model  calls  requests  tokens in  tokens out  mean s  max s
      fake.complete  m-1       40         3        ...         160    ...   ...
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
    spans: list[Span] = field(default_factory=list)
    unknown: list[UnknownRequest] = field(default_factory=list)
    reused: int = 0
    reused_input_tokens: int = 0
    reused_output_tokens: int = 0
    damaged: int = 0
    resampled: int = 0
    passed_on: dict[str, int] = field(default_factory=dict)
    dollars: float | None = None
    unpriced: int = 0
    asked: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of(cls, run: Run) -> RunReport:
        """Return the report of a run that has ended, or that was given up.

        :param run: the run.
        """
        ended = time.monotonic() if run.ended is None else run.ended
        requests = list(run.requests)
        prices = prices_of(requests, run.askers)
        dollars, unpriced = sum_of(prices)
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
            operations=_rows(requests, prices),
            tasks=dict(sorted(run.seconds.items(), key=lambda item: -item[1])),
            requests=requests,
            errors=[f"{type(run.errors[i]).__name__}: {run.errors[i]}" for i in run.failed[:20]],
            cancelled=run.cancelled,
            spans=spans,
            unknown=unknown_requests(run),
            reused=run.reused,
            reused_input_tokens=round(run.reused_input_tokens),
            reused_output_tokens=round(run.reused_output_tokens),
            damaged=run.damaged,
            resampled=run.resampled,
            passed_on=passed_on(run),
            dollars=dollars,
            unpriced=unpriced,
            asked=frozenset(k for k, i in run.program.index.items() if run.state[i] != KEPT),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, with the schema version."""
        data = {
            name: getattr(self, name) for name in self.__slots__ if name not in ("spans", "asked")
        }
        data["operations"] = [asdict(row) for row in self.operations]
        data["requests"] = [r.to_json() for r in self.requests]
        data["unknown"] = [asdict(unknown) for unknown in self.unknown]
        return {"schema": SCHEMA, **data, "perhaps_billed": self.perhaps_billed}

    def save(self, path: str | Path) -> None:
        """Write the report as ``.json``, ``.txt`` or ``.html``, or its timeline as ``.svg``.

        :param path: the file.
        :raises ConfigError: for another file extension.
        """
        match ending(path, ".json", ".txt", ".html", ".svg"):
            case ".json":
                text = json.dumps(self.to_json(), indent=1)
            case ".html":
                text = page(self._headline(), self._repr_html_())
            case ".svg":
                text = self.timeline()
            case _:
                text = str(self)
        write(path, text)

    def timeline(self, path: str | Path | None = None) -> str:
        """Draw when each request and each task ran, as SVG, which a notebook displays.

        :param path: the file to write, ``.svg`` or ``.html``, or None.
        :raises ConfigError: for another file extension.
        """
        svg = draw_timeline(self.spans, title=self._headline())
        if path is not None:
            html_page = ending(path, ".svg", ".html") == ".html"
            write(path, page(self._headline(), svg) if html_page else svg)
        return svg

    def _answered(self) -> int:
        return sum(row.calls for row in self.operations)

    def _sent(self) -> int:
        return sum(row.requests for row in self.operations)

    def _headline(self) -> str:
        calls, sent = counted(self._answered(), "call"), counted(self._sent(), "request")
        stopped = ", stopped" if self.cancelled else ""
        return (
            f"{self.run}: {counted(self.nodes, 'node')}, {calls} answered by {sent} "
            f"in {self.seconds:,.2f} s{stopped}{self._price()}"
        )

    def _price(self) -> str:
        if self.dollars is None:
            return ""
        if self.unpriced:
            unknown = counted(self.unpriced, "request")
            return f", at least {money(self.dollars)} ({unknown} of unknown price)"
        return f", {money(self.dollars)}"

    @property
    def perhaps_billed(self) -> int:
        """Requests that left and were not answered: the provider may have charged for them."""
        return sum(request.billed == "unknown" for request in self.requests)

    def _states(self) -> str:
        return ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in self.states.items())

    def table(self) -> list[list[str]]:
        """Return the rows of the table of operations, the heading first.

        The columns of models, failures, tokens and prices are omitted if they are empty in all rows.
        """
        heading = (
            "operation,model,calls,requests,failed,tokens in,cached,tokens out,dollars,mean s,max s"
        )
        names = heading.split(",")
        rows = [_cells(row) for row in self.operations]
        return telling([names, *rows], _OPTIONAL, _NOTHING)

    def __str__(self) -> str:
        lines = [*wrapped(self._headline()), *wrapped(self._states(), 2)]
        if self.operations:
            rows = self.table()
            lines += ["", *aligned(rows, 1 + ("model" in rows[0]))]
        lines += [line for remark in remarks(self) for line in wrapped(remark, 2)]
        if self.errors:
            lines += ["", "errors:", *(line for e in self.errors[:5] for line in wrapped(e, 2))]
        return "\n".join(lines)

    def __repr__(self) -> str:
        answered = self._answered()
        what = counted(answered, "call") if answered else counted(self.nodes, "node")
        return f"<RunReport {self.run}: {what} in {self.seconds:,.2f} s>"

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(line)}</p>" for line in (self._headline(), self._states())]
        if self.operations:
            heading, *rows = self.table()
            body = "".join(f"<tr>{_html_cells('td', row)}</tr>" for row in rows)
            head = f"<thead><tr>{_html_cells('th', heading)}</tr></thead>"
            parts.append(f"<table>{head}<tbody>{body}</tbody></table>")
        parts += [f"<p>{html.escape(remark)}</p>" for remark in remarks(self)]
        parts += [f"<pre>{html.escape(error)}</pre>" for error in self.errors[:5]]
        return "".join([*parts, self.timeline()])


def _cells(row: OperationRow) -> list[str]:
    mean = row.seconds / row.requests if row.requests else 0.0
    return [
        row.operation,
        row.model,
        f"{row.calls:,}",
        f"{row.requests:,}",
        f"{row.failed:,}",
        _count(row.input_tokens),
        _count(row.cached_tokens),
        _count(row.output_tokens),
        dollars(Range.of(row.dollars), row.unpriced),
        f"{mean:,.2f}",
        f"{row.longest:,.2f}",
    ]


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _html_cells(tag: str, row: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)


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


def _rows(
    requests: Sequence[RequestFinished], prices: Sequence[float | None]
) -> list[OperationRow]:
    rows: dict[tuple[str, str], OperationRow] = {}
    for request, price in zip(requests, prices, strict=True):
        name = (f"{request.backend}.{request.operation}", request.model)
        row = rows.setdefault(name, OperationRow(*name))
        row.requests += 1
        row.failed += bool(request.error)
        row.calls += 0 if request.error else request.items
        row.input_tokens = _plus(row.input_tokens, request.input_tokens)
        row.output_tokens = _plus(row.output_tokens, request.output_tokens)
        row.cached_tokens = _plus(row.cached_tokens, request.cached_tokens)
        row.written_tokens = _plus(row.written_tokens, request.written_tokens)
        if price is None:
            row.unpriced += 1
        else:
            row.dollars = price + (row.dollars or 0.0)
        row.seconds += request.at - request.sent
        row.longest = max(row.longest, request.at - request.sent)
    return list(rows.values())


def _plus(known: int | None, more: int | None) -> int | None:
    return known if more is None else more + (known or 0)
