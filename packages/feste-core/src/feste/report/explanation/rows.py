"""The figures of a plan: a row for the calls of each operation and model, and their sums."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from feste.node import Node
from feste.optimization.analysis.estimates import Estimates
from feste.optimization.analysis.forming import fewest_requests
from feste.optimization.analysis.ranges import NOTHING, UNKNOWN, Range, total
from feste.optimization.analysis.tokens import CallEstimate
from feste.report.naming import Places

__all__ = ["CallRow", "call_rows", "known_total"]


@dataclass(slots=True)
class CallRow:
    """The calls of one operation of one backend and model.

    :param operation: ``plugin.operation``.
    :param model: the model, if it is known before the run.
    :param where: ``file:line`` of the first call.
    :param lines: the number of source lines that make such calls.
    :param calls: the number of calls.
    :param requests: the number of requests that the plan needs if none fails; at most so many, if any
        calls are grouped.
    :param at_least: a lower bound of requests for any order and grouping.
    :param grouped: the number of calls whose requests are formed while the graph runs.
    :param unknown: the number of calls whose prompt is not known before the run.
    :param failing: the number of calls that cannot be prepared, and will fail. Figures of tokens and
        dollars are those of the others, and unknown if there are none.
    :param error: why the first of these fails, and where it is.
    :param input_tokens: tokens read, at four bytes of text a token; at worst at one for each byte of the
        request.
    :param output_tokens: tokens generated.
    :param cached_tokens: how many tokens of the input the prompt cache serves, if all goes well.
    :param written_tokens: how many are written to it.
    :param dollars: the price of the calls whose price is known; unknown if there is none.
    :param unpriced: the number of calls of unknown price.
    :param seconds: the time of all requests, added up; unknown without a latency.
    """

    operation: str
    model: str
    where: str = ""
    lines: int = 0
    calls: int = 0
    requests: int = 0
    at_least: int = 0
    grouped: int = 0
    unknown: int = 0
    failing: int = 0
    error: str = ""
    input_tokens: Range = NOTHING
    output_tokens: Range = NOTHING
    cached_tokens: int = 0
    written_tokens: int = 0
    dollars: Range = UNKNOWN
    unpriced: int = 0
    seconds: Range = NOTHING

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON."""
        data: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return {n: v._asdict() if isinstance(v, Range) else v for n, v in data.items()}


@dataclass(slots=True)
class _Calls:
    """The calls of a row, while it is made."""

    calls: list[CallEstimate] = field(default_factory=list)
    seconds: list[Range] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return [call.node for call in self.calls]


def call_rows(estimates: Estimates) -> list[CallRow]:
    """Return a row for each operation and model, in the order of their first calls.

    :param estimates: the estimates of the plan.
    """
    made: dict[Any, _Calls] = {}
    for estimate in estimates.calls.values():
        made.setdefault(_name(estimate), _Calls()).calls.append(estimate)
    for request in estimates.requests:
        made[_name(request.calls[0])].seconds.append(request.seconds)
    places = Places()
    grouped = {key for group in estimates.graph.groups for key in group.members}
    return [_row(estimates, some, grouped, places) for some in made.values()]


def _name(estimate: CallEstimate) -> Any:
    op: Any = estimate.node.op
    return op.token, estimate.model


def _row(estimates: Estimates, some: _Calls, grouped: Set[str], places: Places) -> CallRow:
    calls, first = some.calls, some.calls[0]
    lines = dict.fromkeys(places.of(node) for node in some.nodes)
    requests = len(some.seconds)
    sound = [call for call in calls if not call.error]
    failing = [call for call in calls if call.error]
    return CallRow(
        operation=f"{first.client.plugin}.{first.node.op.name}",
        model=first.model,
        where=next(iter(lines)),
        lines=len(lines),
        calls=len(calls),
        requests=requests,
        at_least=min(requests, fewest_requests(estimates.graph, some.nodes)),
        grouped=sum(node.key in grouped for node in some.nodes),
        unknown=sum(not call.is_known for call in sound),
        failing=len(failing),
        error=f"{failing[0].error} (at {places.of(failing[0].node)})" if failing else "",
        input_tokens=known_total([call.input for call in sound], len(calls)),
        output_tokens=known_total([call.output for call in sound], len(calls)),
        cached_tokens=sum(call.cached for call in calls),
        written_tokens=sum(call.written for call in calls),
        dollars=known_total([call.dollars for call in sound if call.is_priced], len(calls)),
        unpriced=sum(not call.is_priced for call in calls),
        seconds=total(some.seconds),
    )


def known_total(known: Sequence[Range], of: int) -> Range:
    """Return the sum of known figures; unknown if there are calls, but no figure of any.

    :param known: the figures.
    :param of: the number of calls, known or not.
    """
    return total(known) if known or not of else UNKNOWN
