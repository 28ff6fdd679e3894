"""Render prompts whose variables are all known, so that their consumers are ready at once."""

from __future__ import annotations

from feste.graph import FesteGraph
from feste.node import PENDING
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["FoldOptimization"]


class FoldOptimization:
    """Render prompts whose variables are all constants.

    Rendering is pure, so it may happen early. A prompt that fails to render is left for the run,
    which reports the error.
    """

    name = "fold"
    level = Level.E0
    phase = Phase.SIMPLIFY
    before = ("cse",)

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with rendered prompts in place of calls of templates.

        :param graph: the graph.
        :param cx: receives one remark for all rendered prompts.
        """
        folded, left = [], []
        for node in graph.nodes.values():
            if node.op.kind != "prompt" or node.deps or node.value is not PENDING:
                continue
            constant = node.replace()
            try:
                constant.value = node.op.fn(*node.args, **node.kwargs)  # type: ignore[attr-defined]
            except Exception:  # the run raises it again and applies on_error
                left.append(node)
            else:
                folded.append(constant)
        if left:
            cx.missed(
                f"{counted(len(left), 'prompt')} cannot be rendered and will fail in the run", left
            )
        if not folded:
            return graph
        cx.applied(f"rendered {counted(len(folded), 'prompt')} of constants", folded)
        return graph.with_nodes(folded)
