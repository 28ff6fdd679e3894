"""The steps of a run between the user's code and the results: optimize, compile, wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from feste._compute.arrivals import Mailbox
from feste._compute.results import Repack, make_report, rescue
from feste.context import Settings
from feste.errors import (
    ConfigError,
    FesteError,
    NodeError,
    PluginError,
    RunFailed,
    RunInterrupted,
)
from feste.garbage import no_collection
from feste.graph import FesteGraph
from feste.lowering import Lowered, LoweredBatch
from feste.node import PENDING, Node
from feste.optimization import Optimizer, Plan
from feste.packing import COLLECTION
from feste.report import RunReport
from feste.report.progress import in_terminal, shown
from feste.scheduler.checks import check_nodes
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor, Scheduler
from feste.scheduler.inputs import Later, compute_together
from feste.scheduler.program import Program
from feste.scheduler.run import Run
from feste.scheduler.states import STATES, VALUED
from feste.store.answers import answers_of
from feste.wording import counted

__all__ = [
    "for_dask",
    "interruption",
    "make_plan",
    "make_run",
    "program_of",
    "run_elsewhere",
    "start_inputs",
    "stop_gently",
    "wait_for",
]

Hands = Executor | Scheduler | Callable[..., Any]

#: Seconds that requests in flight may still take after Ctrl-C.
GRACE = 2.0


def make_plan(graph: FesteGraph, settings: Settings, hands: Hands | None = None) -> Plan:
    """Optimize the graph, and raise the errors that can be known before anything is sent.

    :param graph: the graph.
    :param settings: the settings of the run.
    :param hands: what will run it; None if that is not known.
    """
    plan = Optimizer().run(graph, settings)
    executor = hands if isinstance(hands, Executor) else None
    check_nodes(plan.graph.nodes.values(), settings, executor)
    return plan


def start_inputs(program: Program, hands: Executor) -> None:
    """Let the executor compute the Dask collections among a program's inputs, all in one call."""
    places = [i for i, node in enumerate(program.nodes) if _is_input(node)]
    for i, node in zip(places, _given([program.nodes[i] for i in places], hands), strict=True):
        if not node.origin and program.consumers[i]:  # then it is where the first call takes it
            node.origin = program.nodes[program.consumers[i][0]].origin
        program.nodes[i] = node


def _with_inputs(graph: FesteGraph) -> FesteGraph:
    """Compute the Dask collections among a graph's inputs, which another scheduler than ours runs."""
    return graph.with_nodes(_given([n for n in graph.nodes.values() if _is_input(n)]))


def _is_input(node: Node) -> bool:
    return node.op is COLLECTION and node.value is PENDING


def _given(nodes: Sequence[Node], hands: Executor | None = None) -> list[Node]:
    """Return copies of collections' nodes that have values, or what they are to be run with."""
    if not nodes:
        return []
    inputs = [node.args[0] for node in nodes]
    found = compute_together(inputs) if hands is None else hands.compute_collections(inputs)
    given = [node.replace() for node in nodes]
    for node, value in zip(given, found, strict=True):
        if type(value) is Later:
            node.args = (value.given,)
        else:
            node.value = value
    return given


def program_of(plan: Plan) -> Program:
    with no_collection():
        measured = driver().brain.measured
        return Program(plan.graph, plan.before.nodes, plan.rewrites, measured)


def make_run(program: Program, settings: Settings, hands: Executor, prefix: str = "run") -> Run:
    """Make a run, open its store and cache, start its inputs: after this, money may be spent."""
    run = Run(program, settings, hands, answers_of(settings), prefix)
    start_inputs(program, hands)
    return run


def wait_for(run: Run, repack: Repack, settings: Settings) -> None:
    """Submit a run and block this thread until it has ended; Ctrl-C stops it."""
    mail = Mailbox()
    run.on_finish(lambda: mail.put(run))
    try:
        with shown(run, settings["progress"]):
            driver().submit(run)
            mail.get()
        return
    except KeyboardInterrupt:
        pass
    except BaseException:  # a user's signal handler raised, so nothing waits any more
        driver().stop(run, 0.0)
        raise
    stop_gently([run], settings)
    report = make_report(run)
    raise interruption(rescue(run, repack, report), report, settings) from None


def stop_gently(runs: Sequence[Run], settings: Settings) -> None:
    """Stop runs after Ctrl-C, and wait for what may still end; a second Ctrl-C stops them at once."""
    try:
        for run in runs:
            driver().stop(run, GRACE)
        if settings["progress"] is not False and in_terminal():
            sys.stderr.write(
                f"\nstopping: nothing new is sent, what is under way has {GRACE:.0f} seconds; "
                "Ctrl-C again stops at once\n"
            )
        _wait_until(time.monotonic() + GRACE + 1.0, runs)
    except KeyboardInterrupt:
        for run in runs:
            driver().stop(run, 0.0)
        _wait_until(time.monotonic() + 0.5, runs)


def _wait_until(until: float, runs: Sequence[Run]) -> None:
    for run in runs:
        run.finished.wait(max(0.0, until - time.monotonic()))


def interruption(partial: tuple[Any, ...], report: RunReport, settings: Settings) -> RunInterrupted:
    """Return the error of a run that Ctrl-C has stopped."""
    done = sum(report.states.get(STATES[state], 0) for state in VALUED)
    where = f"; answers are in {settings['store']}: run again to go on" if settings["store"] else ""
    return RunInterrupted(
        f"interrupted after {done:,} of {report.nodes:,} nodes; what was finished is in .partial{where}",
        partial=partial,
        report=report,
    )


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
            values = hands.run(_with_inputs(plan.graph), keys, settings)
        else:
            values = hands(for_dask(plan, settings), keys)
        found = _one_each(values, keys, hands)
    except FesteError as error:
        raise _failed_elsewhere(error) from error
    except Exception as error:
        raise _failed_elsewhere(NodeError(f"{type(error).__name__}: {error}")) from error
    return repack(found)


def _one_each(values: object, keys: Sequence[str], hands: Hands) -> list[Any]:
    """Return what another scheduler returned, if that is one value for each key."""
    own = isinstance(hands, Scheduler)
    name = f"{type(hands).__qualname__}.run" if own else getattr(hands, "__qualname__", repr(hands))
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping, Set)):
        raise PluginError(
            f"the scheduler {name} returned {type(values).__name__}, not a list of values"
        )
    found = list(values)
    if len(found) != len(keys):
        told = f"{counted(len(found), 'value')} for {counted(len(keys), 'key')}"
        raise PluginError(f"the scheduler {name} returned {told}: it takes one for each, in order")
    return found


def _failed_elsewhere(error: FesteError) -> RunFailed:
    return RunFailed("the run failed; this scheduler keeps no partial results", errors=[error])


def for_dask(plan: Plan, settings: Settings | None = None) -> dict[str, Any]:
    """Return a plan's Dask tasks; paid values are stored in the user's own nodes."""
    dsk = dict(_with_inputs(plan.graph))
    keepers = program_of(plan).keepers
    own = dict(zip(plan.graph.nodes, keepers, strict=True))
    for task in dsk.values():
        low = getattr(task, "func", None)
        for member in low.members if isinstance(low, LoweredBatch) else [low]:
            if isinstance(member, Lowered):
                member.belongs_to(*own[member.node.key])
                member.settings = settings
    return dsk
