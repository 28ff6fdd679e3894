"""Run the brain on a virtual clock: thousands of runs a minute, all reproducible.

:class:`VirtualClock` drives a :class:`~feste.scheduler.brain.Brain` with an executor that really
calls functions and answers requests (with the backend's own ``answer``), but only simulates their
duration. So a test can check what a policy does in an hour of rate limits.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from feste import context
from feste.backend import Call, OnChunk, Request, Response
from feste.errors import CallError, FesteError
from feste.fused import Halted
from feste.graph import FesteGraph
from feste.optimization import Optimizer
from feste.scheduler.brain import Brain
from feste.scheduler.emission import Emission
from feste.scheduler.executor import Executor, PyTask, Reporter
from feste.scheduler.growth import compile_emission
from feste.scheduler.program import Program
from feste.scheduler.run import Run
from feste.scheduler.work import describe, result_of, run_task
from feste.store.answers import answers_of

__all__ = ["VirtualClock", "VirtualHands"]

Answer = Callable[[Request], Response]
Seconds = Callable[[Any], float]


class VirtualHands(Executor):
    """An executor that works at once and reports later, in virtual time.

    :param clock: the clock.
    :param places: how many chunks may run at once.
    """

    def __init__(self, clock: VirtualClock, places: int) -> None:
        super().__init__()
        self.clock = clock
        self.places = places
        self._begun: dict[int, list[PyTask]] = {}

    def start(self, report: Reporter) -> None:
        """Do nothing: reports go through the clock.

        :param report: unused.
        """

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once.

        :param where: unused; all places are alike.
        """
        return self.places

    def call(self, where: str, chunk: list[PyTask]) -> None:
        """Run a chunk; its tasks end one after the other in virtual time.

        :param where: the place it would run in.
        :param chunk: the tasks.
        """
        self._begun[id(chunk)] = list(chunk)
        self._next(where, chunk)

    def _next(self, where: str, chunk: list[PyTask]) -> None:
        left = self._begun[id(chunk)]
        if not left:
            del self._begun[id(chunk)]
            self.clock.tell(0.0, ("free", self, where, chunk))
            return
        task = left.pop(0)
        if any(type(v) is PyTask and not v.ok for v in task.values):
            self.clock.tell(0.0, ("returned", self, [task, *left]))
            left.clear()
            self._next(where, chunk)
            return
        task.values = [v.result if type(v) is PyTask else v for v in task.values]
        seconds = self.clock.task_seconds(task)
        try:
            value = run_task(task)
            value = result_of(value) if task.stage == "run" else value
            task.ok, task.result = type(value) not in (Emission, Halted), value
            done = ("done", self, task, True, value, seconds)
        except BaseException as error:
            task.ok = False
            done = ("done", self, task, False, describe(error), seconds)
        self.clock.tell(seconds, done, then=lambda: self._next(where, chunk))

    def reclaim(self, chunk: list[PyTask]) -> None:
        """Return the unstarted tasks of a chunk.

        :param chunk: the chunk.
        """
        left = self._begun.get(id(chunk))
        if left:
            self.clock.tell(0.0, ("returned", self, list(left)))
            left.clear()

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Answer a request at a later virtual time.

        :param handle: the brain's number for the request.
        :param call: unused.
        :param request: the request.
        :param on_chunk: unused.
        """
        self.clock.in_flight += 1
        self.clock.peak = max(self.clock.peak, self.clock.in_flight)
        self.clock.sent.append((self.clock.now, request))
        seconds = self.clock.request_seconds(request)
        ok = True
        value: Any = None
        try:
            value = self.clock.answer(request)
        except CallError as error:
            ok, value = False, error

        def landed() -> None:
            self.clock.in_flight -= 1

        self.clock.tell(seconds, ("sent", self, handle, ok, value, seconds), before=landed)

    def cancel(self, handle: int) -> None:
        """Do nothing: the request still ends, and the run ignores it.

        :param handle: the brain's number for the request.
        """

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Report the references themselves, which are values here.

        :param handle: the brain's number for the fetch.
        :param refs: the values.
        """
        self.clock.tell(0.0, ("fetched", self, handle, list(refs)))

    def close(self) -> None:
        """Do nothing."""


class VirtualClock:
    """Drives a brain through virtual time.

    :param answer: answers a request, or raises a :class:`~feste.errors.CallError`.
    :param request_seconds: returns the seconds that a request takes.
    :param task_seconds: returns the seconds that a piece of Python takes.
    :param places: how many chunks of Python may run at once.
    :param seed: the seed of the brain's jitter.
    :param store_seconds: the seconds that a store takes to write or look up something.
    :param brain: the brain; None makes one.

    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> clock = VirtualClock(llm.answer, request_seconds=lambda request: 60.0)
    >>> (reply,) = clock.compute(llm.chat("Hi"))
    >>> clock.now, len(clock.sent)
    (60.0, 1)
    """

    def __init__(
        self,
        answer: Answer,
        *,
        request_seconds: Seconds = lambda request: 1.0,
        task_seconds: Seconds = lambda task: 0.0,
        places: int = 6,
        seed: int = 0,
        store_seconds: float = 0.0,
        brain: Brain | None = None,
    ) -> None:
        self.answer = answer
        self.request_seconds = request_seconds
        self.task_seconds = task_seconds
        self.brain = brain or Brain(seed=seed)
        self.hands = VirtualHands(self, places)
        self.rng = random.Random(seed)
        self.store_seconds = store_seconds
        self.now = 0.0
        self.in_flight = 0
        self.peak = 0
        self.sent: list[tuple[float, Request]] = []
        self._count = itertools.count()
        self._coming: list[tuple[float, int, tuple[Any, ...], Any, Any]] = []

    def tell(
        self,
        seconds: float,
        event: tuple[Any, ...],
        *,
        before: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Schedule an event for the brain.

        :param seconds: the delay in virtual seconds.
        :param event: the event.
        :param before: called just before the event.
        :param then: called just after the event.
        """
        entry = (self.now + seconds, next(self._count), event, before, then)
        heapq.heappush(self._coming, entry)

    def run(self, *args: Any, **settings: Any) -> Run:
        """Make the run of some arguments without starting it.

        :param args: as for :func:`feste.compute`.
        :param settings: as for :func:`feste.compute`.
        """
        chosen = context.settings(**settings)
        graph, _, _ = FesteGraph.collect(*args)
        plan = Optimizer().run(graph, chosen)
        return Run(
            Program(plan.graph, plan.before.nodes, plan.rewrites, self.brain.measured),
            chosen,
            self.hands,
            answers_of(chosen),
        )

    def compute(self, *args: Any, **settings: Any) -> list[Any]:
        """Run some arguments to the end; return a value or an error for each node in them.

        :param args: as for :func:`feste.compute`.
        :param settings: as for :func:`feste.compute`.
        """
        run = self.run(*args, **settings)
        self.tell(0.0, ("submit", run))
        self.drive()
        return run.results()

    def drive(self, until: float | None = None) -> None:
        """Advance the time until nothing more can happen.

        :param until: stop at this virtual time, as if the process were killed then; or None.
        :raises StalledError: if a run had to be ended, because the brain has forgotten something.
        :raises FesteError: if a run has still not ended.
        """
        while self._coming or self.brain.wake_at is not None:
            wake = self.brain.wake_at
            coming = self._coming[0][0] if self._coming else None
            if until is not None and min(t for t in (coming, wake) if t is not None) > until:
                return
            if self._coming and (wake is None or self._coming[0][0] <= wake):
                self.now, _, event, before, then = heapq.heappop(self._coming)
                if before is not None:
                    before()
                self._act(self.brain.on([event], self.now))
                if then is not None:
                    then()
            else:
                assert wake is not None
                self.now = max(self.now, wake)
                self._act(self.brain.on([], self.now))
        if self.brain.runs:
            names = ", ".join(run.name for run in self.brain.runs)
            raise FesteError(f"nothing can happen any more, but not ended: {names}")

    def _act(self, actions: list[tuple[Any, ...]]) -> None:
        for name, *rest in actions:
            if name == "grow":
                run, i, emission = rest
                part = compile_emission(run, i, emission)
                self.tell(0.0, ("grown", run, i, part, emission))
            elif name == "finish":
                rest[0].finish()
                if rest[0].failure is not None:
                    raise rest[0].failure
            elif name == "hand":
                rest[0].outlet.take(tuple(rest[1:]))
            elif name == "ask":
                ticket, question = rest
                told: Future[tuple[bool, Any]] = Future()
                question(then=lambda ok, value, told=told: told.set_result((ok, value)))
                self.tell(self.store_seconds, ("told", ticket, *told.result()))
            elif name not in ("notify", "warn"):
                first, *given = rest
                executor = first.executor if isinstance(first, Run) else first
                getattr(executor, name)(*given)
