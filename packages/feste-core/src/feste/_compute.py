"""From what the user holds to what the user gets: collect, optimize, schedule, hand back."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from feste import blocking, context
from feste.context import Settings
from feste.delayed import FesteDelayed
from feste.draw import forget
from feste.errors import (
    ConfigError,
    FesteError,
    NodeError,
    RunFailed,
    RunInterrupted,
    UngatedCall,
    UpstreamFailed,
)
from feste.graph import FesteGraph, Lowered, LoweredBatch, draw_lowered, lower
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
        note = "this scheduler is a plain get function: nothing is batched while it runs, but as planned"
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
    from dask.base import get_scheduler

    one = get_scheduler()  # type: ignore[no-untyped-call]
    groups: dict[Any, dict[Any, list[Node]]] = {}
    for node in nodes:
        # without a scheduler for all, those of bags and arrays differ, and Dask refuses them together
        own = None if one else getattr(node.args[0], "__dask_scheduler__", None)
        # Dask returns the results of collections of one kind together, wherever they were given
        kind = getattr(node.args[0], "__dask_optimize__", None)
        groups.setdefault(own, {}).setdefault(kind, []).append(node.replace())
    calls = [[n for kind in kinds.values() for n in kind] for kinds in groups.values()]
    for call in calls:
        values = dask.compute(*[n.args[0] for n in call])  # type: ignore[attr-defined, no-untyped-call]
        for node, value in zip(call, values, strict=True):
            node.value = value
    return graph.with_nodes(itertools.chain.from_iterable(calls))


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
    if settings["on_error"] != "raise":
        raise ConfigError(
            f"on_error={settings['on_error']!r} needs Feste's own scheduling: a plain get function or "
            "a whole Scheduler ends at the first error"
        )
    keys = list(plan.graph.outputs)
    _last_report.set(None)  # this run has none, and the one before would be taken for it
    try:
        if isinstance(hands, Scheduler):
            values = hands.run(plan.graph, keys)
        else:
            values = hands(_for_dask(plan), keys)
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
        values = _values_of([FesteDelayed(d) for d in node.deps])
        args = tuple(fill(a, values) for a in node.args)
        kwargs = {k: fill(v, values) for k, v in node.kwargs.items()}
        node = Node(op, args, kwargs, (), node.origin)
    if op.kind == "call" or getattr(op, "is_async", False):
        return _alone(node)
    result = op.fn(*node.args, **node.kwargs)
    return _values_of([result])[0] if holds_nodes(result) else result


def _values_of(lazy: Sequence[Any]) -> tuple[Any, ...]:
    """Compute what an eager call needs; it raises the error of the call that failed, as itself."""
    try:
        return compute(*lazy, on_error="raise", progress=False)
    except RunFailed as failed:
        error = failed.errors[0]
        cause = error.__cause__ if isinstance(error, NodeError) else None
        raise cause or error from None


def _alone(node: Node) -> Any:
    """Run one node and raise its own error."""
    settings = context.settings()
    hands = choose("local")
    assert isinstance(hands, Executor)
    with blocking.waiting():
        graph = FesteGraph.of([node])
        node.op.client.preflight() if node.op.kind == "call" else None  # type: ignore[attr-defined]
        run = Run(Program(graph, graph.nodes), settings, hands, "eager")
        _wait(run, tuple, context.settings(progress=False))
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
    return lower([node._node])


def optimize_lowered(dsk: Any, keys: Any) -> Any:
    """Run Feste's optimizer on the lowered nodes of a graph; what Dask calls before it runs one.

    :param dsk: the graph; what is not ours in it stays as it is.
    :param keys: the wanted keys, nested as Dask likes.
    """
    from dask.core import flatten

    tasks = dict(dsk)
    ours: dict[str, Lowered] = {}
    wanted = list(flatten(keys))  # type: ignore[no-untyped-call]
    for key, task in tasks.items():
        low = getattr(task, "func", None)
        if isinstance(low, Lowered):
            ours[key] = low
        else:
            wanted.extend(getattr(task, "dependencies", ()))
    roots = [ours[key].node for key in dict.fromkeys(wanted) if key in ours]
    if not roots or not all(low.is_whole for low in ours.values()):
        return dsk
    others = {key: task for key, task in tasks.items() if key not in ours}
    return {**others, **_for_dask(_plan(lower(roots), context.settings()))}


def _for_dask(plan: Plan) -> dict[str, Any]:
    """The tasks of a plan; they know the user's own nodes, which keep what is paid for."""
    dsk = dict(plan.graph)
    keepers = Program(plan.graph, plan.before.nodes).keepers
    own = dict(zip(plan.graph.nodes, keepers, strict=True))
    for task in dsk.values():
        low = getattr(task, "func", None)
        for member in low.members if isinstance(low, LoweredBatch) else [low]:
            if isinstance(member, Lowered):
                member.belongs_to(*own[member.node.key])
    return dsk


def persisted(dsk: Any, node: Node, *, rename: Any = None) -> FesteDelayed[Any]:
    """Return a collection again after ``dask.persist`` and the like.

    :param dsk: what Dask computed, or a graph that it rewrote.
    :param node: the node of the collection.
    :param rename: new names of keys, from ``dask.graph_manipulation``.
    :raises NotImplementedError: for new names: a node has one name.
    """
    from dask.task_spec import DataNode, GraphNode

    if rename:
        raise NotImplementedError(
            f"dask.graph_manipulation cannot rename {node.key}: build the lazy value anew instead"
        )
    value = dsk[node.key]
    if isinstance(value, DataNode):
        node.value = value.value
    elif type(value).__module__.startswith("distributed."):  # of client.persist()
        node.value = value.result()
    elif not isinstance(value, GraphNode):
        node.value = value
    return FesteDelayed(node)


def run_lowered(low: Lowered, values: Sequence[Any]) -> Any:
    """Run one node for Dask, in whatever process it is.

    :param low: the lowered node.
    :param values: the values of its inputs.
    :raises UngatedCall: for a paid call outside the process that made the graph.
    """
    op: Any = low.node.op
    draw_lowered()
    if op.kind == "call" and not low.is_here:
        raise UngatedCall(
            f"{low.node.key} is a paid call in a process without its gate: it would go round your "
            'limits. Use feste.compute(..., scheduler="dask"), which sends requests from the '
            "process that made the graph",
            origin=low.node.where,
        )
    with _one_at_a_time(low.node.key):
        kept = low.own.value
        if kept is not PENDING:
            return kept
        if op.kind == "call" or getattr(op, "is_async", False):
            (outcome,) = _outcomes([low], [values])
            if isinstance(outcome, UpstreamFailed):  # of a node that it emitted
                outcome = outcome.roots[0]
            if isinstance(outcome, FesteError):
                raise (outcome.__cause__ if isinstance(outcome, NodeError) else None) or outcome
            return outcome
        args = [fill(a, values) for a in low.node.args]
        result = op.fn(*args, **{k: fill(v, values) for k, v in low.node.kwargs.items()})
        return _emitted(low, result) if holds_nodes(result) else result


def run_lowered_batch(low: LoweredBatch, values: Sequence[Any]) -> list[Any]:
    """Run the calls of a batch for Dask, in one request as far as limits allow.

    :param low: the lowered batch.
    :param values: the values of the members' inputs, one member's after the other.
    :returns: for each member its value, or the error that Dask shall raise.
    """
    if not low.members[0].is_here:
        return [run_lowered(low.members[0], values)]  # raises UngatedCall
    given = iter(values)
    return _outcomes(low.members, [[next(given) for _ in range(n)] for n in low.counts])


def _outcomes(members: Sequence[Lowered], values: Sequence[Sequence[Any]]) -> list[Any]:
    """Run nodes whose inputs Dask has computed; they stay the nodes that they are, for other runs."""
    draw_lowered()
    filled: list[Node] = []
    aliases: dict[str, str] = {}
    before: dict[str, Node] = {}
    for low, given in zip(members, values, strict=True):
        args = tuple(fill(a, given) for a in low.node.args)
        kwargs = {k: fill(v, given) for k, v in low.node.kwargs.items()}
        single = low.node.replace(args=args, kwargs=kwargs, deps=())
        single.draw = low.own.draw  # of a node that a pass has copied
        filled.append(single)
        before.update({n.key: n for n in low.keepers})
        aliases.update({n.key: low.node.key for n in low.keepers[1:]})
    keys = [n.key for n in filled]
    graph = FesteGraph(dict(zip(keys, filled, strict=True)), keys, aliases)
    settings = context.settings(on_error="return", progress=False)
    hands = choose("local")
    assert isinstance(hands, Executor)
    with blocking.waiting():
        run = Run(Program(_plan(graph, settings).graph, before), settings, hands)
        _wait(run, tuple, settings)
    return list(_hand_back(run, tuple))


def _emitted(low: Lowered, result: Any) -> Any:
    """Compute what a task returned with nodes inside, as the brain would."""
    draw = low.own.draw
    assert draw is not None  # whoever runs a lowered node has seen to it
    scope = draw.inner
    forget(scope)  # the task ran from its start, so its draws count from 0
    graph, keys, repack = FesteGraph.collect(result, scope=scope)
    if low.is_here:
        value = compute(result, scheduler="local", progress=False)[0]
        if context.get("keep") != "none":
            for node in low.keepers:
                node.value = value
        return value
    import dask

    dsk = dict(graph)  # a paid call in it is as far from its gate as this task
    for task in dsk.values():
        if isinstance(getattr(task, "func", None), Lowered):
            task.func.process = low.process
    return repack(dask.get(dsk, keys))[0]  # type: ignore[attr-defined]


_locks: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_locking = threading.Lock()


@contextmanager
def _one_at_a_time(key: str) -> Iterator[None]:
    """Have a node run by one thread at a time: Dask may copy its task, each under another key."""
    with _locking:
        lock = _locks.setdefault(key, threading.RLock())
    with lock:
        yield


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
