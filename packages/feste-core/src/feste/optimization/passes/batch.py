"""Form batches before the run: calls that become ready at the same time share requests."""

from __future__ import annotations

from collections.abc import Hashable

from feste.graph import Batch, FesteGraph, Group
from feste.node import Node
from feste.optimization import rules
from feste.optimization.analysis.levels import levels_of
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["BatchOptimization", "sharing_key"]

#: Calls that may share requests, by the event at which they become ready.
Candidates = dict[Hashable, list[Node]]


class BatchOptimization:
    """Batch calls where it is proven legal and makes no call wait; group those that it would.

    All members share operation, backend and all parameters except the item, and none has effects.
    Members of a batch have the same ready event, so none waits for another, and the graph stays
    acyclic when all batches are contracted at once: see :func:`~feste.optimization.rules.ready_event`.
    Calls with different ready events become a :class:`~feste.graph.Group`.
    """

    name = "batch"
    level = Level.E0
    phase = Phase.PHYSICAL

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with batches and groups.

        :param graph: the graph.
        :param cx: receives a remark for each batch and each group.
        """
        draws = {b.members[0]: b for b in graph.batches if b.items == 1}
        equal = {first: [graph.nodes[m] for m in b.members] for first, b in draws.items()}
        kept = [b for b in graph.batches if b.items > 1]
        batches: list[Batch] = []
        groups: list[list[Node]] = []
        # what a task returns may share requests with any call that is still there then
        grows = any(map(rules.may_emit, graph.nodes.values()))
        for candidates in _candidates(graph, draws, kept):
            for nodes in candidates.values():
                if len(nodes) > 1 and cx.allow():
                    batches.append(_batch(nodes, draws, cx))
            if (grows or len(candidates) > 1) and cx.allow():
                own = [node for nodes in candidates.values() for node in nodes]
                groups.append([one for node in own for one in equal.get(node.key, [node])])
                why = "become ready at different times: they share requests"
                if len(candidates) == 1:
                    why = "may share requests with what tasks return"
                told = f"{counted(len(groups[-1]), 'call')} of {own[0].op.name} {why}"
                cx.applied(f"{told}, formed while the graph runs", groups[-1])
        if not batches and not groups:
            return graph
        levels = levels_of(graph, [[n.key for n in nodes] for nodes in groups])
        return graph.replace(
            batches=[*kept, *draws.values(), *batches],
            groups=[
                Group(tuple(n.key for n in nodes), tuple(own))
                for nodes, own in zip(groups, levels, strict=True)
            ],
        )


def _candidates(graph: FesteGraph, draws: dict[str, Batch], kept: list[Batch]) -> list[Candidates]:
    """Return the calls that may share requests; equal draws are represented by their first."""
    taken = {m for batch in kept for m in batch.members}
    taken |= {m for batch in draws.values() for m in batch.members[1:]}
    found: dict[Hashable, Candidates] = {}
    for node in graph.calls():
        call = node.call
        if call is None or node.key in taken or not rules.takes_lists(call):
            continue
        same = sharing_key(node)
        if same is not None:
            by_event = found.setdefault(same, {})
            by_event.setdefault(rules.ready_event(graph, node), []).append(node)
    return list(found.values())


def sharing_key(node: Node) -> Hashable:
    """Return a key that is equal for calls that may share requests; None for a call that must not.

    :param node: a call of an operation that takes lists.
    """
    if rules.is_visible(node) or not rules.may_share(node):
        return None
    same = rules.parameters(node)
    return None if same is None else (rules.operation(node), rules.limits(node), same)


def _batch(nodes: list[Node], draws: dict[str, Batch], cx: PassContext) -> Batch:
    """Form a batch of some calls, and of the equal draws that they represent."""
    parts = [draws.pop(n.key) if n.key in draws else Batch((n.key,)) for n in nodes]
    batch = Batch(
        tuple(m for part in parts for m in part.members),
        tuple(equal for part in parts for equal in part.draws),
    )
    call = nodes[0].call
    assert call is not None, "only calls are batched"
    calls = f"{len(batch.members):,} calls"
    if len(nodes) < len(batch.members):
        calls += f" with {len(nodes):,} prompts"
    cx.applied(f"{calls} of {call.name} share requests, up to {call.max_items:,} in each", nodes)
    return batch
