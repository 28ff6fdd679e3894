"""What no pass may do: checked after every pass of a plugin, and in strict mode after every pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from feste.draw import Determinism
from feste.errors import GraphError, PluginError
from feste.graph import FesteGraph
from feste.node import Node
from feste.optimization import rules
from feste.optimization.base import Level, Optimization, PassContext, level_of

__all__ = ["check"]


def check(one: Optimization, before: FesteGraph, after: Any, cx: PassContext) -> None:
    """Check what a pass made of a graph against the rules and the level that it states.

    :param one: the pass.
    :param before: the graph it was given.
    :param after: what it returned.
    :param cx: holds its account of calls.
    :raises PluginError: if it broke a rule; the message names the pass.
    """
    try:
        _check(level_of(one), before, after, cx)
    except GraphError as error:
        raise PluginError(f"the pass {one.name!r} broke the rules: {error}") from None


def _check(level: Level, before: FesteGraph, after: Any, cx: PassContext) -> None:
    if not isinstance(after, FesteGraph):
        raise GraphError(f"apply() returned {type(after).__name__}, not a FesteGraph")
    if after.outputs != before.outputs:
        raise GraphError("it changed which outputs are wanted")
    gone = [n for n in before.calls() if n.key not in after.nodes]
    lost = [n for n in gone if n.key not in cx.accounted and n.key not in after.aliases]
    if lost:
        raise GraphError(
            f"{len(lost)} calls are gone without an account, the first is {_named(lost[0])}: say what "
            "became of them with cx.account(keys, how)"
        )
    after.check()
    if level is not Level.E2:
        _check_gone(level, before, after, gone)
        _check_kept(before, after)
    _check_batches(after)


def _check_gone(level: Level, before: FesteGraph, after: FesteGraph, gone: Iterable[Node]) -> None:
    """Calls that are gone were not needed, or an equal one stands for each."""
    gone = list(gone)
    needed = before.cull().nodes if gone else {}
    merged = {key: after.resolve(key) for key in after.aliases}
    for node in gone:
        if node.key not in needed:
            continue
        kept = after.nodes.get(after.resolve(node.key))
        if kept is None:
            raise GraphError(f"it dropped {_named(node)}, which an output needs")
        if rules.is_open(kept) and not _is_equal(before, merged, node, kept):
            raise GraphError(f"it merged {_named(node)} into {kept.key}, which is another call")
        if not rules.is_mergeable(node):
            raise GraphError(
                f"it merged {_named(node)}, but equal {node.determinism.name} calls are not the same"
            )
        if node.determinism is Determinism.GREEDY and level is not Level.E1G:
            raise GraphError(f"merging {_named(node)}, a GREEDY call, takes level E1G")


def _is_equal(before: FesteGraph, merged: Mapping[str, str], node: Node, kept: Node) -> bool:
    """Whether a call that is gone would ask for the same as the one that stands for it."""
    return (
        kept.key in before.nodes
        and rules.operation(node) == rules.operation(kept)
        and rules.arguments(node) == rules.arguments(kept)
        and rules.inputs(before, node, merged) == rules.inputs(before, kept, merged)
    )


def _check_kept(before: FesteGraph, after: FesteGraph) -> None:
    """The other calls ask for the same as before, and there are no new ones."""
    for key, node in after.nodes.items():
        if not rules.is_call(node):
            continue
        old = before.nodes.get(key)
        if old is node:
            continue
        if old is None:
            raise GraphError(f"it added {_named(node)}: that takes level E2")
        if node.op is not old.op or rules.arguments(node) != rules.arguments(old):
            raise GraphError(f"it changed {_named(node)}: that takes level E2")
        if rules.is_open(node) and after.dependencies(key) != [
            after.resolve(d) for d in before.dependencies(key)
        ]:
            raise GraphError(f"it changed the inputs of {_named(node)}: that takes level E2")


def _check_batches(graph: FesteGraph) -> None:
    """The members of each batch may share requests."""
    for batch in graph.batches:
        nodes = [graph.nodes[m] for m in batch.members]
        first, call = nodes[0], nodes[0].call
        for node in nodes:
            if call is None or not rules.is_call(node):
                raise GraphError(f"{_named(node)} is in a batch, but it is no call")
            if rules.is_visible(node):
                raise GraphError(f"{_named(node)} is in a batch, but it has an effect")
            if rules.operation(node) != rules.operation(first):
                raise GraphError(f"{_named(node)} is in a batch with another operation")
            if rules.limits(node) != rules.limits(first):
                raise GraphError(f"{_named(node)} is in a batch with another client's limits")
        if batch.items > 1 and (call is None or not rules.takes_lists(call)):
            raise GraphError(f"{_named(first)} is in a batch, but its operation takes no lists")
        if batch.items > 1:
            _check_parameters(nodes)
        for equal in batch.draws:
            _check_draws(graph, [graph.nodes[m] for m in equal])


def _check_parameters(nodes: list[Node]) -> None:
    """Some calls that become a list have equal parameters, which hold for each of them by itself."""
    own = rules.parameters(nodes[0])
    for node in nodes:
        if own is None or rules.parameters(node) != own:
            raise GraphError(f"{_named(node)} is in a batch with other parameters")
        if not rules.may_share(node):
            raise GraphError(f"{_named(node)} is in a batch, but its seed would hold for all of it")


def _check_draws(graph: FesteGraph, nodes: list[Node]) -> None:
    """Some calls that become several answers to one prompt are equal draws."""
    first = nodes[0]
    for node in nodes:
        is_same = rules.expression(graph, node) == rules.expression(graph, first)
        call = node.call
        if not is_same or not rules.is_draw(node) or call is None or not rules.may_fuse(node):
            raise GraphError(f"{_named(node)} and {first.key} are no equal draws")


def _named(node: Node) -> str:
    return f"{node.key} ({node.where})" if node.where else node.key
