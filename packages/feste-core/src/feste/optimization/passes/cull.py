"""Remove nodes that no output needs."""

from __future__ import annotations

from feste.graph import FesteGraph
from feste.optimization import rules
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["CullOptimization"]


class CullOptimization:
    """Remove nodes that no output needs, even those with effects: only requested nodes run."""

    name = "cull"
    level = Level.E0
    phase = Phase.SIMPLIFY
    before = ("fold", "cse", "fuse")

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph without unneeded nodes.

        :param graph: the graph.
        :param cx: receives one remark if a node was removed.
        """
        culled = graph.cull()
        if culled is graph or not cx.allow():
            return graph
        dropped = [n for key, n in graph.nodes.items() if key not in culled.nodes]
        cx.account((n.key for n in dropped), "dropped: no output needs it")
        cx.applied(f"dropped {counted(len(dropped), 'node')} that no output needs", dropped)
        effects = [n for n in dropped if n.op.kind == "task" and rules.is_visible(n)]
        if effects:
            cx.applied(f"{counted(len(effects), 'task')} with effects will not run", effects)
        return culled
