"""What ``feste store list`` and ``show`` print, as text and as JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from feste.report.table import aligned, telling
from feste.store import schema
from feste.store.contents.reader import Reader, Row
from feste.store.contents.records import iso
from feste.store.contents.summary import UNDER_WAY, Session, Summary, Task, Unanswered
from feste.wording import counted, printable, wrapped

__all__ = ["as_json", "overview", "session_as_json", "sessions"]

#: At most this many requests, tasks and damaged rows are told one by one.
_TOLD = 20
#: Columns that are omitted if all their cells are in _NOTHING.
_OPTIONAL = {"pid", "failed", "unknown"}
_NOTHING = {"-", "0"}


def sessions(summary: Summary) -> list[str]:
    """Return the sessions as a table.

    :param summary: the figures of the store.
    """
    head = "session,began,program,ended,lasted,pid,requests,calls,tokens,unknown"
    rows = [head.split(",")]
    for session in summary.sessions.values():
        numbers = (session.requests, session.calls, _tokens(session), session.unknown)
        rows.append(
            [
                str(session.id),
                _local(session.began)[:-3],
                printable(session.program) or "-",
                session.state,
                _lasted(session),
                str(session.pid) if session.state in ("running", "unknown") else "-",
                *map(_number, numbers),
            ]
        )
    return aligned(telling(rows, _OPTIONAL, _NOTHING), 4)


def overview(reader: Reader, summary: Summary, quarantine: Sequence[Row]) -> list[str]:
    """Return all figures as text.

    :param reader: the store.
    :param summary: its figures.
    :param quarantine: its damaged rows.
    """
    size = f"{_bytes(_size(reader))}, tables version {schema.VERSION}"
    held = [
        counted(len(summary.sessions), "session"),
        counted(reader.count("answers"), "answer"),
        counted(reader.count("prompts"), "prompt"),
    ]
    lines = [printable(str(reader.path)), *wrapped(f"{', '.join(held)}; {size}", 2)]
    for block in (
        _operations(summary),
        _unanswered(summary.unanswered),
        _tasks(summary),
        _quarantine(quarantine),
    ):
        found = list(block)
        lines += ["", *found] if found else []
    return lines


def _operations(summary: Summary) -> Iterator[str]:
    if not summary.operations:
        return
    head = "operation,model,calls,requests,failed,unknown,tokens in,tokens out"
    rows = [head.split(",")]
    for row in summary.operations.values():
        numbers = (row.calls, row.requests, row.failed, row.unknown)
        tokens = (row.input_tokens, row.output_tokens)
        names = [printable(row.operation), printable(row.model)]
        rows.append([*names, *map(_number, numbers), *map(_number, tokens)])
    yield from aligned(telling(rows, _OPTIONAL, _NOTHING), 2)


def _unanswered(requests: Sequence[Unanswered]) -> Iterator[str]:
    if not requests:
        return
    ended = sum(request.outcome == "unknown" for request in requests)
    parts = [f"{counted(ended, 'request')} may have been billed without an answer"] if ended else []
    if len(requests) > ended:
        parts.append(f"{counted(len(requests) - ended, 'request')} {UNDER_WAY}")
    yield f"{', '.join(parts)}:"
    for request in requests[:_TOLD]:
        name = f"request {request.id} of session {request.session}: {request.operation}"
        said = f"{name} {request.model}, sent {_local(request.sent)}"
        yield from wrapped(printable(said + (f"; {request.error}" if request.error else "")), 2)
        for call in request.calls[:_TOLD]:
            yield f"    {printable(call.key)}"
            yield f"      {'answered by a later request' if call.kept else 'no answer since'}"
        if len(request.calls) > _TOLD:
            yield f"    and {counted(len(request.calls) - _TOLD, 'more call', 'more calls')}"
    yield from _more(requests)


def _tasks(summary: Summary) -> Iterator[str]:
    if not summary.tasks:
        return
    rows = [["once=True task", "done", "failed", "unknown"]]
    for name, ends in summary.tasks.items():
        unknown = ends["unknown"] + ends[UNDER_WAY]
        rows.append([printable(name), *map(_number, (ends["answered"], ends["failed"], unknown))])
    yield from aligned(rows, 1)
    for task in summary.unfinished[:_TOLD]:
        yield from wrapped(printable(_told(task)), 2)
        yield f"    {printable(task.key)}"
    yield from _more(summary.unfinished)


def _told(task: Task) -> str:
    said = f"{_call(task)} of session {task.session}, begun {_local(task.sent)}: {task.outcome}"
    return said + (f"; {task.error}" if task.error else "")


def _call(task: Task) -> str:
    """Return a call of a task as it is written in Python, where its arguments were kept."""
    if task.asked is None:
        return task.name
    args, kwargs = task.asked["args"], task.asked["kwargs"]
    parts = [repr(arg) for arg in args] + [f"{name}={arg!r}" for name, arg in kwargs.items()]
    return f"{task.name}({', '.join(part if len(part) <= 60 else f'{part[:60]}...' for part in parts)})"


def _quarantine(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield f"{counted(len(rows), 'damaged row')} in quarantine:"
    for row in rows[:_TOLD]:
        yield f"  row {row['id']}, of {printable(row['place'])}, found {_local(row['found'])}"
    yield from _more(rows)


def _more(items: Sequence[Any]) -> Iterator[str]:
    if len(items) > _TOLD:
        yield f"  and {len(items) - _TOLD:,} more; --json has them all"


def as_json(reader: Reader, summary: Summary, quarantine: Sequence[Row]) -> dict[str, Any]:
    """Return all figures as JSON.

    :param reader: the store.
    :param summary: its figures.
    :param quarantine: its damaged rows.
    """
    found = [{"id": r["id"], "place": r["place"], "found": iso(r["found"])} for r in quarantine]
    return {
        "path": str(reader.path),
        "bytes": _size(reader),
        "tables": schema.VERSION,
        "answers": reader.count("answers"),
        "prompts": reader.count("prompts"),
        "sessions": [session_as_json(session) for session in summary.sessions.values()],
        "operations": [asdict(row) for row in summary.operations.values()],
        "unanswered": [_as_json(request) for request in summary.unanswered],
        "tasks": {name: _ends(ends) for name, ends in summary.tasks.items()},
        "unfinished": [_as_json(task) for task in summary.unfinished],
        "quarantine": found,
        "damaged": sorted(f"{table} {name}" for table, name in reader.damaged),
    }


def session_as_json(session: Session) -> dict[str, Any]:
    """Return a session as JSON, with its totals.

    :param session: the session.
    """
    moments = {"began": iso(session.began), "last": iso(session.last)}
    return {**asdict(session), **moments, "ended": session.ended and iso(session.ended)}


def _as_json(item: Unanswered | Task) -> dict[str, Any]:
    row = {**asdict(item), "sent": iso(item.sent)}
    if isinstance(item, Unanswered):
        row["calls"] = [call._asdict() for call in item.calls]
    return row


def _ends(ends: Counter[str]) -> dict[str, int]:
    return dict(sorted(ends.items()))


def _size(reader: Reader) -> int:
    """Return the bytes of the store with its write-ahead log."""
    files = (reader.path, reader.path.with_name(f"{reader.path.name}-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def _bytes(size: float) -> str:
    """Return a size with its unit.

    >>> _bytes(512), _bytes(1_234_567)
    ('512 B', '1.23 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:,.1f} TB"


def _lasted(session: Session) -> str:
    if session.ended is not None:
        return _duration(session.ended - session.began)
    until = time.time() if session.state == "running" else session.last
    return f">{_duration(until - session.began)}"


def _duration(seconds: float) -> str:
    """Return a duration with its unit.

    >>> _duration(3.21), _duration(150), _duration(10_000)
    ('3.2 s', '2.5 min', '2.8 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _tokens(session: Session) -> int | None:
    if session.input_tokens is None and session.output_tokens is None:
        return None
    return (session.input_tokens or 0) + (session.output_tokens or 0)


def _number(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _local(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
