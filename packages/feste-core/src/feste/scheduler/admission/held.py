"""How long a gate lets nobody through, and why: read as a request comes to it, and as it goes."""

from __future__ import annotations

from typing import Any

from feste.events import CAUSES
from feste.scheduler.admission.gate import Gate

__all__ = ["AT_GATE", "RATE_LIMIT", "SLOT", "Held", "cause_at"]

#: Why a request waits at a gate.
AT_GATE = tuple(
    CAUSES.index(cause) for cause in ("slot", "rate_limit", "outage", "budget", "worker")
)
SLOT, RATE_LIMIT, *_ = AT_GATE


def cause_at(gate: Gate[Any], now: float) -> int | None:
    """Return why a gate lets no further request through, or None if it would.

    :param gate: the gate.
    :param now: the time in seconds on the brain's clock.
    """
    if gate.parked:
        return CAUSES.index(gate.parked)
    if gate.room(now):
        return None
    return SLOT if gate.holds(now) in ("", "slot") else RATE_LIMIT


class Held:
    """How long a gate has let nobody through, by cause."""

    __slots__ = ("cause", "closed_until", "noted", "sums")

    def __init__(self, now: float) -> None:
        self.cause: int | None = None
        self.noted = now
        #: The seconds so far for each cause at a gate.
        self.sums = (0.0,) * len(AT_GATE)
        #: Until when it was closed when that was last told.
        self.closed_until = 0.0

    def until(self, now: float) -> tuple[float, ...]:
        """Return the sums; those who ask at one moment share a tuple."""
        elapsed, self.noted = now - self.noted, now
        if elapsed and self.cause is not None:
            times = zip(AT_GATE, self.sums, strict=True)
            self.sums = tuple(s + elapsed if cause == self.cause else s for cause, s in times)
        return self.sums
