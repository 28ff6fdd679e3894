"""How far runs have got, in a few words: what is done, what they wait for, what they cost, how long yet."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from feste.report.axis import clock
from feste.report.figures import money
from feste.report.prices import Prices, certain
from feste.scheduler.admission.held import RATE_LIMIT
from feste.scheduler.states import GATHERED, QUEUED
from feste.wording import counted

if TYPE_CHECKING:
    from feste.report.run_report import RunReport
    from feste.scheduler.run import Run

__all__ = ["Course", "Headway", "Look"]

#: The rate is that of the last so many seconds, of which so many looks are kept.
_WINDOW, _LOOKS = 30.0, 60
#: The time that is left is told when a run has done something for so many seconds.
_SOON = 2.0
#: Positions of the parts that are left out where there is little room: tokens, workers, in flight,
#: other waits, dollars, gates.
_NEEDED_LEAST = (5, 1, 2, 4, 6, 3)
#: Of those that are not about the present.
_LASTING = (0, 5, 6, 7)


@dataclass(frozen=True, slots=True)
class Look:
    """What runs show at one moment.

    :param done: how many calls are done; or nodes, if no call is left; or items, where these count.
    :param total: how many there are so far; None if that is not known.
    :param parts: the words next to a bar: what is done, by how many workers, what is in flight, held by
        a gate, waits for something else, generated, paid, failed, left; those that there is nothing to
        say of are empty.
    """

    done: int
    total: int | None
    parts: tuple[str, ...]

    @property
    def words(self) -> str:
        """All words."""
        return ", ".join(filter(None, self.parts))

    @property
    def outcome(self) -> str:
        """The words that still hold when the runs are over: done, generated, paid, failed."""
        return ", ".join(part for i, part in enumerate(self.parts) if part and i in _LASTING)

    @property
    def share(self) -> float | None:
        """How much is done, from 0 to 1; None if that is not known."""
        return None if self.total is None else min(1.0, self.done / max(1, self.total))

    def fit(self, room: int) -> str:
        """Return the words that fit, without those that are needed least.

        :param room: the characters.

        >>> parts = "1/9 calls", "2 workers", "2 in flight", "", "", "", "$0.10", "", "~3 s left"
        >>> look = Look(1, 9, parts)
        >>> look.fit(45), look.fit(25)
        ('1/9 calls, 2 in flight, $0.10, ~3 s left', '1/9 calls, ~3 s left')
        """
        parts = list(self.parts)
        for part in _NEEDED_LEAST:
            if len(", ".join(filter(None, parts))) <= room:
                break
            parts[part] = ""
        return ", ".join(filter(None, parts))


@dataclass(slots=True)
class Course:
    """What a progress line looks at: a run, or runs that follow each other.

    :param runs: the runs that go on.
    :param name: what they are called together; empty for the name of the run.
    :param before: the report of those that have ended, or None.
    :param calls: how many calls these had, and so on.
    :param in_items: whether items are what counts, and not calls.
    :param items: how many items are done.
    :param of: how many items there seem to be, or None.
    """

    runs: list[Run] = field(default_factory=list)
    name: str = ""
    before: RunReport | None = None
    calls: int = 0
    nodes: int = 0
    failed: int = 0
    in_items: bool = False
    items: int = 0
    of: int | None = None

    def begun(self, run: Run) -> None:
        """Add a run that begins.

        :param run: the run.
        """
        self.name = self.name or run.name
        self.runs.append(run)

    def ended(self, run: Run, report: RunReport) -> None:
        """Remove a run that has ended.

        :param run: the run.
        :param report: the report of all that have ended.
        """
        self.runs.remove(run)
        self.before = report
        self.calls += run.calls
        self.nodes += len(run.state)
        self.failed += len(run.failed)


class Headway:
    """Looks at runs now and then, and learns how fast they go.

    :param course: the runs.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._prices = Prices()
        self._counts = ""
        self._seen: deque[tuple[float, int]] = deque(maxlen=_LOOKS)

    def look(self, now: float | None = None) -> Look:
        """Return what the runs show now.

        :param now: the monotonic time in seconds; None is the present.
        """
        runs, now = self._course.runs[:], time.monotonic() if now is None else now
        told = self._done(runs)
        done, total, what = told[-1]
        if what != self._counts:  # the rate was that of something else
            self._counts = what
            self._seen.clear()
        self._remember(now, done)
        calls = self._course.calls or any(r.calls for r in runs)
        workers = max((len(run.workers.rows) for run in runs), default=0)
        tokens, failed = self._tokens(runs), self._course.failed + sum(len(r.failed) for r in runs)
        parts = (
            ", ".join(_of(some, all_, kind) for some, all_, kind in told),
            counted(workers, "worker") if workers else "",
            f"{sum(r.in_flight for r in runs):,} in flight" if calls and what != "node" else "",
            _held(runs, now),
            _waiting(runs),
            f"{counted(tokens, 'token')} out" if tokens else "",
            self._cost(runs),
            f"{failed:,} failed" if failed else "",
            self._left(now, done, total),
        )
        return Look(done, total, parts)

    def _done(self, runs: list[Run]) -> list[tuple[int, int | None, str]]:
        """Return how many are done, of how many, of what: the last is what the bar shows."""
        course = self._course
        if course.in_items:
            of = course.of
            return [(course.items, of if of is None or of >= course.items else None, "item")]
        calls = course.calls + sum(r.calls for r in runs)
        done = course.calls + sum(r.calls_done for r in runs)
        left = sum(r.open for r in runs)
        told: list[tuple[int, int | None, str]] = [(done, calls, "call")] if calls else []
        if done == calls and (left or not told):  # only Python is left
            nodes = course.nodes + sum(len(r.state) for r in runs)
            told.append((nodes - left, nodes, "node"))
        return told

    def _tokens(self, runs: list[Run]) -> int:
        before = self._course.before
        rows = before.operations if before is not None else []
        return sum(r.output_tokens for r in runs) + sum(row.output_tokens or 0 for row in rows)

    def _cost(self, runs: list[Run]) -> str:
        """Return the dollars so far; what is not known is never taken for zero."""
        every = [row for run in runs for row in [*run.rows.values(), *run.inner.values()]]
        rows = [row for row in every if row.requests]
        found = [certain(row, self._prices.of(row)) for row in rows]
        if self._course.before is not None:
            found += [(row.dollars, row.unpriced) for row in self._course.before.operations]
        if not found:
            return ""
        known = [dollars for dollars, _ in found if dollars is not None]
        if not known:
            return "cost unknown"
        return f"{'>= ' if any(n for _, n in found) else ''}{money(sum(known))}"

    def _remember(self, now: float, done: int) -> None:
        """Keep what was done when, at equal distances in time over the window."""
        seen = self._seen
        while len(seen) > 1 and now - seen[0][0] > _WINDOW:
            seen.popleft()
        if not seen or now - seen[-1][0] >= _WINDOW / _LOOKS:
            seen.append((now, done))

    def _left(self, now: float, done: int, total: int | None) -> str:
        """Return how long the rest takes at the present rate; an empty string if that is not known."""
        begun, before = self._seen[0]
        if done <= before or total is None or done >= total or now - begun < _SOON:
            return ""
        seconds = (total - done) * (now - begun) / (done - before)
        return f"~{clock(float(round(seconds)) or 1.0)} left"


def _of(some: int, of: int | None, kind: str) -> str:
    return counted(some, kind) if of is None else f"{some:,}/{counted(of, kind)}"


def _held(runs: list[Run], now: float) -> str:
    """Return what holds calls at a gate, or an empty string."""
    down = max((run.down_until for run in runs), default=now)
    limited = max((run.resumes_at for run in runs), default=now)
    for until, told in ((down, "backend down, next try at"), (limited, "rate limit until")):
        if until > now:
            at = time.localtime(time.time() + until - now)
            return f"{told} {time.strftime('%H:%M:%S', at)}"
    queued = sum(run.state.count(QUEUED) - run.retrying for run in runs)
    lacks = "the rate limit" if any(run.lacks == RATE_LIMIT for run in runs) else "a slot"
    return f"{queued:,} waiting for {lacks}" if queued > 0 else ""


def _waiting(runs: list[Run]) -> str:
    """Return how many calls wait for something else than a gate, or an empty string."""
    gathered = sum(run.state.count(GATHERED) for run in runs)
    retrying = sum(run.retrying for run in runs)
    told = (
        f"{gathered:,} waiting for their batch" if gathered else "",
        f"{retrying:,} waiting to retry" if retrying else "",
    )
    return ", ".join(filter(None, told))
