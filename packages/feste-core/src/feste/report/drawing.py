"""Draw a graph of nodes as a picture."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from feste import context
from feste.graph import FesteGraph
from feste.node import PENDING, Node, topological
from feste.optimization import Optimizer
from feste.report import Box, draw_mermaid, draw_svg
from feste.report.files import ending, page, write
from feste.report.naming import Places, detail_of

__all__ = ["draw", "visualize"]


def visualize(value: Any, path: str | Path | None = None) -> str:
    """Draw the optimized graph of a value; nodes with known values are marked as done.

    :param value: the value.
    :param path: as for :func:`draw`.
    """
    collected, _, _ = FesteGraph.collect(value)
    needed = topological([collected.nodes[key] for key in collected.outputs])
    order = sorted(needed, key=lambda node: node.seq)
    answered = {node.key for node in order if _is_answered(node)}
    # The inputs of an answered node are not needed for a run but are for a picture, so plan as if
    # no value was known.
    nodes = [_unanswered(node) if node.key in answered else node for node in order]
    whole = FesteGraph({node.key: node for node in nodes}, collected.outputs)
    graph = Optimizer().run(whole, context.settings()).graph
    return _drawn(graph, {graph.resolve(key) for key in answered}, path)


def draw(graph: FesteGraph, path: str | Path | None = None) -> str:
    """Draw a graph.

    :param graph: the graph.
    :param path: the file to write: ``.svg``, ``.mmd`` (Mermaid) or ``.html``; None writes none.
    :returns: the picture: Mermaid text for ``.mmd``, otherwise SVG, which a notebook displays.
    :raises ConfigError: for another file extension.
    """
    # Passes render prompts: these values are part of the plan, not results of a run.
    answered = {
        key for key, node in graph.nodes.items() if _is_answered(node) and node.op.kind != "prompt"
    }
    return _drawn(graph, answered, path)


def _is_answered(node: Node) -> bool:
    return node.value is not PENDING and node.op.kind != "data"


def _unanswered(node: Node) -> Node:
    blank = node.replace()
    blank.value = PENDING
    return blank


def _drawn(graph: FesteGraph, answered: Collection[str], path: str | Path | None) -> str:
    kind = ".svg" if path is None else ending(path, ".svg", ".mmd", ".html")
    batch_of = {m: b.key for b in graph.batches for m in b.members}
    wanted = set(graph.wanted())
    places = Places()
    boxes = [
        Box(
            key,
            node.op.name,
            node.op.kind,
            detail_of(node),
            batch_of.get(key, ""),
            key in wanted,
            "done" if key in answered else "",
            places.of(node),
        )
        for key, node in graph.nodes.items()
    ]
    edges = [(need, key) for key in graph.nodes for need in graph.dependencies(key)]
    picture = draw_mermaid(boxes, edges) if kind == ".mmd" else draw_svg(boxes, edges)
    if path is not None:
        write(path, page("Graph", picture) if kind == ".html" else picture)
    return picture
