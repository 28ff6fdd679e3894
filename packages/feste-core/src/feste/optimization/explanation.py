"""Describe a plan before anything is sent: calls, requests, bounds, tokens, passes."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import Any

from feste.backend import Call, Params, Request
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization.optimizer import Plan
from feste.packing import fill
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
        self.rows = _rows(self.plan.graph)

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


def _rows(graph: FesteGraph) -> list[CallRow]:
    groups: dict[Any, list[Node]] = {}
    for node in graph.calls():
        op: Any = node.op
        groups.setdefault((op.token, _model(node)), []).append(node)
    batched = {m: b for b in graph.batches for m in b.members}
    prepared = {n.key: _request(n, graph) for nodes in groups.values() for n in nodes}
    levels = _levels(graph, groups) if groups else {}
    rows = []
    for (_, model), nodes in groups.items():
        op = nodes[0].op
        row = CallRow(f"{op.client.plugin}.{op.name}", model, calls=len(nodes))
        limit = op.max_items
        seen = set()
        for node in nodes:
            batch = batched.get(node.key)
            if batch is None:
                row.requests += 1
            elif batch.key not in seen:
                seen.add(batch.key)
                again = {m for equal in batch.draws for m in equal[1:]}
                items = [prepared[m] for m in batch.members if m not in again]
                row.requests += _requests_of(op, items)
            _count_tokens(row, node, graph, prepared[node.key])
        row.at_least = _bound([levels[n.key] for n in nodes], limit)
        rows.append(row)
    return rows


def _model(node: Node) -> str:
    for argument in node.args:
        if isinstance(argument, Params) and getattr(argument, "model", None):
            return str(argument.model)  # type: ignore[attr-defined]
    op: Any = node.op
    return str(getattr(op.client, "model", None) or "")


def _requests_of(op: Call[Any], requests: list[Request | None]) -> int:
    """How many requests a batch becomes: by all limits if its requests are known, else by items."""
    if op.rule is None:
        return 1
    if not all(requests):
        return -(-len(requests) // op.max_items)
    sizes = [(request.tokens, request.size) for request in requests if request is not None]
    counts: list[int] = op.rule.chunks(sizes, op.max_items)
    return len(counts)


def _count_tokens(row: CallRow, node: Node, graph: FesteGraph, request: Request | None) -> None:
    values = [graph.nodes[key].value for key in graph.dependencies(node.key)]
    known = [value for value in values if value is not PENDING]
    row.unknown += len(known) < len(values)
    if request is not None:
        row.input_tokens += request.tokens
        bound = request.max_output
    else:
        known += [a for a in node.args if isinstance(a, (str, list))]
        row.input_tokens += -(-sum(len(str(part)) for part in known) // 4)
        bound = next((a.max_output() for a in node.args if isinstance(a, Params)), None)
    if bound is None or row.output_tokens is None:
        row.output_tokens = None
    else:
        row.output_tokens += bound


def _request(node: Node, graph: FesteGraph) -> Request | None:
    """The request of a call whose inputs are known before the run."""
    values = [graph.nodes[key].value for key in graph.dependencies(node.key)]
    if any(value is PENDING for value in values):
        return None
    op: Any = node.op
    try:
        request: Request = op.prepare([fill(argument, values) for argument in node.args])
    except Exception:  # the run raises it again and applies on_error
        return None
    return request


def _levels(graph: FesteGraph, groups: dict[Any, list[Node]]) -> dict[str, int]:
    """Return for each call how many calls of its group are on the longest path that ends in it."""
    group_of = {n.key: i for i, nodes in enumerate(groups.values()) for n in nodes}
    depth: dict[str, dict[int, int]] = {}
    levels: dict[str, int] = {}
    left = dict.fromkeys(graph.nodes, 0)
    for key in graph.nodes:
        for need in graph.dependencies(key):
            left[need] += 1
    for key in graph.order():
        best: dict[int, int] = {}
        for need in graph.dependencies(key):
            for group, level in depth[need].items():
                best[group] = max(level, best.get(group, 0))
            left[need] -= 1
            if not left[need]:
                del depth[need]
        own = group_of.get(key)
        if own is not None:
            levels[key] = best[own] = best.get(own, 0) + 1
        depth[key] = best
    return levels


def _bound(levels: list[int], limit: int) -> int:
    """Return max over l of (l + ceil(calls above level l / limit)), a lower bound of requests."""
    above = len(levels)
    best = 0
    counts: dict[int, int] = {}
    for level in levels:
        counts[level] = counts.get(level, 0) + 1
    for level in range(max(levels, default=0)):
        above -= counts.get(level, 0)
        best = max(best, level + -(-above // limit))
    return best
