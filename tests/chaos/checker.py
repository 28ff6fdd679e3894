"""What must hold after any run, whatever went wrong in it; docs/reliability.md says the same.

I1  What was acknowledged is in the results.
I2  Each result is an answer to its own prompt, and no answer is there twice.
I3  Each call is delivered once.
I4  The provider made no more answers than calls, plus those lost on the way, plus those in flight
    at a kill; and the store names these.
I5  Nothing was asked that needs an answer which was not kept.
I6  The report adds up: states to nodes, and the provider's bill lies within the report's bounds;
    where one run did all, requests to requests.
I7  The API key is in no file and no output.
I8  No process, thread, connection or temporary file is left, and no request is under way.
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

from feste.store import schema
from feste.testing import LedgerEntry, LoggedRequest, Totals
from tests.chaos.work import POISON, Step

__all__ = ["Evidence", "Violation", "check", "check_end", "check_kill", "rows"]

#: Threads that a program may still have: Feste keeps those of its pools for the next run.
THREADS = 80
#: Sockets besides those of requests: an event loop has two.
SOCKETS = 8


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
    :param workers_killed: how many workers of a cluster were killed under the programs.
    :param spoiled: how many answers were lost by no program: they were destroyed in the store, or
        handed over by a run which said that it could not keep them.
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
    workers_killed: int = 0
    spoiled: int = 0
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
    need(
        len(lost) <= e.spoiled,
        lambda: f"I1: acknowledged, but not in the results: {sorted(lost)[:3]}",
    )


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
    notes = _noted(e)
    # a task whose worker is killed runs again, with what it was given before
    times = Counter((run, i) for run, i, _ in (set(notes) if e.workers_killed else notes))
    twice = [one for one, count in times.items() if count > 1]
    need(not twice, lambda: f"I3: (run, call) delivered more than once: {twice[:3]}")
    noted = {i for run, i, _ in notes if run == e.told["run"]}
    missing = {i for i, value in enumerate(e.values) if value is not None} - noted
    need(not missing, lambda: f"I3: in the results, but never delivered: {sorted(missing)[:3]}")


def _i4(e: Evidence) -> None:
    lost = [request for request in e.log if not request.delivered]
    spoilt = sum(request.items for request in lost if request.fault)
    left = sum(request.items for request in lost if not request.fault)
    # at a kill, each request in flight may be for as many answers as there are equal calls; those
    # that the provider saw the program leave are among them
    most = max((request.items for request in e.log), default=1)
    in_flight = (e.kills + e.workers_killed) * e.window * most
    allowed = spoilt + max(left, in_flight) + e.spoiled
    need(
        e.extra <= allowed,
        lambda: f"I4: {e.extra} answers were made for nobody, at most {allowed} are explained",
    )
    peak = e.totals.peak
    need(peak <= e.window, lambda: f"I4: {peak} requests in flight, {e.window} are allowed")
    if e.store is not None:
        named = _named(e.store, e.ledger, e.spoiled)
        need(
            e.extra <= named + e.spoiled,
            lambda: f"I4: {e.extra} answers were made for nobody, {named} are named",
        )
        still_open = rows(e.store, "SELECT id FROM requests WHERE outcome = 'sent'")
        need(not still_open, lambda: f"I4: {len(still_open)} requests are said to be on their way")
        if not e.spoiled:
            _reported(e, e.store)


def rows(store: Path, query: str) -> list[Any]:
    """Return what a query finds in a store, which may be a killed program's, without changing it.

    :param store: the store.
    :param query: the query.
    """
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as conn:
        conn.text_factory = lambda data: data.decode(errors="replace")  # of a damaged one
        return conn.execute(query).fetchall()


def check_kill(
    store: Path,
    ledger: Sequence[LedgerEntry],
    window: int,
    before: Sequence[int],
    spoiled: int = 0,
) -> list[int]:
    """See that a store names all that a program which was killed had under way, and no more.

    :param store: the store.
    :param ledger: the answers made until now.
    :param window: the most requests in flight.
    :param before: the requests that the kill before left open.
    :param spoiled: as in :class:`Evidence`.
    :returns: the requests that are open now.
    :raises Violation: if it does not.
    """
    _named(store, ledger, spoiled)
    found = rows(store, "SELECT id, session FROM requests WHERE outcome = 'sent'")
    need(len(found) <= window, lambda: f"I4: {len(found)} requests are open, at most {window} were")
    need(len({s for _, s in found}) <= 1, lambda: "I4: an earlier session's requests are open")
    unknown = {i for (i,) in rows(store, "SELECT id FROM requests WHERE outcome = 'unknown'")}
    # a program that was killed before it had opened the store has left it as it was
    unnamed = sorted(set(before) - unknown - {i for i, _ in found})
    need(
        len(unnamed) <= spoiled,
        lambda: f"I4: not named as unknown after a kill: {unnamed[:3]}",
    )
    return [i for i, _ in found]


def check_end(output: Sequence[bytes], scratch: Path | None, canary: str) -> None:
    """See that a program which has ended printed no key, and left no temporary file.

    :param output: what it wrote to stdout and stderr.
    :param scratch: the folder of its temporary files; None for one that was killed.
    :param canary: the API key.
    :raises Violation: if it did.
    """
    need(not any(canary.encode() in text for text in output), lambda: "I7: the key was printed")
    left = sorted(path.name for path in scratch.iterdir()) if scratch is not None else []
    need(not left, lambda: f"I8: temporary files are left: {left}")


def _texts(store: Path) -> dict[str, str]:
    """Return the prompts that a store has, by key."""
    return {
        key: json.loads(request)[-1]["messages"][-1]["content"]
        for key, request, seal in rows(store, "SELECT * FROM prompts")
        if schema.is_good("prompts", (key, request, seal))
    }


def _named(store: Path, ledger: Sequence[LedgerEntry], spoiled: int) -> int:
    """See that the store names each request whose answer was made and not kept.

    :returns: how many answers it names.
    """
    texts = _texts(store)
    found = rows(store, "SELECT outcome, billed, calls, request_id FROM requests")
    answered = {request for outcome, _, _, request in found if outcome == "answered"}
    made = Counter(entry["prompt"] for entry in ledger if entry["request"] not in answered)
    owned_up: Counter[str] = Counter()
    for outcome, billed, calls, _ in found:
        if outcome in ("unknown", "sent") or (outcome == "failed" and billed != "no"):
            owned_up.update(texts.get(key, "") for key, _ in json.loads(calls))
    unnamed = made - owned_up
    need(unnamed.total() <= spoiled, lambda: f"I4: made, not kept, not named: {list(unnamed)[:3]}")
    return owned_up.total()


def _reported(e: Evidence, store: Path) -> None:
    """See that the last report names exactly the calls whose requests ended without being known."""
    texts = _texts(store)
    (last,) = rows(store, "SELECT max(id) FROM sessions")[0]
    query = f"SELECT calls FROM requests WHERE outcome = 'unknown' AND session < {last}"
    calls = {tuple(call) for (text,) in rows(store, query) for call in json.loads(text)}
    named = Counter(texts[key] for key, _ in calls)
    told = Counter(None if i is None else e.steps[i].prompt(e.values) for i, _ in e.told["unknown"])
    need(told <= named, lambda: f"I4: reported as unknown, but known: {list(told - named)[:3]}")
    if e.delivered == len(e.steps):  # else not all calls were looked up
        need(told == named, lambda: f"I4: unknown, but not reported: {list(named - told)[:3]}")


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
    billed = e.totals.dollars
    need(billed is not None, lambda: "I6: the provider has no price")
    assert billed is not None
    if e.runs > 1:
        return _i6_of_all_runs(e, billed)
    astray = report["sent"] - e.totals.requests
    # they may have found no open door, and what a worker was given last may have died with it
    most = report["unreached"] + e.workers_killed * e.window
    need(
        0 <= astray <= most,
        lambda: f"I6: {report['sent']} requests sent, {e.totals.requests} came",
    )
    need(
        e.extra <= report["owned_up"],
        lambda: f"I6: {e.extra} answers are lost, {report['owned_up']} are owned up to",
    )
    _within(billed, report["dollars"], report["dollars_possible"])


def _i6_of_all_runs(e: Evidence, billed: float) -> None:
    """See that the bill is what the last run paid and saved, and what was lost on the way."""
    report = e.told["report"]
    if e.store is None or e.spoiled or e.delivered < len(e.steps):
        return  # not all that was paid for is in the last report
    lost = "outcome = 'unknown' OR (outcome = 'failed' AND billed != 'no')"
    (last,) = rows(e.store, "SELECT max(id) FROM sessions")[0]
    ((times,),) = rows(
        e.store, f"SELECT count(*) FROM requests WHERE session < {last} AND ({lost})"
    )
    dearest = max((request.dollars or 0.0 for request in e.log), default=0.0)
    saved, most = report["dollars_saved"], report["dollars_possible"]
    least = (report["dollars"] or 0.0) + saved
    _within(billed, least, most if most is None else most + saved + times * dearest)


def _within(billed: float, least: float | None, most: float | None) -> None:
    """See that a bill lies between two bounds."""
    need(
        most is not None and (least or 0.0) - 1e-9 <= billed <= most + 1e-9,
        lambda: f"I6: billed ${billed}, said from ${least} to ${most}",
    )


def _i7(e: Evidence) -> None:
    for path in e.folder.rglob("*"):
        if path.is_file():
            need(
                e.canary.encode() not in path.read_bytes(),
                lambda p=path: f"I7: the key is in {p.name}",
            )


def _i8(e: Evidence) -> None:
    need(not e.totals.in_flight, lambda: f"I8: {e.totals.in_flight} requests are still under way")
    if not e.workers_killed:  # else it is a client of a cluster, which has threads of its own
        threads, sockets = e.told["threads"], e.told["sockets"]
        strange = [name for name in threads if not name.startswith("feste-")]
        twice = len(threads) - len(set(threads))
        need(not strange and not twice, lambda: f"I8: threads are left: {strange or threads}")
        need(len(threads) <= THREADS, lambda: f"I8: {len(threads)} threads are left")
        # connections are kept for the next run
        need(sockets <= e.window + SOCKETS, lambda: f"I8: {sockets} sockets are left")
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
