"""Describe a plan before anything is sent: what it will take, what was done to it, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from feste import optimization
from feste.optimization.analysis.estimates import Estimates
from feste.optimization.analysis.ranges import Range
from feste.report.explanation.actual import Actual
from feste.report.explanation.html import html_of
from feste.report.explanation.passes import PassRow, pass_rows
from feste.report.explanation.rows import CallRow, call_rows, known_total
from feste.report.explanation.summary import headline, notes_of
from feste.report.explanation.text import shown
from feste.report.explanation.tree import Tree
from feste.report.files import ending, page, write
from feste.report.mermaid import Mermaid, draw_mermaid
from feste.report.naming import Places
from feste.report.run_report import RunReport
from feste.report.summary import Box

__all__ = ["Explanation", "Hop"]

#: Incremented when a field changes its meaning; new fields do not change it.
SCHEMA = 2

FOR_CACHE = "wait for the prompt cache"


@dataclass(frozen=True, slots=True)
class Hop:
    """Calls of the critical path that follow each other and were written at one line.

    :param name: the operation; or that those after it wait for what the one before it wrote to the
        provider's prompt cache.
    :param where: ``file:line``.
    :param nodes: how many they are.
    :param seconds: how long they probably take; None if unknown.
    """

    name: str
    where: str
    nodes: int
    seconds: float | None


class Explanation:
    """A plan in words and numbers; print it. Nothing is sent to make it.

    Figures are :class:`Range` objects: low, likely and worst, each None where it is not known.

    :param plan: the plan.
    :param note: a remark on the whole run, or an empty string.
    :param report: the report of a run of the plan, to see what happened beside what was estimated.

    >>> import feste
    >>> from feste.testing import FakeBackend, FakeParams
    >>> llm = FakeBackend("m-1")
    >>> plan = feste.explain([llm.complete(f"word {i}", FakeParams(max_tokens=9)) for i in range(40)])
    >>> plan.calls, plan.requests, plan.at_least
    (40, 3, 3)
    >>> print(str(plan).splitlines()[0])
    PLAN  40 nodes -> 40   40 calls -> 3 requests (at least 3)   1 request deep
    >>> plan.output_tokens
    Range(low=40, likely=200, worst=360)
    """

    def __init__(
        self, plan: optimization.Plan, note: str = "", report: RunReport | None = None
    ) -> None:
        self.plan = plan
        self.note = note
        self._estimates = Estimates(plan.graph, plan.sketches)
        #: A row for the calls of each operation and model.
        self.rows: list[CallRow] = call_rows(self._estimates)
        #: What happened in the run; None without a report.
        self.actual = None if report is None else Actual.of(report, self.rows, self.seconds)

    # --- figures ----------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[int, int]:
        """The number of nodes as built, and as planned."""
        return len(self.plan.before.nodes), len(self.plan.graph.nodes)

    @property
    def calls(self) -> int:
        """The number of calls that will be answered."""
        return sum(row.calls for row in self.rows)

    @property
    def requests(self) -> int:
        """The number of requests that the plan needs if none fails; at most, if calls are grouped."""
        return sum(row.requests for row in self.rows)

    @property
    def grouped(self) -> int:
        """The number of calls whose requests are formed while the graph runs."""
        return sum(row.grouped for row in self.rows)

    @property
    def at_least(self) -> int:
        """A lower bound of requests for any order and grouping."""
        return sum(row.at_least for row in self.rows)

    @property
    def input_tokens(self) -> Range:
        """Tokens read, at four bytes of text a token; without calls that will fail."""
        return known_total([row.input_tokens for row in self._sound], self.calls)

    @property
    def output_tokens(self) -> Range:
        """Tokens generated; without calls that will fail."""
        return known_total([row.output_tokens for row in self._sound], self.calls)

    @property
    def dollars(self) -> Range:
        """The price of the calls whose price is known; unknown if there is no such call."""
        known = [row.dollars for row in self._sound if row.unpriced < row.calls]
        return known_total(known, self.calls)

    @property
    def _sound(self) -> list[CallRow]:
        return [row for row in self.rows if row.failing < row.calls]

    @property
    def failing(self) -> int:
        """The number of calls that cannot be prepared, and will fail."""
        return sum(row.failing for row in self.rows)

    @property
    def unpriced(self) -> int:
        """The number of calls of unknown price, which :attr:`dollars` does not count."""
        return sum(row.unpriced for row in self.rows)

    @property
    def unbounded(self) -> list[str]:
        """The names of operations and tasks without which the worst price would be known."""
        return self._estimates.unbounded

    @property
    def depth(self) -> int:
        """The number of requests on the longest path: each waits for the one before."""
        return self._estimates.depth

    @property
    def seconds(self) -> Range:
        """How long the run takes; unknown if the latency of a call is."""
        return self._estimates.seconds

    @property
    def path_seconds(self) -> Range:
        """How long its longest path takes, with as many requests at a time as it likes."""
        return self._estimates.path_seconds

    @cached_property
    def critical_path(self) -> list[Hop]:
        """The calls of the path that takes longest, the first to run first."""
        places = Places()
        hops: list[Hop] = []
        for node, seconds in self._estimates.critical_path:
            if node is None:
                hops.append(Hop(FOR_CACHE, "", 1, seconds))
                continue
            if node.key not in self._estimates.calls:
                continue
            name, where = node.op.name, places.of(node)
            if hops and (hops[-1].name, hops[-1].where) == (name, where):
                last = hops.pop()
                both = None if seconds is None or last.seconds is None else last.seconds + seconds
                hops.append(Hop(name, where, last.nodes + 1, both))
            else:
                hops.append(Hop(name, where, 1, seconds))
        return hops

    @property
    def growing(self) -> int:
        """The number of tasks that may return further calls (``emits=True``)."""
        nodes = self.plan.graph.nodes
        return sum(nodes[key].op.emits for key in self._estimates.open)

    # --- words ------------------------------------------------------------------------------------

    @cached_property
    def tree(self) -> Tree:
        """The graph as rows."""
        return Tree(self._estimates)

    @cached_property
    def passes(self) -> list[PassRow]:
        """What each pass did."""
        return pass_rows(self.plan.passes)

    @property
    def notes(self) -> list[str]:
        """Remarks on the whole run."""
        return notes_of(self)

    def to_json(self) -> dict[str, Any]:
        """Return the explanation as JSON, with the schema version: every number of the text."""
        before, after = self.nodes
        return {
            "schema": SCHEMA,
            "nodes": {"before": before, "after": after},
            "calls": self.calls,
            "requests": self.requests,
            "at_least": self.at_least,
            "grouped": self.grouped,
            "input_tokens": self.input_tokens._asdict(),
            "output_tokens": self.output_tokens._asdict(),
            "dollars": self.dollars._asdict(),
            "unpriced": self.unpriced,
            "unbounded": self.unbounded,
            "failing": self.failing,
            "seconds": self.seconds._asdict(),
            "depth": self.depth,
            "critical_path": {
                "seconds": self.path_seconds._asdict(),
                "hops": [asdict(hop) for hop in self.critical_path],
            },
            "operations": [row.to_json() for row in self.rows],
            "graph": {
                "rows": [asdict(row) for row in self.tree.rows],
                "results": self.tree.results,
            },
            "passes": [asdict(row) for row in self.passes],
            "rewrites": self.plan.rewrites,
            "accounted": dict(self.plan.accounted),
            "growing": self.growing,
            "note": self.note,
            "run": None if self.actual is None else asdict(self.actual),
        }

    def to_mermaid(self) -> Mermaid:
        """Return the graph's rows as a Mermaid chart, for Markdown.

        Rows that need each other, as of a chain written as a loop, are joined in one direction only.
        """
        boxes, edges = [], []
        for row in self.tree.rows:
            times = f" × {row.nodes:,}" if row.nodes > 1 else ""
            detail = ", ".join(filter(None, [row.detail, *row.notes]))
            name = f"{row.name}{times}"
            number = str(row.number)
            boxes.append(Box(number, name, row.kind, detail, output=row.is_result))
            needs = (need for need in row.needs if (row.number, need) not in self.tree.loops)
            edges += [(str(need), number) for need in needs]
        return draw_mermaid(boxes, edges)

    def save(self, path: str | Path) -> None:
        """Write the explanation as ``.txt``, ``.json``, ``.html`` or ``.mmd`` (Mermaid).

        :param path: the file.
        :raises ConfigError: for another file extension.
        """
        match ending(path, ".txt", ".json", ".html", ".mmd"):
            case ".json":
                text = json.dumps(self.to_json(), indent=1)
            case ".html":
                text = page(", ".join(headline(self)), self._repr_html_())
            case ".mmd":
                text = self.to_mermaid()
            case _:
                text = str(self)
        write(path, text)

    def __str__(self) -> str:
        return shown(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_of(self)
