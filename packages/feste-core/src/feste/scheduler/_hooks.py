"""The schedulers that feste-core offers, through the hook that plugins use."""

from __future__ import annotations

from feste.hookspecs import hookimpl


@hookimpl
def feste_schedulers() -> dict[str, str]:
    """Offer Feste's own hands."""
    return {"local": "feste.scheduler.local:LocalExecutor"}
