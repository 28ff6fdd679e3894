"""Feste on Dask: Python tasks run on the workers of a cluster; requests may leave from there.

Any of these runs a graph on a cluster::

    feste.compute(x, scheduler=client)                  # a distributed.Client
    feste.compute(x, scheduler="dask")                  # the current Client, or else a new cluster
    feste.compute(x, scheduler="tcp://127.0.0.1:8786")  # or "tls://..." for other machines
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feste.scheduler.dask.executor import DaskExecutor

__all__ = ["DaskExecutor"]


def __getattr__(name: str) -> Any:  # import on first use: distributed takes 0.3 s
    if name == "DaskExecutor":
        from feste.scheduler.dask.executor import DaskExecutor

        return DaskExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
