"""Let each merged node stand directly for the one that replaces it."""

from __future__ import annotations

from feste.graph import FesteGraph
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["ResolveOptimization"]


class ResolveOptimization:
    """Shorten chains of merges, so that no input is looked up through several names.

    Merges come in rounds: what one round keeps, the next may merge again.
    """

    name = "resolve"
    level = Level.E0
    phase = Phase.SIMPLIFY
    after = ("cse",)

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with each alias naming a node.

        :param graph: the graph.
        :param cx: receives one remark if a chain was shortened.
        """
        direct: dict[str, str] = {}
        for key in graph.aliases:
            trail, kept = [], key
            while kept not in direct and kept in graph.aliases:
                trail.append(kept)
                kept = graph.aliases[kept]
            kept = direct.get(kept, kept)
            direct.update(dict.fromkeys(trail, kept))
        if direct == graph.aliases or not cx.allow():
            return graph
        short = sum(direct[key] != kept for key, kept in graph.aliases.items())
        cx.applied(f"resolved {counted(short, 'chain')} of merges")
        return graph.replace(aliases=direct)
