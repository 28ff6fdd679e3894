"""The halves of operations that run plugin code: an executor calls them, never the brain's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from feste.backend import Call, Price, Request, Response
from feste.draw import Draw
from feste.errors import ConfigError
from feste.optimization.analysis.profiles import Profiles
from feste.packing import fill
from feste.sharing import Prefix

__all__ = ["parse_response", "prepare_request", "priced_as", "unknown_price"]


def prepare_request(
    call: Call[Any],
    draw: Draw,
    args: tuple[Any, ...],
    values: list[Any],
    keyed: bool = False,
    prefixes: Sequence[Prefix] = (),
    profiles: Profiles | None = None,
) -> Request:
    """Prepare the request of a call and attach its draw.

    :param call: the operation.
    :param draw: the node's draw.
    :param args: the packed arguments of the call.
    :param values: the values for the slots.
    :param keyed: whether to compute its key here, since a store or an equal call needs it.
    :param prefixes: what it begins with, the shortest first.
    :param profiles: where to look up the price of its model, since a budget needs it; or None.
    """
    request = replace(call.prepare([fill(a, values) for a in args]), draws=(draw,))
    if prefixes:
        keys = [p.digest for p in prefixes if p.keyed]
        ends = tuple(p.whole for p in prefixes if p.whole)
        request = replace(request, mark=(keys[0] if keys else None, ends))
    request.tokens  # noqa: B018 - cached; the brain, which needs it, has no time to count
    if profiles is not None:
        priced_as(call, request, profiles)
        request.size  # noqa: B018 - cached
    if keyed:
        request.key  # noqa: B018 - cached
    return request


def priced_as(call: Call[Any], request: Request, profiles: Profiles) -> Price | None:
    """Return the price of a request's model, or None if it is not known.

    :param call: the operation.
    :param request: its request.
    :param profiles: keeps what backends say: each is asked once.
    """
    model = request.model or str(getattr(call.client, "model", None) or "")
    return profiles.price(call.client, model)


def unknown_price(call: Call[Any], model: str) -> ConfigError:
    """Return the error for a call whose price must be known, and is not.

    :param call: the operation.
    :param model: the model.
    """
    name = type(call.client).__name__
    return ConfigError(
        f"a budget in dollars needs the price of {model or call.client.plugin}, which is not known: give "
        f"{name}(..., profile=Profile(price=Price(input=..., output=...))), install "
        'feste-core[prices], or cap tokens instead: budget="200000 tokens"'
    )


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
