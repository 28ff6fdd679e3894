"""Pack several calls into one request, and unpack its response.

A :class:`Group` waits until each member has delivered its request or dropped out; then
:func:`pack_requests` cuts it into requests within all limits. The two functions here run plugin
code, so an executor calls them, never the brain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from feste.backend import Call, Request, Response
from feste.errors import CallError, CountMismatch

__all__ = ["Group", "Taken", "pack_requests", "unpack_response"]


class Group:
    """Calls of one run that will share requests, collected until all have arrived.

    :param members: the positions of their nodes.

    >>> group = Group([4, 7])
    >>> group.arrive(7, "request 7"), group.drop(4), group.flush()
    (False, True, [(7, 'request 7')])
    """

    __slots__ = ("arrived", "waiting")

    def __init__(self, members: Iterable[int]) -> None:
        self.waiting = set(members)
        self.arrived: dict[int, Any] = {}

    def arrive(self, member: int, request: Any) -> bool:
        """Add a member's request; return True if no other member is awaited.

        :param member: its position.
        :param request: its request.
        """
        self.waiting.discard(member)
        self.arrived[member] = request
        return not self.waiting

    def drop(self, member: int) -> bool:
        """Remove a member that will not come; return True if the arrived ones can be sent now.

        :param member: its position.
        """
        waited = member in self.waiting
        self.waiting.discard(member)
        return waited and not self.waiting and bool(self.arrived)

    def flush(self) -> list[tuple[int, Any]]:
        """Return the arrived requests in graph order, and remove them from the group."""
        arrived, self.arrived = sorted(self.arrived.items()), {}
        return arrived


class Taken(NamedTuple):
    """The largest list that a server is known to take.

    A server may limit how many items a list has or how large it is, and does not say which it was.
    So a list is sent if it has no more items, or is no larger.

    :param items: how many calls.
    :param size: the bytes of their requests.
    """

    items: int
    size: int

    def allows(self, items: int, size: int) -> bool:
        """Return whether a list may be sent; one call always may.

        :param items: how many calls.
        :param size: the bytes of their requests.

        >>> [Taken(4, 1000).allows(*of) for of in [(4, 5000), (9, 900), (5, 1001)]]
        [True, True, False]
        """
        return items <= max(1, self.items) or size <= self.size


def pack_requests(
    call: Call[Any], members: Sequence[int], requests: Sequence[Request], taken: Taken | None = None
) -> list[tuple[list[int], list[Request], Request]]:
    """Pack a group of calls into as few requests as the limits allow.

    The plan grouped the calls by their arguments. Here the requests themselves are compared: only
    requests that differ in nothing but the item are packed together.

    :param call: the operation.
    :param members: the positions of the calls.
    :param requests: their requests.
    :param taken: the largest list that the server is known to take, or None.
    :returns: for each request to send: the members it answers, their own requests, and the request.
    """
    rule = call.rule
    assert rule is not None, "only operations with a rule are grouped"
    alike: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        alike.setdefault(rule.signature(request), []).append(i)
    parts: list[tuple[list[int], list[Request], Request]] = []
    for positions in alike.values():
        sizes = [(requests[i].tokens, requests[i].size) for i in positions]
        begin = 0
        for count in rule.chunks(sizes, call.max_items, taken and taken.allows):
            chosen = positions[begin : begin + count]
            begin += count
            own = [requests[i] for i in chosen]
            parts.append(([members[i] for i in chosen], own, _packed(call, own)))
    return parts


def _packed(call: Call[Any], requests: list[Request]) -> Request:
    if len(requests) == 1:
        return requests[0]
    rule = call.rule
    assert rule is not None
    request = rule.pack(call.client, requests)
    draws = tuple(d for r in requests for d in r.draws)
    bounds = [r.max_output for r in requests if r.max_output is not None]
    bound = sum(bounds) if len(bounds) == len(requests) else None
    return replace(request, draws=draws, max_output=bound, packed=True)


def unpack_response(
    call: Call[Any], request: Request, response: Response
) -> list[Response | CallError]:
    """Return the outcome of each call in a packed request.

    :param call: the operation.
    :param request: the packed request.
    :param response: its response.
    :raises CountMismatch: if the number of outcomes differs from the number of calls.
    """
    rule = call.rule
    assert rule is not None, "only operations with a rule are packed"
    outcomes = list(rule.unpack(call.client, request, response))
    if len(outcomes) != request.items:
        raise CountMismatch(
            f"{call.name} of {request.plugin} gave {len(outcomes)} outcomes for {request.items} "
            "calls"
        )
    return outcomes
