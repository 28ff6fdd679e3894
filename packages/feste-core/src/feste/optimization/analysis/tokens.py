"""How many tokens the calls of a plan read and generate: known, likely, or unknown.

A prompt that is known has probably one token for four bytes of text. At most it has one for each
byte of the request, names and brackets included, whatever the language: a budget reserves as many.

Assumptions, where nothing is known: an answer has half as many tokens as it may have, or 256 if it
may have any number; a Python task returns about as much text as it gets, and a task that is given no
node an unknown amount.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from feste.backend import Backend, Call, Params, Request
from feste.backend.request import BYTES_PER_TOKEN, text_bytes
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization.analysis.paths import Paths
from feste.optimization.analysis.ranges import NOTHING, UNKNOWN, Range, total
from feste.optimization.analysis.sketches import HOLE, Sketch, Sketches

__all__ = ["CallEstimate", "bound_of", "count_tokens", "likely_output"]

#: The tokens of an answer without a bound.
USUAL_OUTPUT = 256


def likely_output(bound: int | None) -> int:
    """Return how many tokens an answer probably has.

    :param bound: how many it may have; None if any number.

    >>> likely_output(64), likely_output(None), likely_output(0)
    (32, 256, 0)
    """
    return USUAL_OUTPUT if bound is None else (bound + 1) // 2


def bound_of(node: Node) -> int | None:
    """Return how many tokens a call may generate by its parameters; None if there is no bound.

    :param node: the call.
    """
    bounds = (a.max_output() for a in node.args if isinstance(a, Params))
    return next(bounds, None)


@dataclass(slots=True)
class CallEstimate:
    """What one call will take.

    :param node: the call.
    :param model: its model, as far as it is known.
    :param input: tokens read; none for a draw that shares the prompt of an equal one.
    :param output: tokens generated.
    :param is_known: whether its prompt is known before the run.
    :param cached: how many of the tokens read come from the prompt cache, if all goes well.
    :param written: how many are written to it.
    :param dollars: what they cost; unknown without a price.
    :param is_priced: whether there is a price.
    :param error: why it cannot be prepared, and will fail; else an empty string.
    """

    node: Node
    model: str
    input: Range
    output: Range
    is_known: bool
    cached: int = 0
    written: int = 0
    dollars: Range = UNKNOWN
    is_priced: bool = False
    error: str = ""

    @property
    def client(self) -> Backend:
        """The backend that it asks."""
        call = self.node.call
        assert call is not None, "only calls are estimated"
        return call.client


def count_tokens(graph: FesteGraph, paths: Paths, sketches: Sketches) -> dict[str, CallEstimate]:
    """Return the estimates of all calls that will be answered, by key.

    :param graph: the optimized graph.
    :param paths: its paths.
    :param sketches: the requests of its calls.
    """
    calls: dict[str, CallEstimate] = {}
    nodes = list(graph.nodes.values())
    adds: list[Range] = [NOTHING] * len(nodes)  # by a value that is not known, to what needs it
    for i in paths.order:
        node = nodes[i]
        if node.value is not PENDING:
            continue
        deps = paths.deps[i]
        needs = [nodes[d] for d in deps]
        added = total([adds[d] for d in deps]) if deps else NOTHING
        call = node.call
        if call is not None:
            made = _of_call(node, call, sketches.of(graph, node), needs, added)
            calls[node.key] = made
            adds[i] = Range(0, made.output.likely, made.output.worst)
        elif node.op.kind == "prompt":
            adds[i] = added
        else:
            known = [n.value for n in needs if n.value is not PENDING]
            likely = None if added.likely is None or not deps or node.op.emits else added.likely
            if likely is not None:
                likely += text_bytes(known) // BYTES_PER_TOKEN
            adds[i] = Range(0, likely, None)
    return calls


def _of_call(
    node: Node, call: Call[Any], sketch: Sketch, needs: Sequence[Node], added: Range
) -> CallEstimate:
    is_known = all(need.value is not PENDING for need in needs)
    request = sketch.request
    if request is not None:
        bound, holes = request.max_output, 0
        if not is_known:
            request, holes = _without_holes(request)
            again = holes - len(needs)
            if again > 0 and added.worst is not None:  # a prompt may use a variable twice
                added = Range(added.low, added.likely, added.worst * (1 + again))
        known = Range(request.tokens, request.tokens, request.size)
    else:
        bound = bound_of(node)
        texts = [n.value for n in needs if n.value is not PENDING]
        known = Range.of(-(-text_bytes([*texts, *node.args]) // BYTES_PER_TOKEN))
        added = Range(0, added.likely, None)
    return CallEstimate(
        node,
        call.model(node.args),
        UNKNOWN if sketch.error else known + added,
        Range(1 if bound is None or bound > 0 else 0, likely_output(bound), bound),
        is_known,
        error=sketch.error,
    )


def _without_holes(request: Request) -> tuple[Request, int]:
    """Return a request without its unknown texts, and their number."""
    holes = 0

    def filled(value: Any) -> Any:
        nonlocal holes
        if isinstance(value, str):
            holes += value.count(HOLE)
            return value.replace(HOLE, "")
        if isinstance(value, (list, tuple)):
            return [filled(part) for part in value]
        if isinstance(value, Mapping):
            return {name: filled(part) for name, part in value.items()}
        return value

    return replace(request, body=filled(request.body)), holes
