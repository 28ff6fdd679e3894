"""What a run tells its observers: frozen records of plain data.

Observers get them in order through the hooks ``feste_run_started``, ``feste_node_finished``,
``feste_request_finished`` and ``feste_run_finished``. Times are seconds since the run began.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

__all__ = ["SCHEMA", "Event", "NodeFinished", "RequestFinished", "RunFinished", "RunStarted"]

#: Raised by one whenever a field changes its meaning; new fields do not raise it.
SCHEMA = 1

State = Literal["done", "kept", "shared", "failed", "skipped", "interrupted", "not_started"]


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events.

    :param run: the run's name.
    :param at: when it happened.
    """

    name: ClassVar[str] = ""

    run: str
    at: float

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON, with its name and the schema's version."""
        return {"schema": SCHEMA, "event": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run begins.

    :param nodes: how many nodes it has.
    :param calls: how many of them are LLM calls to be answered.
    :param started: the wall-clock time, in seconds since 1970.
    """

    name: ClassVar[str] = "run_started"

    nodes: int
    calls: int
    started: float


@dataclass(frozen=True, slots=True)
class NodeFinished(Event):
    """A node ended.

    :param key: the node's key.
    :param op: the name of what it does.
    :param kind: ``"call"``, ``"prompt"``, ``"task"`` or ``"data"``.
    :param state: how it ended.
    :param ready: when all it needs was there.
    :param origin: ``file:line`` of the user's call.
    :param error: the error's text, or an empty string.
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
    """One request to a provider ended; a call that is tried again ends several.

    :param backend: the backend's plugin name.
    :param operation: the operation's name.
    :param model: the model asked for.
    :param items: logical calls in the request.
    :param attempt: 1 for the first try.
    :param ready: when it could have been sent, but for limits.
    :param sent: when it was sent.
    :param input_tokens: tokens read, as the provider counts, or None if it does not say.
    :param output_tokens: tokens generated, or None.
    :param status: the HTTP status of a refusal, or None.
    :param error: the error's class name, or an empty string.
    :param request_id: the provider's name for the request.
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
    status: int | None = None
    error: str = ""
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """A run ended.

    :param states: how many nodes ended in which state.
    :param requests: how many requests were sent.
    :param input_tokens: tokens read in all, as far as providers said.
    :param output_tokens: tokens generated in all.
    :param cancelled: whether it was stopped before its end.
    """

    name: ClassVar[str] = "run_finished"

    states: dict[str, int]
    requests: int
    input_tokens: int
    output_tokens: int
    cancelled: bool = False
