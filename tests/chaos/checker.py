"""What must hold after any run, whatever went wrong in it.

I1  What was acknowledged is in the results.
I2  Each result is an answer to its own prompt, and no answer is there twice.
I3  Each call is delivered once.
I4  The provider made no more answers than calls, plus those that were lost on the way, plus those
    in flight at a kill.
I5  Nothing was asked that needs an answer which was not kept.
I6  The report adds up: states to nodes, and the bill of the provider lies within its bounds.
I7  The API key is in no file.
I8  No process and no temporary file is left.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feste.testing import LedgerEntry, LoggedRequest, Totals
from tests.chaos.work import POISON, Step

__all__ = ["Evidence", "Violation", "check"]


class Violation(AssertionError):
    """An invariant does not hold; the message begins with its number."""


@dataclass(slots=True)
class Evidence:
    """What the runs of one piece of work left.

    :param steps: the work.
    :param told: what the last run told; see :func:`tests.chaos.program.outcome`.
    :param side: the file of what was acknowledged.
    :param folder: the folder of all files.
    :param store: the store, if there is one.
    :param ledger: the answers made, in order.
    :param log: the requests.
    :param totals: the provider's totals.
    :param runs: how many programs were started.
    :param kills: how many of them were killed.
    :param window: the most requests in flight.
    :param canary: the API key.
    :param longest: the most prompts that the program puts into one request.
    """

    steps: Sequence[Step]
    told: dict[str, Any]
    side: Path
    folder: Path
    store: Path | None
    ledger: Sequence[LedgerEntry]
    log: Sequence[LoggedRequest]
    totals: Totals
    runs: int
    kills: int
    window: int
    canary: str
    longest: int = 1

    @property
    def values(self) -> list[str | None]:
        """The answer of each call; None for one that failed."""
        return list(self.told["values"])

    @property
    def delivered(self) -> int:
        """How many calls have an answer."""
        return sum(value is not None for value in self.values)

    @property
    def extra(self) -> int:
        """How many answers were made that nobody has."""
        return len(self.ledger) - self.delivered


def check(evidence: Evidence) -> None:
    """See that all invariants hold.

    :param evidence: what the runs left.
    :raises Violation: if one does not.
    """
    for holds in (_i1, _i2, _i3, _i4, _i5, _i6, _i7, _i8):
        holds(evidence)


def need(condition: object, what: Callable[[], str]) -> None:
    """Raise unless a condition holds.

    :param condition: it.
    :param what: says what is wrong; the number of the invariant first.
    """
    if not condition:
        raise Violation(what())


def _noted(evidence: Evidence) -> list[tuple[int, int, str]]:
    """What the programs acknowledged: run, call, answer."""
    lines = evidence.side.read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def _i1(e: Evidence) -> None:
    if e.store is None and e.runs > 1:
        return  # each run has its own answers
    lost = {(i, text) for _, i, text in _noted(e)} - set(enumerate(e.values))
    need(not lost, lambda: f"I1: acknowledged, but not in the results: {sorted(lost)[:3]}")


def _i2(e: Evidence) -> None:
    made = defaultdict(list)
    for entry in e.ledger:
        made[entry["prompt"]].append(entry["answer"])
    for i, (step, value) in enumerate(zip(e.steps, e.values, strict=True)):
        if value is not None:
            prompt = step.prompt(e.values)
            need(
                value in made[prompt],
                lambda i=i, v=value: f"I2: call {i} has {v!r}, which is no answer to it",
            )
    twice = [v for v, times in Counter(filter(None, e.values)).items() if times > 1]
    need(not twice, lambda: f"I2: one answer for several calls: {twice[:3]}")


def _i3(e: Evidence) -> None:
    times = Counter((run, i) for run, i, _ in _noted(e))
    twice = [one for one, count in times.items() if count > 1]
    need(not twice, lambda: f"I3: (run, call) delivered more than once: {twice[:3]}")
    noted = {i for run, i, _ in _noted(e) if run == e.runs}
    missing = {i for i, value in enumerate(e.values) if value is not None} - noted
    need(not missing, lambda: f"I3: in the results, but never delivered: {sorted(missing)[:3]}")


def _i4(e: Evidence) -> None:
    lost = sum(request.items for request in e.log if not request.delivered)
    # at a kill, each request in flight may be for as many answers as there are equal calls
    most = max((request.items for request in e.log), default=1)
    allowed = lost + e.kills * e.window * most
    need(
        e.extra <= allowed,
        lambda: f"I4: {e.extra} answers were made for nobody, at most {allowed} are explained",
    )
    if e.store is not None:
        _named(e, e.store)


def _named(e: Evidence, store: Path) -> None:
    """See that the store names each request whose answer was made and not kept."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as conn:
        rows = conn.execute("SELECT outcome, billed, calls, request_id FROM requests").fetchall()
        texts = {
            key: json.loads(request)[-1]["messages"][-1]["content"]
            for key, request in conn.execute("SELECT key, request FROM prompts")
        }
    answered = {request for outcome, _, _, request in rows if outcome == "answered"}
    made = Counter(entry["prompt"] for entry in e.ledger if entry["request"] not in answered)
    owned_up: Counter[str] = Counter()
    for outcome, billed, calls, _ in rows:
        if outcome == "unknown" or (outcome == "failed" and billed != "no"):
            owned_up.update(texts[key] for key, _ in json.loads(calls))
    need(made <= owned_up, lambda: f"I4: made, not kept, not named: {list(made - owned_up)[:3]}")
    open_ones = [outcome for outcome, *_ in rows if outcome == "sent"]
    need(not open_ones, lambda: f"I4: {len(open_ones)} requests are said to be still on their way")


def _i5(e: Evidence) -> None:
    known = {step.prompt(e.values) for step in e.steps if None not in _needed(step, e.values)}
    strange = {entry["prompt"] for entry in e.ledger} - known
    need(not strange, lambda: f"I5: asked with an answer that was not kept: {list(strange)[:3]}")
    early = [r for r in e.log if r.status == 400 and r.fault is None]
    refused = sum(POISON in step.text for step in e.steps)
    halves = e.longest.bit_length()  # a refused list is sent in halves, until the bad one is alone
    need(
        len(early) <= refused * e.runs * (halves + 1 if e.longest > 1 else 1),
        lambda: f"I5: {len(early)} requests refused, {refused} are poisoned",
    )


def _needed(step: Step, values: Sequence[Any]) -> list[Any]:
    return [values[parent] for parent in step.parents]


def _i6(e: Evidence) -> None:
    report = e.told["report"]
    need(
        sum(report["states"].values()) == report["nodes"],
        lambda: f"I6: {report['states']} do not add up to {report['nodes']} nodes",
    )
    if e.runs > 1:
        return  # the provider's bill is of all runs
    need(
        report["sent"] == e.totals.requests,
        lambda: f"I6: {report['sent']} requests sent, {e.totals.requests} came",
    )
    need(
        e.extra <= report["owned_up"],
        lambda: f"I6: {e.extra} answers are lost, {report['owned_up']} are owned up to",
    )
    billed, least, more = e.totals.dollars, report["dollars"], report["dollars_possible"]
    if None not in (billed, least, more):
        need(
            least - 1e-9 <= billed <= least + more + 1e-9,
            lambda: f"I6: billed ${billed}, said from ${least} to ${least + more}",
        )


def _i7(e: Evidence) -> None:
    for path in e.folder.rglob("*"):
        if path.is_file():
            need(
                e.canary.encode() not in path.read_bytes(),
                lambda p=path: f"I7: the key is in {p.name}",
            )


def _i8(e: Evidence) -> None:
    left = sorted(path.name for path in (e.folder / f"tmp{e.runs}").iterdir())
    need(not left, lambda: f"I8: temporary files are left: {left}")
    ours = str(e.folder).encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = entry.read_bytes()
        except OSError:
            continue  # it has ended, or is somebody else's
        need(
            ours not in environ or int(entry.parent.name) == os.getpid(),
            lambda p=entry: f"I8: process {p.parent.name} is left",
        )
