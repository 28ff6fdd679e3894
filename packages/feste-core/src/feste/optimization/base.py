"""The interface of optimization passes: levels, phases, remarks, the account of calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal, Protocol, TypeVar, runtime_checkable

from feste.context import Settings
from feste.errors import PluginError
from feste.graph import FesteGraph
from feste.node import Node
from feste.optimization.analysis.sketches import Sketches

__all__ = [
    "Level",
    "Optimization",
    "PassContext",
    "Phase",
    "Remark",
    "check_pass",
    "level_of",
    "names_of",
    "phase_of",
]

E = TypeVar("E", bound=Enum)


class Level(Enum):
    """The guarantee of a pass; see the guide for pass authors."""

    E0 = "exact"
    """The same logical calls reach the backend; only grouping, order and timing differ."""
    E1 = "distribution"
    """The joint distribution of all outputs is unchanged."""
    E1G = "greedy"
    """E1, and equal GREEDY calls may be answered by one request."""
    E2 = "task"
    """Outputs may differ. Such a pass runs only if the user names it."""


class Phase(IntEnum):
    """When a pass runs."""

    NORMALIZE = 0
    SIMPLIFY = 1
    """Repeated until nothing changes."""
    REWRITE = 2
    """Only passes of level E2."""
    PHYSICAL = 3
    """Decides how calls become requests."""
    SCHEDULE = 4


@runtime_checkable
class Optimization(Protocol):
    """The interface of an optimization pass; only ``name`` and ``apply`` are required.

    Optional attributes: ``level`` (a :class:`Level`, default E0), ``phase`` (a :class:`Phase`,
    default SIMPLIFY; of level E2 always REWRITE), ``before`` and ``after`` (names of passes of the
    same phase).

    >>> class Nothing:
    ...     name = "nothing"
    ...     def apply(self, graph, cx):
    ...         return graph
    >>> isinstance(Nothing(), Optimization)
    True
    """

    name: str

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return a new graph, or the same object if nothing changed.

        :param graph: the graph; it must not be changed in place.
        :param cx: receives remarks and the account of every call that is dropped.
        """


@dataclass(frozen=True, slots=True)
class Remark:
    """What a pass did, or why it did not.

    :param kind: ``"applied"``, ``"missed"`` or ``"advice"``.
    :param text: one sentence.
    :param count: the number of nodes concerned.
    :param origins: ``file:line`` of the first few of them.
    """

    kind: Literal["applied", "missed", "advice"]
    text: str
    count: int = 1
    origins: tuple[str, ...] = ()


@dataclass(slots=True)
class PassContext:
    """The context of a pass: settings, remarks, the account of calls, and the count of rewrites.

    :param settings: the settings of the run.
    :param left: how many rewrites may still be made; None is no limit.
    :param sketches: the requests of calls as far as they are known, shared by all passes.

    >>> from feste import context
    >>> cx = PassContext(context.settings(), left=1)
    >>> cx.missed("2 calls could share a request if their seeds were equal")
    >>> cx.account(["chat-1"], "dropped: its prompt is empty")
    >>> cx.remarks[0].kind, cx.accounted
    ('missed', {'chat-1': 'dropped: its prompt is empty'})
    >>> cx.allow(), cx.allow(), cx.rewrites
    (True, False, 1)
    """

    settings: Settings
    left: int | None = None
    sketches: Sketches = field(default_factory=Sketches, repr=False)
    remarks: list[Remark] = field(default_factory=list)
    accounted: dict[str, str] = field(default_factory=dict)
    rewrites: int = 0

    def allow(self) -> bool:
        """Count one rewrite, and return whether it may be made.

        A pass that asks before each of its rewrites can be cut off after any of them by the setting
        ``max_rewrites``; one that never asks counts as one rewrite.
        """
        if self.left is not None and self.rewrites >= self.left:
            return False
        self.rewrites += 1
        return True

    def applied(self, text: str, nodes: Sequence[Node] = ()) -> None:
        """Add a remark on a change that was made.

        :param text: one sentence.
        :param nodes: the changed nodes.
        """
        self._remark("applied", text, nodes)

    def missed(self, text: str, nodes: Sequence[Node] = ()) -> None:
        """Add a remark on a change that was not made, and why.

        :param text: one sentence.
        :param nodes: the nodes concerned.
        """
        self._remark("missed", text, nodes)

    def advice(self, text: str, nodes: Sequence[Node] = ()) -> None:
        """Add a remark on what the user could change to gain more.

        :param text: one sentence.
        :param nodes: the nodes concerned.
        """
        self._remark("advice", text, nodes)

    def account(self, keys: Iterable[str], how: str) -> None:
        """Record what happened to calls that are no longer in the graph.

        Merged calls account for themselves: their aliases say what stands for them.

        :param keys: their keys.
        :param how: for example ``"dropped: no output needs it"``.
        """
        if not isinstance(how, str):
            raise TypeError(f"cx.account() takes a text that says how, not {how!r}")
        for key in keys:
            self.accounted[key] = how

    def _remark(
        self, kind: Literal["applied", "missed", "advice"], text: str, nodes: Sequence[Node]
    ) -> None:
        if not isinstance(text, str):
            raise TypeError(f"cx.{kind}() takes a text, not {text!r}")
        origins = tuple(dict.fromkeys(n.where for n in nodes[:50]))[:3]
        self.remarks.append(Remark(kind, text, max(1, len(nodes)), tuple(o for o in origins if o)))


def phase_of(one: Optimization) -> Phase:
    """Return the phase of a pass.

    :param one: the pass.
    :raises PluginError: if it states something else than a phase, or one that its level forbids.
    """
    changes = level_of(one) is Level.E2
    phase = _member(one, "phase", Phase.REWRITE if changes else Phase.SIMPLIFY)
    if (phase is Phase.REWRITE) is not changes:
        raise PluginError(
            f"pass {one.name!r}: level {level_of(one).name} in phase {phase.name}: passes of level E2 run "
            "in REWRITE, and no others"
        )
    return phase


def level_of(one: Optimization) -> Level:
    """Return the guarantee of a pass.

    :param one: the pass.
    :raises PluginError: if it states something else than a level.
    """
    return _member(one, "level", Level.E0)


def names_of(one: Optimization, attribute: str) -> tuple[str, ...]:
    """Return the names of passes that a pass gives: one, or several.

    :param one: the pass.
    :param attribute: ``"before"`` or ``"after"``.
    :raises PluginError: if it states something else than names.
    """
    given: object = getattr(one, attribute, ())
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
        raise PluginError(f"pass {one.name!r}: {attribute}={given!r} holds no names of passes")
    return tuple(names)


def check_pass(one: Optimization) -> None:
    """Check what a pass states of itself.

    :param one: the pass.
    :raises PluginError: if its level, phase, ``before`` or ``after`` is none; the message names it.
    """
    phase_of(one)
    names_of(one, "before")
    names_of(one, "after")


def _member(one: Optimization, attribute: str, default: E) -> E:
    given = getattr(one, attribute, default)
    if not isinstance(given, type(default)):
        kind = type(default).__name__
        raise PluginError(f"pass {one.name!r}: {attribute}={given!r} is no {kind}")
    return given
