"""Tell users what they could change in their program to gain more; nothing is rewritten."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from feste.backend import Params
from feste.backend.profile import profile_of
from feste.backend.request import BYTES_PER_TOKEN
from feste.graph import FesteGraph
from feste.node import Node
from feste.optimization import rules
from feste.optimization.base import Level, PassContext, Phase
from feste.packing import Nested, Slot
from feste.prompt.operation import PromptOp
from feste.prompt.segments import Evaluator, Hole
from feste.wording import counted

__all__ = ["LintOptimization"]

#: How many shared tokens behind a changing part are worth a remark: providers cache no fewer.
LONG = 1024

Found = tuple[str, Sequence[Node]]
"""A piece of advice, and the nodes that it is about."""


class LintOptimization:
    """Give advice with ``file:line``, where a change of the program would save requests or tokens."""

    name = "lint"
    level = Level.E0
    phase = Phase.SCHEDULE

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the same graph.

        :param graph: the graph.
        :param cx: receives the advice.
        """
        for lint in (late_constants, equal_draws, almost_equal_parameters, mixed_languages):
            for text, nodes in lint(graph):
                cx.advice(text, nodes)
        return graph


def late_constants(graph: FesteGraph) -> Iterator[Found]:
    """Find prompts in which a changing part stands before a long text that they all share.

    A provider's prompt cache serves only the beginnings of prompts.

    :param graph: the graph.
    """
    least: dict[str, int] = {}  # for each prompt the shortest prefix that its call's cache takes
    for node in graph.calls():
        call = node.call
        if call is not None and call.operation.prefix is not None:
            cache = profile_of(call.client, call.model(node.args)).prompt_cache
            shortest = LONG if cache is None else cache.minimum
            least.update((graph.resolve(dep.key), shortest) for dep in node.deps)
    alike: dict[tuple[int, Hashable], list[Node]] = {}
    for key in least:
        node = graph.nodes[key]
        op: Any = node.op
        if rules.is_renderable(node):
            same = tuple((t.source, t.language, id(t.environment)) for t in op.templates)
            alike.setdefault((least[key], same), []).append(node)
    for (shortest, _), nodes in alike.items():
        if len(nodes) == 1:
            continue
        names, tokens = _late(nodes)
        if tokens >= shortest:
            yield (
                f"{' and '.join(map(repr, names))} changes from prompt to prompt and stands before "
                f"~{tokens:,} tokens that {len(nodes):,} prompts share: with these first, a prompt cache "
                "could serve them",
                nodes,
            )


def _late(nodes: Sequence[Node]) -> tuple[list[str], int]:
    """Return the variables in the first changing part of some prompts, and the tokens shared after it."""
    op: Any = nodes[0].op
    given = [{**getattr(node.op, "known", {}), **node.kwargs} for node in nodes]
    first = given[0]
    if any(values.keys() != first.keys() for values in given):
        return [], 0
    same = {
        name: value
        for name, value in first.items()
        if not isinstance(value, (Slot, Nested)) and all(value == v[name] for v in given)
    }
    whole = PromptOp(op.templates, op.roles, op.language)
    changing = frozenset(first.keys() - same.keys())
    parts = [
        part
        for segments in Evaluator().partial(whole, same, changing).segments(changing)
        for part in segments
    ]
    holes = [i for i, part in enumerate(parts) if isinstance(part, Hole)]
    if not holes:
        return [], 0
    hole = parts[holes[0]]
    assert isinstance(hole, Hole)
    late = sum(len(part) for part in parts[holes[0] + 1 :] if isinstance(part, str))
    return sorted(hole.names), late // BYTES_PER_TOKEN


def equal_draws(graph: FesteGraph) -> Iterator[Found]:
    """Find equal SAMPLE calls on different lines: one line in a loop asks for several draws.

    :param graph: the graph.
    """
    equal: dict[Hashable, list[Node]] = {}
    for node in graph.calls():
        if rules.is_draw(node):
            equal.setdefault(rules.expression(graph, node), []).append(node)
    for nodes in equal.values():
        if len({node.origin for node in nodes}) == 1:
            continue
        first_of = {node.where: node for node in reversed(nodes)}
        if len(first_of) > 1:
            places = list(reversed(first_of.values()))
            yield (
                f"equal calls of {nodes[0].op.name} on different lines are {len(nodes):,} answers: if "
                "one is meant, use the same node twice (temperature=0 makes equal calls one, too)",
                places,
            )


def almost_equal_parameters(graph: FesteGraph) -> Iterator[Found]:
    """Find calls that would share requests if one parameter were equal.

    :param graph: the graph.
    """
    found: dict[Hashable, dict[Hashable, tuple[Mapping[str, Any], list[Node]]]] = {}
    for node in graph.calls():
        call = node.call
        if call is None or not rules.takes_lists(call) or rules.is_visible(node):
            continue
        if not rules.may_share(node):  # a seed of one's own is no obstacle that goes away
            continue
        own = [argument for argument in node.args if isinstance(argument, Params)]
        if len(own) != 1 or rules.parameters(node) is None:
            continue
        together = (rules.operation(node), rules.ready_event(graph, node))
        body = own[0].body()
        sets = found.setdefault(together, {})
        sets.setdefault(rules.exact(body), (body, []))[1].append(node)
    for sets in found.values():
        if len(sets) > 1:
            yield from _differ_in_one(list(sets.values()))


def _differ_in_one(sets: Sequence[tuple[Mapping[str, Any], list[Node]]]) -> Iterator[Found]:
    """Find the parameters without which several sets of parameters would be one."""
    for name in sorted({name for body, _ in sets for name in body}):
        rest: dict[Hashable, list[tuple[Any, list[Node]]]] = {}
        for body, nodes in sets:
            others = {key: value for key, value in body.items() if key != name}
            rest.setdefault(rules.exact(others), []).append((body.get(name), nodes))
        for alike in rest.values():
            if len(alike) < 2:
                continue
            nodes = [node for _, some in alike for node in some]
            values = [repr(value) for value in sorted((v for v, _ in alike), key=_numbers_first)]
            shown = ", ".join(values[:3]) + (", ..." if len(values) > 3 else "")
            yield (
                f"{counted(len(nodes), 'call')} of {nodes[0].op.name} could share requests if {name} were "
                f"equal (it is {shown})",
                [some[0] for _, some in alike],
            )


def _numbers_first(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, (int, float))
    return (not is_number, value if is_number else 0, repr(value))


def mixed_languages(graph: FesteGraph) -> Iterator[Found]:
    """Find prompts that are given answers which were asked for in another language.

    :param graph: the graph.
    """
    spoken: dict[str, frozenset[str]] = {}
    found: dict[tuple[str, str], list[Node]] = {}
    for key in graph.order():
        node = graph.nodes[key]
        given = [spoken.get(need, frozenset()) for need in graph.dependencies(key)]
        heard = given[0] if len(given) == 1 else frozenset[str]().union(*given)
        if node.op.kind != "prompt":
            spoken[key] = heard
            continue
        op: Any = node.op
        own: str = op.language
        spoken[key] = frozenset((own,))
        for other in sorted(heard - {own}):
            found.setdefault((own, other), []).append(node)
    for (own, other), nodes in found.items():
        are = "is" if len(nodes) == 1 else "are"
        yield (
            f"{counted(len(nodes), 'prompt')} in {own!r} {are} given answers to prompts in {other!r}",
            nodes,
        )
