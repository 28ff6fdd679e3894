"""What happened in a run, beside what its plan had said."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from feste.errors import ConfigError
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization.analysis.ranges import Range, total
from feste.report.axis import clock
from feste.report.explanation.rows import CallRow
from feste.report.figures import dollars, money, time
from feste.report.operations import OperationRow
from feste.report.run_report import RunReport
from feste.wording import counted

__all__ = ["Actual", "as_before"]

#: An estimate is off if what happened is so many times as much as was likely, or as little; or out
#: of its range by more than such a part, since tokens are counted by a rule of thumb.
FAR, BEYOND = 2.0, 0.25


@dataclass(slots=True)
class Actual:
    """What happened in a run.

    :param run: the name of the run.
    :param seconds: its duration.
    :param calls: how many calls were answered by requests.
    :param requests: how many requests were sent, with those that failed.
    :param failed: how many of them ended in an error.
    :param retried: how many of them were further attempts.
    :param sizes: how many requests had so many calls, by that number.
    :param states: the number of nodes in each final state.
    :param reused: how many answers came from a store or a cache.
    :param dollars: the price of the requests whose price is known; None if there is none.
    :param unpriced: the number of requests of unknown price.
    :param operations: a row for each operation and model.
    :param off: where the estimates were off.
    """

    run: str
    seconds: float
    calls: int
    requests: int
    failed: int
    retried: int
    sizes: dict[int, int]
    states: dict[str, int]
    reused: int
    dollars: float | None
    unpriced: int
    operations: list[OperationRow] = field(default_factory=list)
    off: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, report: RunReport, rows: Sequence[CallRow], seconds: Range) -> Actual:
        """Return what a report says of a plan.

        :param report: the report.
        :param rows: the figures of the plan.
        :param seconds: how long it was to take.
        """
        return cls(
            run=report.run,
            seconds=report.seconds,
            calls=report.answered,
            requests=report.sent,
            failed=sum(row.failed for row in report.operations),
            retried=sum(report.retries.values()),
            sizes=dict(report.sizes),
            states=dict(report.states),
            reused=report.reused,
            dollars=report.dollars,
            unpriced=report.unpriced,
            operations=list(report.operations),
            off=[*_off(report, rows), *_far("seconds", seconds, report.seconds, clock)],
        )

    def lines(self, seconds: Range, price: Range, unpriced: int) -> list[str]:
        """Return the run in words.

        :param seconds: how long it was to take.
        :param price: what it was to cost.
        :param unpriced: of how many calls the price was not known.
        """
        took = f"{clock(self.seconds)}{_estimated(time(seconds))}"
        sent = counted(self.requests, "request")
        parts = [f"{self.run}: {counted(self.calls, 'call')} answered by {sent} in {took}"]
        if self.dollars is not None:
            parts.append(f"{money(self.dollars)}{_estimated(dollars(price, unpriced))}")
            if self.unpriced:
                parts[-1] = f"at least {parts[-1]}"
                parts.append(f"{counted(self.unpriced, 'request')} of unknown price")
        lines = [", ".join(parts)]
        if self.sizes:
            told = [f"{n:,} of {counted(size, 'call')}" for size, n in self.sizes.items()]
            rest = ["..."] if len(told) > 8 else []
            lines.append(f"requests by size: {', '.join(told[:8] + rest)}")
        if self.failed or self.retried:
            again = f"{counted(self.retried, 'request')} sent again"
            lines.append(f"{counted(self.failed, 'request')} failed, {again}")
        states = {name: n for name, n in self.states.items() if name != "done" and n}
        if states:
            told = [f"{n:,} {name.replace('_', ' ')}" for name, n in states.items()]
            lines.append(f"nodes besides those done: {', '.join(told)}")
        return lines + [f"off: {line}" for line in self.off]


def _estimated(what: str) -> str:
    return "" if what == "unknown" else f" (estimated {what})"


def _off(report: RunReport, rows: Sequence[CallRow]) -> list[str]:
    """Compare the figures of each operation and model."""
    found: list[str] = []
    planned: dict[tuple[str, str], list[CallRow]] = {}
    for row in rows:
        planned.setdefault((row.operation, row.model), []).append(row)
    happened = {(row.operation, row.model): row for row in report.operations}
    for name, plans in planned.items():
        ran, what = happened.pop(name, None), " ".join(filter(None, name))
        if ran is None:
            continue  # answers from a store, or a run that was stopped
        requests = sum(plan.requests for plan in plans)
        least = sum(plan.at_least if plan.grouped else plan.requests for plan in plans)
        if not least <= ran.requests <= requests:
            found.append(f"{what}: {counted(ran.requests, 'request')}, {requests:,} planned")
        read = total(plan.input_tokens for plan in plans)
        if read.low == read.likely:  # the prompts are known: only the rule of thumb may be wrong
            read = Range.of(read.likely)
        made = total(plan.output_tokens for plan in plans)
        found += _far(f"{what}: tokens in", read, ran.input_tokens, _number, far=math.inf)
        found += _far(f"{what}: tokens out", made, ran.output_tokens, _number)
    for name, ran in happened.items():
        sent = counted(ran.requests, "request")
        found.append(f"{' '.join(filter(None, name))}: {sent}, none planned")
    return found


def _number(tokens: float) -> str:
    return f"{tokens:,.0f}"


def _far(
    what: str,
    of: Range,
    actual: float | None,
    shown: Callable[[float], str],
    far: float = FAR,
) -> list[str]:
    """Return a sentence if an estimate was off: out of its range, or far from what was likely."""
    if actual is None or of.likely is None:
        return []
    low, high = sorted((actual, of.likely))
    possible = (of.low is None or actual >= of.low * (1 - BEYOND)) and (
        of.worst is None or actual <= of.worst * (1 + BEYOND)
    )
    if possible and (far == math.inf or high <= far * low):
        return []
    return [f"{what}: {shown(actual)}, {shown(of.likely)} estimated"]


# --- the graph as it was before the run -----------------------------------------------------------


def as_before(graph: FesteGraph, report: object, *, is_empty: bool = False) -> FesteGraph:
    """Return a graph as it was before a run: without the values that the run gave to its nodes.

    :param graph: the graph.
    :param report: the report of the run.
    :param is_empty: whether nothing was given to be explained.
    :raises ConfigError: if it is no report, or one of other nodes.
    """
    if not isinstance(report, RunReport):
        raise ConfigError(
            f"analyze={report!r}: give it the report of a run of these nodes, feste.last_report() after it "
            "or the .report of its error"
        )
    asked = report.asked
    nodes: dict[str, Node] = {}
    stack = [graph.nodes[key] for key in graph.outputs]
    while stack:
        node = stack.pop()
        if node.key in nodes:
            continue
        if node.value is not PENDING and node.key in asked and node.op.kind != "data":
            node = _unanswered(node)
        nodes[node.key] = node
        if node.value is PENDING:
            stack.extend(node.deps)
    if is_empty or (nodes and not any(key in asked for key in nodes)):
        raise ConfigError(
            f"analyze=...: {report.run} was a run of other nodes, or had nothing to do: give explain the "
            "nodes that were computed"
        )
    order = sorted(nodes.values(), key=lambda node: node.seq)
    return FesteGraph({node.key: node for node in order}, graph.outputs)


def _unanswered(node: Node) -> Node:
    blank = node.replace()
    blank.value = PENDING
    return blank
