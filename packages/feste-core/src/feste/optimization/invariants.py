"""What no pass may do: checked after every pass of a plugin, and in strict mode after every pass."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from feste.draw import Determinism
from feste.errors import GraphError, PluginError
from feste.fused import Fused
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization import rules
from feste.optimization.base import Level, Optimization, PassContext, level_of
from feste.optimization.equivalence import Equivalence
from feste.wording import a_kind

__all__ = ["check"]


def check(
    one: Optimization, before: FesteGraph, after: Any, cx: PassContext, known: Container[str]
) -> None:
    """Check what a pass made of a graph against the rules and the level that it states.

    :param one: the pass.
    :param before: the graph it was given.
    :param after: what it returned.
    :param cx: holds its account of calls.
    :param known: the keys of the nodes whose values were known before the pass: since then another
        run may have set more of them.
    :raises PluginError: if it broke a rule; the message names the pass.
    """
    try:
        _check(level_of(one), before, after, cx, known)
    except GraphError as error:
        raise PluginError(f"the pass {one.name!r} broke the rules: {error}") from None


def _check(
    level: Level, before: FesteGraph, after: Any, cx: PassContext, known: Container[str]
) -> None:
    if not isinstance(after, FesteGraph):
        raise GraphError(f"apply() returned {a_kind(after)}, not a FesteGraph")
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
    if level is Level.E0:
        _check_no_new_draws(before, after)
    if level is not Level.E2:
        _check_nodes(level, Equivalence(before, after), known)
    _check_shared(after)


def _check_no_new_draws(before: FesteGraph, after: FesteGraph) -> None:
    """Several answers to one prompt are equal in distribution, not exactly the same."""
    known = {m: i for i, e in enumerate(e for b in before.batches for e in b.draws) for m in e}
    for batch in after.batches:
        for equal in batch.draws:
            if len({known.get(m, -1) for m in equal}) > 1 or equal[0] not in known:
                node = after.nodes[equal[0]]
                raise GraphError(
                    f"it made {_named(node)} one of several answers: that takes level E1"
                )


def _check_nodes(level: Level, same: Equivalence, known: Container[str]) -> None:
    """Each node still does the same, or an equal one stands for it, or nobody needs it."""
    before, after = same.before, same.after
    changed = {
        key: after.resolve(key)
        for key, node in before.nodes.items()
        if after.nodes.get(key) is not node or key in after.aliases
    }
    steps = _steps(same, known)
    gone = [key for key, kept in changed.items() if kept not in after.nodes and key not in steps]
    needed = before.cull().nodes if gone else {}
    for key in gone:
        node = before.nodes[key]
        if key in needed and (rules.is_call(node) or not _is_pure(node)):
            raise GraphError(f"it dropped {_named(node)}, which an output needs")
    for key, kept in changed.items():
        if kept in after.nodes and kept != key:
            _check_merged(level, same, known, before.nodes[key])
    for key, kept in before.aliases.items():
        is_there = key in after.aliases or key in after.nodes
        if is_there and after.resolve(key) != after.resolve(kept):
            raise GraphError(f"it merged {key} into another node than before")
    for key, kept in changed.items():
        if kept in after.nodes and kept == key:
            _check_kept(before.nodes[key], after.nodes[key], same, known)
    for key, node in after.nodes.items():
        if key not in before.nodes and (rules.is_call(node) or not _is_pure(node)):
            raise GraphError(f"it added {_named(node)}: that takes level E2")


def _steps(same: Equivalence, known: Container[str]) -> set[str]:
    """Return the keys of the tasks that are gone because another one runs them first."""
    after, steps = same.after, set[str]()
    for key, node in after.nodes.items():
        if type(node.op) is not Fused or same.before.nodes.get(key) is node:
            continue
        tasks = same.fused_from(node)
        if not tasks:
            raise GraphError(f"it fused {_named(node)} from other tasks than ran in a row before")
        for step in tasks[:-1]:
            if step.key in steps or step.key in known or after.resolve(step.key) in after.nodes:
                raise GraphError(f"it runs {_named(step)} once more, in {key}")
            steps.add(step.key)
    return steps


def _check_merged(level: Level, same: Equivalence, known: Container[str], node: Node) -> None:
    """An equal node stands for one that is gone, where nobody can tell them apart."""
    kept = same.after.nodes[same.after.resolve(node.key)]
    if node.key in known:
        is_equal = rules.exact(node.value) == rules.exact(kept.value)
    else:
        is_equal = same.is_equal(node, same.before.nodes.get(kept.key, kept))
    if not is_equal:
        raise GraphError(
            f"it merged {_named(node)} into {kept.key}, which is another {node.op.kind}"
        )
    if not rules.is_mergeable(node):
        raise GraphError(
            f"it merged {_named(node)}, but equal {node.determinism.name} nodes are not the same"
        )
    if node.determinism is Determinism.GREEDY and level is not Level.E1G:
        raise GraphError(f"merging {_named(node)}, a GREEDY call, takes level E1G")


def _check_kept(old: Node, node: Node, same: Equivalence, known: Container[str]) -> None:
    """A node is the same draw, has no other value, and would do the same as before."""
    if node.draw != old.draw:
        raise GraphError(f"it gave {_named(node)} another draw")
    if old.key in known:
        if node.value is not old.value and rules.exact(node.value) != rules.exact(old.value):
            raise GraphError(f"it changed the value of {_named(node)}, which was known")
    elif old.op.kind == "prompt":
        if not same.is_equal(old, node):
            raise GraphError(f"it changed the text of {_named(node)}: that takes level E2")
    elif node.value is not PENDING and node.value is not old.value:
        if rules.is_call(old) or not _is_pure(old):
            raise GraphError(f"it set the value of {_named(node)}, which only a run may do")
    elif type(node.op) is Fused:
        return  # its steps were compared
    elif node.op is not old.op or not same.is_equal(old, node):
        if node.op is not old.op or rules.arguments(node) != rules.arguments(old):
            raise GraphError(f"it changed {_named(node)}: that takes level E2")
        raise GraphError(f"it changed the inputs of {_named(node)}: that takes level E2")


def _check_shared(graph: FesteGraph) -> None:
    """The members of each batch and of each group may share requests, and those of a prefix are calls."""
    for batch in graph.batches:
        nodes = [graph.nodes[m] for m in batch.members]
        _check_members(nodes, "batch")
        if batch.items > 1:
            _check_list(nodes, "batch")
        for equal in batch.draws:
            _check_draws(graph, [graph.nodes[m] for m in equal])
    for group in graph.groups:
        nodes = [graph.nodes[m] for m in group.members]
        _check_members(nodes, "group")
        _check_list(nodes, "group")
        levels = [level for level in group.levels if type(level) is int and level > 0]
        if not len(levels) == len(group.levels) == len(nodes):
            raise GraphError(
                f"the group of {_named(nodes[0])} has the levels {str(group.levels)[:80]}: each of its "
                f"{len(nodes)} members has one, a whole number from 1"
            )
    for prefix in graph.prefixes:
        _check_calls([graph.nodes[m] for m in prefix.members], "prefix")


def _check_calls(nodes: list[Node], kind: str) -> None:
    for node in nodes:
        if not rules.is_call(node):
            raise GraphError(f"{_named(node)} is in a {kind}, but it is no call")


def _check_members(nodes: list[Node], kind: str) -> None:
    """Some calls that share requests are of one operation and of equal clients, without effects."""
    _check_calls(nodes, kind)
    first = nodes[0]
    for node in nodes:
        if rules.is_visible(node):
            raise GraphError(f"{_named(node)} is in a {kind}, but it has an effect")
        if rules.operation(node) != rules.operation(first):
            raise GraphError(f"{_named(node)} is in a {kind} with another operation")
        if rules.limits(node) != rules.limits(first):
            raise GraphError(f"{_named(node)} is in a {kind} with another client's limits")


def _check_list(nodes: list[Node], kind: str) -> None:
    """Some calls that become a list have equal parameters, which hold for each of them by itself."""
    first, call = nodes[0], nodes[0].call
    if call is None or not rules.takes_lists(call):
        raise GraphError(f"{_named(first)} is in a {kind}, but its operation takes no lists")
    own = rules.parameters(first)
    for node in nodes:
        if own is None or rules.parameters(node) != own:
            raise GraphError(f"{_named(node)} is in a {kind} with other parameters")
        if not rules.may_share(node):
            raise GraphError(
                f"{_named(node)} is in a {kind}, but its seed would hold for all of it"
            )


def _check_draws(graph: FesteGraph, nodes: list[Node]) -> None:
    """Some calls that become several answers to one prompt are equal draws."""
    first = nodes[0]
    for node in nodes:
        is_same = rules.expression(graph, node) == rules.expression(graph, first)
        call = node.call
        if not is_same or not rules.is_draw(node) or call is None or not rules.may_repeat(node):
            raise GraphError(f"{_named(node)} and {first.key} are no equal draws")


def _is_pure(node: Node) -> bool:
    return node.determinism is Determinism.PURE


def _named(node: Node) -> str:
    return f"{node.key} ({node.where})" if node.where else node.key
