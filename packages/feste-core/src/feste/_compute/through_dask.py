"""Run nodes inside Dask, in its threads or processes, one by one or as a batch."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from feste import blocking, context, draw
from feste._compute.front import compute
from feste._compute.results import hand_back
from feste._compute.steps import for_dask, make_plan, make_run, wait_for
from feste.context import Settings
from feste.delayed import FesteDelayed
from feste.errors import (
    FesteError,
    NodeError,
    UngatedCall,
    UpstreamFailed,
)
from feste.fused import Halted, StepFailed
from feste.graph import FesteGraph
from feste.lowering import Lowered, LoweredBatch, draw_lowered, note_lowered
from feste.node import PENDING, Node
from feste.packing import fill, holds_nodes
from feste.scheduler.choice import choose
from feste.scheduler.executor import Executor
from feste.scheduler.program import Program

__all__ = ["lowered", "optimize_lowered", "persisted", "run_lowered", "run_lowered_batch"]


def lowered(node: FesteDelayed[Any]) -> FesteGraph:
    """Return the Dask graph of a node.

    :param node: the node.
    """
    return lower([node._node])


def optimize_lowered(dsk: Any, keys: Any) -> Any:
    """Optimize the Feste nodes of a Dask graph; Dask calls this before it runs the graph.

    :param dsk: the graph; tasks that are not Feste's stay unchanged.
    :param keys: the requested keys, nested as in Dask.
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
    roots = [ours[key].own for key in dict.fromkeys(wanted) if key in ours]
    if not roots or not all(low.is_whole for low in ours.values()):
        return dsk
    others = {key: task for key, task in tasks.items() if key not in ours}
    return {**others, **for_dask(make_plan(lower(roots), context.settings()))}


def lower(roots: Sequence[Node]) -> FesteGraph:
    """Return the graph of some nodes for Dask, which asks for one collection at a time.

    Their draws are counted when the first of them is optimized or run: all together, in creation
    order, as if they had been collected at once.

    :param roots: the requested nodes.
    """
    graph = FesteGraph.of(roots, scope=None)
    note_lowered(graph.nodes.values())
    return graph


def persisted(dsk: Any, node: Node, *, rename: Any = None) -> FesteDelayed[Any]:
    """Rebuild a lazy value from its graph, after ``dask.persist`` and similar functions.

    :param dsk: the computed results, or a graph that Dask rewrote.
    :param node: the node of the lazy value.
    :param rename: new names of keys, from ``dask.graph_manipulation``.
    :raises NotImplementedError: if there are new names: a node cannot be renamed.
    """
    from dask.task_spec import DataNode, GraphNode

    if rename:
        raise NotImplementedError(
            f"dask.graph_manipulation cannot rename {node.key}: build the lazy value anew instead"
        )
    value = dsk[node.key]
    if isinstance(value, DataNode):
        node.value = value.value
    elif type(value).__module__.startswith("distributed."):  # a future from client.persist()
        node.value = value.result()
    elif not isinstance(value, GraphNode):
        node.value = value
    return FesteDelayed(node)


def run_lowered(low: Lowered, values: Sequence[Any]) -> Any:
    """Run one node for Dask, in any process.

    :param low: the lowered node.
    :param values: the values of its inputs.
    :raises UngatedCall: for a paid call outside the process that made the graph.
    """
    op: Any = low.node.op
    draw_lowered()
    alone = op.kind == "call" or getattr(op, "once", False)
    if alone and not low.is_here:
        what = "a paid call" if op.kind == "call" else "a task with once=True"
        raise UngatedCall(
            f"{low.node.key} is {what} in a process without the gate and the store of its run: it would "
            'go round your limits. Use feste.compute(..., scheduler="dask"), which keeps it in the '
            "process that made the graph",
            origin=low.node.where,
        )
    with _one_at_a_time(low.node.key):
        kept = low.own.value
        if kept is not PENDING:
            return kept
        if alone or getattr(op, "is_async", False):
            (outcome,) = _outcomes([low], [values])
            if isinstance(outcome, UpstreamFailed):  # from a node that it emitted
                outcome = outcome.roots[0]
            if isinstance(outcome, FesteError):
                raise (outcome.__cause__ if isinstance(outcome, NodeError) else None) or outcome
            return outcome
        args = [fill(a, values) for a in low.node.args]
        kwargs = {k: fill(v, values) for k, v in low.node.kwargs.items()}
        assert low.own.draw is not None  # draw_lowered was called before
        inherited = context.everywhere(_settings_of(low))
        with draw.inside(low.own.draw), context.within(inherited):
            try:
                result = op.fn(*args, **kwargs)
                while type(result) is Halted:
                    step = op.steps[result.at].node
                    value = result.context.run(_emitted, low, (step,), result.value)
                    result = op.go_on(result.at + 1, value, args)
            except StepFailed as failed:
                raise failed.__cause__ or failed from None
            return _emitted(low, low.keepers, result) if holds_nodes(result) else result


def run_lowered_batch(low: LoweredBatch, values: Sequence[Any]) -> list[Any]:
    """Run the calls of a batch for Dask, in one request if the limits allow.

    :param low: the lowered batch.
    :param values: the values of all members' inputs, concatenated.
    :returns: for each member its value, or the error that Dask must raise.
    """
    if not low.members[0].is_here:
        return [run_lowered(low.members[0], values)]  # raises UngatedCall
    given = iter(values)
    return _outcomes(low.members, [[next(given) for _ in range(n)] for n in low.counts])


def _outcomes(members: Sequence[Lowered], values: Sequence[Sequence[Any]]) -> list[Any]:
    """Run nodes whose inputs Dask has computed; other runs can still join the same nodes."""
    draw_lowered()
    filled: list[Node] = []
    aliases: dict[str, str] = {}
    before: dict[str, Node] = {}
    for low, given in zip(members, values, strict=True):
        args = tuple(fill(a, given) for a in low.node.args)
        kwargs = {k: fill(v, given) for k, v in low.node.kwargs.items()}
        single = low.node.replace(args=args, kwargs=kwargs, deps=())
        single.draw = low.own.draw  # an optimization may have copied the node
        filled.append(single)
        before.update({n.key: n for n in low.keepers})
        aliases.update({n.key: low.node.key for n in low.keepers[1:]})
    keys = [n.key for n in filled]
    graph = FesteGraph(dict(zip(keys, filled, strict=True)), keys, aliases)
    settings = _settings_of(members[0]).replace(on_error="return", progress=False)
    hands = choose(settings.replace(scheduler="local"))
    assert isinstance(hands, Executor)
    with blocking.waiting():
        program = Program(make_plan(graph, settings).graph, before)
        run = make_run(program, settings, hands)
        wait_for(run, tuple, settings)
    return list(hand_back(run, tuple))


def _settings_of(low: Lowered) -> Settings:
    return low.settings or context.settings()


def _emitted(low: Lowered, keepers: Sequence[Node], result: Any) -> Any:
    """Compute the nodes that a task returned, as the brain would."""
    graph, keys, repack = FesteGraph.collect(result, scope=draw.scope())
    if low.is_here:
        settings = _settings_of(low)
        own = settings.replace(scheduler="local", progress=False, on_error="raise")
        value = compute(result, **own)[0]
        if settings["keep"] != "none":
            for node in keepers:
                node.value = value
        return value
    import dask

    dsk = dict(graph)  # its paid calls must also be refused: they have no gate in this process
    for task in dsk.values():
        if isinstance(getattr(task, "func", None), Lowered):
            task.func.process = low.process
    return repack(dask.get(dsk, keys))[0]  # type: ignore[attr-defined]


_locks: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_locking = threading.Lock()


def _forget() -> None:
    """Replace the locks in a forked child, where the threads that hold them do not exist."""
    global _locks, _locking
    _locks, _locking = weakref.WeakValueDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def _one_at_a_time(key: str) -> Iterator[None]:
    """Let only one thread at a time run a node, since Dask may copy its task under another key."""
    with _locking:
        lock = _locks.setdefault(key, threading.RLock())
    with lock:
        yield
