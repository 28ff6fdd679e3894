"""Which requests a plan sends, and how few any plan could send."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from feste.backend import Request
from feste.backend.batching import even_parts
from feste.graph import Batch, FesteGraph
from feste.node import PENDING, Node
from feste.optimization import rules
from feste.optimization.analysis.levels import least_requests, levels_of
from feste.optimization.analysis.sketches import Sketches

__all__ = ["fewest_requests", "form_requests"]

#: The calls of one item of a list: one call, or equal ones that are several answers to one prompt.
Item = list[Node]


def form_requests(graph: FesteGraph, sketches: Sketches) -> list[list[Item]]:
    """Return the items of each request that the plan sends, if none fails.

    Batches are cut by all limits, as the scheduler cuts them. Of a request that is not known yet,
    the known part counts.

    :param graph: the optimized graph.
    :param sketches: the requests of its calls.
    """
    batched = {m for batch in graph.batches for m in batch.members}
    formed = [[[node]] for node in graph.calls() if node.key not in batched]
    for batch in graph.batches:
        nodes = [n for n in (graph.nodes[m] for m in batch.members) if n.value is PENDING]
        if nodes:
            formed += _cut(graph, nodes, batch, sketches)
    return formed


def _cut(
    graph: FesteGraph, nodes: Sequence[Node], batch: Batch, sketches: Sketches
) -> Iterable[list[Item]]:
    call = nodes[0].call
    assert call is not None, "only calls are batched"
    items: list[Item] = []
    drawn = {m: equal for equal in batch.draws for m in equal}
    by_key = {node.key: node for node in nodes}
    for node in nodes:
        equal = drawn.get(node.key)
        if equal is None:
            items.append([node])
        elif node.key == equal[0]:
            some = [by_key[m] for m in equal if m in by_key]
            items += even_parts(some, call.max_draws(call.model(node.args)))
    rule = call.rule
    if rule is None:
        return [[item] for item in items]
    requests = [_of_item(item, graph, sketches) for item in items]
    return [[items[i] for i in positions] for positions in rule.lists(requests, call.max_items)]


def _of_item(item: Item, graph: FesteGraph, sketches: Sketches) -> Request | None:
    """Return the request of an item as far as it is known."""
    call, request = item[0].call, sketches.of(graph, item[0]).request
    samples = call.operation.samples if call else None
    return request if request is None or samples is None else samples.pack(request, len(item))


def fewest_requests(graph: FesteGraph, nodes: Sequence[Node]) -> int:
    """Return a lower bound of the requests for some calls, in any order and grouping.

    Equal draws are one item where the backend answers them with one request. Calls with other
    parameters share no request, and neither do calls of which one needs the other.

    :param graph: the graph.
    :param nodes: calls of one operation and model.
    """
    alone = 0
    groups: dict[Hashable, list[Node]] = {}
    for node in _prompts(graph, nodes):
        call = node.call
        if call is not None and rules.takes_lists(call) and rules.may_share(node):
            groups.setdefault(rules.parameters(node), []).append(node)
        else:
            alone += 1
    shared = list(groups.values())
    late = [g for g in shared if any(graph.dependencies(node.key) for node in g)]
    levels = levels_of(graph, [[node.key for node in group] for group in late])
    level_of = {id(group): own for group, own in zip(late, levels, strict=True)}
    return alone + sum(
        least_requests(level_of.get(id(group), [1] * len(group)), _most_items(group))
        for group in shared
    )


def _prompts(graph: FesteGraph, nodes: Sequence[Node]) -> list[Node]:
    """Return one call for each time that a prompt must be sent: once for so many equal draws."""
    calls = {id(node.op): node for node in nodes}.values()
    most = max((n.call.max_draws(n.call.model(n.args)) for n in calls if n.call), default=1)
    if most < 2:
        return list(nodes)
    prompts: list[Node] = []
    draws: dict[Hashable, Item] = {}
    for node in nodes:
        if rules.is_draw(node) and rules.may_repeat(node):
            draws.setdefault(rules.expression(graph, node), []).append(node)
        else:
            prompts.append(node)
    for equal in draws.values():
        prompts += equal[: -(-len(equal) // most)]
    return prompts


def _most_items(nodes: Sequence[Node]) -> int:
    return max(node.call.max_items for node in nodes if node.call)
