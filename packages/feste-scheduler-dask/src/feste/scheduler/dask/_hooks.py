"""Register the schedulers of feste-scheduler-dask through the hook that plugins use."""

from __future__ import annotations

from feste.hookspecs import hookimpl

_EXECUTOR = "feste.scheduler.dask:DaskExecutor"


@hookimpl
def feste_schedulers() -> dict[str, str]:
    """Return Dask by its names, its module, and the schemes of its addresses."""
    return dict.fromkeys(("dask", "distributed", "tcp", "tls"), _EXECUTOR)
