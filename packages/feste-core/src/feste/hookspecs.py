"""The contract with plugins, hook by hook.

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

Hooks contribute objects; Feste decides their order, so the same plugins give the same plan
whatever the order of installation. A module named by an entry point must be light to import: it is
read when plugins are listed. Name heavy classes as ``"module:attribute"``; they are imported when
they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from feste.backend import Backend
    from feste.context import Setting
    from feste.events import NodeFinished, RequestFinished, RunFinished, RunStarted
    from feste.optimization import Optimization

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("feste")
hookimpl = pluggy.HookimplMarker("feste")


# --- what a plugin offers: asked once, when plugins are first needed -----------------------------


@hookspec
def feste_backends() -> Mapping[str, type[Backend] | str]:  # type: ignore[empty-body]
    """Offer LLM providers.

    :returns: for each name that :func:`feste.backend.create` shall know, a
        :class:`~feste.backend.Backend` class or ``"module:Class"``. Two distributions that offer
        the same name are an error that names both.
    """


@hookspec
def feste_optimizations() -> Iterable[Optimization]:  # type: ignore[empty-body]
    """Offer optimization passes.

    :returns: objects with ``name`` and ``apply(graph, cx)``; see
        :class:`~feste.optimization.Optimization`. Passes run by phase, then ``before`` and
        ``after``, then name. A pass of level E2 runs only where the user names it in ``optimize``.
    """


@hookspec
def feste_schedulers() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Offer ways to run an optimized graph.

    :returns: for each name that the setting ``scheduler`` shall know: a class that derives from
        :class:`~feste.scheduler.Executor` (Feste's brain with other hands) or from
        :class:`~feste.scheduler.Scheduler` (all of it), a plain Dask ``get(dsk, keys)`` function,
        or ``"module:attribute"`` of one of these. A URL given as ``scheduler`` is looked up by its
        scheme, an object by its top-level module, among these names.
    """


@hookspec
def feste_settings() -> Mapping[str, Setting]:  # type: ignore[empty-body]
    """Declare settings of the plugin, for :func:`feste.context.set` and ``FESTE_*`` variables.

    :returns: for each name a :class:`~feste.context.Setting` with default, type and help.
    """


# --- what a run tells: called in order, from one thread of their own ------------------------------


@hookspec
def feste_run_started(event: RunStarted) -> None:
    """Hear that a run begins. Observers never change a run; one that raises is named and ignored.

    :param event: what will be run.
    """


@hookspec
def feste_node_finished(event: NodeFinished) -> None:
    """Hear that a node ended: done, failed, or skipped because one it needs failed.

    :param event: which node, how, and when.
    """


@hookspec
def feste_request_finished(event: RequestFinished) -> None:
    """Hear that one request to a provider ended, well or not; a retried call ends several.

    :param event: the request's operation, size, usage, times and error.
    """


@hookspec
def feste_run_finished(event: RunFinished) -> None:
    """Hear that a run ended; the last event of a run.

    :param event: the counts of the run.
    """
