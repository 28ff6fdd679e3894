"""Register the schedulers of feste-core through the same hook that plugins use."""

from __future__ import annotations

from feste.hookspecs import hookimpl


@hookimpl
def feste_schedulers() -> dict[str, str]:
    """Return Feste's own executor."""
    return {"local": "feste.scheduler.hands.local:LocalExecutor"}
