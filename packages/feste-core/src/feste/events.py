"""The events that a run sends to observers: frozen records of plain data.

Observers receive them in order through the hooks ``feste_run_started``, ``feste_node_finished``,
``feste_request_finished`` and ``feste_run_finished``. Times are seconds since the run started.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from feste.errors import Billed

__all__ = ["SCHEMA", "Event", "NodeFinished", "RequestFinished", "RunFinished", "RunStarted"]

#: Incremented when a field changes its meaning; new fields do not change it.
SCHEMA = 1

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
    """

    name: ClassVar[str] = "node_finished"

    key: str
    op: str
    kind: str
    state: State
    ready: float
    origin: str = ""
    error: str = ""


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


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """A run ended.

    :param states: the number of nodes in each final state.
    :param requests: the number of requests sent.
    :param input_tokens: the total of tokens read, where providers reported them.
    :param output_tokens: the total of tokens generated.
    :param cancelled: whether the run was stopped early.
    """

    name: ClassVar[str] = "run_finished"

    states: dict[str, int]
    requests: int
    input_tokens: int
    output_tokens: int
    cancelled: bool = False
