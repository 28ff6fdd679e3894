"""What `SimServer` tells of its process: the bill, the log, the ledger, the totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

__all__ = ["Billed", "LedgerEntry", "LoggedRequest", "Totals"]


@dataclass(frozen=True, slots=True)
class Billed:
    """What a provider bills.

    :param input_tokens: tokens of prompts, those of the prompt cache included.
    :param cached_tokens: tokens of `input_tokens` that were read from the prompt cache.
    :param written_tokens: tokens of `input_tokens` that were written to the prompt cache.
    :param output_tokens: tokens generated.
    :param input_units: the price of the input, in usual prices of an input token.

    >>> Billed(10, output_tokens=3, input_units=10) + Billed(5, 4, input_units=1.5)
    Billed(input_tokens=15, cached_tokens=4, written_tokens=0, output_tokens=3, input_units=11.5)
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    output_tokens: int = 0
    input_units: float = 0.0

    @classmethod
    def uncached(cls, input_tokens: int, output_tokens: int = 0) -> Billed:
        """Return the bill of a request that the prompt cache does not concern.

        :param input_tokens: tokens read.
        :param output_tokens: tokens generated.
        """
        return cls(input_tokens, output_tokens=output_tokens, input_units=input_tokens)

    def __add__(self, other: Billed) -> Billed:
        return Billed(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.written_tokens + other.written_tokens,
            self.output_tokens + other.output_tokens,
            self.input_units + other.input_units,
        )


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request as the server saw it.

    Times are of the machine's monotonic clock, in seconds.

    :param headers: names in lower case, no secrets.
    :param body: decoded JSON, or text if it is not JSON.
    :param items: the answers generated.
    :param status: None until a status is sent.
    :param fault: the kind of the fault that hit it, or ``"outage"``.
    :param started: when it had arrived.
    :param finished: when the reply was written or the client left.
    :param billed: what it cost in tokens.
    :param dollars: what it cost in dollars, where the server has a price.
    :param delivered: whether all of what was generated went to the socket of a client that was
        still there. What a fault spoiled was not delivered.
    :param left: when the client closed the connection before it had a whole reply.
    """

    id: str
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    items: int
    status: int | None
    fault: str | None
    started: float
    finished: float | None
    billed: Billed
    dollars: float | None
    delivered: bool
    left: float | None


class LedgerEntry(TypedDict):
    """One generated answer, which a provider would bill even if nobody received it.

    `request` is the `id` of the `LoggedRequest`, `prompt` the prompt, embedded text or last user
    message, `key` the digest of the whole prompt, `sample` the ``sample_index`` of the answer.
    """

    request: str
    path: str
    prompt: str
    answer: str
    key: str
    sample: int


@dataclass(frozen=True, slots=True)
class Totals:
    """What a server has seen since its start or last reset; cheap to ask for at any time.

    :param requests: requests that arrived, refused ones included.
    :param statuses: how many replies had which status.
    :param faults: how many requests were hit by which kind of fault.
    :param generated: answers generated, which is the length of the ledger.
    :param delivered: those of `generated` that went to a client whole.
    :param left: requests whose client closed the connection before it had a whole reply.
    :param in_flight: requests in flight now; one whose client left is not.
    :param peak: the most requests in flight at once. A server without latency answers as soon as
        it has read a request, so its peak is 1.
    :param billed: what was generated, in tokens, embeddings included.
    :param dollars: the same in dollars, where the server has a price.
    :param requests_used: the share of the quota of requests that was used from the first request
        to the last, or of one bucket in a shorter time; above 1 if what was saved up at first was
        used as well. None without such a limit.
    :param tokens_used: likewise for tokens.
    :param committed: prefixes in the prompt cache that a request would find now. A prompt has one
        for each multiple of the cache's `step` and for each breakpoint.
    """

    requests: int = 0
    statuses: Mapping[int, int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)
    generated: int = 0
    delivered: int = 0
    left: int = 0
    in_flight: int = 0
    peak: int = 0
    billed: Billed = field(default_factory=Billed)
    dollars: float | None = None
    requests_used: float | None = None
    tokens_used: float | None = None
    committed: int = 0

    def share(self, status: int) -> float:
        """Return the share of requests that were answered with a status.

        :param status: the HTTP status.

        >>> Totals(requests=4, statuses={200: 3, 429: 1}).share(429)
        0.25
        """
        return self.statuses.get(status, 0) / self.requests if self.requests else 0.0
