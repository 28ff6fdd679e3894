"""The optimizer: collects the passes, orders and applies them, and checks their results."""

from __future__ import annotations

import graphlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from feste import blocking, context
from feste.context import Settings
from feste.errors import PluginError, PluginWarning, UnknownName, suggest
from feste.garbage import no_collection
from feste.graph import FesteGraph
from feste.optimization import rules
from feste.optimization.analysis.sketches import Sketches
from feste.optimization.base import (
    Level,
    Optimization,
    PassContext,
    Phase,
    Remark,
    level_of,
    names_of,
    phase_of,
)
from feste.optimization.invariants import check
from feste.plugins import registry
from feste.wording import printable

__all__ = ["Optimizer", "PassReport", "Plan"]

_MAX_ROUNDS = 8
_SKIPPED = "skipped: "


@dataclass(slots=True)
class PassReport:
    """What one pass did in one run of the optimizer.

    :param name: the pass.
    :param phase: its phase.
    :param level: its level.
    :param remarks: its remarks.
    :param changed: how many times it changed the graph.
    :param rewrites: how many rewrites it made.
    :param numbers: the numbers of its rewrites, first and last of each time that it made some: those
        that the setting ``max_rewrites`` counts.
    """

    name: str
    phase: Phase
    level: Level
    remarks: list[Remark] = field(default_factory=list)
    changed: int = 0
    rewrites: int = 0
    numbers: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """An optimized graph, and the record of how it was made.

    :param graph: the graph to run.
    :param before: the graph as it was built.
    :param passes: the report of each pass in running order, idle ones included.
    :param accounted: what happened to calls that are no longer in the graph, by key.
    :param sketches: the requests of calls as far as they are known.

    >>> from feste.graph import FesteGraph
    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> graph, _, _ = FesteGraph.collect([llm.embed("same"), llm.embed("same")])
    >>> plan = Optimizer().run(graph)
    >>> len(plan.before.nodes), len(plan.graph.nodes), [p.name for p in plan.passes if p.changed]
    (2, 1, ['cse'])
    """

    graph: FesteGraph
    before: FesteGraph
    passes: list[PassReport] = field(default_factory=list)
    accounted: dict[str, str] = field(default_factory=dict)
    sketches: Sketches = field(default_factory=Sketches, repr=False)

    @property
    def rewrites(self) -> int:
        """How many rewrites were made: the count that the setting ``max_rewrites`` limits."""
        return sum(report.rewrites for report in self.passes)


def is_enabled(name: str, optimize: bool | Mapping[str, bool], level: Level = Level.E0) -> bool:
    """Return whether a setting ``optimize`` lets a pass run; those of level E2 must be named.

    :param name: the pass.
    :param optimize: the setting.
    :param level: the pass's level.

    >>> is_enabled("cse", {"batch": False}), is_enabled("cse", False)
    (True, False)
    """
    default = optimize is not False and level is not Level.E2
    return default if isinstance(optimize, bool) else optimize.get(name, default)


class Optimizer:
    """Applies passes in a fixed order: by phase, then ``before`` and ``after``, then name.

    :param passes: the passes; None uses all registered ones, including Feste's own.
    :raises PluginError: if two have the same name, or ``before`` and ``after`` contradict each
        other; of registered ones, :meth:`run` tells that, unless it leaves one of these out.

    >>> " ".join(p.name for p in Optimizer().passes)
    'cull fold cse resolve fuse sample_fusion batch prefix critical_path lint'
    """

    def __init__(self, passes: Iterable[Optimization] | None = None) -> None:
        given = list(registry().optimizations.values() if passes is None else passes)
        names = Counter(p.name for p in given)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise PluginError(f"two passes have the name {twice[0]!r}")
        self._is_ordered = True
        try:
            self.passes = _ordered(given)
        except PluginError:
            if passes is not None:
                raise
            self.passes, self._is_ordered = given, False

    @no_collection()
    def run(self, graph: FesteGraph, settings: Settings | None = None) -> Plan:
        """Optimize a graph and return the plan.

        :param graph: the graph as it was built.
        :param settings: the settings of the run; ``optimize``, ``max_rewrites`` and ``strict`` apply
            here.
        :raises UnknownName: if ``optimize`` names an unknown pass.
        :raises PluginError: in strict mode, if a pass breaks the rules; or if ``before`` and ``after``
            of passes that are on contradict each other.
        """
        settings = settings or context.settings()
        with context.within(context.everywhere(settings)):
            return self._run(graph, settings)

    def _run(self, graph: FesteGraph, settings: Settings) -> Plan:
        switches = self._switches(settings["optimize"])
        plan = Plan(graph, graph)
        on = [one for one in self.passes if switches[one.name]]
        if not self._is_ordered:
            on = _ordered(on)
        chosen = {p: [one for one in on if phase_of(one) is p] for p in Phase}
        plan.passes = [PassReport(one.name, phase_of(one), level_of(one)) for one in on]
        reports = {report.name: report for report in plan.passes}

        def go(phase: Phase) -> None:
            for one in chosen[phase]:
                self._apply(one, plan, reports[one.name], settings)

        def simplify() -> None:
            for _ in range(_MAX_ROUNDS):
                before, counts = plan.graph, {r.name: r.changed for r in plan.passes}
                go(Phase.SIMPLIFY)
                if plan.graph is before:
                    return
            told = Remark("missed", f"stopped after {_MAX_ROUNDS} rounds, each with another change")
            for report in plan.passes:
                if report.changed > counts[report.name] and told not in report.remarks:
                    report.remarks.append(told)

        go(Phase.NORMALIZE)
        simplify()
        before = plan.graph
        go(Phase.REWRITE)
        if plan.graph is not before:
            simplify()
        go(Phase.PHYSICAL)
        go(Phase.SCHEDULE)
        return plan

    def _switches(self, optimize: bool | Mapping[str, bool]) -> dict[str, bool]:
        known = {p.name for p in self.passes}
        if isinstance(optimize, bool):
            optimize = {} if optimize else dict.fromkeys(known, False)
        for name in optimize:
            if name not in known:
                raise UnknownName(f"optimize: no pass {name!r}.{suggest(name, known)}")
        return {p.name: is_enabled(p.name, optimize, level_of(p)) for p in self.passes}

    def _apply(self, one: Optimization, plan: Plan, report: PassReport, settings: Settings) -> None:
        most: int | None = settings["max_rewrites"]
        left = None if most is None else max(0, most - plan.rewrites)
        cx = PassContext(settings, left, plan.sketches)
        own = type(one).__module__.startswith("feste.optimization.")
        checked = settings["strict"] or not own
        known = set[str]()
        if checked:
            known = {key for key, n in plan.graph.nodes.items() if not rules.is_open(n)}
        try:
            with blocking.inside("pass"):
                graph = one.apply(plan.graph, cx)
            if graph is not plan.graph:
                cx.rewrites = cx.rewrites or 1  # a pass that did not ask
                if cx.left is not None and cx.rewrites > cx.left:
                    return
                if checked:
                    check(one, plan.graph, graph, cx, known)
        except Exception as error:  # a pass may raise anything; the previous graph is still valid
            if settings["strict"]:
                error.add_note(f"raised by the optimization pass {one.name!r}")
                raise
            skipped = Remark("missed", f"{_SKIPPED}{type(error).__name__}: {error}")
            if skipped not in report.remarks:  # a repeated pass fails again
                report.remarks.append(skipped)
                warnings.warn(
                    f"the optimization pass {one.name!r} was {printable(skipped.text)}. Its author "
                    "sees where with strict=True; optimize={" + f"{one.name!r}: False" + "} leaves "
                    "it out",
                    PluginWarning,
                    stacklevel=2,
                )
            return
        # what was done adds up over the rounds; what was not is said of the graph as it is now
        kept = [
            r
            for r in report.remarks
            if r.kind == "applied" or r.text.startswith(_SKIPPED) or r in cx.remarks
        ]
        report.remarks = [*kept, *(r for r in cx.remarks if r not in kept)]
        if graph is not plan.graph:
            report.changed += 1
            report.numbers.append((plan.rewrites + 1, plan.rewrites + cx.rewrites))
            report.rewrites += cx.rewrites
            plan.accounted.update(cx.accounted)
            for node in plan.graph.calls():
                if node.key in graph.aliases:
                    plan.accounted[node.key] = f"merged into {graph.resolve(node.key)}"
            plan.graph = graph


def _ordered(passes: list[Optimization]) -> list[Optimization]:
    ordered: list[Optimization] = []
    for phase in Phase:
        named = {p.name: p for p in passes if phase_of(p) is phase}
        after = {name: {n for n in names_of(p, "after") if n in named} for name, p in named.items()}
        for name, p in named.items():
            for later in names_of(p, "before"):
                if later in named:
                    after[later].add(name)
        sorter = graphlib.TopologicalSorter(after)
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            raise PluginError(
                f"the order of passes contradicts itself: {' -> '.join(error.args[1])}"
                f"{_whose(error.args[1])}"
            ) from None
        ready = sorted(sorter.get_ready())
        while ready:
            name = ready.pop(0)
            ordered.append(named[name])
            sorter.done(name)
            ready = sorted([*ready, *sorter.get_ready()])
    return ordered


def _whose(names: Iterable[str]) -> str:
    """Return whose passes contradict each other, and what to do, as far as plugins offer them."""
    found = {name: registry().plugin_of("optimizations", name) for name in names}
    others = {n: p for n, p in found.items() if p is not None and p.distribution != "feste-core"}
    if not others:
        return ""
    told = ", ".join(f"{name} is of {plugin.origin}" for name, plugin in others.items())
    name, plugin = next(iter(others.items()))
    return (
        f". {told}. Set FESTE_DISABLED_PLUGINS={plugin.name}, or leave a pass out: "
        f"optimize={{{name!r}: False}}"
    )
