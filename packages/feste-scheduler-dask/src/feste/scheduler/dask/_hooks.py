"""Register the schedulers of feste-scheduler-dask, and their settings, through the hooks of plugins."""

from __future__ import annotations

from typing import Any, Literal

from feste.context import Setting
from feste.hookspecs import hookimpl

_EXECUTOR = "feste.scheduler.dask:DaskExecutor"


@hookimpl
def feste_schedulers() -> dict[str, str]:
    """Return Dask by its names, its module, and the schemes of its addresses."""
    # written out, so that `feste plugins` can read the names without running anything
    return {"dask": _EXECUTOR, "distributed": _EXECUTOR, "tcp": _EXECUTOR, "tls": _EXECUTOR}


@hookimpl
def feste_settings() -> dict[str, Setting]:
    """Return the settings of runs on a cluster."""
    return {
        "requests_on": Setting(
            "client", Literal["client", "workers"], "where requests to providers leave from on Dask"
        ),
        "worker_window": Setting(
            32, _window, 'requests under way on one worker, with requests_on="workers"'
        ),
        "prepare_worker": Setting(
            None, _function, "called on each Dask worker first: a function, or its module:name"
        ),
        "allow_insecure": Setting(
            False, bool, "use a Dask cluster on the network without TLS: others may run code there"
        ),
    }


def _window(value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if type(value) is not int or value < 1:
        raise ValueError("expected a whole number from 1")
    return value


def _function(value: Any) -> Any:
    if value is None or value == "":
        return None
    if callable(value) or (isinstance(value, str) and ":" in value):
        return value
    raise ValueError("expected a function, or the text module:name of one")
