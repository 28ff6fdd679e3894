"""Whether the nodes of a graph still do what they did before a pass."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from typing import Any

from feste.draw import Determinism
from feste.fused import fuse
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization import rules
from feste.packing import fill
from feste.prompt.operation import PromptOp
from feste.prompt.segments import PartialPromptOp

__all__ = ["Equivalence"]


class Equivalence:
    """Compares nodes by what they do with their inputs, as these are after a pass.

    Inputs are the same if they are one node after merges, have equal known values, or are equal PURE
    nodes. What was merged, and what was given a value, is held to the rules by itself.

    :param before: the graph that the pass was given.
    :param after: what it returned.
    """

    def __init__(self, before: FesteGraph, after: FesteGraph) -> None:
        self.before = before
        self.after = after
        self._merged: dict[str, str] | None = None
        self._texts: dict[int, tuple[Node, Any]] = {}

    def is_equal(self, old: Node, new: Node) -> bool:
        """Whether two nodes do the same with the same; of calls, an input may become a constant.

        :param old: a node of the graph before.
        :param new: a node of either graph.
        """
        if old.op.kind == "prompt":
            return self._same_text(old, new)
        if rules.operation(old) != rules.operation(new):
            return False
        if rules.arguments(old) == rules.arguments(new) and self._same_inputs(old, new):
            return True
        given = self._given(old)
        return given is not None and given == self._given(new)

    def fused_from(self, new: Node) -> list[Node]:
        """Return the tasks that a fused node runs in a row as they ran before; none if it does not.

        :param new: a node of the graph after whose op is a fused one.
        """
        op: Any = new.op
        nodes, resolve = self.before.nodes, self.after.resolve
        chain = [nodes[step.node.key] for step in op.steps if step.node.key in nodes]
        if not chain or chain[-1].key != new.key or not all(map(rules.is_task, chain)):
            return []
        if not all(rules.is_sync(n) and not rules.runs_once(n) for n in chain):
            return []
        if any(map(rules.may_emit, chain)):
            return []
        for before, node in pairwise(chain):
            if before.key not in {resolve(dep.key) for dep in node.deps}:
                return []
            if not rules.run_alike(before, node) or not rules.waits_for(self.before, node, before):
                return []
        made = fuse(chain, resolve)
        expected: Any = made.op
        is_same = (
            rules.arguments(new) == rules.arguments(made)
            and [resolve(dep.key) for dep in new.deps] == [resolve(dep.key) for dep in made.deps]
            and new.determinism is made.determinism
            and [(id(step.node), step.sources) for step in op.steps]
            == [(id(step.node), step.sources) for step in expected.steps]
        )
        return chain if is_same else []

    def _same_text(self, old: Node, new: Node) -> bool:
        """Whether two prompts are made of the same, or are rendered to the same."""
        may_differ = new.op is old.op or rules.is_renderable(old)
        if may_differ and rules.is_open(new) and self._is_same_template(old, new):
            return True
        text = self._rendered(old)
        return text is not PENDING and rules.exact(text) == rules.exact(self._rendered(new))

    def _given(self, node: Node) -> Hashable | None:
        """Return a key of the arguments that a call will be given; None if one is not known."""
        values = [self._value(self.after.resolve(dep.key)) for dep in node.deps]
        if not rules.is_call(node) or any(value is PENDING for value in values):
            return None
        try:
            given = {name: fill(value, values) for name, value in node.kwargs.items()}
            return rules.exact(([fill(value, values) for value in node.args], given))
        except Exception:  # the run raises it again
            return None

    def _same_inputs(self, old: Node, new: Node) -> bool:
        return len(old.deps) == len(new.deps) and all(
            self._is_same_input(one.key, other.key)
            for one, other in zip(old.deps, new.deps, strict=True)
        )

    def _is_same_input(self, one: str, other: str) -> bool:
        one, other = self.after.resolve(one), self.after.resolve(other)
        if one == other:
            return True
        value = self._value(one)
        if value is not PENDING and rules.exact(value) == rules.exact(self._value(other)):
            return True
        if self._merged is None:
            self._merged = _merged(self.before)
        return self._merged.get(one, one) == self._merged.get(other, other)

    def _value(self, key: str) -> Any:
        node = self._node(key)
        return PENDING if node is None else self._rendered(node)

    def _node(self, key: str) -> Node | None:
        return self.after.nodes.get(key) or self.before.nodes.get(key)

    def _rendered(self, node: Node) -> Any:
        """Return the value of a node, or of a prompt the text that it will have; else PENDING."""
        if node.value is not PENDING or not rules.is_renderable(node):
            return node.value
        if id(node) not in self._texts:
            self._texts[id(node)] = node, self._render(node)
        return self._texts[id(node)][1]

    def _render(self, node: Node) -> Any:
        needs = [self._node(self.after.resolve(dep.key)) for dep in node.deps]
        values = [PENDING if need is None else need.value for need in needs]
        if any(value is PENDING for value in values):
            return PENDING
        op: Any = node.op
        try:
            return op.fn(**{name: fill(value, values) for name, value in node.kwargs.items()})
        except Exception:  # the run raises it again
            return PENDING

    def _is_same_template(self, old: Node, new: Node) -> bool:
        one, other = _template(old), _template(new)
        return one is not None and one == other and self._same_inputs(old, new)


def _merged(graph: FesteGraph) -> dict[str, str]:
    """Return for each PURE node that is equal to an earlier one the key of the first of them."""
    first: dict[Hashable, str] = {}
    merged: dict[str, str] = {}
    for key in graph.order():
        node = graph.nodes[key]
        if rules.is_open(node) and node.determinism is Determinism.PURE:
            kept = first.setdefault(rules.expression(graph, node, merged), key)
            if kept != key:
                merged[key] = kept
    return merged


def _template(node: Node) -> Hashable | None:
    """Return a key that is equal for prompts of the same templates and variables, rendered or not."""
    op = node.op
    known = op.known if type(op) is PartialPromptOp else {}
    if not isinstance(op, PromptOp) or type(op) not in (PromptOp, PartialPromptOp):
        return None
    variables = {**known, **node.kwargs}
    given = tuple((name, rules.exact(variables[name])) for name in sorted(variables))
    return (tuple(map(id, op.templates)), op.roles, op.language, given)
