"""The steps of a run: optimize, compile, wait, hand back."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from feste.context import Settings
from feste.errors import (
    ConfigError,
    FesteError,
    NodeError,
    RunFailed,
    RunInterrupted,
)
from feste.graph import FesteGraph
from feste.lowering import Lowered, LoweredBatch
from feste.node import PENDING, Node
from feste.optimization import Optimizer, Plan
from feste.packing import COLLECTION
from feste.report import RunReport
from feste.report.progress import in_terminal, shown
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor, Scheduler
from feste.scheduler.processes import check_picklable
from feste.scheduler.program import Program
from feste.scheduler.run import Run

__all__ = [
    "LOOK",
    "for_dask",
    "forget_report",
    "hand_back",
    "last_report",
    "make_plan",
    "make_report",
    "make_run",
    "run_elsewhere",
    "wait_for",
]

#: Seconds that requests in flight may still take after Ctrl-C.
GRACE = 2.0
#: Seconds between checks for a signal in a waiting thread.
LOOK = 0.25

_last_report: ContextVar[RunReport | None] = ContextVar("feste_last_report", default=None)

Repack = Callable[[Sequence[Any]], tuple[Any, ...]]


def last_report() -> RunReport | None:
    """Return the report of the last run of this context (thread or async task), or None.

    >>> import feste
    >>> _ = feste.compute(feste.task(abs)(-1))
    >>> last_report().states
    {'done': 1}
    """
    return _last_report.get()


def forget_report() -> None:
    """Clear the last report when a run starts, so that ``last_report`` never shows an older one."""
    _last_report.set(None)


def make_plan(graph: FesteGraph, settings: Settings) -> Plan:
    """Optimize the graph, and raise the errors that can be known before anything is sent."""
    plan = Optimizer().run(_compute_collections(graph), settings)
    checked = set()
    for node in plan.graph.nodes.values():
        if node.value is not PENDING:
            continue
        call = node.call
        try:
            if call is not None and id(call.client) not in checked:  # clients may be unhashable
                checked.add(id(call.client))
                call.client.preflight()
            elif getattr(node.op, "executor", "") == "process":
                check_picklable(node)
        except FesteError as error:
            if not error.origin:
                error.origin = node.where
            raise
    return plan


def _compute_collections(graph: FesteGraph) -> FesteGraph:
    """Compute the Dask collections among the inputs, those with the same scheduler in one call."""
    nodes = [n for n in graph.nodes.values() if n.op is COLLECTION and n.value is PENDING]
    if not nodes:
        return graph
    import dask
    from dask.base import get_scheduler

    one = get_scheduler()  # type: ignore[no-untyped-call]
    groups: dict[Any, dict[Any, list[Node]]] = {}
    for node in nodes:
        # without a global scheduler, bags and arrays use different ones, which one call cannot mix
        own = None if one else getattr(node.args[0], "__dask_scheduler__", None)
        # Dask returns results grouped by kind of collection, so group the nodes in the same way
        kind = getattr(node.args[0], "__dask_optimize__", None)
        groups.setdefault(own, {}).setdefault(kind, []).append(node.replace())
    calls = [[n for kind in kinds.values() for n in kind] for kinds in groups.values()]
    for call in calls:
        values = dask.compute(*[n.args[0] for n in call])  # type: ignore[attr-defined, no-untyped-call]
        for node, value in zip(call, values, strict=True):
            node.value = value
    return graph.with_nodes(itertools.chain.from_iterable(calls))


def make_run(plan: Plan, settings: Settings, hands: Executor) -> Run:
    return Run(Program(plan.graph, plan.before.nodes), settings, hands)


def wait_for(run: Run, repack: Repack, settings: Settings) -> None:
    """Submit a run and block this thread until it has ended; Ctrl-C stops it."""
    try:
        driver().submit(run)
        with shown(run, settings["progress"]):
            # a signal that arrives just before a thread blocks does not wake it, so poll
            while not run.finished.wait(LOOK):
                pass
        return
    except KeyboardInterrupt:
        driver().stop(run, GRACE)
        if settings["progress"] is not False and in_terminal():
            sys.stderr.write(
                f"\nstopping: nothing new is sent, what is under way has {GRACE:.0f} seconds; "
                "Ctrl-C again stops at once\n"
            )
    except BaseException:  # a user's signal handler raised, so nothing waits any more
        driver().stop(run, 0.0)
        raise
    try:
        run.finished.wait(GRACE + 1.0)
    except KeyboardInterrupt:
        driver().stop(run, 0.0)
        run.finished.wait(0.5)
    report = make_report(run)
    try:
        partial = _put_back(run, repack, report)
    except RunFailed as failed:  # Ctrl-C it is, whether or not the values fit
        partial = failed.partial
    done = sum(
        count for state, count in report.states.items() if state in ("done", "kept", "shared")
    )
    raise RunInterrupted(
        f"interrupted after {done:,} of {report.nodes:,} nodes; what was finished is in .partial",
        partial=partial,
        report=report,
    ) from None


def make_report(run: Run) -> RunReport:
    report = RunReport.of(run)
    _last_report.set(report)
    return report


def hand_back(run: Run, repack: Repack) -> tuple[Any, ...]:
    if run.failure is not None:
        raise run.failure
    report = make_report(run)
    results = _put_back(run, repack, report)
    if not run.failed or run.on_error == "return":
        return results
    errors = [run.errors[i] for i in run.failed]
    wanted = len(run.outputs)
    bad = sum(i in run.errors for i in run.outputs)
    if bad == wanted:
        told = "the result failed" if bad == 1 else f"all {bad:,} results failed"
    else:
        told = f"{bad:,} of {wanted:,} results failed; the others are in .partial"
    raise RunFailed(
        told, partial=results, report=report, errors=errors, where=_failed_places(run, repack)
    ) from errors[0]


class _Place:
    """Stands for an output that failed, to find where it is in what the user gave."""

    __slots__ = ("error",)

    def __init__(self, error: FesteError) -> None:
        self.error = error


def _failed_places(run: Run, repack: Repack) -> dict[str, FesteError]:
    """The places of failed outputs in what is handed back; the values themselves are not searched."""
    try:
        shape = repack([_Place(run.errors[i]) if i in run.errors else None for i in run.outputs])
    except Exception:  # a container of the user's own that takes no such thing
        return {}
    return {where: place.error for where, place in _find_places(shape, "")}


def _find_places(shape: Any, where: str) -> Iterator[tuple[str, _Place]]:
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(shape, _Place):
        yield where, shape
    elif isinstance(shape, (list, tuple)):
        parts = ((f"[{i}]", part) for i, part in enumerate(shape))
    elif isinstance(shape, dict):
        parts = ((f"[{name!r}]", part) for name, part in shape.items())
    elif dataclasses.is_dataclass(shape) and not isinstance(shape, type):
        names = [f.name for f in dataclasses.fields(shape) if hasattr(shape, f.name)]
        parts = ((f".{name}", getattr(shape, name)) for name in names)
    for step, part in parts:
        if part is not None and type(part) not in (str, int, float, bool):
            yield from _find_places(part, where + step)


def _put_back(run: Run, repack: Repack, report: RunReport) -> tuple[Any, ...]:
    """Put the values into the user's containers; raise if they do not fit, as vectors in a set."""
    results = run.results()
    try:
        return repack(results)
    except Exception as error:
        raise RunFailed(
            f"the values do not fit into what was given to compute: {type(error).__name__}: {error}. "
            "They are in .partial, one after the other; give a list instead of a set",
            partial=tuple(results),
            report=report,
            errors=[run.errors[i] for i in run.failed],
        ) from error


def run_elsewhere(
    hands: Scheduler | Callable[..., Any], plan: Plan, repack: Repack, settings: Settings
) -> tuple[Any, ...]:
    """Run the graph with a whole scheduler or a plain ``get`` function."""
    if settings["on_error"] != "raise":
        raise ConfigError(
            f"on_error={settings['on_error']!r} needs Feste's own scheduling: a plain get function or "
            "a whole Scheduler ends at the first error"
        )
    keys = list(plan.graph.outputs)
    try:
        if isinstance(hands, Scheduler):
            values = hands.run(plan.graph, keys, settings)
        else:
            values = hands(for_dask(plan), keys)
    except FesteError as error:
        raise _failed_elsewhere(error) from error
    except Exception as error:
        raise _failed_elsewhere(NodeError(f"{type(error).__name__}: {error}")) from error
    return repack(list(values))


def _failed_elsewhere(error: FesteError) -> RunFailed:
    return RunFailed("the run failed; this scheduler keeps no partial results", errors=[error])


def for_dask(plan: Plan) -> dict[str, Any]:
    """Return a plan's Dask tasks; paid values are stored in the user's own nodes."""
    dsk = dict(plan.graph)
    keepers = Program(plan.graph, plan.before.nodes).keepers
    own = dict(zip(plan.graph.nodes, keepers, strict=True))
    for task in dsk.values():
        low = getattr(task, "func", None)
        for member in low.members if isinstance(low, LoweredBatch) else [low]:
            if isinstance(member, Lowered):
                member.belongs_to(*own[member.node.key])
    return dsk
