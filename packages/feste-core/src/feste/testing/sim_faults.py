"""What goes wrong at `SimServer`: faults of single requests, and outages.

Chance depends on the server's seed, the body of a request and how often that body has come, and
never on the order of arrival. So a run with many requests at once can be repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from feste.testing.sim_http import Reply

__all__ = ["Chance", "Fault", "FaultKind", "Faults", "Outage", "spoiled"]

FaultKind = Literal[
    "status", "rate_limit", "quota", "overloaded", "unavailable", "html", "bad_gateway",
    "reset_before", "hang",
    "gateway_timeout", "reset_after", "truncated", "garbage", "empty", "wrong_shape", "wrong_count",
    "drip", "slow",
]  # fmt: skip

_HTML = "<html><body><h1>The server is not available.</h1></body></html>"
_PAUSES = {"drip": 0.05}


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault for `SimServer`: which requests it hits, and what happens to them.

    ===================  ===============================================================  =========
    kind                 what the client sees                                             generated
    ===================  ===============================================================  =========
    ``status``           `status` with `body`, or the provider's own error JSON           no
    ``rate_limit``       429, told to wait `pause` seconds                                no
    ``quota``            429 of an account without money                                  no
    ``overloaded``       529, told to wait `pause` seconds                                no
    ``unavailable``      503, told to wait `pause` seconds                                no
    ``html``             503 of something in front of the provider, as HTML               no
    ``bad_gateway``      502, as HTML                                                     no
    ``reset_before``     the connection reset                                             no
    ``hang``             nothing, until it goes away                                      no
    ``gateway_timeout``  504, as HTML, though the answer was made                         yes
    ``reset_after``      the connection reset, though the answer was made                 yes
    ``truncated``        half of the answer, then the end of the connection               yes
    ``garbage``          status 200 with `body`, by default not JSON                      yes
    ``empty``            status 200 without a body                                        yes
    ``wrong_shape``      status 200 with JSON that is no answer                           yes
    ``wrong_count``      one answer less than there should be                             yes
    ``drip``             the answer in 16 pieces (a stream: event by event), with         yes
                         `pause` seconds before each
    ``slow``             the answer, `pause` seconds late                                 yes
    ===================  ===============================================================  =========

    Generated answers are in the ledger, because a provider would bill them. Only ``drip`` and
    ``slow`` deliver them.

    :param status: the status of kind ``status``.
    :param headers: headers of the reply; they override the server's own.
    :param times: how many requests it hits; None for all.
    :param path: hit only this path.
    :param kind: see the table.
    :param body: JSON, or a string that is sent unchanged.
    :param match: hit only requests whose body contains this text, with or without JSON escapes.
    :param probability: the share of matching requests to hit; shares of several faults add up.
    :param pause: seconds; None for 0.05 of ``drip`` and 1 of the others.
    :raises ValueError: if there is no such kind, or the probability is not from 0 to 1.

    >>> Fault(status=429, headers={"retry-after": "1"}, times=3).kind
    'status'
    """

    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int | None = 1
    path: str | None = None
    kind: FaultKind = "status"
    body: Any = None
    match: str | None = None
    probability: float = 1.0
    pause: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            known = ", ".join(get_args(FaultKind))
            raise ValueError(f"no fault of kind {self.kind!r}; there are: {known}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be from 0 to 1, not {self.probability}")

    @property
    def seconds(self) -> float:
        """The pause, or that of the kind."""
        return _PAUSES.get(self.kind, 1.0) if self.pause is None else self.pause


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A time in which a simulated provider is away.

    It begins with the first request that fits both `after_requests` and `after_seconds`, and hits
    that one too. Its requests count as fault ``"outage"``.

    :param after_requests: how many requests are served before.
    :param after_seconds: the least seconds from the first request of all until it begins.
    :param seconds: how long it lasts.
    :param requests: how many requests it hits, if not for a time.
    :param refuse: reset all connections and refuse new ones, instead of answering 503. What is
        being generated then is billed, and reaches nobody.
    :raises ValueError: if it has no end or two, or is to count what it refuses.

    >>> Outage(after_requests=100, seconds=20).refuse
    False
    """

    after_requests: int = 0
    after_seconds: float = 0.0
    seconds: float | None = None
    requests: int | None = None
    refuse: bool = False

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.requests is None):
            raise ValueError("an outage lasts for seconds= or for requests=, one of them")
        if self.refuse and self.seconds is None:
            raise ValueError("who refuses connections sees no requests to count: give seconds=")


class Chance:
    """Numbers between 0 and 1 for requests.

    :param seed: the seed of the server.
    """

    def __init__(self, seed: int) -> None:
        self.key = str(seed).encode()[:64]
        self.seen: Counter[bytes] = Counter()

    def draw(self, body: bytes) -> tuple[float, float]:
        """Return two numbers for the next request that has this body.

        :param body: the body of the request.
        """
        key = hashlib.blake2b(body, digest_size=16, key=self.key).digest()
        self.seen[key] += 1
        made = hashlib.blake2b(key + str(self.seen[key]).encode(), digest_size=16).digest()
        return (
            int.from_bytes(made[:8], "big") / 2**64,
            int.from_bytes(made[8:], "big") / 2**64,
        )


class Faults:
    """The faults and outages that a server has left.

    :param given: the faults and outages.
    """

    def __init__(self, given: Sequence[Fault | Outage] = ()) -> None:
        self.faults: list[tuple[Fault, list[int | None]]] = []
        self.outages: list[Outage] = []
        self.outage: tuple[Outage, float, int] | None = None  # with the end in seconds, requests
        self.add(given)

    def add(self, given: Sequence[Fault | Outage]) -> None:
        """Append faults and outages."""
        for one in given:
            if isinstance(one, Outage):
                self.outages.append(one)
            else:
                self.faults.append((one, [one.times]))

    def away(self, number: int, first: float, now: float) -> Outage | None:
        """Return the outage that a request falls into, if it does.

        :param number: the number of the request, from 1.
        :param first: when the first request arrived, in seconds.
        :param now: when this one did.
        """
        if self.outage is not None and (now >= self.outage[1] or number >= self.outage[2]):
            self.outage = None
        if self.outage is None:
            for outage in self.outages:
                if number > outage.after_requests and now - first >= outage.after_seconds:
                    self.outages.remove(outage)
                    end = float("inf") if outage.seconds is None else now + outage.seconds
                    last = number + outage.requests if outage.requests else 2**63
                    self.outage = outage, end, last
                    break
        return self.outage[0] if self.outage else None

    def strike(self, path: str, body: bytes, number: float) -> Fault | None:
        """Return the fault that hits a request, if one does.

        :param path: the path of the request.
        :param body: its body.
        :param number: its number from `Chance`.
        """
        for fault, left in self.faults:
            if left[0] == 0 or fault.path not in (None, path):
                continue
            if fault.match is not None and not _holds(body, fault.match):
                continue
            if number >= fault.probability:
                number -= fault.probability
                continue
            if left[0] is not None:
                left[0] -= 1
            return fault
        return None


def _holds(body: bytes, text: str) -> bool:
    spellings = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return any(spelling.encode("utf-8", "surrogatepass") in body for spelling in spellings)


def one_less(body: Any) -> Any:
    """Return a reply without the last of its answers: without the end of its first list.

    :param body: the reply as JSON.

    >>> one_less({"model": "m", "data": [1, 2]})
    {'model': 'm', 'data': [1]}
    """
    if isinstance(body, list):
        return body[:-1]
    if isinstance(body, dict):
        for name, value in body.items():
            less = one_less(value)
            if less is not value:
                return {**body, name: less}
    return body


def spoiled(reply: Reply, fault: Fault) -> Reply | None:
    """Apply a fault to a reply; return None if the connection is to be reset.

    :param reply: the reply: the answer, or the error that the fault asks for.
    :param fault: the fault.
    """
    headers = {**reply.headers, **{name.lower(): value for name, value in fault.headers.items()}}
    reply.headers = headers
    match fault.kind:
        case "reset_after":
            return None
        case "garbage":
            text = "this is {not JSON" if fault.body is None else fault.body
            return _scripted(200, text, headers)
        case "empty":
            return _scripted(200, "", headers)
        case "wrong_shape":
            return _scripted(200, {"object": "none"}, headers)
        case "gateway_timeout" | "html" | "bad_gateway":
            status = {"gateway_timeout": 504, "html": 503, "bad_gateway": 502}[fault.kind]
            page = _HTML if fault.body is None else fault.body
            return _scripted(status, page, {"content-type": "text/html"})
        case "truncated":
            half = reply.pieces[: len(reply.pieces) // 2]
            if reply.size is not None:
                half = [b"".join(reply.pieces)[: reply.size // 2]]
            return Reply(reply.status, half, headers, reply.size, reply.pause, cut=True)
        case "drip":
            pieces = reply.pieces
            if reply.size is not None:
                body, step = b"".join(pieces), reply.size // 16 + 1
                pieces = [body[at : at + step] for at in range(0, reply.size, step)]
            reply.pieces, reply.pause = pieces, fault.seconds
        case _ if fault.body is not None:
            return _scripted(reply.status, fault.body, headers)
    return reply


def _scripted(status: int, body: object, headers: dict[str, str]) -> Reply:
    data = body if isinstance(body, str) else json.dumps(body)
    if headers.get("content-type", "").startswith("text/event-stream"):
        headers = {name: value for name, value in headers.items() if name != "content-type"}
    return Reply.whole(status, data.encode(), headers)
