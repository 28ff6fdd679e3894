"""Render prompts whose variables are all known, so that what needs them is ready at once."""

from __future__ import annotations

from feste.graph import FesteGraph
from feste.node import PENDING
from feste.optimization.base import Level, PassContext, Phase
from feste.optimization.wording import counted

__all__ = ["FoldOptimization"]


class FoldOptimization:
    """Render prompts whose variables are all constants.

    Rendering is pure, so when it happens does not matter; a prompt that fails to render is left for
    the run, where its error belongs.
    """

    name = "fold"
    level = Level.E0
    phase = Phase.SIMPLIFY
    before = ("cse",)

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with constant prompts in place of calls of templates.

        :param graph: the graph.
        :param cx: gets one remark for all that were rendered.
        """
        folded, left = [], []
        for node in graph.nodes.values():
            if node.op.kind != "prompt" or node.deps or node.value is not PENDING:
                continue
            constant = node.replace()
            try:
                constant.value = node.op.fn(*node.args, **node.kwargs)  # type: ignore[attr-defined]
            except Exception:  # the run will raise it again, where on_error decides
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
