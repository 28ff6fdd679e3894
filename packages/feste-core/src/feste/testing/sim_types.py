"""The data between `SimServer` and its process: options one way, log, ledger and bill the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

__all__ = ["Billed", "Fault", "FaultKind", "LedgerEntry", "LoggedRequest"]

FaultKind = Literal["status", "reset_before", "reset_after", "garbage", "truncated", "hang", "drip"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault for `SimServer.add`: which requests it hits, and what happens to them.

    ========================  ==========================================================  =========
    kind                      what the client sees                                        generated
    ========================  ==========================================================  =========
    ``status``                `status` with `body`, or the provider's own error JSON      no
    ``reset_before``          the connection reset                                        no
    ``hang``                  nothing, until it goes away                                 no
    ``reset_after``           the connection reset, though the answer was made            yes
    ``garbage``               status 200 with `body`, by default not JSON                 yes
    ``truncated``             half of the answer, then the end of the connection          yes
    ``drip``                  the answer in 16 pieces (a stream: event by event), with    yes
                              `pause` seconds before each
    ========================  ==========================================================  =========

    Generated answers are in the ledger, because a provider would bill them.

    :param status: the status of kind ``status``.
    :param headers: headers of the reply; they override the server's own.
    :param times: how many requests it hits; None for all.
    :param path: hit only this path.
    :param kind: see the table.
    :param body: JSON, or a string that is sent unchanged.
    :param match: hit only requests whose body contains this text, with or without JSON escapes.
    :param probability: the probability to hit a matching request, drawn from the server's seed.
    :param pause: the seconds before each piece of kind ``drip``.

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
    pause: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            known = ", ".join(get_args(FaultKind))
            raise ValueError(f"no fault of kind {self.kind!r}; there are: {known}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be from 0 to 1, not {self.probability}")


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

    `headers` have lower-case names and no secrets. `body` is decoded JSON, or text if it is not
    JSON. `items` counts the generated answers. `status` is None until a status is sent. `fault` is
    the kind of the fault that hit the request. `started` and `finished` are times of the machine's
    monotonic clock; `finished` is when the reply was written or the client left.
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
