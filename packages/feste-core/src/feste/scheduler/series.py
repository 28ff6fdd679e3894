"""What runs have in common that are one to the user: those of one ``feste.map``."""

from __future__ import annotations

__all__ = ["Series"]


class Series:
    """Runs that count their failures together, and stop together; most runs are one by themselves."""

    __slots__ = ("calls", "calls_failed", "stopped", "why")

    def __init__(self) -> None:
        #: The calls of its runs that have ended, and the calls of all that failed on their own.
        self.calls = 0
        self.calls_failed = 0
        #: Whether nothing new is started in any of them; and why, in a few words, if that is known.
        self.stopped = False
        self.why = ""
