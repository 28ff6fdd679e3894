"""The hooks that plugins can implement.

A plugin is any importable module that an installed distribution names in the entry-point group
``feste``. It marks its functions with :data:`feste.hookimpl`::

    # pyproject.toml of the plugin
    [project.entry-points.feste]
    echo = "feste_echo"

    # feste_echo.py
    import feste

    @feste.hookimpl
    def feste_backends():
        return {"echo": "feste_echo.client:Echo"}

Hooks contribute objects and Feste decides their order, so the same plugins give the same plan in
any installation order. An entry point's module must be light to import, because the first use of any
plugin imports all. Name heavy classes as ``"module:attribute"``; they are imported on first use. What a
distribution requires of ``feste-core`` is checked before its module is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from feste.backend import Backend
    from feste.context import Setting
    from feste.events import (
        GateClosed,
        NodeFinished,
        RequestFinished,
        RequestStarted,
        RunFinished,
        RunStarted,
    )
    from feste.optimization import Optimization

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("feste")
hookimpl = pluggy.HookimplMarker("feste")


# --- what a plugin registers: called once, when plugins are first needed --------------------------


@hookspec
def feste_backends() -> Mapping[str, type[Backend] | str]:  # type: ignore[empty-body]
    """Register backends.

    :returns: for each name that :func:`feste.backend.create` accepts, a
        :class:`~feste.backend.Backend` class or ``"module:Class"``. If two distributions register
        the same name, an error names both.
    """


@hookspec
def feste_optimizations() -> Iterable[Optimization]:  # type: ignore[empty-body]
    """Register optimization passes.

    :returns: objects with ``name`` and ``apply(graph, cx)``; see
        :class:`~feste.optimization.Optimization`. Passes run by phase, then ``before`` and
        ``after``, then name. A pass of level E2 runs only if the user names it in ``optimize``.
    """


@hookspec
def feste_schedulers() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Register ways to run an optimized graph.

    :returns: for each name that the setting ``scheduler`` accepts: a class derived from
        :class:`~feste.scheduler.Executor` (does the work for Feste's scheduler) or from
        :class:`~feste.scheduler.Scheduler` (replaces it), a plain Dask ``get(dsk, keys)`` function,
        or ``"module:attribute"`` of one of these. A URL given as ``scheduler`` is looked up among
        these names by its scheme, an object by its top-level module.
    """


@hookspec
def feste_settings() -> Mapping[str, Setting]:  # type: ignore[empty-body]
    """Declare the plugin's settings, for :func:`feste.context.set` and ``FESTE_*`` variables.

    :returns: for each name a :class:`~feste.context.Setting` with default, type and help.
    """


# --- events of a run: sent in order, from one separate thread -------------------------------------


@hookspec
def feste_run_started(event: RunStarted) -> None:
    """Handle the start of a run. Observers cannot change a run; one that raises is skipped.

    :param event: the size of the run.
    """


@hookspec
def feste_node_finished(event: NodeFinished) -> None:
    """Handle the end of a node: done, failed, or skipped because a node it needs failed.

    :param event: the node, its final state and its times.
    """


@hookspec
def feste_request_started(event: RequestStarted) -> None:
    """Handle the start of one request to a provider; its end follows with the same number.

    :param event: the request's operation, model and size.
    """


@hookspec
def feste_request_finished(event: RequestFinished) -> None:
    """Handle the end of one request to a provider, successful or not; a retried call has several.

    :param event: the request's operation, size, usage, times and error.
    """


@hookspec
def feste_gate_closed(event: GateClosed) -> None:
    """Handle that no request goes to a provider for a while, told once for each such time.

    :param event: the provider's model, why, and for how long.
    """


@hookspec
def feste_run_finished(event: RunFinished) -> None:
    """Handle the end of a run; the last event of a run.

    :param event: the counts of the run.
    """
