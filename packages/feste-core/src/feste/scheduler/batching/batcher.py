"""Pack several calls into one request, and unpack its response.

A :class:`Gathering` waits until each member has delivered its request or dropped out; then
:func:`pack_requests` cuts it into requests within all limits. The two functions here run plugin
code, so an executor calls them, never the brain.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from feste.backend import Call, Request, Response
from feste.backend.batching import even_parts
from feste.errors import CallError, CountMismatch, MalformedResponse
from feste.wording import a_kind

__all__ = ["Gathering", "Packed", "Taken", "pack_requests", "unpack_response"]


class Gathering:
    """The calls of a batch, collected until all have arrived.

    :param members: the positions of their nodes.
    :param several: whether equal ones among them may become several answers to one prompt.

    >>> gathering = Gathering([4, 7])
    >>> gathering.arrive(7, "request 7"), gathering.drop(4), gathering.flush()
    (False, True, [(7, 'request 7')])
    """

    __slots__ = ("arrived", "several", "waiting")

    def __init__(self, members: Iterable[int], several: bool = False) -> None:
        self.several = several
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
        """Return the arrived requests in graph order, and remove them from here."""
        arrived, self.arrived = sorted(self.arrived.items()), {}
        return arrived


class Taken(NamedTuple):
    """The largest request that a server is known to take.

    A server may limit how many items a list has or how large it is, and does not say which it was.
    So a list is sent if it has no more items, or is no larger.

    :param items: how many prompts.
    :param size: the bytes of their requests.
    :param draws: how many answers to one prompt.
    """

    items: int = sys.maxsize
    size: int = sys.maxsize
    draws: int = sys.maxsize

    def allows(self, items: int, size: int) -> bool:
        """Return whether a list may be sent; one call always may.

        :param items: how many prompts.
        :param size: the bytes of their requests.

        >>> [Taken(4, 1000).allows(*of) for of in [(4, 5000), (9, 900), (5, 1001)]]
        [True, True, False]
        """
        return items <= max(1, self.items) or size <= self.size

    def least(self, other: Taken) -> Taken:
        """Return the limits that hold if both hold.

        :param other: other limits.

        >>> Taken(4, 1000).least(Taken(draws=1))
        Taken(items=4, size=1000, draws=1)
        """
        return Taken(*map(min, self, other))


class Packed(NamedTuple):
    """One request to send.

    :param members: the positions of the calls that it answers.
    :param requests: their own requests, as each would be sent alone.
    :param request: the request.
    """

    members: list[int]
    requests: list[Request]
    request: Request


def pack_requests(
    call: Call[Any],
    members: Sequence[int],
    requests: Sequence[Request],
    taken: Taken = Taken(),
    *,
    several: bool = False,
) -> list[Packed]:
    """Pack calls into as few requests as the limits allow.

    The plan grouped the calls by their arguments. Here the requests themselves are compared: only
    equal ones become several answers to one prompt, and only those that differ in nothing but the
    item become a list.

    :param call: the operation.
    :param members: the positions of the calls.
    :param requests: their requests.
    :param taken: the largest request that the server is known to take.
    :param several: whether equal requests may become one for several answers: the calls are SAMPLE.
    """
    singles = [Packed([i], [request], request) for i, request in zip(members, requests)]
    items = _fused(call, singles, taken) if several else singles
    rule = call.rule
    if rule is None:
        return items
    lists = rule.lists([item.request for item in items], call.max_items, taken.allows)
    return [_listed(call, [items[i] for i in positions]) for positions in lists]


def _fused(call: Call[Any], singles: Sequence[Packed], taken: Taken) -> list[Packed]:
    """Make equal requests one for several answers."""
    rule = call.operation.samples
    most = min(taken.draws, call.max_draws(singles[0].request.model))
    if rule is None or most < 2:
        return list(singles)
    equal: dict[str, list[Packed]] = {}
    for single in singles:
        equal.setdefault(single.request.key, []).append(single)
    fused: list[Packed] = []
    for some in equal.values():
        for own in even_parts(some, most):
            request = _for_all(rule.pack(own[0].request, len(own)), own)
            fused.append(Packed([p.members[0] for p in own], [p.request for p in own], request))
    return fused


def _listed(call: Call[Any], items: Sequence[Packed]) -> Packed:
    """Make requests that differ in the item one list."""
    if len(items) == 1:
        return items[0]
    request = call.pack([item.request for item in items])
    return Packed(
        [i for item in items for i in item.members],
        [r for item in items for r in item.requests],
        replace(_for_all(request, items), packed=True),
    )


def _for_all(request: Request, parts: Sequence[Packed]) -> Request:
    """Give a request the draws and the bound of all that it answers."""
    bounds = [r.max_output for part in parts for r in part.requests]
    known = [bound for bound in bounds if bound is not None]
    draws = tuple(d for part in parts for r in part.requests for d in r.draws)
    return replace(
        request, draws=draws, max_output=sum(known) if len(known) == len(bounds) else None
    )


def unpack_response(
    call: Call[Any], request: Request, response: Response
) -> list[Response | CallError]:
    """Return the outcome of each call in a shared request.

    :param call: the operation.
    :param request: the request that was sent.
    :param response: its response.
    :returns: for each call its response or error; :class:`~feste.errors.CountMismatch` for each of
        several answers to one prompt that did not come.
    :raises CountMismatch: if the number of outcomes of a list differs from the number of its items.
    """
    outcomes: Sequence[Response | CallError] = [response]
    if request.packed:
        rule = call.rule
        assert rule is not None, "only operations with a rule are packed"
        outcomes = list(rule.unpack(call.client, request, response))
        items = request.items // request.samples
        if len(outcomes) != items:
            raise CountMismatch(
                f"{call.name} of {request.plugin} gave {len(outcomes)} outcomes for {items} items"
            )
    if request.samples > 1:
        outcomes = [one for outcome in outcomes for one in _answers(call, request, outcome)]
    for outcome in outcomes:
        if not isinstance(outcome, (Response, CallError)):
            raise MalformedResponse(
                f"unpack of {request.plugin}.{call.name} gave {a_kind(outcome)}, not a Response "
                "or a CallError"
            )
    return list(outcomes)


def _answers(
    call: Call[Any], request: Request, outcome: Response | CallError
) -> Sequence[Response | CallError]:
    """Return the outcome of each of several answers to one prompt."""
    wanted = request.samples
    if isinstance(outcome, CallError):
        return [outcome.copy() for _ in range(wanted)]
    rule = call.operation.samples
    assert rule is not None, "only operations with a rule ask for several answers"
    made = list(rule.unpack(call.client, request, outcome))[:wanted]
    missing = wanted - len(made)
    told = f"{call.name} of {request.plugin} gave {len(made)} answers of {wanted}"
    return [*made, *(CountMismatch(told) for _ in range(missing))]
