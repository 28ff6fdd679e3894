"""What goes into a store and comes out of it: calls, answers, and requests of earlier sessions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from feste.backend import Request, Response, Secret, Usage
from feste.draw import Draw

__all__ = [
    "Answer",
    "Earlier",
    "Found",
    "Wanted",
    "calls_as_json",
    "decode",
    "draw_of",
    "encode",
]


class Wanted(NamedTuple):
    """A call whose answer is looked up.

    :param key: the key of its request, sent alone.
    :param draw: its draw.
    :param sample: whether it needs an answer of its own (SAMPLE, EFFECT); others take any.
    :param own: whether only the answer that was bought for its draw will do.
    """

    key: str
    draw: Draw
    sample: bool
    own: bool = False


@dataclass(frozen=True, slots=True)
class Earlier:
    """A request that was sent by an earlier session, or earlier in this one, and has no known answer.

    :param id: its number in the store.
    :param plugin: the backend's plugin name; ``"task"`` for a ``once=True`` task.
    :param operation: the operation, or the name of the task.
    :param model: the requested model.
    :param sent: when it was sent, in seconds since 1970.
    :param outcome: ``"unknown"``; for a task also ``"failed"`` if it raised, ``"sent"`` if it runs.
    :param error: why it ended, where that is known.
    :param key: the key of the call.
    :param draw: the call's draw, as text.
    """

    id: int
    plugin: str
    operation: str
    model: str
    sent: float
    outcome: str
    error: str
    key: str
    draw: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class Found(NamedTuple):
    """The result of looking up one call.

    :param response: the stored answer, or None.
    :param source: ``"replayed"`` from the store or ``"cached"`` from the cache; "" for no answer.
    :param tokens: the tokens read and generated for it, when it was bought.
    :param earlier: the request for the same call whose answer is not known, or None.
    :param damaged: how many stored answers to it were unreadable.
    :param equal: whether there is no answer for it, but one that an equal call has taken.
    """

    response: Response | None = None
    source: str = ""
    tokens: tuple[float, float] = (0, 0)
    earlier: Earlier | None = None
    damaged: int = 0
    equal: bool = False


class Answer(NamedTuple):
    """An answer to keep.

    :param request: the call's request, as it would be sent alone; its one draw is the call's.
    :param response: the answer, unparsed.
    :param source: ``"bought"``, or ``"cache"`` if a cache had it.
    :param secrets: keys that are blanked, should a provider have put one into its answer.
    """

    request: Request
    response: Response
    source: str = "bought"
    secrets: tuple[Secret, ...] = ()

    @property
    def key(self) -> str:
        """The call's key."""
        return self.request.key

    @property
    def draw(self) -> Draw:
        """The call's draw."""
        return self.request.draws[0]


_dumps = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def encode(response: Response) -> str:
    """Return a response as ASCII JSON, which holds lone surrogates and NUL too.

    The headers are left out: they speak of the connection and the account. So are the tokens that
    were written to the provider's prompt cache, for which rows have no place.

    :param response: the response.
    :raises ValueError: if the payload is not JSON; TypeError likewise.

    >>> encode(Response({"text": "é"}, Usage(3, 1, written=2), request_id="r-1"))
    '{"payload":{"text":"\\\\u00e9"},"usage":[3,1,0],"request_id":"r-1"}'
    """
    used = response.usage
    usage = None if used is None else [int(n) for n in (used.input, used.output, used.cached)]
    parts = {"payload": response.payload, "usage": usage, "request_id": response.request_id}
    return _dumps(parts)


def decode(text: str) -> Response:
    """Return the response that :func:`encode` made a text of.

    :param text: the text.
    :raises ValueError: if it is of another form: a store may come from elsewhere.
    """
    parts = json.loads(text)
    if type(parts) is not dict or parts.keys() != {"payload", "usage", "request_id"}:
        raise ValueError("not a stored response")
    used, request_id = parts["usage"], parts["request_id"]
    if not (used is None or (type(used) is list and [type(n) for n in used] == [int] * 3)):
        raise ValueError("its usage is no three numbers")
    if not (request_id is None or type(request_id) is str):
        raise ValueError("its request_id is no text")
    usage = None if used is None else Usage(*used)
    return Response(parts["payload"], usage, request_id=request_id)


def draw_of(text: str) -> Draw:
    """Return the draw that ``str`` made a text of; damage gives a draw that no node has.

    :param text: the text.

    >>> draw_of(str(Draw("main", "abc", 2)))
    Draw(scope='main', fingerprint='abc', n=2)
    """
    scope, _, rest = text.partition("/")
    fingerprint, _, n = rest.rpartition(".")
    return Draw(scope, fingerprint, int(n)) if n.isdecimal() else Draw(text, "", 0)


def calls_as_json(requests: Iterable[Request]) -> str:
    """Return the keys and draws of some calls as JSON.

    :param requests: each call's request, as it would be sent alone.
    """
    return _dumps([[request.key, str(request.draws[0])] for request in requests])
