"""Form batches before the run: calls that become ready at the same time share requests."""

from __future__ import annotations

from collections.abc import Hashable

from feste.draw import Determinism
from feste.errors import GraphError
from feste.graph import Batch, FesteGraph
from feste.node import PENDING, Node
from feste.optimization.base import Level, PassContext, Phase

__all__ = ["BatchOptimization"]


class BatchOptimization:
    """Batch calls where it is proven legal and makes no call wait.

    The proof: all members share operation, backend and all parameters except the item; none has
    effects; they have the same *ready event* (the same unfinished inputs, or none), so no member
    waits for another and the batch adds no barrier; and contracting all batches at once leaves the
    graph acyclic, which pairwise checks would not prove.
    """

    name = "batch"
    level = Level.E0
    phase = Phase.PHYSICAL

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with batches.

        :param graph: the graph.
        :param cx: receives a remark for each group of calls.
        """
        groups: dict[Hashable, dict[Hashable, list[Node]]] = {}
        for node in graph.calls():
            group = batch_group(node)
            if group is not None:
                ready = ready_event(graph, node)
                groups.setdefault(group, {}).setdefault(ready, []).append(node)
        batches = []
        for by_event in groups.values():
            late = [nodes[0] for nodes in by_event.values() if len(nodes) == 1]
            for nodes in by_event.values():
                if len(nodes) > 1:
                    batches.append(Batch(tuple(n.key for n in nodes)))
                    call = nodes[0].call
                    assert call is not None, "only calls are batched"
                    cx.applied(
                        f"{len(nodes):,} calls of {nodes[0].op.name} share requests, "
                        f"up to {call.max_items:,} in each",
                        nodes,
                    )
            if len(late) > 1:
                cx.missed(
                    f"{len(late):,} calls of {late[0].op.name} could share requests but become ready "
                    "at different times: they are sent as they come",
                    late,
                )
        if not batches or tuple(batches) == graph.batches:
            return graph
        return keep_acyclic(graph, batches, cx)


def batch_group(node: Node) -> Hashable | None:
    """Return a value that is equal for calls that may share a request; None if a call may not.

    :param node: the call.
    """
    call = node.call
    if call is None or call.max_items < 2 or node.determinism is Determinism.EFFECT:
        return None
    group = call.group(node.args)
    return None if group is None else (call.token, group)


def ready_event(graph: FesteGraph, node: Node) -> Hashable:
    """Return a value that is equal for nodes that become ready at the same time.

    :param graph: the graph.
    :param node: the node.
    """
    return frozenset(d for d in graph.dependencies(node.key) if graph.nodes[d].value is PENDING)


def keep_acyclic(graph: FesteGraph, batches: list[Batch], cx: PassContext) -> FesteGraph:
    """Add the batches to the graph, except those that would make it cyclic when contracted.

    :param graph: the graph.
    :param batches: the candidates, in order of preference.
    :param cx: receives a remark for each refused batch.
    """
    try:
        graph.order(contract=batches)
        return graph.with_batches(batches)
    except GraphError:
        kept: list[Batch] = []
        for batch in batches:
            try:
                graph.order(contract=[*kept, batch])
                kept.append(batch)
            except GraphError as error:
                cx.missed(f"a batch was refused: {error}", [graph.nodes[m] for m in batch.members])
        return graph.with_batches(kept)
