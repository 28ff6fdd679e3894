"""How long a gate lets nobody through, and why: read as a request comes to it, and as it goes."""

from __future__ import annotations

from typing import Any

from feste.events import CAUSES
from feste.scheduler.admission.gate import Gate

__all__ = ["RATE_LIMIT", "SLOT", "Held", "cause_at"]

SLOT, RATE_LIMIT = CAUSES.index("slot"), CAUSES.index("rate_limit")


def cause_at(gate: Gate[Any], now: float) -> int | None:
    """Return why a gate lets no further request through, or None if it would.

    :param gate: the gate.
    :param now: the time in seconds on the brain's clock.
    """
    if gate.room(now):
        return None
    return SLOT if gate.holds(now) in ("", "slot") else RATE_LIMIT


class Held:
    """How long a gate has let nobody through, by cause."""

    __slots__ = ("cause", "closed_until", "noted", "sums")

    def __init__(self, now: float) -> None:
        self.cause: int | None = None
        self.noted = now
        #: The seconds so far for want of a slot, and for the provider's limit.
        self.sums = (0.0, 0.0)
        #: Until when it was closed when that was last told.
        self.closed_until = 0.0

    def until(self, now: float) -> tuple[float, float]:
        """Return the sums; those who ask at one moment share a tuple."""
        elapsed, self.noted = now - self.noted, now
        if elapsed and self.cause is not None:
            slot, rate_limit = self.sums
            if self.cause == SLOT:
                self.sums = (slot + elapsed, rate_limit)
            else:
                self.sums = (slot, rate_limit + elapsed)
        return self.sums
