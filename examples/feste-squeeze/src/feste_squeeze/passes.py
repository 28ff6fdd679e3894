"""A pass of level E2, which changes what models read, and one of E0 that tells what it would save."""

from __future__ import annotations

from collections.abc import Callable

from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization import Level, PassContext, Phase, rules
from feste_squeeze.text import squeezed

__all__ = ["Blanks", "Squeeze"]


class Squeeze:
    """Leave spare white space out of what models read.

    Another prompt may have another answer, so this is E2: it runs only where the user names it.
    """

    name = "squeeze"
    level = Level.E2
    phase = Phase.REWRITE

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with squeezed prompts.

        :param graph: the graph.
        :param cx: receives a remark on the prompts, and one on those that are not known yet.
        """
        late = [n for n in _calls(graph) if any(rules.is_open(d) for d in _inputs(graph, n))]
        if late:
            cx.missed("texts that are made while it runs stay as they are", late)
        found = _rewritten(graph, cx.allow)
        if not found:
            return graph
        calls = [node for node in found if rules.is_call(node)]
        cx.applied(f"squeezed the prompts of {len(calls):,} calls", calls)
        return graph.with_nodes(found)


class Blanks:
    """Tell how many tokens :class:`Squeeze` would save, where that is worth a remark.

    The graph stays as it is: E0. Draws that were fused read their prompt once, so this comes after.
    """

    name = "blanks"
    level = Level.E0
    phase = Phase.PHYSICAL
    after = ("sample_fusion", "batch")

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph itself.

        :param graph: the graph.
        :param cx: receives the advice, if it is worth it.
        """
        again = {m for batch in graph.batches for equal in batch.draws for m in equal[1:]}
        better = graph.with_nodes(_rewritten(graph))
        spare, all_tokens, concerned = 0, 0, []
        for node in _calls(graph):
            if node.key in again:
                continue
            tokens = _tokens(graph, node, cx)
            all_tokens += tokens
            new = better.nodes[node.key]
            if new is not node:
                spare += tokens - _tokens(better, new, cx)
                concerned.append(node)
        if spare and spare >= cx.settings["squeeze_worth"] * all_tokens:
            cx.advice(
                f"~{spare:,} of ~{all_tokens:,} tokens are spare white space: "
                "optimize={'squeeze': True} leaves it out",
                concerned,
            )
        return graph


def _calls(graph: FesteGraph) -> list[Node]:
    """Return the calls that models answer; what has an effect is no prompt."""
    return [node for node in graph.calls() if not rules.is_visible(node)]


def _inputs(graph: FesteGraph, node: Node) -> list[Node]:
    return [graph.nodes[key] for key in graph.dependencies(node.key)]


def _rewritten(graph: FesteGraph, allow: Callable[[], bool] = lambda: True) -> list[Node]:
    """Return the calls whose prompts can be squeezed, rewritten, and the prompts that they read.

    :param graph: the graph.
    :param allow: is asked before each call.
    """
    shorter: dict[str, Node] = {}  # a rendered prompt may be read by many calls
    found: list[Node] = []
    for node in _calls(graph):
        args = squeezed(list(node.args))
        inputs = _inputs(graph, node)
        spare = [d for d in inputs if _text(d) is not squeezed(_text(d))]
        if (args == list(node.args) and not spare) or not allow():
            continue
        for prompt in spare:
            if prompt.key not in shorter:
                shorter[prompt.key] = _shorter(prompt)
        deps = tuple(shorter.get(d.key, d) for d in inputs)
        found.append(node.replace(args=tuple(args), deps=deps))
    return [*shorter.values(), *found]


def _text(node: Node) -> object:
    """Return what a prompt was rendered to; None if it is not known before the run, or no prompt."""
    return None if node.op.kind != "prompt" or node.value is PENDING else node.value


def _shorter(prompt: Node) -> Node:
    """Return another prompt: the user's own is not changed, since its value may be asked for."""
    made = Node(prompt.op, prompt.args, prompt.kwargs, origin=prompt.origin)
    made.value = squeezed(prompt.value)
    return made


def _tokens(graph: FesteGraph, node: Node, cx: PassContext) -> int:
    """Return the estimated tokens of a call's request, as far as it is known."""
    request = cx.sketches.of(graph, node).request
    return 0 if request is None else request.tokens
