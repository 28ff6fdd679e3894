"""What a report says besides its figures: what was reused, and what may have been paid twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feste.report.figures import money
from feste.wording import counted, printable

if TYPE_CHECKING:
    from feste.report.run_report import RunReport
    from feste.scheduler.run import Run

__all__ = ["UnknownRequest", "passed_on", "remarks", "unknown_requests"]

#: How many requests with unknown answers are named in the text.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class UnknownRequest:
    """A request of an earlier session that was sent for a call of the run, answer unknown.

    The process was killed while it was under way, for example. It may have been billed, so the call
    may have been paid for twice. Where the calls of a list shared it, there is one of these for each.

    :param call: the key of the call's node in this run.
    :param origin: ``file:line`` of the call.
    :param operation: ``plugin.operation``.
    :param model: the model.
    :param sent: when it was sent, in seconds since 1970.
    :param error: why its answer is unknown, where that is known.
    :param bought_again: whether this run bought the call again; else it has an answer from before.
    :param request: the number of the request in the store; 0 in reports that older versions wrote.
    """

    call: str
    origin: str
    operation: str
    model: str
    sent: float
    error: str = ""
    bought_again: bool = True
    request: int = 0


def unknown_requests(run: Run) -> list[UnknownRequest]:
    """Return the earlier requests for a run's calls whose answers are not known.

    :param run: the run.
    """
    nodes = run.program.nodes
    return [
        UnknownRequest(
            call=nodes[i].key,
            origin=nodes[i].where,
            operation=f"{earlier.plugin}.{earlier.operation}",
            model=earlier.model,
            sent=earlier.sent,
            error=earlier.error,
            bought_again=i not in run.sources,
            request=earlier.id,
        )
        for i, earlier in run.unknown
    ]


def passed_on(run: Run) -> dict[str, int]:
    """Return how many calls the next backend was asked for, by backend, operation, model and error.

    :param run: the run.
    """
    counts: Counter[str] = Counter()
    for i, errors in list(run.passed_on.items()):
        for error in errors:
            told = f"{getattr(error, 'backend', '')}.{run.program.nodes[i].op.name}"
            model = getattr(error, "model", "")
            counts[f"{f'{told} {model}'.rstrip()}: {type(error).__name__}"] += 1
    return dict(counts)


def remarks(report: RunReport) -> list[str]:
    """Return what the figures do not show: what was not bought, and what may be paid twice.

    :param report: the report.
    """
    told = []
    if report.inner_runs:
        told.append(f"with {counted(report.inner_runs, 'run')} that its tasks began")
    if report.reused:
        read, made = report.reused_input_tokens, report.reused_output_tokens
        tokens = f": {read:,} tokens in, {made:,} out" if read or made else ""
        saved = f", {money(report.dollars_saved)}" if report.dollars_saved else ""
        told.append(f"{counted(report.reused, 'answer')} not bought again{tokens}{saved}")
    for why, calls in report.passed_on.items():
        told.append(f"{counted(calls, 'call')} passed on to the next backend by {printable(why)}")
    if report.damaged:
        told.append(f"{counted(report.damaged, 'stored answer')} damaged, and so not used")
    if report.perhaps_billed:
        ended = counted(report.perhaps_billed, "request")
        most = report.dollars_possible
        bound = "" if most is None else f"; with all of them the run costs {money(most)} at most"
        told.append(f"{ended} ended without an answer and may have been billed{bound}")
    if report.resampled:
        told.append(
            f"{counted(report.resampled, 'call')} bought though equal ones had been answered: nodes "
            "written anew are new samples; the same nodes computed again cost nothing"
        )
    again = _by_request(unknown for unknown in report.unknown if unknown.bought_again)
    if again:
        calls, sent = sum(map(len, again.values())), len(again)
        earlier, those = "an earlier request has", "that one"
        if sent > 1:
            earlier, those = f"{sent:,} earlier requests have", "those"
        told.append(
            f"{counted(calls, 'call')} bought again, because {earlier} no known answer; {those} may "
            "have been billed, too:"
        )
        told += [f"  {_named(some)}" for some in list(again.values())[:_NAMED]]
        if sent > _NAMED:
            told.append(f"  and {sent - _NAMED:,} more in .unknown")
    settled = _by_request(report.unknown).keys() - again
    if settled:
        told.append(
            f"{counted(len(settled), 'request')} of earlier runs for these calls may have been billed "
            "besides those that brought the answers"
        )
    return told


def _by_request(unknown: Iterable[UnknownRequest]) -> dict[int | str, list[UnknownRequest]]:
    """Group what is unknown of calls by the request that they shared."""
    found: dict[int | str, list[UnknownRequest]] = {}
    for each in unknown:
        found.setdefault(each.request or each.call, []).append(each)
    return found


def _named(calls: Sequence[UnknownRequest]) -> str:
    first = calls[0]
    sent = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.sent))
    what = printable(f"{first.operation} {first.model}".rstrip())
    several = f" for {len(calls):,} calls" if len(calls) > 1 else ""
    return f"{what}, sent {sent}{several} (at {first.origin})"
