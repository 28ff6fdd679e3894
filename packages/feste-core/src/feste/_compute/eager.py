"""Eager mode: run one call at once, where it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from feste import blocking, context, draw
from feste._compute.front import compute
from feste._compute.results import make_report, warn_of
from feste._compute.steps import make_run, wait_for
from feste.delayed import FesteDelayed
from feste.errors import (
    NodeError,
    RunFailed,
)
from feste.graph import FesteGraph
from feste.node import Node
from feste.packing import fill, holds_nodes
from feste.scheduler.checks import check_nodes
from feste.scheduler.choice import choose
from feste.scheduler.executor import Executor
from feste.scheduler.program import Program
from feste.store.answers import answers_of
from feste.store.once import run_once

__all__ = ["alone", "run_eager"]


def run_eager(node: Node) -> Any:
    """Run one call immediately and return its value, instead of recording it.

    Python runs on the caller's own thread, so a debugger stops in it and its exception is raised
    unchanged. A backend's call uses the same gate, retries and code as in a graph.

    :param node: the call.
    :raises CallError: if the call failed.
    """
    op: Any = node.op
    if node.deps:  # nodes recorded before eager mode was set
        values = values_of([FesteDelayed(d) for d in node.deps])
        args = tuple(fill(a, values) for a in node.args)
        kwargs = {k: fill(v, values) for k, v in node.kwargs.items()}
        node = Node(op, args, kwargs, (), node.origin)
    if op.kind == "prompt":
        return op.fn(*node.args, **node.kwargs)
    draw.assign([node], draw.scope())
    assert node.draw is not None
    if op.kind == "call":
        return alone(node)
    with draw.inside(node.draw):  # calls inside a task get the same draws as calls it returns
        if op.is_async:
            return alone(node)
        if op.once:
            return _once(node)
        result = op.fn(*node.args, **node.kwargs)  # recording has copied them
        return values_of([result])[0] if holds_nodes(result) else result


def _once(node: Node) -> Any:
    settings = context.settings()
    check_nodes([node], settings)
    answers = answers_of(settings)
    assert answers is not None and node.draw is not None
    return run_once(answers, node.op, node.draw, node.args, node.kwargs, "eager")[0]


def values_of(lazy: Sequence[Any]) -> tuple[Any, ...]:
    """Compute the inputs of an eager call; raise the failed call's own error."""
    try:
        return compute(*lazy, on_error="raise", progress=False)
    except RunFailed as failed:
        error = failed.errors[0]
        cause = error.__cause__ if isinstance(error, NodeError) else None
        raise cause or error from None


def alone(node: Node) -> Any:
    """Run one node and raise its own error."""
    settings = context.settings(progress=False, on_error="return")
    hands = choose(settings.replace(scheduler="local"))
    assert isinstance(hands, Executor)
    with blocking.waiting():
        graph = FesteGraph.of([node])
        check_nodes([node], settings)
        run = make_run(Program(graph, graph.nodes), settings, hands, "eager")
        wait_for(run, tuple, settings)
    if run.failure is not None:
        raise run.failure
    make_report(run)
    if not run.failed:
        warn_of(run)
    (result,) = run.results()
    if run.failed:
        root = run.errors[run.failed[0]]  # may belong to a node that a task emitted
        cause = root.__cause__ if isinstance(root, NodeError) else None
        raise cause or root
    if run.fault is not None:
        raise run.fault
    if run.outputs[0] in run.errors:
        raise run.errors[run.outputs[0]]
    return result
