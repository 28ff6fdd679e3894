"""The schedulers that feste-scheduler-dask offers, through the hook that plugins use."""

from __future__ import annotations

from feste.hookspecs import hookimpl

_EXECUTOR = "feste.scheduler.dask:DaskExecutor"


@hookimpl
def feste_schedulers() -> dict[str, str]:
    """Offer Dask: by name, by the module of its objects, by the schemes of its addresses."""
    return dict.fromkeys(("dask", "distributed", "tcp", "tls"), _EXECUTOR)
