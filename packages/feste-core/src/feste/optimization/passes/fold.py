"""Render prompts as far as their variables are known, so that their consumers are ready earlier."""

from __future__ import annotations

from typing import Any

from feste.graph import FesteGraph
from feste.optimization import rules
from feste.optimization.base import Level, PassContext, Phase
from feste.prompt.segments import Evaluator, PartialPromptOp, known_and_unknown
from feste.wording import counted

__all__ = ["FoldOptimization"]


class FoldOptimization:
    """Render prompts whose variables are constants, and the constant parts of others.

    Rendering is pure, so it may happen early, and once for equal parts. A prompt that fails to
    render is left for the run, which reports the error; one that uses something impure is left too.
    """

    name = "fold"
    level = Level.E0
    phase = Phase.SIMPLIFY
    before = ("cse",)

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with rendered prompts in place of calls of templates.

        :param graph: the graph.
        :param cx: receives one remark for all rendered prompts, and one for those rendered in part.
        """
        evaluator = Evaluator()
        whole, partly, left = [], [], []
        for node in graph.nodes.values():
            given: Any = node.op
            if not rules.is_renderable(node) or not rules.is_open(node):
                continue
            if isinstance(given, PartialPromptOp):  # of an earlier round
                continue
            known, unknown = known_and_unknown(node)
            op = evaluator.partial(given, known, unknown)
            if not unknown:
                try:
                    folded = node.replace(value=op.fn())
                except Exception:  # the run raises it again and applies on_error
                    left.append(node)
                    continue
                if cx.allow():
                    whole.append(folded)
            elif op.is_computed and cx.allow():
                pending = {name: node.kwargs[name] for name in unknown}
                partly.append(node.replace(op=op, kwargs=pending))
        if left:
            cx.missed(
                f"{counted(len(left), 'prompt')} cannot be rendered and will fail in the run", left
            )
        if whole:
            cx.applied(f"rendered {counted(len(whole), 'prompt')} of constants", whole)
        if partly:
            cx.applied(f"rendered the constant parts of {counted(len(partly), 'prompt')}", partly)
        return graph.with_nodes(whole + partly) if whole or partly else graph
