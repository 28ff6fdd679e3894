"""What a program hands over to be run in parts, and gets back part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from feste import draw
from feste._compute.iterating import Results
from feste._compute.results import errors_of
from feste._compute.steps import make_plan, make_run, program_of, run_elsewhere, start_inputs
from feste.context import Settings
from feste.errors import FesteError, RunFailed
from feste.graph import FesteGraph
from feste.node import Node
from feste.packing import Deps, fill, pack
from feste.report.headway import Course
from feste.scheduler.choice import choose
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor
from feste.scheduler.growth import join_groups
from feste.scheduler.handing import Outlet
from feste.scheduler.run import Run
from feste.scheduler.series import Series
from feste.scheduler.work import describe
from feste.wording import counted

__all__ = ["Item", "Items"]

T = TypeVar("T")

#: The most errors that are kept for the error at the end.
_MOST = 1_000


class Item:
    """Something with nodes in it, and the values of these as far as they are known.

    :param name: what it is handed out with.
    :param value: the thing: a node, a container with nodes, or a plain value.
    :raises GraphError: if a container contains itself.
    """

    __slots__ = ("failed", "missing", "name", "nodes", "packed", "values")

    def __init__(self, name: Any, value: Any) -> None:
        deps = Deps()
        self.packed = pack(value, deps)
        self.name = name
        self.nodes = deps.nodes
        self.values: list[Any] = [None] * len(deps.nodes)
        self.missing = len(deps.nodes)
        self.failed = False


#: What a run's outlet gets with a result: each item that waits for it, and the place in it.
_Places = list[tuple[Item, int]]


class Items(Results[T]):
    """Results that are items whose nodes are run.

    :param settings: the settings of the runs; only ``progress=True`` shows a line, since a loop may
        print, or show its own.
    :param course: what that line shows.
    """

    def __init__(self, settings: Settings, course: Course | None = None) -> None:
        super().__init__(settings, course, progress=settings["progress"] is True)
        self._hands: Any = None
        #: The run that takes in more, or None.
        self._growing: Run | None = None
        #: What its runs count together.
        self._series = Series()
        #: Items of which some node has not ended, and items that failed.
        self._waiting = 0
        self._count_failed = 0
        self._errors: list[FesteError] = []
        #: Nodes made before this one may be needed by later items too, and their values by key.
        self._since = 0
        self._kept: dict[str, Any] = {}

    def _done(self, item: Item, value: Any) -> None:
        """Hand out the value of an item, now or when it is its turn."""
        raise NotImplementedError

    def _dropped(self, item: Item) -> None:
        """Go on without an item that failed."""

    def _run(
        self,
        items: Sequence[Item],
        settings: Settings,
        *,
        grows: bool,
    ) -> None:
        """Add items to the growing run, or begin a new one, which may grow; returns at once."""
        places: dict[int, _Places] = {}
        nodes: list[Node] = []
        for item in items:
            for slot, node in enumerate(item.nodes):
                if id(node) not in places:
                    places[id(node)] = []
                    nodes.append(node)
                places[id(node)].append((item, slot))
            item.nodes = []
        tokens = list(places.values())
        if self._hands is None:
            self._hands = choose(settings)
        plan = make_plan(FesteGraph.of(nodes, scope=draw.scope()), settings, self._hands)
        put = self._mail.put  # so that a run does not keep this iterator alive
        if not isinstance(self._hands, Executor):
            values = run_elsewhere(self._hands, plan, tuple, settings)
            for token, value in zip(tokens, values, strict=True):
                put(([token], True, value))
            return
        program = program_of(plan)
        if grows:
            join_groups(program, settings)
        if self._growing is not None:
            start_inputs(program, self._hands)
            driver().add(self._growing, program, tokens)
            return
        run = make_run(program, settings, self._hands)
        run.series = self._series
        run.outlet = Outlet(put, program, tokens, is_open=grows, since=self._since, kept=self._kept)
        if grows:
            self._growing = run
        self._begin(run)

    def _seal(self) -> None:
        """Let the growing run end, so that all that it holds is freed."""
        if self._growing is not None:
            driver().seal(self._growing)
            self._growing = None

    def _take(self, mail: Any) -> None:
        tokens, ok, value = mail
        for places in tokens:
            for item, slot in places:
                item.values[slot] = value
                item.missing -= 1
                item.failed = item.failed or not ok
                if not item.missing:
                    self._waiting -= 1
                    self._settle(item)

    def _settle(self, item: Item) -> None:
        self._course.items += 1
        try:
            value = fill(item.packed, item.values)
        except Exception as error:  # a container of the user's own, or vectors in a set
            value, item.failed = describe(error), True
            self._errors.append(value)
        self._count_failed += item.failed
        if item.failed and self._settings["on_error"] != "return":
            self._dropped(item)
        else:
            self._done(item, value)

    @property
    def _is_over(self) -> bool:
        return not self._waiting and not self._course.runs

    def _ended(self, run: Run) -> None:
        self._errors += errors_of(run)[: max(0, _MOST - len(self._errors))]
        if run is self._growing:  # it was stopped: by an error, or by its store
            self._growing = None

    def _finish(self) -> None:
        if not self._errors or self._settings["on_error"] == "return":
            return
        failed = counted(self._count_failed, "result")
        told = f"{failed} failed; the others were handed out"
        if self._series.why:
            told = f"{told}; the run was stopped: {self._series.why}"
        report = self._course.before
        raise RunFailed(told, report=report, errors=self._errors) from self._errors[0]
