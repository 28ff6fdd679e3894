"""Which requests a fault hits, and what it does to their replies.

Chance depends on the server's seed, the body of a request and how often that body has come, and
never on the order of arrival. So a run with many requests at once can be repeated.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Sequence

from feste.testing.sim_faults import Fault, Outage
from feste.testing.sim_http import Reply
from feste.testing.sim_limits import Wait, retry_after
from feste.testing.wire import Refusal

__all__ = ["DELIVERING", "Chance", "Faults", "refusal_of", "spoiled"]

#: The faults after which the client has a whole answer.
DELIVERING = frozenset({"filtered", "drip", "drip_headers", "slow", "shuffled"})

_HTML = "<html><body><h1>The server is not available.</h1></body></html>"
#: The statuses of faults that answer instead of the provider's model.
_STATUSES = {
    "rate_limit": 429,
    "quota": 429,
    "overloaded": 529,
    "unavailable": 503,
    "html": 503,
    "bad_gateway": 502,
    "redirect": 307,
    "content_filter": 400,
}
_CODES = {"quota": "insufficient_quota", "content_filter": "content_filter"}
_SAID = {"content_filter": "The content_filter refused the prompt."}
_DEPTH = 100_000
_WAITING = ("rate_limit", "overloaded", "unavailable")


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
                    end = math.inf if outage.seconds is None else now + outage.seconds
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


def refusal_of(fault: Fault, spelling: Wait) -> Refusal | None:
    """Return the error that a fault answers instead of the provider, if it is such a fault.

    :param fault: the fault.
    :param spelling: how it says how long to wait, if it does.
    """
    status = fault.status if fault.kind == "status" else _STATUSES.get(fault.kind)
    if status is None:
        return None
    waiting = fault.kind in _WAITING
    headers = retry_after(spelling, fault.seconds, time.time()) if waiting else {}
    if fault.kind == "redirect":
        headers = {"location": "https://elsewhere.example/"}
    said = _SAID.get(fault.kind, "A scripted fault.")
    return Refusal(status, said, code=_CODES.get(fault.kind), headers=headers)


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
            status = 504 if fault.kind == "gateway_timeout" else reply.status
            page = _HTML if fault.body is None else fault.body
            return _scripted(status, page, {"content-type": "text/html"})
        case "truncated":
            half = reply.pieces[: len(reply.pieces) // 2]
            if reply.size is not None:
                half = [b"".join(reply.pieces)[: reply.size // 2]]
            return Reply(reply.status, half, headers, reply.size, reply.pause, cut=True)
        case "wrong_length":
            body = b"".join(reply.pieces)
            announced = int(headers.get("content-length") or len(body) // 2)
            reply.size = announced
            return Reply(reply.status, [reply.head(), body], raw=True, cut=announced > len(body))
        case "bomb":
            return Reply.whole(200, _bomb(), {**headers, "content-encoding": "gzip"})
        case "deep":
            return _scripted(200, f'{{"choices": {"[" * _DEPTH}{"]" * _DEPTH}}}', headers)
        case "endless":
            piece = b" " if fault.body is None else str(fault.body).encode()
            return Reply(200, [], headers, endless=piece * (65_536 // len(piece) + 1))
        case "endless_headers":
            line = (b"x-more: %b\r\n" % (b"a" * 1_000)) * 64
            return Reply(200, [reply.head()[:-2]], raw=True, endless=line)
        case "filtered":
            made = [_FINISH.sub(rb'\1"content_filter"', piece) for piece in reply.pieces]
            reply.pieces = made
            reply.size = None if reply.size is None else sum(map(len, made))
        case "drip":
            pieces = reply.pieces
            if reply.size is not None:
                pieces = _sixteenths(b"".join(pieces))
            reply.pieces, reply.pause = pieces, fault.seconds
        case "drip_headers":
            body = b"".join(map(reply.framed, reply.pieces)) + reply.tail()
            pieces = [*_sixteenths(reply.head()), body]
            return Reply(
                reply.status, pieces, raw=True, pause=fault.seconds, delivers=reply.delivers
            )
        case _ if fault.body is not None:
            return _scripted(reply.status, fault.body, headers)
    return reply


#: The reason why an answer ended, in the JSON of either provider; texts have other quotes.
_FINISH = re.compile(rb'("finish_reason": ?)"\w+"')


def _sixteenths(data: bytes) -> list[bytes]:
    step = len(data) // 16 + 1
    return [data[at : at + step] for at in range(0, len(data), step)]


@functools.cache
def _bomb() -> bytes:
    """Return 1 GB of spaces, packed by gzip: a block that is packed once and repeated."""
    block, times = b" " * (1 << 20), 1024
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    piece = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    check = 0
    for _ in range(times):
        check = zlib.crc32(block, check)
    head = b"\x1f\x8b\x08" + b"\0" * 7
    end = check.to_bytes(4, "little") + (len(block) * times).to_bytes(4, "little")
    return head + piece * times + packer.flush() + end


def _scripted(status: int, body: object, headers: dict[str, str]) -> Reply:
    data = body if isinstance(body, str) else json.dumps(body)
    if headers.get("content-type", "").startswith("text/event-stream"):
        headers = {name: value for name, value in headers.items() if name != "content-type"}
    return Reply.whole(status, data.encode(), headers)
