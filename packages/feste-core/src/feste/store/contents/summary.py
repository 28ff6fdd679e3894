"""Figures of a store: its sessions, what they sent, and what ended without a known answer."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from feste.store.contents.reader import Reader, Row

__all__ = [
    "UNDER_WAY",
    "Call",
    "Operation",
    "Session",
    "Summary",
    "Task",
    "Unanswered",
    "summarize",
]

State = Literal["closed", "killed", "running", "unknown"]
UNDER_WAY = "under way or unknown"


@dataclass(slots=True)
class _Totals:
    calls: int = 0
    requests: int = 0
    failed: int = 0
    unknown: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None

    def add(self, row: Row, outcome: str, calls: int) -> None:
        self.requests += 1
        self.calls += calls if outcome == "answered" else 0
        self.failed += outcome == "failed"
        self.unknown += outcome in ("unknown", UNDER_WAY)
        if row["input_tokens"] is not None:
            self.input_tokens = (self.input_tokens or 0) + row["input_tokens"]
        if row["output_tokens"] is not None:
            self.output_tokens = (self.output_tokens or 0) + row["output_tokens"]


@dataclass(slots=True, kw_only=True)
class Session(_Totals):
    """A process that had the store open for writing, and the totals of what it sent.

    :param id: its number.
    :param began: when it opened the store, in seconds since 1970.
    :param ended: when it closed the store; None if it did not.
    :param last: the last moment that it is known to have been at work.
    :param state: ``"closed"``; ``"killed"`` if it ended without closing the store; ``"running"``; or
        ``"unknown"``, of a process on another machine.
    :param pid: its process id.
    :param host: its machine.
    :param program: the name of its program.
    :param feste: its version of Feste.
    :param calls: the calls that were answered; the other totals are as in :class:`Operation`.
    """

    id: int
    began: float
    ended: float | None
    last: float
    state: State
    pid: int
    host: str
    program: str
    feste: str


@dataclass(slots=True, kw_only=True)
class Operation(_Totals):
    """The totals of one operation and model.

    :param operation: ``plugin.operation``.
    :param model: the requested model.
    :param calls: the calls that were answered.
    :param requests: the requests that were sent, with the failed ones.
    :param failed: the requests that ended in an error.
    :param unknown: the requests that are under way, or may have been billed without an answer.
    :param input_tokens: tokens read, where the provider reported them; None if it never did.
    :param output_tokens: tokens generated, likewise.
    """

    operation: str
    model: str


class Call(NamedTuple):
    """A call whose request has no known answer.

    :param key: its key.
    :param draw: its draw.
    :param kept: whether an answer to it was kept since, of another request.
    """

    key: str
    draw: str
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Unanswered:
    """A request that is under way, or that may have been billed without an answer.

    :param id: its number.
    :param session: the number of its session.
    :param run: the name of its run.
    :param operation: ``plugin.operation``.
    :param model: the requested model.
    :param endpoint: where it was sent.
    :param sent: when, in seconds since 1970.
    :param outcome: ``"unknown"``, or ``"under way or unknown"`` if its process may still be at work.
    :param error: why it ended, where that is known.
    :param request_id: the provider's ID of it, or None.
    :param calls: its calls.
    """

    id: int
    session: int
    run: str
    operation: str
    model: str
    endpoint: str
    sent: float
    outcome: str
    error: str
    request_id: str | None
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A ``once=True`` task that was started and did not return.

    :param id: the number of its start.
    :param session: the number of its session.
    :param name: the name of the task.
    :param sent: when it was started, in seconds since 1970.
    :param outcome: ``"failed"``, ``"unknown"`` or ``"under way or unknown"``.
    :param error: why it ended, where that is known.
    :param key: the key of the call.
    :param asked: its arguments, ``{"args": [...], "kwargs": {...}}``; None if prompts are not kept.
    """

    id: int
    session: int
    name: str
    sent: float
    outcome: str
    error: str
    key: str
    asked: dict[str, Any] | None


@dataclass(slots=True)
class Summary:
    """What a store holds, in figures.

    :param sessions: the sessions, oldest first.
    :param operations: totals of each operation and model.
    :param unanswered: the requests without a known answer.
    :param tasks: for each ``once=True`` task how often it ended in which way.
    :param unfinished: the starts of tasks that did not return.
    """

    sessions: dict[int, Session] = field(default_factory=dict)
    operations: dict[tuple[str, str], Operation] = field(default_factory=dict)
    unanswered: list[Unanswered] = field(default_factory=list)
    tasks: dict[str, Counter[str]] = field(default_factory=dict)
    unfinished: list[Task] = field(default_factory=list)


def summarize(reader: Reader, session: int | None = None) -> Summary:
    """Return the figures of a store.

    :param reader: the store.
    :param session: the number of the only session to look at, or None for all.
    :raises JournalError: if there is no such session, or the store cannot be read.
    """
    made = Summary()
    rows = list(reader.good("sessions", "SELECT * FROM sessions ORDER BY id"))
    for row in rows:
        state = _state(row, newest=row is rows[-1])
        last = row["ended"] or row["began"]
        made.sessions[row["id"]] = Session(**row, state=state, last=last)
    if session is None:
        requests = reader.good("requests", "SELECT * FROM requests ORDER BY id")
    else:
        reader.check_session(session)
        made.sessions = {session: made.sessions[session]}
        query = "SELECT * FROM requests WHERE session = ? ORDER BY id"
        requests = reader.good("requests", query, session)
    for row in requests:
        _add(reader, made, row)
    return made


def _add(reader: Reader, made: Summary, row: Row) -> None:
    owner = made.sessions.get(row["session"])
    outcome = row["outcome"]
    if outcome == "sent":
        over = owner is not None and owner.state in ("closed", "killed")
        outcome = "unknown" if over else UNDER_WAY
    if owner is not None:
        owner.last = max(owner.last, row["sent"], row["ended"] or 0.0)
    if row["plugin"] == "task":
        made.tasks.setdefault(row["operation"], Counter())[outcome] += 1
        if outcome not in ("answered", "withdrawn"):
            made.unfinished.append(_task(reader, row, outcome))
    elif outcome != "withdrawn":
        name = (f"{row['plugin']}.{row['operation']}", row["model"])
        totals = made.operations.setdefault(name, Operation(operation=name[0], model=name[1]))
        calls = json.loads(row["calls"])
        totals.add(row, outcome, len(calls))
        if owner is not None:
            owner.add(row, outcome, len(calls))
        if outcome in ("unknown", UNDER_WAY):
            told = tuple(Call(key, drawn, _kept(reader, key, drawn, row)) for key, drawn in calls)
            made.unanswered.append(_unanswered(row, outcome, told))


def _task(reader: Reader, row: Row, outcome: str) -> Task:
    calls = json.loads(row["calls"])
    key = calls[0][0] if calls else ""
    asked = reader.asked(key)
    return Task(
        id=row["id"],
        session=row["session"],
        name=row["operation"],
        sent=row["sent"],
        outcome=outcome,
        error=row["error"] or "",
        key=key,
        asked=None if asked is None else asked[-1],
    )


def _unanswered(row: Row, outcome: str, calls: tuple[Call, ...]) -> Unanswered:
    return Unanswered(
        id=row["id"],
        session=row["session"],
        run=row["run"],
        operation=f"{row['plugin']}.{row['operation']}",
        model=row["model"],
        endpoint=row["endpoint"],
        sent=row["sent"],
        outcome=outcome,
        error=row["error"] or "",
        request_id=row["request_id"],
        calls=calls,
    )


def _kept(reader: Reader, key: str, drawn: str, request: Row) -> bool:
    query = "SELECT * FROM answers WHERE key = ? AND draw = ? AND kept >= ?"
    return reader.one("answers", query, key, drawn, request["sent"]) is not None


def _state(row: Row, *, newest: bool) -> State:
    """Return what became of a session; only the newest can still be at work."""
    if row["ended"] is not None:
        return "closed"
    if not newest:
        return "killed"
    if row["host"] != socket.gethostname() or os.name == "nt":  # where signal 0 is Ctrl-C
        return "unknown"
    try:
        os.kill(row["pid"], 0)
    except ProcessLookupError:
        return "killed"
    except OSError:  # of another user
        return "running"
    return "running"
