"""The halves of operations that run plugin code: an executor calls them, never the brain's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from feste.backend import Call, Request, Response
from feste.draw import Draw
from feste.packing import fill
from feste.sharing import Prefix

__all__ = ["parse_response", "prepare_request"]


def prepare_request(
    call: Call[Any],
    draw: Draw,
    args: tuple[Any, ...],
    values: list[Any],
    keyed: bool = False,
    prefixes: Sequence[Prefix] = (),
) -> Request:
    """Prepare the request of a call and attach its draw.

    :param call: the operation.
    :param draw: the node's draw.
    :param args: the packed arguments of the call.
    :param values: the values for the slots.
    :param keyed: whether to compute its key here, since a store or an equal call needs it.
    :param prefixes: what it begins with, the shortest first.
    """
    request = replace(call.prepare([fill(a, values) for a in args]), draws=(draw,))
    if prefixes:
        keys = [p.digest for p in prefixes if p.keyed]
        ends = tuple(p.whole for p in prefixes if p.whole)
        request = replace(request, mark=(keys[0] if keys else None, ends))
    request.tokens  # noqa: B018 - cached; the brain, which needs it, has no time to count
    if keyed:
        request.key  # noqa: B018 - cached
    return request


def parse_response(
    call: Call[Any], response: Response, args: tuple[Any, ...], values: list[Any]
) -> Any:
    """Return the value of a call.

    :param call: the operation.
    :param response: its response.
    :param args: the packed arguments of the call.
    :param values: the values for the slots.
    """
    return call.parse(response, [fill(a, values) for a in args])
