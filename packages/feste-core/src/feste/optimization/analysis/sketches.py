"""The requests of calls as far as they are known before the run.

Requests are data, and preparing one is free. So a plan looks at the very requests that will be sent,
with a mark in each place where an input is not known yet.
"""

from __future__ import annotations

import operator
import weakref
from dataclasses import dataclass, replace
from typing import Any

from feste.backend import Request
from feste.draw import Determinism
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.packing import fill
from feste.prompt.segments import known_and_unknown, segments_of

__all__ = ["HOLE", "Sketch", "Sketches"]

#: Stands in a request for a text that is not known. No user's text holds this.
HOLE = "\ufdd0"


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is known of a call's request.

    :param request: the request, with :data:`HOLE` for each unknown text; None if it cannot be
        prepared, because of an error that the run will report, or since more than texts is unknown.
    :param unknown: the keys of the nodes whose values are not known, without prompts: what these are
        made of counts.
    :param error: why it will fail, if that is sure; else an empty string.
    """

    request: Request | None
    unknown: tuple[str, ...] = ()
    error: str = ""


class Sketches:
    """The sketches of calls, each made once: passes and explanations share them."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[Node, tuple[Any, Sketch]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, graph: FesteGraph, node: Node) -> Sketch:
        """Return the sketch of a call.

        :param graph: the graph.
        :param node: the call.
        """
        needs = [graph.nodes[key] for key in graph.dependencies(node.key)]
        made = self._made.get(node)
        if made is not None and all(map(operator.is_, made[0], needs)):
            return made[1]
        sketch = _sketch(graph, node, needs)
        self._made[node] = needs, sketch
        return sketch


def _sketch(graph: FesteGraph, node: Node, needs: list[Node]) -> Sketch:
    unknown: dict[str, None] = {}
    values = []
    error = ""
    for need in needs:
        if need.value is not PENDING:
            values.append(need.value)
        elif need.op.kind == "prompt":
            values.append(_text(need))
            sources, failure = _sources(graph, need)
            unknown.update(dict.fromkeys(sources))
            error = error or failure
        else:
            values.append(HOLE)
            unknown[need.key] = None
    call = node.call
    assert call is not None, "only calls have requests"
    if error:
        return Sketch(None, tuple(unknown), error)
    try:
        request: Request = call.prepare([fill(argument, values) for argument in node.args])
    except Exception as wrong:  # the run raises it again and applies on_error
        is_known = all(need.value is not PENDING for need in needs)  # else a mark may be wrong
        return Sketch(None, tuple(unknown), _told(wrong) if is_known else "")
    if not isinstance(request.max_output, (int, type(None))):  # it is not known yet
        request = replace(request, max_output=None)
    return Sketch(request, tuple(unknown))


def _failure(prompt: Node) -> str:
    """Return why a prompt cannot be rendered, if all of its variables are known."""
    if prompt.determinism is not Determinism.PURE or known_and_unknown(prompt)[1]:
        return ""
    op: Any = prompt.op
    try:
        op.fn(**prompt.kwargs)
    except Exception as wrong:
        return _told(wrong)
    return ""


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _text(prompt: Node) -> Any:
    """Return what is known of a prompt's text, or of its messages."""
    texts = [
        "".join(part if isinstance(part, str) else HOLE for part in m) for m in segments_of(prompt)
    ]
    op: Any = prompt.op
    if not op.roles:
        return texts[0]
    return [{"role": role, "content": text} for role, text in zip(op.roles, texts, strict=True)]


def _sources(graph: FesteGraph, prompt: Node) -> tuple[list[str], str]:
    """Return the keys of the unknown nodes that a prompt is made of, through other prompts.

    :returns: the keys; and why it, or one of these prompts, cannot be rendered, if that is sure.
    """
    found: list[str] = []
    error = _failure(prompt)
    stack = [prompt.key]
    seen = set(stack)
    while stack:
        for key in graph.dependencies(stack.pop()):
            need = graph.nodes[key]
            if key in seen or need.value is not PENDING:
                continue
            seen.add(key)
            if need.op.kind == "prompt":
                stack.append(key)
                error = error or _failure(need)
            else:
                found.append(key)
    return found, error
