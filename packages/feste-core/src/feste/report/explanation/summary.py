"""The figures of a plan in words: its headline, and the table of its operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from feste.optimization.analysis.ranges import NOTHING, Range
from feste.report.axis import clock
from feste.report.explanation.actual import Actual
from feste.report.explanation.rows import CallRow
from feste.report.figures import bounded, dollars, money, time, tokens
from feste.report.operations import OperationRow
from feste.report.table import telling
from feste.wording import counted, printable

if TYPE_CHECKING:
    from feste.report.explanation.explanation import Explanation

__all__ = ["headline", "notes_of", "operations", "ran"]

_NAMES = ("operation", "model")
_FIGURES = ("calls", "requests", "tokens in", "cached", "tokens out", "dollars")
_OPTIONAL = {"model", "cached", "dollars"}
_NOTHING = {"", "0", "unknown"}
_NO_PRICE = (
    'no price is known: pip install "feste-core[prices]", or give profile=Profile(price=...)'
)


def headline(explained: Explanation) -> list[str]:
    """Return the figures of the whole plan.

    :param explained: the explanation.
    """
    before, after = explained.nodes
    most = "at most " if explained.grouped else ""
    requests = f"{most}{counted(explained.requests, 'request')} (at least {explained.at_least:,})"
    parts = [
        f"{counted(before, 'node')} -> {after:,}",
        f"{counted(explained.calls, 'call')} -> {requests}",
    ]
    if explained.seconds.likely is not None and explained.calls:
        parts.append(time(explained.seconds))
        worst = explained.seconds.worst
        if worst is not None and worst != explained.seconds.likely:
            parts[-1] += f" (worst {clock(worst)})"
    elif explained.depth:
        parts.append(f"{counted(explained.depth, 'request')} deep")
    if explained.calls:
        parts.append(_price(explained))
    return parts


def notes_of(explained: Explanation) -> list[str]:
    """Return the remarks on the whole run.

    :param explained: the explanation.
    """
    notes = [explained.note] if explained.note else []
    failing = explained.failing
    if failing:
        why = next(row.error for row in explained.rows if row.failing)
        first = "" if failing == 1 else ", the first"
        notes.append(f"{counted(failing, 'call')} cannot be prepared and will fail{first}: {why}")
    notes += _made_later(explained.rows)
    if explained.calls and explained.unpriced == explained.calls:
        notes.append(_NO_PRICE)
    if explained.growing:
        may = f"{counted(explained.growing, 'task')} may add calls while the graph runs"
        notes.append(f"{may}: these are not counted here")
    return notes


def _made_later(rows: Sequence[CallRow]) -> list[str]:
    """Return the remark on what is known during the run only; none if there is nothing."""
    later, calls = sum(row.unknown for row in rows), sum(row.calls for row in rows)
    if not later:
        return []
    # what is embedded is no prompt
    noun = "input" if any(row.output_tokens == NOTHING for row in rows) else "prompt"
    of = f"the {noun}" if calls == 1 else f"{later:,} of {counted(calls, noun)}"
    made = "is made while it runs: its" if later == 1 else "are made while it runs: their"
    return [f"{of} {made} tokens are estimates"]


def _price(explained: Explanation) -> str:
    price, unpriced = explained.dollars, explained.unpriced
    if price.low is None:
        return "price unknown"
    worst = "unknown" if price.worst is None else money(price.worst)
    if price.worst is None and explained.unbounded:
        names = explained.unbounded
        more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
        has = "has" if len(names) == 1 else "have"
        worst += f": {', '.join(names[:2])}{more} {has} no bound"
    around = "" if price.low == price.worst else f" (low {money(price.low)}, worst {worst})"
    if unpriced:
        least = money(price.low if price.likely is None else price.likely)
        return f"at least {least}{around}, {counted(unpriced, 'call')} of unknown price"
    return f"{dollars(price)}{around}"


def operations(rows: Sequence[CallRow], actual: Actual | None = None) -> list[list[str]]:
    """Return the table of operations, the heading first; columns that tell nothing are left out.

    :param rows: the rows.
    :param actual: what happened in a run, which follows each row.
    """
    table = [[*_NAMES, *_FIGURES]]
    happened = {(row.operation, row.model): row for row in actual.operations} if actual else {}
    last = {(row.operation, row.model): row for row in rows}
    for row in rows:
        name = (row.operation, row.model)
        table.append(_cells(row))
        if last[name] is row and name in happened:
            table.append(_actual_cells("  it ran", "", happened.pop(name)))
    table += [_actual_cells(*name, row) for name, row in happened.items()]
    return telling(table, _OPTIONAL, _NOTHING)


def _actual_cells(operation: str, model: str, row: OperationRow) -> list[str]:
    used = (row.input_tokens, row.cached_tokens, row.output_tokens)
    return [
        operation,
        printable(model),
        f"{row.calls:,}",
        f"{row.requests:,}",
        *("" if n is None else f"{n:,}" for n in used),
        "" if row.dollars is None else dollars(Range.of(row.dollars), row.unpriced),
    ]


def _cells(row: CallRow) -> list[str]:
    bound = "" if row.at_least == row.requests else f" (>= {row.at_least:,})"
    most = "<= " if row.grouped and bound else ""
    return [
        row.operation,
        printable(row.model),
        f"{row.calls:,}",
        f"{most}{row.requests:,}{bound}",
        tokens(row.input_tokens),
        f"{row.cached_tokens:,}",
        bounded(row.output_tokens),
        dollars(row.dollars, row.unpriced),
    ]


def ran(actual: Actual, explained: Explanation) -> list[str]:
    """Return what happened in words.

    :param actual: what happened.
    :param explained: the explanation of the plan.
    """
    return actual.lines(explained.seconds, explained.dollars, explained.unpriced)
