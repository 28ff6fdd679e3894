"""The events that a run sends to observers: frozen records of plain data.

Observers receive them in order through hooks: :class:`RunStarted` through ``feste_run_started``, and so
on. Times are seconds since the run started.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from feste.errors import Billed

__all__ = [
    "CAUSES",
    "EVENTS",
    "SCHEMA",
    "Event",
    "GateClosed",
    "NodeFinished",
    "RequestFinished",
    "RequestStarted",
    "RunFinished",
    "RunStarted",
]

#: Incremented when a field changes its meaning; new fields do not change it.
SCHEMA = 1

#: What a call may wait for: its inputs; a free worker for its request or a piece of its Python; a store; the other
#: calls of its request; another request that writes the beginning of its prompt into the provider's
#: cache; the number of requests in flight; a provider's limit; a provider that is down; room under a
#: cap on money; its next attempt; an equal call, or the same one in another run, that is under way.
CAUSES = (
    "dependency",
    "worker",
    "store",
    "batch",
    "prefix",
    "slot",
    "rate_limit",
    "outage",
    "budget",
    "retry",
    "equal_call",
)

State = Literal[
    "done",
    "kept",
    "shared",
    "replayed",
    "cached",
    "failed",
    "skipped",
    "interrupted",
    "not_started",
]


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events.

    :param run: the run's name.
    :param at: the time of the event.
    """

    name: ClassVar[str] = ""

    run: str
    at: float

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON, with its name and the schema version."""
        return {"schema": SCHEMA, "event": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run started.

    :param nodes: the number of nodes.
    :param calls: the number of LLM calls among them.
    :param started: the wall-clock time, in seconds since 1970.
    """

    name: ClassVar[str] = "run_started"

    nodes: int
    calls: int
    started: float


@dataclass(frozen=True, slots=True)
class NodeFinished(Event):
    """A node reached its final state.

    :param key: the node's key.
    :param op: the name of its op.
    :param kind: ``"call"``, ``"prompt"``, ``"task"`` or ``"data"``.
    :param state: the final state.
    :param ready: when all its inputs were available.
    :param origin: ``file:line`` of the user's call.
    :param error: the text of the error, or an empty string.
    :param worker: the name of the worker that ran the task, or sent the call's last request; empty for
        this process.
    """

    name: ClassVar[str] = "node_finished"

    key: str
    op: str
    kind: str
    state: State
    ready: float
    origin: str = ""
    error: str = ""
    worker: str = ""


@dataclass(frozen=True, slots=True)
class RequestStarted(Event):
    """One request was sent to a provider; a :class:`RequestFinished` with its number follows.

    :param number: the number of the request, unique in the process.
    :param backend: the backend's plugin name.
    :param operation: the operation's name.
    :param model: the requested model.
    :param items: the number of calls in the request.
    :param attempt: the number of the attempt, from 1.
    """

    name: ClassVar[str] = "request_started"

    number: int
    backend: str
    operation: str
    model: str
    items: int
    attempt: int


@dataclass(frozen=True, slots=True)
class RequestFinished(Event):
    """One request to a provider ended; a retried call has several.

    :param backend: the backend's plugin name.
    :param operation: the operation's name.
    :param model: the requested model.
    :param items: the number of calls in the request.
    :param attempt: the number of the attempt, from 1.
    :param ready: when it could have been sent without limits.
    :param sent: when it was sent.
    :param input_tokens: tokens read, as counted by the provider, or None if it reports none.
    :param output_tokens: tokens generated, or None.
    :param cached_tokens: how many of the tokens read came from the provider's prompt cache, or None.
    :param written_tokens: how many of them were written to it, or None.
    :param status: the HTTP status of a refusal, or None.
    :param error: the name of the error's class, or an empty string.
    :param request_id: the provider's ID of the request.
    :param billed: whether the provider charged for it: ``"yes"``, ``"no"``, or ``"unknown"`` where the
        request left and no answer came.
    :param number: the number of the request, as in :class:`RequestStarted`.
    :param waits: the seconds that it waited, by cause, since the earliest of its calls was prepared, or
        since its last attempt ended; see :data:`CAUSES`.
    :param worker: the name of the worker that sent it; empty for this process.
    """

    name: ClassVar[str] = "request_finished"

    backend: str
    operation: str
    model: str
    items: int
    attempt: int
    ready: float
    sent: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    written_tokens: int | None = None
    status: int | None = None
    error: str = ""
    request_id: str | None = None
    billed: Billed = "yes"
    number: int = 0
    waits: dict[str, float] = field(default_factory=dict)
    worker: str = ""


@dataclass(frozen=True, slots=True)
class GateClosed(Event):
    """No request goes to a provider for a while; told once, by the run whose request was refused.

    :param backend: the backend's plugin name.
    :param model: the model.
    :param reason: ``"rate_limit"``: the provider asked everyone to wait; or ``"breaker"``: too many
        requests failed.
    :param seconds: for how long.
    """

    name: ClassVar[str] = "gate_closed"

    backend: str
    model: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """A run ended.

    :param states: the number of nodes in each final state.
    :param requests: the number of requests sent.
    :param input_tokens: the total of tokens read, where providers reported them.
    :param output_tokens: the total of tokens generated.
    :param cancelled: whether the run was stopped early.
    :param failures: the number of failed nodes by the name of the error's class.
    :param retries: the number of further attempts by the name of the error's class.
    :param waits: the seconds that calls waited, by cause, summed over calls; see :data:`CAUSES`.
    :param peak: the most requests that were in flight at once.
    :param damaged: the number of stored answers that were unreadable and so not used.
    """

    name: ClassVar[str] = "run_finished"

    states: dict[str, int]
    requests: int
    input_tokens: int
    output_tokens: int
    cancelled: bool = False
    failures: dict[str, int] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    damaged: int = 0


#: All kinds of events; the hook of each is ``feste_`` and its name.
EVENTS: tuple[type[Event], ...] = (
    RunStarted,
    NodeFinished,
    RequestStarted,
    RequestFinished,
    GateClosed,
    RunFinished,
)
