"""Draws a graph of nodes as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feste import context
from feste.errors import (
    ConfigError,
)
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization import Optimizer
from feste.report import Box, draw_mermaid, draw_svg

__all__ = ["draw", "visualize"]


def visualize(value: Any, path: str | Path | None = None) -> str:
    """Draw the optimized graph that a value needs.

    :param value: the value.
    :param path: as for :func:`draw`.
    """
    graph, _, _ = FesteGraph.collect(value)
    return draw(Optimizer().run(graph, context.settings()).graph, path)


def draw(graph: FesteGraph, path: str | Path | None = None) -> str:
    """Draw a graph.

    :param graph: the graph.
    :param path: where to write it: ``.svg``, ``.mmd`` (Mermaid) or ``.html``; None writes none.
    :returns: the picture: Mermaid text for ``.mmd``, else SVG.
    :raises ConfigError: for another ending.
    """
    suffix = Path(path).suffix if path is not None else ".svg"
    if suffix not in (".svg", ".mmd", ".html"):
        raise ConfigError(f"cannot draw to {path}: use .svg, .mmd or .html")
    batch_of = {m: b.key for b in graph.batches for m in b.members}
    wanted = set(graph.wanted())
    boxes = [_box(n, batch_of.get(key, ""), key in wanted) for key, n in graph.nodes.items()]
    edges = [(need, key) for key in graph.nodes for need in graph.dependencies(key)]
    picture = draw_mermaid(boxes, edges) if suffix == ".mmd" else draw_svg(boxes, edges)
    if path is not None:
        page = f"<!doctype html><meta charset='utf-8'>{picture}" if suffix == ".html" else picture
        Path(path).write_text(page, encoding="utf-8")
    return picture


def _box(node: Node, group: str, output: bool) -> Box:
    op: Any = node.op
    detail = str(getattr(getattr(op, "client", None), "model", None) or "")
    kind = op.kind if node.value is PENDING or op.kind == "prompt" else "data"
    return Box(node.key, op.name, kind, detail, group, output)
