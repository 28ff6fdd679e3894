"""Tell runs to Python's ``logging``, for who has set that up; Feste itself installs no handler.

Lines have names, counts and times. They never have prompts, answers, keys, or the texts of errors,
which may quote any of them. Names come from providers too, so keys are redacted in every line.
"""

from __future__ import annotations

import logging

from feste.backend import redact_record
from feste.events import Event, GateClosed, RequestFinished, RunFinished, RunStarted
from feste.wording import counted, printable

__all__ = ["log", "wanted"]

_runs = logging.getLogger("feste.scheduler")
_store = logging.getLogger("feste.store")
for _logger in (_runs, _store):
    _logger.addFilter(redact_record)

#: The events of which lines are made, by the lowest level at which one is.
_LEVELS: dict[int, tuple[type[Event], ...]] = {
    logging.WARNING: (GateClosed, RunFinished),
    logging.INFO: (RunStarted,),
    logging.DEBUG: (RequestFinished,),
}


def wanted() -> set[str]:
    """Return the names of the events that are logged, as logging is set up now."""
    return {
        event.name
        for level, events in _LEVELS.items()
        if _says(_runs, level) or _says(_store, level)
        for event in events
    }


def _says(logger: logging.Logger, level: int) -> bool:
    """Whether a logger's lines go anywhere; without handlers Python itself would print warnings."""
    return logger.isEnabledFor(level) and logger.hasHandlers()


def log(event: Event) -> None:
    """Write the line of an event, if there is one.

    :param event: the event.
    """
    if isinstance(event, RunStarted) and _says(_runs, logging.INFO):
        nodes, calls = counted(event.nodes, "node"), counted(event.calls, "call")
        _runs.info("%s started: %s, %s", event.run, nodes, calls)
    elif isinstance(event, RequestFinished) and _says(_runs, logging.DEBUG):
        _runs.debug("%s", _request(event))
    elif isinstance(event, GateClosed) and _says(_runs, logging.WARNING):
        why = "too many requests failed" if event.reason == "breaker" else "rate limit"
        what = printable(f"{event.backend} {event.model}".rstrip())
        _runs.warning(
            "%s: nothing is sent to %s for %.1f s: %s", event.run, what, event.seconds, why
        )
    elif isinstance(event, RunFinished):
        if _says(_runs, logging.INFO):
            _runs.info("%s", _run(event))
        if event.damaged and _says(_store, logging.WARNING):
            answers = counted(event.damaged, "stored answer")
            _store.warning("%s: %s damaged, and so not used", event.run, answers)


def _request(event: RequestFinished) -> str:
    what = printable(f"{event.backend}.{event.operation} {event.model}".rstrip())
    waited = "".join(f", {name} {wait:.3f} s" for name, wait in event.waits.items())
    where = f" on {printable(event.worker)}" if event.worker else ""
    told = [
        f"{event.run}: request {event.number} of {what}{where}: {counted(event.items, 'call')}",
        f"attempt {event.attempt}",
        f"{event.at - event.sent:.3f} s{waited}",
    ]
    if event.input_tokens is not None:
        told.append(f"{event.input_tokens:,} tokens in, {event.output_tokens or 0:,} out")
    if event.error:
        status = f" {event.status}" if event.status is not None else ""
        told.append(f"{event.error}{status}, billed: {event.billed}")
    if event.request_id is not None:
        told.append(f"id {printable(str(event.request_id))}")
    return ", ".join(told)


def _run(event: RunFinished) -> str:
    states = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in event.states.items())
    failures = ", ".join(f"{n:,} {name}" for name, n in event.failures.items())
    parts = [
        f"{event.run} {'stopped' if event.cancelled else 'ended'} after {event.at:.2f} s: {states}",
        f"failures: {failures}" if failures else "",
        counted(event.requests, "request"),
        f"{event.input_tokens:,} tokens in, {event.output_tokens:,} out",
    ]
    return "; ".join(filter(None, parts))
