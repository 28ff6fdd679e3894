"""How far a run has got, in a few words: what is done, what it waits for, what it costs, how long yet."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feste.report.axis import clock
from feste.report.figures import money
from feste.report.prices import Prices, certain
from feste.scheduler.admission.held import RATE_LIMIT
from feste.scheduler.states import GATHERED, QUEUED
from feste.wording import counted

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["Headway", "Look"]

#: The rate is that of the last so many seconds, of which so many looks are kept.
_WINDOW, _LOOKS = 30.0, 60
#: The time that is left is told when a run has done something for so many seconds.
_SOON = 2.0
#: Positions of the parts that are left out where there is little room: tokens, workers, in flight,
#: other waits, dollars, gates.
_NEEDED_LEAST = (5, 1, 2, 4, 6, 3)


@dataclass(frozen=True, slots=True)
class Look:
    """What a run shows at one moment.

    :param done: how many calls are done; or nodes, if no call is left.
    :param total: how many there are so far.
    :param parts: the words next to a bar: what is done, by how many workers, what is in flight, held by
        a gate, waits for something else, generated, paid, failed, left; those that there is nothing to
        say of are empty.
    """

    done: int
    total: int
    parts: tuple[str, ...]

    @property
    def words(self) -> str:
        """All words."""
        return ", ".join(filter(None, self.parts))

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


class Headway:
    """Looks at a run now and then, and learns how fast it goes.

    :param run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._prices = Prices(quiet=True)  # the report tells of a plugin that has none
        self._counts = ""
        self._seen: deque[tuple[float, int]] = deque(maxlen=_LOOKS)

    def look(self, now: float | None = None) -> Look:
        """Return what the run shows now.

        :param now: the monotonic time in seconds; None is the present.
        """
        run, now = self._run, time.monotonic() if now is None else now
        told = [(run.calls_done, run.calls, "call")] if run.calls else []
        if run.calls_done == run.calls and (run.open or not told):  # only Python is left
            told.append((len(run.state) - run.open, len(run.state), "node"))
        done, total, what = told[-1]
        if what != self._counts:  # the rate was that of something else
            self._counts = what
            self._seen.clear()
        self._remember(now, done)
        workers = len(run.workers.rows)
        parts = (
            ", ".join(f"{some:,}/{counted(all_, kind)}" for some, all_, kind in told),
            counted(workers, "worker") if workers else "",
            f"{run.in_flight:,} in flight" if what == "call" else "",
            self._held(now),
            self._waiting(),
            f"{counted(run.output_tokens, 'token')} out" if run.output_tokens else "",
            self._cost(),
            f"{len(run.failed):,} failed" if run.failed else "",
            self._left(now, done, total),
        )
        return Look(done, total, parts)

    def _held(self, now: float) -> str:
        """Return what holds calls at a gate, or an empty string."""
        run = self._run
        closed = (run.down_until, "backend down, next try at"), (run.resumes_at, "rate limit until")
        for until, told in closed:
            if until > now:
                at = time.localtime(time.time() + until - now)
                return f"{told} {time.strftime('%H:%M:%S', at)}"
        queued = run.state.count(QUEUED) - run.retrying
        lacks = "the rate limit" if run.lacks == RATE_LIMIT else "a slot"
        return f"{queued:,} waiting for {lacks}" if queued > 0 else ""

    def _waiting(self) -> str:
        """Return how many calls wait for something else than a gate, or an empty string."""
        gathered, retrying = self._run.state.count(GATHERED), self._run.retrying
        told = (
            f"{gathered:,} waiting for their batch" if gathered else "",
            f"{retrying:,} waiting to retry" if retrying else "",
        )
        return ", ".join(filter(None, told))

    def _cost(self) -> str:
        """Return the dollars so far; what is not known is never taken for zero."""
        rows = [row for row in list(self._run.rows.values()) if row.requests]
        if not rows:
            return ""
        found = [certain(row, self._prices.of(row)) for row in rows]
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

    def _left(self, now: float, done: int, total: int) -> str:
        """Return how long the rest takes at the present rate; an empty string if that is not known."""
        begun, before = self._seen[0]
        if done <= before or done >= total or now - begun < _SOON:
            return ""
        seconds = (total - done) * (now - begun) / (done - before)
        return f"~{clock(float(round(seconds)) or 1.0)} left"
