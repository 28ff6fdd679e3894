"""A graph as a tree of rows: what does the same at the same line in the same role is one row."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from feste.node import Node
from feste.optimization.analysis.estimates import Estimates
from feste.report.axis import clock
from feste.report.naming import Places, detail_of
from feste.wording import counted

__all__ = ["MOST_ROWS", "GraphRow", "Tree"]

#: The most rows that are printed; and that a division into roles may have, and how deep it may be.
MOST_ROWS, MOST_DEPTH = 60, 16

#: Slack is told if it is more than such a part of the longest path.
WORTH_TELLING = 0.1


@dataclass(slots=True)
class GraphRow:
    """Nodes that do the same at the same source line.

    :param number: the number of the row, from 1.
    :param kind: ``"call"``, ``"prompt"``, ``"task"`` or ``"data"``.
    :param name: what they do.
    :param detail: the model, or the beginning of a template.
    :param where: ``file:line``.
    :param nodes: how many they are.
    :param requests: in how many requests their calls are sent.
    :param slack: the seconds that one of them may be late without delaying the run; a request of
        unknown latency counts as one second.
    :param is_result: whether the user asked for one of them.
    :param notes: what is special about them.
    :param needs: the numbers of the rows that they need; its own number for a chain.
    """

    number: int
    kind: str
    name: str
    detail: str = ""
    where: str = ""
    nodes: int = 0
    requests: int = 0
    slack: float = 0.0
    is_result: bool = False
    notes: list[str] = field(default_factory=list)
    needs: list[int] = field(default_factory=list)


class Tree:
    """The rows of a plan's graph, results first.

    Rows are divided by source line and role, which is what needs a node. Where that makes too many
    rows, or too deep a tree, as of a chain written as a loop, they are divided by source line only.

    :param estimates: the estimates of the plan.
    """

    def __init__(self, estimates: Estimates) -> None:
        graph, paths = estimates.graph, estimates.paths
        nodes = list(graph.nodes.values())
        looks = _looks(nodes, graph.wanted(), estimates.open)
        of = _by_role(estimates, looks) or _by_look(looks)
        if len(set(of)) > MOST_ROWS:
            of = _by_look([(kind, name, where) for kind, name, _, where, *_ in looks])
        members: dict[int, list[int]] = {}
        for i, row in enumerate(of):
            members.setdefault(row, []).append(i)
        needs = {
            row: list(dict.fromkeys(of[d] for i in own for d in paths.deps[i]))
            for row, own in members.items()
        }
        position = {key: i for i, key in enumerate(paths.keys)}
        results = dict.fromkeys(of[position[key]] for key in graph.wanted())
        order, loops = _walk(list(results), needs)
        #: The rows by number, beginning with 1, in the order in which they are printed.
        self.rows = [GraphRow(n, "", "") for n, _ in enumerate(order, start=1)]
        number = {row: n for n, row in enumerate(order, start=1)}
        #: The numbers of the rows of results.
        self.results = [number[row] for row in results]
        #: Pairs of rows, the second of which the first needs, that close a loop.
        self.loops = {(number[row], number[need]) for row, need in loops}
        sent = _requests(estimates)
        for row, made in zip(order, self.rows, strict=True):
            own = [nodes[i] for i in members[row]]
            _fill(made, own, estimates, sent)
            made.is_result = row in results
            made.needs = [number[need] for need in needs[row]]

    def row(self, number: int) -> GraphRow:
        """Return a row by its number.

        :param number: the number, from 1.
        """
        return self.rows[number - 1]


Look = tuple[Hashable, ...]


def _looks(nodes: Sequence[Node], wanted: Sequence[str], unknown: Container[str]) -> list[Look]:
    """Return for each node what it looks like: kind, name, detail, line, and whether it is known."""
    places, details = Places(), _cached(detail_of)
    results = set(wanted)
    return [
        (
            node.op.kind,
            node.op.name,
            details(node),
            places.of(node),
            node.key in unknown,
            node.key in results,
        )
        for node in nodes
    ]


def _cached(detail: Callable[[Node], str]) -> Callable[[Node], str]:
    known: dict[int, str] = {}

    def of(node: Node) -> str:
        if node.op.kind != "prompt":
            return detail(node)
        if id(node.op) not in known:
            known[id(node.op)] = detail(node)
        return known[id(node.op)]

    return of


def _by_role(estimates: Estimates, looks: Sequence[Look]) -> list[int] | None:
    """Divide nodes by what they look like and by the rows that need them; None if that is too much."""
    paths = estimates.paths
    if max(paths.ends([1] * len(looks)), default=0) > MOST_DEPTH:
        return None
    rows: dict[Hashable, int] = {}
    of = [0] * len(looks)
    above: list[set[int]] = [set() for _ in looks]
    for i in reversed(paths.order):
        role = (looks[i], frozenset(above[i]))
        of[i] = rows.setdefault(role, len(rows))
        if len(rows) > MOST_ROWS:
            return None
        for d in paths.deps[i]:
            above[d].add(of[i])
    return of


def _by_look(looks: Sequence[Look]) -> list[int]:
    rows: dict[Hashable, int] = {}
    return [rows.setdefault(look, len(rows)) for look in looks]


def _walk(
    roots: Sequence[int], needs: dict[int, list[int]]
) -> tuple[list[int], set[tuple[int, int]]]:
    """Return the rows in the order of a tree, each before what it needs, and the pairs that loop."""
    order: dict[int, None] = {}
    open_rows: set[int] = set()
    loops: set[tuple[int, int]] = set()
    # the rows that no result needs come last, where nothing has dropped them
    stack = [(row, row, False) for row in reversed([*roots, *(r for r in needs if r not in roots)])]
    while stack:
        row, above, is_left = stack.pop()
        if is_left:
            open_rows.discard(row)
        elif row in open_rows:
            loops.add((above, row))
        elif row not in order:
            order[row] = None
            open_rows.add(row)
            stack.append((row, above, True))
            stack.extend((need, row, False) for need in reversed(needs[row]))
    return list(order), loops


def _requests(estimates: Estimates) -> dict[str, int]:
    return {
        call.node.key: i for i, request in enumerate(estimates.requests) for call in request.calls
    }


def _named(node: Node) -> str:
    """Return the backends that are asked one after the other if a call fails."""
    calls = [call for call, _ in node.call.rest] if node.call else []
    return ", ".join(f"{call.client.plugin} {call.model(())}".rstrip() for call in calls)


def _fill(row: GraphRow, own: Sequence[Node], estimates: Estimates, sent: dict[str, int]) -> None:
    first: Any = own[0]
    row.kind, row.name = first.op.kind, first.op.name
    row.detail, row.where = detail_of(first), Places().of(first)
    row.nodes = len(own)
    requests = {sent[node.key] for node in own if node.key in sent}
    row.requests = len(requests)
    row.slack = min(estimates.slack[node.key] for node in own)
    if requests and len(requests) < len(own):
        row.notes.append(f"in {counted(len(requests), 'request')}")
    others = dict.fromkeys(_named(node) for node in own if node.call and node.call.rest)
    if others:
        row.notes.append(f"or else {' / '.join(others)}")
    known = sum(node.key not in estimates.open for node in own)
    if known and row.kind != "data":
        which = "" if known == len(own) else f"{known:,} "
        word = "rendered before the run" if row.kind == "prompt" else "answered"
        row.notes.append(f"{which}{word}")
    failing = sum(bool(estimates.calls[node.key].error) for node in own if node.key in sent)
    if failing:
        row.notes.append(f"{'' if failing == len(own) else f'{failing:,} '}will fail")
    longest = estimates.path_seconds.likely
    if row.kind == "call" and longest is not None and row.slack > WORTH_TELLING * longest:
        row.notes.append(f"can wait {clock(row.slack)}")
    if any(node.op.emits and node.key in estimates.open for node in own):
        row.notes.append("may add calls")
