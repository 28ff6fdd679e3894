"""From what the user holds to what the user gets: collect, optimize, schedule, hand back."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from feste import blocking, context
from feste.context import Settings
from feste.delayed import FesteDelayed
from feste.errors import (
    ConfigError,
    FesteError,
    NodeError,
    RunFailed,
    RunInterrupted,
    UngatedCall,
)
from feste.graph import FesteGraph, Lowered, LoweredBatch
from feste.node import COLLECTION, PENDING, Node, fill, holds_nodes
from feste.optimization import Explanation, Optimizer, Plan
from feste.report import Box, RunReport, draw_mermaid, draw_svg
from feste.report.progress import shown
from feste.scheduler.choice import choose, kind_of
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor, Scheduler
from feste.scheduler.processes import check_picklable
from feste.scheduler.program import Program
from feste.scheduler.run import Run

__all__ = ["acompute", "compute", "explain", "last_report"]

#: Seconds that requests in flight may still take after Ctrl-C.
GRACE = 2.0

_last_report: ContextVar[RunReport | None] = ContextVar("feste_last_report", default=None)

Repack = Callable[[Sequence[Any]], tuple[Any, ...]]


def compute(*args: Any, **settings: Any) -> tuple[Any, ...]:
    """Run what the arguments need, and return them with values in place of nodes.

    :param args: lazy values, and lists, dicts, sets and dataclasses with lazy values inside; plain
        values are returned as they are.
    :param settings: settings for this run, before all others; see :mod:`feste.context`.
    :returns: one value for each argument, in its shape.
    :raises RunFailed: if a node failed; what was computed is in its ``partial``.
    :raises ConfigError: if a setting, key or argument is wrong; nothing was sent then.
    :raises BlockingCallError: where waiting would stop Feste itself.

    >>> import feste
    >>> @feste.task
    ... def add(a: int, b: int) -> int:
    ...     return a + b
    >>> feste.compute([add(1, 2), add(3, 4)], {"sum": add(5, 6)})
    ([3, 7], {'sum': 11})
    """
    chosen = context.settings(**settings)
    graph, _, repack = FesteGraph.collect(*args)
    if not graph.outputs:
        return repack([])
    with blocking.waiting():
        plan = _plan(graph, chosen)
        hands = choose(chosen["scheduler"])
        if not isinstance(hands, Executor):
            return _by_another(hands, plan, repack, chosen)
        run = _run(plan, chosen, hands)
        _wait(run, repack, chosen)
    return _hand_back(run, repack)


async def acompute(*args: Any, **settings: Any) -> tuple[Any, ...]:
    """Do what :func:`compute` does, without blocking the running event loop.

    Cancelling it starts nothing new and gives up what is under way.

    :param args: as for :func:`compute`.
    :param settings: as for :func:`compute`.
    :returns: as :func:`compute`.
    :raises RunFailed: as :func:`compute`.

    >>> import asyncio, feste
    >>> double = feste.task(lambda x: 2 * x)
    >>> asyncio.run(acompute(double(21)))
    (42,)
    """
    chosen = context.settings(**settings)
    graph, _, repack = FesteGraph.collect(*args)
    if not graph.outputs:
        return repack([])
    with blocking.waiting(awaited=True):
        plan = await asyncio.to_thread(_plan, graph, chosen)
        hands = await asyncio.to_thread(choose, chosen["scheduler"])  # may start a cluster
        if not isinstance(hands, Executor):
            return await asyncio.to_thread(_by_another, hands, plan, repack, chosen)
        run = await asyncio.to_thread(_run, plan, chosen, hands)
        await _ended(run)
    return _hand_back(run, repack)


async def _ended(run: Run) -> None:
    """Submit a run and wait until it has ended; it is stopped if nobody waits any more."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ended.done():
            ended.set_result(None)

    def from_the_brain() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(wake)

    run.on_finish(from_the_brain)
    try:
        driver().submit(run)
        await ended
    except BaseException:  # cancelled, or the loop was closed under it
        driver().stop(run, 0.0)
        raise


async def acompute_one(node: FesteDelayed[Any]) -> Any:
    """Return the value of one node: what ``await node`` does.

    :param node: the node.
    """
    return (await acompute(node))[0]


def explain(*args: Any, **settings: Any) -> Explanation:
    """Say what :func:`compute` would do, without sending anything.

    :param args: as for :func:`compute`.
    :param settings: as for :func:`compute`.
    :returns: the plan in words and numbers; print it.

    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> explanation = explain([llm.complete(f"word {i}") for i in range(40)])
    >>> explanation.calls, explanation.requests
    (40, 3)
    """
    chosen = context.settings(**settings)
    graph, _, _ = FesteGraph.collect(*args)
    note = ""
    if not inspect.isclass(kind_of(chosen["scheduler"])):
        note = "this scheduler is a plain get function: nothing is batched while it runs"
    return Explanation(Optimizer().run(graph, chosen), note)


def last_report() -> RunReport | None:
    """Return the report of the last run of this context (thread or async task), or None.

    >>> import feste
    >>> _ = feste.compute(feste.task(abs)(-1))
    >>> last_report().states
    {'done': 1}
    """
    return _last_report.get()


# --- the steps -----------------------------------------------------------------------------------


def _plan(graph: FesteGraph, settings: Settings) -> Plan:
    """Optimize, and refuse what can be known to be wrong before anything is sent."""
    plan = Optimizer().run(_with_collections(graph), settings)
    checked = set()
    for node in plan.graph.nodes.values():
        if node.value is not PENDING:
            continue
        op: Any = node.op
        try:
            if op.kind == "call" and id(op.client) not in checked:  # a dataclass has no hash
                checked.add(id(op.client))
                op.client.preflight()
            elif getattr(op, "executor", "") == "process":
                check_picklable(node)
        except FesteError as error:
            if not error.origin:
                error.origin = node.where
            raise
    return plan


def _with_collections(graph: FesteGraph) -> FesteGraph:
    """Compute the Dask collections among the inputs, all in one Dask call."""
    nodes = [n for n in graph.nodes.values() if n.op is COLLECTION and n.value is PENDING]
    if not nodes:
        return graph
    import dask

    values = dask.compute(*[n.args[0] for n in nodes])  # type: ignore[attr-defined, no-untyped-call]
    computed = [node.replace() for node in nodes]
    for node, value in zip(computed, values, strict=True):
        node.value = value
    return graph.with_nodes(computed)


def _run(plan: Plan, settings: Settings, hands: Executor) -> Run:
    return Run(Program(plan.graph, plan.before.nodes), settings, hands)


def _wait(run: Run, repack: Repack, settings: Settings) -> None:
    """Submit a run and park this thread until it has ended; Ctrl-C ends it sooner."""
    try:
        driver().submit(run)
        with shown(run, settings["progress"]):
            run.finished.wait()
        return
    except KeyboardInterrupt:
        driver().stop(run, GRACE)
    except BaseException:  # a signal handler of the user's raised: nobody waits any more
        driver().stop(run, 0.0)
        raise
    try:
        run.finished.wait(GRACE + 1.0)
    except KeyboardInterrupt:
        driver().stop(run, 0.0)
        run.finished.wait(0.5)
    report = _reported(run)
    partial = repack(run.results())
    done = sum(count for state, count in report.states.items() if state in ("done", "replayed"))
    raise RunInterrupted(
        f"interrupted after {done:,} of {report.nodes:,} nodes; what was finished is in .partial",
        partial=partial,
        report=report,
    ) from None


def _reported(run: Run) -> RunReport:
    report = RunReport.of(run)
    _last_report.set(report)
    return report


def _hand_back(run: Run, repack: Repack) -> tuple[Any, ...]:
    if run.failure is not None:
        raise run.failure
    report = _reported(run)
    results = repack(run.results())
    if not run.failed or run.on_error == "return":
        return results
    errors = [run.errors[i] for i in run.failed]
    wanted = len(run.outputs)
    bad = sum(i in run.errors for i in run.outputs)
    raise RunFailed(
        f"{bad:,} of {wanted:,} results failed; the others are in .partial, the errors in .errors",
        partial=results,
        report=report,
        errors=errors,
    ) from errors[0]


def _by_another(
    hands: Scheduler | Callable[..., Any], plan: Plan, repack: Repack, settings: Settings
) -> tuple[Any, ...]:
    """Hand the graph to a whole scheduler or a plain ``get`` function."""
    keys = list(plan.graph.outputs)
    try:
        if isinstance(hands, Scheduler):
            values = hands.run(plan.graph, keys)
        else:
            values = hands(dict(plan.graph), keys)
    except FesteError as error:
        raise _failed_elsewhere(error) from error
    except Exception as error:
        raise _failed_elsewhere(NodeError(f"{type(error).__name__}: {error}")) from error
    return repack(list(values))


def _failed_elsewhere(error: FesteError) -> RunFailed:
    return RunFailed("the run failed; this scheduler keeps no partial results", errors=[error])


# --- eager calls ---------------------------------------------------------------------------------


def run_eager(node: Node) -> Any:
    """Run one call here and now, and return its value; what eager mode does instead of recording.

    Python runs on the caller's own thread, so a debugger stops in it and its exception is raised as
    it is. A call of a backend goes through the same gate, retry and code as in a graph.

    :param node: the call.
    :raises CallError: if the call failed.
    """
    op: Any = node.op
    if node.deps:  # nodes recorded before eager mode began
        values = compute(*[FesteDelayed(d) for d in node.deps])
        args = tuple(fill(a, values) for a in node.args)
        kwargs = {k: fill(v, values) for k, v in node.kwargs.items()}
        node = Node(op, args, kwargs, (), node.origin)
    if op.kind == "call" or getattr(op, "is_async", False):
        return _alone(node)
    result = op.fn(*node.args, **node.kwargs)
    return compute(result)[0] if holds_nodes(result) else result


def _alone(node: Node) -> Any:
    """Run one node and raise its own error."""
    settings = context.settings()
    hands = choose("local")
    assert isinstance(hands, Executor)
    with blocking.waiting():
        graph = FesteGraph.of([node])
        node.op.client.preflight() if node.op.kind == "call" else None  # type: ignore[attr-defined]
        run = Run(Program(graph, graph.nodes), settings, hands, "eager")
        _wait(run, tuple, settings)
    if run.failure is not None:
        raise run.failure
    _reported(run)
    (result,) = run.results()
    if run.failed:
        root = run.errors[run.failed[0]]  # of a node that a task emitted, perhaps
        cause = root.__cause__ if isinstance(root, NodeError) else None
        raise cause or root
    return result


# --- towards Dask --------------------------------------------------------------------------------


def lowered(node: FesteDelayed[Any]) -> FesteGraph:
    """Return the graph of a node as Dask wants it.

    :param node: the node.
    """
    return FesteGraph.collect(node)[0]


def optimize_lowered(dsk: Any, keys: Any) -> Any:
    """Run Feste's optimizer on a graph of lowered nodes; what Dask calls before it runs one.

    :param dsk: the graph.
    :param keys: the wanted keys, nested as Dask likes.
    """
    flat: list[str] = []
    stack = [keys]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        else:
            flat.append(item)
    if isinstance(dsk, FesteGraph):
        nodes: Mapping[str, Node] = dsk.nodes
    else:
        found = {key: getattr(task, "func", None) for key, task in dict(dsk).items()}
        nodes = {key: low.node for key, low in found.items() if isinstance(low, Lowered)}
    if any(key not in nodes for key in flat):
        return dsk  # not only ours: Dask runs it as it is
    graph = FesteGraph.of([nodes[key] for key in dict.fromkeys(flat)])
    return dict(_plan(graph, context.settings()).graph)


def persisted(dsk: Any, node: Node, *, rename: Any = None) -> FesteDelayed[Any]:
    """Return a node again after ``dask.persist``, with its value.

    :param dsk: what Dask computed.
    :param node: the node that was persisted.
    :param rename: unused; part of Dask's protocol.
    """
    value = dsk[node.key]
    node.value = getattr(value, "value", value)
    return FesteDelayed(node)


def run_lowered(low: Lowered, values: Sequence[Any]) -> Any:
    """Run one node for Dask, in whatever process it is.

    :param low: the lowered node.
    :param values: the values of its inputs.
    :raises UngatedCall: for a paid call outside the process that made the graph.
    """
    node = low.node
    op: Any = node.op
    args = tuple(fill(a, values) for a in node.args)
    kwargs = {k: fill(v, values) for k, v in node.kwargs.items()}
    if op is COLLECTION:
        return compute_collection(args[0])
    if op.kind == "call" or getattr(op, "is_async", False):
        if op.kind == "call" and low.process != os.getpid():
            raise UngatedCall(
                f"{node.key} is a paid call in a process without its gate: it would go round your "
                'limits. Use feste.compute(..., scheduler="dask"), which sends requests from the '
                "process that made the graph",
                origin=node.where,
            )
        if node.value is not PENDING:
            return node.value
        single = Node(op, args, kwargs, (), node.where)
        single.draw = node.draw
        node.value = _alone(single)
        return node.value
    result = op.fn(*args, **kwargs)
    return compute(result)[0] if holds_nodes(result) else result


def compute_collection(collection: Any) -> Any:
    """Return the value of a Dask collection.

    :param collection: the collection.
    """
    import dask

    return dask.compute(collection)[0]  # type: ignore[attr-defined, no-untyped-call]


def run_lowered_batch(low: LoweredBatch, values: Sequence[Any]) -> list[Any]:
    """Run the calls of a batch for Dask, in one request as far as limits allow.

    :param low: the lowered batch.
    :param values: the values of the members' inputs, one member's after the other.
    :returns: for each member its value, or the error that Dask shall raise.
    """
    if low.members[0].process != os.getpid():
        return [run_lowered(low.members[0], values)]  # raises UngatedCall
    singles: list[Node] = []
    begin = 0
    for member, count in zip(low.members, low.counts, strict=True):
        own = values[begin : begin + count]
        begin += count
        node = member.node
        single = Node(node.op, tuple(fill(a, own) for a in node.args), {}, (), node.where)
        single.draw, single.value = node.draw, node.value
        singles.append(single)
    nodes: list[FesteDelayed[Any]] = [FesteDelayed(n) for n in singles]
    results = compute(nodes, on_error="return", scheduler="local")[0]
    for member, result in zip(low.members, results, strict=True):
        if not isinstance(result, FesteError):
            member.node.value = result
    return list(results)


# --- pictures ------------------------------------------------------------------------------------


def visualize(value: Any, path: str | Path | None = None) -> str:
    """Draw the optimized graph that a value needs.

    :param value: the value.
    :param path: as for :func:`draw`.
    """
    graph, _, _ = FesteGraph.collect(value)
    return draw(Optimizer().run(graph, context.settings()).graph, path)


def draw(graph: FesteGraph, path: str | Path | None = None) -> str:
    """Draw a graph.

    :param graph: the graph.
    :param path: where to write it: ``.svg``, ``.mmd`` (Mermaid) or ``.html``; None writes none.
    :returns: the picture: Mermaid text for ``.mmd``, else SVG.
    :raises ConfigError: for another ending.
    """
    suffix = Path(path).suffix if path is not None else ".svg"
    if suffix not in (".svg", ".mmd", ".html"):
        raise ConfigError(f"cannot draw to {path}: use .svg, .mmd or .html")
    batch_of = {m: b.key for b in graph.batches for m in b.members}
    wanted = set(graph.wanted())
    boxes = [_box(n, batch_of.get(key, ""), key in wanted) for key, n in graph.nodes.items()]
    edges = [(need, key) for key in graph.nodes for need in graph.dependencies(key)]
    picture = draw_mermaid(boxes, edges) if suffix == ".mmd" else draw_svg(boxes, edges)
    if path is not None:
        page = f"<!doctype html><meta charset='utf-8'>{picture}" if suffix == ".html" else picture
        Path(path).write_text(page, encoding="utf-8")
    return picture


def _box(node: Node, group: str, output: bool) -> Box:
    op: Any = node.op
    detail = str(getattr(getattr(op, "client", None), "model", None) or "")
    kind = op.kind if node.value is PENDING or op.kind == "prompt" else "data"
    return Box(node.key, op.name, kind, detail, group, output)
