"""Describe a plan before anything is sent: calls, requests, bounds, tokens, passes."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import Any

from feste.node import PENDING, Node
from feste.optimization.analysis.estimates import Estimates
from feste.optimization.analysis.forming import fewest_requests
from feste.optimization.optimizer import Plan
from feste.wording import counted, wrapped

__all__ = ["CallRow", "Explanation"]

SCHEMA = 1


@dataclass(slots=True)
class CallRow:
    """The calls of one operation of one backend and model.

    :param operation: ``plugin.operation``.
    :param model: the model, if it is known before the run.
    :param calls: the number of calls.
    :param requests: the number of requests that the plan needs if none fails.
    :param at_least: a lower bound of requests for any order and grouping.
    :param input_tokens: estimated tokens of the requests. For a call whose prompt is not known yet,
        only its known parts count, at four characters per token.
    :param unknown: the number of calls whose prompt is not known before the run.
    :param output_tokens: the maximum of generated tokens, or None if a call sets no bound.
    """

    operation: str
    model: str
    calls: int = 0
    requests: int = 0
    at_least: int = 0
    input_tokens: int = 0
    unknown: int = 0
    output_tokens: int | None = 0

    def lines(self) -> list[str]:
        """Return the lines that :class:`Explanation` prints for this row."""
        name = f"{self.operation} {self.model}".rstrip()
        known = f"~{counted(self.input_tokens, 'token')} in"
        if self.unknown:
            known += f" (+ {counted(self.unknown, 'prompt')} made while it runs)"
        bound = self.output_tokens
        out = "no bound on tokens out" if bound is None else f"<= {counted(bound, 'token')} out"
        told = [known] if bound == 0 else [known, out]
        bought = _bought(self.calls, self.requests, self.at_least, "in")
        return [*wrapped(f"{name}: {bought}", 2), *wrapped(", ".join(told), 4)]


@dataclass(slots=True)
class Explanation:
    """A plan in words and numbers; print it. Nothing is sent to make it.

    :param plan: the plan.
    :param note: a remark on the whole run, or an empty string.

    >>> import feste
    >>> from feste.testing import FakeBackend, FakeParams
    >>> llm = FakeBackend("m-1")
    >>> plan = feste.explain([llm.complete(f"word {i}", FakeParams(max_tokens=9)) for i in range(40)])
    >>> plan.calls, plan.requests, plan.at_least
    (40, 3, 3)
    >>> print("\\n".join(str(plan).splitlines()[:3]))
    PLAN  40 nodes -> 40   40 calls -> 3 requests (at least 3)
      fake.complete m-1: 40 calls in 3 requests (at least 3)
        ~80 tokens in, <= 360 tokens out
    """

    plan: Plan
    note: str = ""
    rows: list[CallRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = _rows(self.plan)

    @property
    def calls(self) -> int:
        """The number of calls that will be answered."""
        return sum(row.calls for row in self.rows)

    @property
    def requests(self) -> int:
        """The number of requests that the plan needs if none fails."""
        return sum(row.requests for row in self.rows)

    @property
    def at_least(self) -> int:
        """A lower bound of requests for any order and grouping."""
        return sum(row.at_least for row in self.rows)

    @property
    def growing(self) -> int:
        """The number of tasks that may return further calls (``emits=True``)."""
        nodes = self.plan.graph.nodes.values()
        return sum(n.op.emits and n.value is PENDING for n in nodes)

    def to_json(self) -> dict[str, Any]:
        """Return the explanation as JSON, with the schema version."""
        return {
            "schema": SCHEMA,
            "nodes": {"before": len(self.plan.before.nodes), "after": len(self.plan.graph.nodes)},
            "calls": self.calls,
            "requests": self.requests,
            "at_least": self.at_least,
            "operations": [asdict(row) for row in self.rows],
            "passes": [
                {
                    "name": report.name,
                    "phase": report.phase.name,
                    "level": report.level.name,
                    "changed": report.changed,
                    "remarks": [asdict(r) for r in report.remarks],
                }
                for report in self.plan.passes
            ],
            "accounted": dict(self.plan.accounted),
            "growing": self.growing,
            "note": self.note,
        }

    def __str__(self) -> str:
        before, after = len(self.plan.before.nodes), len(self.plan.graph.nodes)
        lines = wrapped(
            f"PLAN  {counted(before, 'node')} -> {after:,}   "
            f"{_bought(self.calls, self.requests, self.at_least, '->')}"
        )
        lines += wrapped(self.note, 2)
        if self.growing:
            may = f"{counted(self.growing, 'task')} may add calls while the graph runs"
            lines += wrapped(f"{may}: these are not counted here", 2)
        for row in self.rows:
            lines += row.lines()
        lines.append("PASSES" if self.plan.passes else "PASSES  none (optimize is off)")
        width = max((len(report.name) for report in self.plan.passes), default=0)
        for report in self.plan.passes:
            idle = "" if report.remarks else "nothing to do"
            lines.append(f"  {report.name:<{width}}  {idle}".rstrip())
            for remark in report.remarks:
                lines += wrapped(f"{remark.kind}: {remark.text}", 4)
                lines += (f"      {origin}" for origin in remark.origins[:2])
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _bought(calls: int, requests: int, at_least: int, how: str) -> str:
    needed = f"{counted(requests, 'request')} (at least {at_least:,})"
    return f"{counted(calls, 'call')} {how} {needed}"


def _rows(plan: Plan) -> list[CallRow]:
    estimates = Estimates(plan.graph, plan.sketches)
    rows: dict[Any, CallRow] = {}
    nodes: dict[Any, list[Node]] = {}
    for estimate in estimates.calls.values():
        op: Any = estimate.node.op
        name = (op.token, estimate.model)
        row = rows.setdefault(name, CallRow(f"{op.client.plugin}.{op.name}", estimate.model))
        nodes.setdefault(name, []).append(estimate.node)
        row.calls += 1
        row.unknown += not estimate.is_known
        row.input_tokens += int(estimate.input.low or 0)
        bound = estimate.output.worst
        known = bound is not None and row.output_tokens is not None
        row.output_tokens = int(bound or 0) + (row.output_tokens or 0) if known else None
    for request in estimates.requests:
        op = request.calls[0].node.op
        rows[op.token, request.calls[0].model].requests += 1
    for name, row in rows.items():
        row.at_least = min(row.requests, fewest_requests(plan.graph, nodes[name]))
    return list(rows.values())
