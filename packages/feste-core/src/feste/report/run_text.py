"""A report in words: what it cost, what it waited for, what went wrong; on one screen."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from feste.optimization.analysis.ranges import Range
from feste.report.figures import dollars, money
from feste.report.remarks import remarks
from feste.report.table import aligned, telling
from feste.report.workers import workers_table
from feste.wording import counted, printable, wrapped

if TYPE_CHECKING:
    from feste.report.operations import OperationRow
    from feste.report.run_report import RunReport

__all__ = ["facts", "headline", "html_of", "table_of", "text_of"]

#: Columns that are omitted if all their cells are in _NOTHING.
_OPTIONAL = {
    "model", "failed", "tokens in", "cached", "tokens out", "dollars", "at most", "wait s"
}  # fmt: skip
_NOTHING = {"", "0", "unknown", "0.00"}
#: Waits that a report tells: seconds of a call, and which part of all its waits a cause must have.
_LEAST, _PART = 0.05, 0.01
#: How many sizes of requests are told, and how many errors.
_SIZES, _ERRORS = 5, 5


def headline(report: RunReport) -> str:
    """Return a report in one line.

    :param report: the report.
    """
    calls, sent = counted(report.answered, "call"), counted(report.sent, "request")
    stopped = ", stopped" if report.cancelled else ""
    return (
        f"{report.run}: {counted(report.nodes, 'node')}, {calls} answered by {sent} "
        f"in {report.seconds:,.2f} s{stopped}{_price(report)}"
    )


def _price(report: RunReport) -> str:
    if report.dollars is None:
        return ""
    if report.unpriced:
        unknown = counted(report.unpriced, "request")
        return f", at least {money(report.dollars)} ({unknown} of unknown price)"
    return f", {money(report.dollars)}"


def states(report: RunReport) -> str:
    """Return how many nodes ended in which way.

    :param report: the report.
    """
    return ", ".join(f"{n:,} {_plain(name)}" for name, n in report.states.items())


def facts(report: RunReport) -> list[str]:
    """Return what a report says between its headline and its table.

    :param report: the report.
    """
    return list(filter(None, (_requests(report), _waits(report), _failures(report))))


def _requests(report: RunReport) -> str:
    told = []
    if any(size > 1 for size in report.sizes):
        by_size = sorted(report.sizes.items(), reverse=True)
        (size, n), *others = by_size[:_SIZES]
        shown = [f"{n:,} of {counted(size, 'call')}", *(f"{n:,} of {size:,}" for size, n in others)]
        rest = sum(n for _, n in by_size[_SIZES:])
        told.append(", ".join(shown + [f"{rest:,} of fewer"] * bool(rest)))
    if report.peak > 1:
        told.append(f"at most {report.peak:,} in flight")
    again = sum(report.retries.values())
    if again:
        causes = ", ".join(f"{n:,} after {name}" for name, n in report.retries.items())
        told.append(f"{again:,} sent again: {causes}")
    if report.breaker_openings:
        times = counted(report.breaker_openings, "time")
        told.append(f"the backend was down {times}")
    return f"requests: {'; '.join(told)}" if told else ""


def _waits(report: RunReport) -> str:
    begun = report.begun
    means = {name: s / begun for name, s in report.waits.items() if name != "dependency" and begun}
    mean = sum(means.values())
    if mean < _LEAST:
        return ""
    causes = sorted(means.items(), key=lambda item: -item[1])
    told = ", ".join(f"{_wait(n)} {s:,.2f} s" for n, s in causes if s >= _PART * mean)
    in_flight = sum(row.in_flight for row in report.operations) / begun
    return f"waits: {mean:,.2f} s a call: {told}; then {in_flight:,.2f} s in flight"


def _failures(report: RunReport) -> str:
    told = ", ".join(f"{n:,} {name}" for name, n in report.failures.items())
    return f"failures: {told}" if told else ""


def errors(report: RunReport) -> list[str]:
    """Return the first errors, one of each kind before the others, and how many are like each.

    :param report: the report.
    """
    told, counts = [], dict(report.failures)
    for error in report.errors[: max(_ERRORS, len(counts))]:
        name = error.partition(": ")[0]
        count = counts.pop(name, 0)  # told with the first
        told.append(f"{error}; {count:,} x {name} in all" if count > 1 else error)
    return told


def _wait(cause: str) -> str:
    return "prompt cache" if cause == "prefix" else _plain(cause)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def table_of(rows: Sequence[OperationRow], *, waits: bool = True) -> list[list[str]]:
    """Return a table of operations, the heading first; empty columns are omitted.

    :param rows: the operations.
    :param waits: whether it has a column of what calls waited for.
    """
    names = (
        "operation,model,calls,requests,failed,tokens in,cached,tokens out,dollars,at most,wait s,"
        "mean s,max s"
    )
    table = [names.split(","), *map(_cells, rows)]
    if not waits:
        table = [row[:-3] + row[-2:] for row in table]
    return telling(table, _OPTIONAL, _NOTHING)


def _cells(row: OperationRow) -> list[str]:
    mean = row.seconds / row.requests if row.requests else 0.0
    waited = sum(seconds for cause, seconds in row.waits.items() if cause != "dependency")
    wait = waited / row.begun if row.begun else 0.0
    most = "" if row.dollars_possible is None else money(row.dollars_possible)
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
        most if row.unpriced else "",
        f"{wait:,.2f}" if wait >= _LEAST else "",
        f"{mean:,.2f}",
        f"{row.longest:,.2f}",
    ]


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def text_of(report: RunReport) -> str:
    """Return a report as text.

    :param report: the report.
    """
    lines = [*wrapped(headline(report)), *wrapped(states(report), 2)]
    lines += [line for fact in facts(report) for line in wrapped(fact, 2)]
    if report.operations:
        rows = table_of(report.operations, waits=False)  # it is in the facts; a line has no room
        lines += ["", *aligned(rows, 1 + ("model" in rows[0]))]
    if report.workers:
        lines += ["", *aligned(workers_table(report.workers), 1)]
    lines += [line for remark in remarks(report) for line in wrapped(remark, 2)]
    if report.errors:
        lines += ["", "errors:", *(line for e in errors(report) for line in wrapped(e, 2))]
    return "\n".join(map(printable, lines))


def html_of(report: RunReport) -> str:
    """Return a report as HTML, without its timeline.

    :param report: the report.
    """
    parts = [_p(line) for line in (headline(report), states(report), *facts(report))]
    if report.operations:
        parts.append(_html_table(report.table()))
    if report.workers:
        parts.append(_html_table(workers_table(report.workers)))
    parts += [_p(remark) for remark in remarks(report)]
    parts += [f"<pre>{_shown(error)}</pre>" for error in errors(report)]
    return "".join(parts)


def _p(text: str) -> str:
    return f"<p>{_shown(text)}</p>"


def _shown(text: str) -> str:
    return html.escape(printable(text, but="\n\t"))


def _html_table(table: Sequence[Sequence[str]]) -> str:
    heading, *rows = table
    body = "".join(f"<tr>{_html_cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{_html_cells('th', heading)}</tr></thead>"
    return f'<table style="margin-bottom:1em">{head}<tbody>{body}</tbody></table>'


def _html_cells(tag: str, row: Sequence[str]) -> str:
    return "".join(f"<{tag}>{_shown(cell)}</{tag}>" for cell in row)
