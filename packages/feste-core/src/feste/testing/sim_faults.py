"""What can go wrong at `SimServer`: faults of single requests, and outages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = ["Fault", "FaultKind", "ListFault", "Outage"]

#: What happens to the answers of a reply that has several.
ListFault = Literal["shuffled", "duplicated", "extra"]
FaultKind = Literal[
    "status", "rate_limit", "quota", "overloaded", "unavailable", "html", "bad_gateway",
    "redirect", "content_filter", "reset_before", "hang",
    "gateway_timeout", "reset_after", "truncated", "garbage", "empty", "wrong_shape", "wrong_count",
    "wrong_length", "bomb", "deep", "endless", "endless_headers",
    "filtered", "drip", "drip_headers", "slow", "shuffled", "duplicated", "extra",
]  # fmt: skip

_PAUSES = {"drip": 0.05, "drip_headers": 0.05}


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
    ``redirect``         307 to another host, that of the header ``location``             no
    ``content_filter``   400 of a content filter that refuses the prompt                  no
    ``reset_before``     the connection reset                                             no
    ``hang``             nothing, until it goes away                                      no
    ``gateway_timeout``  504, as HTML, though the answer was made                         yes
    ``reset_after``      the connection reset, though the answer was made                 yes
    ``truncated``        half of the answer, then the end of the connection               yes
    ``garbage``          status 200 with `body`, by default not JSON                      yes
    ``empty``            status 200 without a body                                        yes
    ``wrong_shape``      status 200 with JSON that is no answer                           yes
    ``wrong_count``      one answer less than there should be                             yes
    ``wrong_length``     the answer, announced as half as long, or as long as the         yes
                         header ``content-length`` says
    ``bomb``             status 200 with 1 MB that gzip unpacks to 1 GB                   yes
    ``deep``             status 200 with JSON that is 100,000 levels deep                 yes
    ``endless``          status 200 with a body without end, of `body` repeated           yes
    ``endless_headers``  headers without end                                              yes
    ``filtered``         the answer, cut off by a content filter                          yes
    ``drip``             the answer in 16 pieces (a stream: event by event), with         yes
                         `pause` seconds before each
    ``drip_headers``     likewise, but the headers                                        yes
    ``slow``             the answer, `pause` seconds late                                 yes
    ``shuffled``         the answers out of order, with their indexes                     yes
    ``duplicated``       the first answer again, in place of the last                     yes
    ``extra``            one answer more than there should be                             yes
    ===================  ===============================================================  =========

    What spoils a generated answer leaves a request alone that the provider refuses; the last three
    leave streams and replies with a single answer alone.

    Generated answers are in the ledger, because a provider would bill them. Only ``filtered``,
    ``drip``, ``drip_headers``, ``slow`` and ``shuffled`` deliver them. Who has no indexes cannot
    notice ``shuffled`` and ``duplicated``.

    :param status: the status of kind ``status``.
    :param headers: headers of the reply; they override the server's own.
    :param times: how many requests it hits; None for all.
    :param path: hit only this path.
    :param kind: see the table.
    :param body: JSON, or a string that is sent unchanged.
    :param match: hit only requests whose body contains this text, with or without JSON escapes.
    :param probability: the share of matching requests to hit; shares of several faults add up.
    :param pause: seconds; None for 0.05 of what drips and 1 of the others.
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
