"""The report of a run: its calls, requests, tokens, waits and errors, as text, HTML, JSON or timeline."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feste.errors import ConfigError, FesteError
from feste.events import SCHEMA, RequestFinished
from feste.plugins import registry
from feste.report.files import ending, page, write
from feste.report.operations import OperationRow, rows_of, saved_by
from feste.report.prices import Prices
from feste.report.remarks import UnknownRequest, passed_on, unknown_requests
from feste.report.run_text import headline, html_of, table_of, text_of
from feste.report.timeline import Span, draw_timeline
from feste.report.waiting import in_order
from feste.report.workers import WorkerRow, busiest
from feste.scheduler.request_log import RequestLog
from feste.scheduler.states import KEPT
from feste.wording import counted, kinds_first

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["Closing", "RunReport"]


@dataclass(frozen=True, slots=True)
class Closing:
    """A time for which no request went to a model's provider.

    :param backend: the backend's plugin name.
    :param model: the model.
    :param reason: as in :class:`feste.events.GateClosed`.
    :param start: the start in seconds since the run started, which may be before it.
    :param end: the end, likewise.
    """

    backend: str
    model: str
    reason: str
    start: float
    end: float


@dataclass(slots=True)
class RunReport:
    """The report of one run.

    :param run: the name of the run.
    :param seconds: its duration in seconds.
    :param nodes: the number of its nodes, including those that tasks emitted.
    :param states: the number of nodes in each final state; they add up to ``nodes``.
    :param operations: a row for each operation and model.
    :param tasks: seconds of Python by name of the task, including halves of operations.
    :param requests: all requests, in the order they ended; of a long ``feste.map`` the last 10,000.
    :param errors: the first errors that differ, as text; one of each kind before the others.
    :param cancelled: whether the run was stopped.
    :param unknown: for each call, the earlier request whose answer is not known; a list has several calls.
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
    :param perhaps_billed: requests that left and were not answered: the provider may have charged for
        them.
    :param dollars_possible: the price if each of these, and each answer whose tokens are not known, was
        billed in full; None if that has no known bound.
    :param dollars_saved: what the reused answers would have cost; None if a price is unknown.
    :param failures: the number of failed nodes by the name of the error's class.
    :param retries: the number of further attempts by the name of the error's class.
    :param sizes: the number of requests by how many calls were in them.
    :param peak: the most requests that were in flight at once.
    :param breaker_openings: how often a circuit breaker stopped requests, because too many failed.
    :param begun: the number of calls that were begun, answered or not.
    :param waits: the seconds that calls waited, by cause, summed over calls; see
        :data:`feste.events.CAUSES`.
    :param versions: the versions of Feste and of its plugins, by distribution.
    :param closings: the times for which no request went to a model's provider.
    :param task_spans: when tasks ran that took longer than a millisecond.
    :param workers: a row for each worker that did something, the busiest first; empty if this process
        did all.
    :param inner_runs: the runs that its tasks began, as by ``await node``: operations, tokens and
        dollars count them, while nodes, states and requests are those of the run itself.

    >>> import feste
    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend("m-1")
    >>> _ = feste.compute([llm.complete(f"word {i}") for i in range(40)])
    >>> report = feste.last_report()
    >>> report.nodes, report.states, len(report.requests), report.sizes
    (40, {'done': 40}, 3, {16: 1, 12: 2})
    >>> RunReport.from_json(report.to_json()) == report
    True
    """

    run: str
    seconds: float
    nodes: int
    states: dict[str, int]
    operations: list[OperationRow] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)
    requests: Sequence[RequestFinished] = field(default_factory=RequestLog)
    errors: list[str] = field(default_factory=list)
    cancelled: bool = False
    unknown: list[UnknownRequest] = field(default_factory=list)
    reused: int = 0
    reused_input_tokens: int = 0
    reused_output_tokens: int = 0
    damaged: int = 0
    resampled: int = 0
    passed_on: dict[str, int] = field(default_factory=dict)
    dollars: float | None = None
    unpriced: int = 0
    asked: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    perhaps_billed: int = 0
    dollars_possible: float | None = None
    dollars_saved: float | None = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    peak: int = 0
    breaker_openings: int = 0
    begun: int = 0
    waits: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    closings: list[Closing] = field(default_factory=list)
    task_spans: list[Span] = field(default_factory=list)
    workers: list[WorkerRow] = field(default_factory=list)
    inner_runs: int = 0

    @classmethod
    def of(cls, run: Run) -> RunReport:
        """Return the report of a run that has ended, or that was given up.

        :param run: the run.
        """
        ended = time.monotonic() if run.ended is None else run.ended
        totals, prices = [*run.rows.values(), *run.inner.values()], Prices()
        operations = rows_of(totals, prices)
        known = [row.dollars for row in operations if row.dollars is not None]
        most = [row.dollars_possible for row in operations]
        return cls(
            run=run.name,
            seconds=ended - run.started,
            nodes=len(run.state),
            states=run.count_states(),
            operations=operations,
            tasks=dict(sorted(run.seconds.items(), key=lambda item: -item[1])),
            requests=run.requests if run.ended is not None else run.requests.copy(),
            errors=_texts(run),
            cancelled=run.cancelled,
            unknown=unknown_requests(run),
            reused=run.reused,
            reused_input_tokens=round(run.reused_input_tokens),
            reused_output_tokens=round(run.reused_output_tokens),
            damaged=run.damaged,
            resampled=run.resampled,
            passed_on=passed_on(run),
            dollars=sum(known) if known or not operations else None,
            unpriced=sum(row.unpriced for row in operations),
            asked=frozenset(k for k, i in run.program.index.items() if run.state[i] != KEPT),
            perhaps_billed=sum(row.perhaps_billed for row in totals),
            dollars_possible=None if None in most else sum(m for m in most if m is not None),
            dollars_saved=saved_by(totals, prices),
            failures=run.count_failures(),
            retries=dict(run.retries.most_common()),
            sizes=dict(sorted(run.sizes.items(), reverse=True)),
            peak=run.peak,
            breaker_openings=run.openings,
            begun=sum(row.begun for row in totals),
            waits=run.sum_waits(),
            versions={info.distribution: info.version for info in registry().plugins},
            closings=[Closing(*closing) for closing in run.closings],
            task_spans=[
                Span(lane, label, begun, end, ok, 1, [("worker", wait)] if wait else [], worker)
                for lane, label, begun, end, wait, ok, worker in run.spans
            ],
            workers=busiest(list(run.workers.rows.values())),
            inner_runs=run.inner_runs,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, with the schema version."""
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        del data["asked"]
        data["operations"] = [asdict(row) for row in self.operations]
        data["requests"] = [r.to_json() for r in self.requests]
        data["unknown"] = [asdict(unknown) for unknown in self.unknown]
        data["closings"] = [asdict(closing) for closing in self.closings]
        data["task_spans"] = [asdict(span) for span in self.task_spans]
        data["workers"] = [asdict(row) for row in self.workers]
        data["sizes"] = {str(size): count for size, count in self.sizes.items()}
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunReport:
        """Return the report that :meth:`to_json` gave; fields that are not known here are left out.

        :param data: the JSON.
        :raises ConfigError: if it is of a later schema, or no report.
        """
        if not isinstance(data.get("schema"), int):
            raise ConfigError("this is no report of a run: it has no schema number")
        if data["schema"] > SCHEMA:
            raise ConfigError(
                f"the report is of schema {data['schema']}, this Feste reads up to {SCHEMA}: update it"
            )
        own = _known(cls, data)
        kinds = {
            "operations": OperationRow,
            "unknown": UnknownRequest,
            "closings": Closing,
            "task_spans": Span,
            "workers": WorkerRow,
        }
        for name, kind in kinds.items():
            own[name] = [kind(**_known(kind, each)) for each in own.get(name, ())]
        own["task_spans"] = [
            replace(span, waits=[(cause, wait) for cause, wait in span.waits])
            for span in own["task_spans"]
        ]
        requests = (RequestFinished(**_known(RequestFinished, r)) for r in own.get("requests", ()))
        own["requests"] = RequestLog(own["run"], requests)
        own["sizes"] = {int(size): count for size, count in own.get("sizes", {}).items()}
        return cls(**own)

    def save(self, path: str | Path) -> None:
        """Write the report as ``.json``, ``.txt`` or ``.html``, or its timeline as ``.svg``.

        :param path: the file.
        :raises ConfigError: for another file extension.
        """
        match ending(path, ".json", ".txt", ".html", ".svg"):
            case ".json":
                text = json.dumps(self.to_json(), indent=1)
            case ".html":
                text = page(headline(self), self._repr_html_())
            case ".svg":
                text = self.timeline()
            case _:
                text = str(self)
        write(path, text)

    @property
    def spans(self) -> list[Span]:
        """When each request and each longer task ran, and what it waited for before."""
        closed: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for closing in self.closings:
            times = closed.setdefault((closing.backend, closing.model), [])
            times.append((closing.start, closing.end))
        return [
            *(_request_span(r, closed.get((r.backend, r.model), ())) for r in self.requests),
            *self.task_spans,
        ]

    def timeline(self, path: str | Path | None = None) -> str:
        """Draw when each request and each task ran, as SVG, which a notebook displays.

        :param path: the file to write, ``.svg`` or ``.html``, or None.
        :raises ConfigError: for another file extension.
        """
        svg = draw_timeline(self.spans, title=headline(self))
        if path is not None:
            html_page = ending(path, ".svg", ".html") == ".html"
            write(path, page(headline(self), svg) if html_page else svg)
        return svg

    @property
    def answered(self) -> int:
        """The number of calls that requests of this run have answered."""
        return sum(row.calls for row in self.operations)

    @property
    def sent(self) -> int:
        """The number of requests that this run has sent."""
        return sum(row.requests for row in self.operations)

    def table(self) -> list[list[str]]:
        """Return the rows of the table of operations, the heading first.

        The columns of models, failures, tokens, prices and waits are omitted if they are empty in all
        rows.
        """
        return table_of(self.operations)

    def __str__(self) -> str:
        return text_of(self)

    def __repr__(self) -> str:
        answered = self.answered
        what = counted(answered, "call") if answered else counted(self.nodes, "node")
        return f"<RunReport {self.run}: {what} in {self.seconds:,.2f} s>"

    def _repr_html_(self) -> str:
        return html_of(self) + self.timeline()


def _texts(run: Run) -> list[str]:
    """Return the first errors of a run that differ, one of each kind before the others."""
    kinds: dict[tuple[str, str], list[FesteError]] = {}
    for error in (run.errors[i] for i in run.failed):
        kind = type(error).__name__, getattr(error, "cause_type", "")
        some = kinds.setdefault(kind, [])
        if len(some) < 1_000:  # to write one takes time
            some.append(error)
    return kinds_first(f"{kind}: {e}" for (kind, _), some in kinds.items() for e in some)[:20]


def _known(kind: Any, data: dict[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def _request_span(request: RequestFinished, closed: Sequence[tuple[float, float]]) -> Span:
    return Span(
        f"{request.operation} {request.model}".rstrip(),
        request.operation,
        request.sent,
        request.at,
        not request.error,
        request.items,
        in_order(request.waits, request.sent, closed),
        request.worker,
    )
