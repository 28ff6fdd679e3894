"""The brain decides what happens next. It is a plain state machine without I/O, clock or threads.

``on(events, now)`` takes events and returns actions; the driver executes the actions and reports
the outcomes as new events. Both are tuples that start with a name:

.. code-block:: text

    events    ("submit", run)                                 a new run
              ("added", run, program, tokens) more nodes for a run that is open for more
              ("sealed", run)                 nothing more will be added
              ("stop", run, grace)                            stop it; requests get `grace` seconds
              ("grown", run, i, program, emission)            a task's returned nodes, compiled
              ("done", executor, task, ok, value, seconds, worker)    a piece of Python ended
              ("done_together", executor, outcomes)           several pieces of Python ended
              ("returned", executor, tasks)                   tasks of a chunk were not started
              ("free", executor, where, chunk)                a chunk has finished
              ("sent", executor, handle, ok, value, seconds, worker)  a request ended
              ("fetched", executor, handle, values)           remote values arrived
              ("capacity", executor, where)                   an executor's capacity changed
              ("started", executor)                           an executor is new, or started again
              ("broken", executor, error)                     an executor can do no more work
              ("fault", executor, error)      an executor did what no executor may
              ("told", ticket, ok, value)                     a store did what it was asked
    actions   ("call", executor, where, chunk)   ("reclaim", executor, chunk)
              ("send", run, handle, call, request, on_chunk)
              ("cancel", executor, handle)   ("abandon", executor, chunk)
              ("fetch", executor, handle, refs)   ("release", executor, ref)
              ("grow", run, i, emission)   ("notify", run, event)   ("finish", run)
              ("hand", run, tokens, ok, value)    a result for the run's outlet
              ("ask", ticket, question)    ask a store; `question` takes what receives the outcome
              ("warn", error)              tell of a fault that no run is there to tell of

States of a call's node: WAITING for inputs, READY, PREPARING its request, GATHERED until its batch
is complete, QUEUED at the gate, SENT, PARSING, DONE. Of a task: WAITING, READY, RUNNING, DONE.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from feste import draw
from feste.errors import FesteError, Interrupted, NotStarted, StalledError
from feste.events import RunFinished, RunStarted
from feste.node import Node
from feste.scheduler.accounts import Accounts
from feste.scheduler.admission.deadlines import Deadlines
from feste.scheduler.admission.gates import Gates
from feste.scheduler.admission.outages import Outages
from feste.scheduler.admission.prefixes import Prefixes
from feste.scheduler.admission.retry import RetryPolicy
from feste.scheduler.admission.spending import Spending
from feste.scheduler.admission.windows import Windows
from feste.scheduler.attempts import Attempts
from feste.scheduler.batching.flights import Flights
from feste.scheduler.batching.groups import Groups
from feste.scheduler.batching.lists import Lists
from feste.scheduler.calls import Calls
from feste.scheduler.dispatcher import Dispatcher
from feste.scheduler.executor import Executor
from feste.scheduler.fallbacks import Fallbacks
from feste.scheduler.faults import Questions, misled
from feste.scheduler.growth import Growth
from feste.scheduler.handing import Handing
from feste.scheduler.joins import Joins
from feste.scheduler.journaling import Journaling
from feste.scheduler.latencies import Durations, Latencies
from feste.scheduler.lifecycle import Lifecycle
from feste.scheduler.nesting import Nesting
from feste.scheduler.run import Run
from feste.scheduler.stalls import Stalls
from feste.scheduler.states import (
    GATHERED,
    INTERRUPTED,
    JOINED,
    NOT_STARTED,
    OPEN,
    PARSING,
    QUEUED,
    READY,
    SENT,
    VALUED,
    WAITING,
)
from feste.scheduler.waits import Waits

__all__ = ["Brain"]

#: Seconds that answers may take to be parsed when their run is interrupted.
_PARSING = 1.0

#: The events that executors report.
_REPORTS = frozenset(
    ("done", "done_together", "returned", "free", "sent", "fetched", "capacity", "broken", "fault")
)

Event = tuple[Any, ...]
Action = tuple[Any, ...]


class Brain:
    """The state machine over all runs of the process and the gates they share.

    :param policy: decides whether and when a failed request is sent again.
    :param seed: the seed of the retry jitter.
    """

    def __init__(self, policy: RetryPolicy | None = None, seed: int | None = None) -> None:
        self.runs: list[Run] = []
        self.fetches: dict[int, tuple[Run, list[int]]] = {}
        #: The executors that can do no more work, and why.
        self.broken: WeakKeyDictionary[Executor, FesteError] = WeakKeyDictionary()
        #: What each last did that no executor may.
        self._faults: WeakKeyDictionary[Executor, str] = WeakKeyDictionary()
        self.timers: list[tuple[float, int, Callable[[float], None]]] = []
        #: The numbers of timers that are wanted no more.
        self._dropped: set[int] = set()
        self.now = 0.0
        self._count = itertools.count(1)
        self._actions: list[Action] = []
        self.questions = Questions(self)
        self.waits = Waits(self)
        self.accounts = Accounts(self)
        self.lifecycle = Lifecycle(self)
        self.joins = Joins(self)
        self.dispatcher = Dispatcher(self)
        self.growth = Growth(self)
        self.handing = Handing(self)
        self.stalls = Stalls(self)
        self.nesting = Nesting(self)
        self.latencies = Latencies()
        self.durations = Durations()
        self.groups = Groups(self)
        self.flights = Flights(self)
        self.lists = Lists(self)
        self.prefixes = Prefixes(self)
        self.journaling = Journaling(self)
        self.outages = Outages(self)
        self.spending = Spending(self)
        self.deadlines = Deadlines(self)
        self.fallbacks = Fallbacks(self)
        self.gates = Gates(self)
        self.windows = Windows(self)
        self.attempts = Attempts(self, policy or RetryPolicy(), random.Random(seed))
        self.calls = Calls(self)
        self._handlers: dict[str, Callable[..., None]] = {
            "submit": self._on_submit,
            "added": self.handing.on_added,
            "sealed": self.handing.on_sealed,
            "stop": self.cancel,
            "grown": self.growth.on_grown,
            "done": self.dispatcher.on_done,
            "done_together": self._on_done_together,
            "returned": self.dispatcher.on_returned,
            "free": self.dispatcher.on_free,
            "sent": self.attempts.on_sent,
            "fetched": self._on_fetched,
            "capacity": self._on_capacity,
            "started": self._on_started,
            "broken": self._on_broken,
            "fault": self.on_fault,
            "told": self.journaling.on_told,
        }
        self.stages: dict[str, Callable[..., None]] = {
            "run": self.dispatcher.on_ran,
            "prepare": self.calls.on_prepared,
            "look ahead": self.fallbacks.on_prepared,
            "pack": self.lists.on_packed,
            "shorten": self.lists.on_shortened,
            "unpack": self.lists.on_unpacked,
            "parse": self.calls.on_parsed,
        }

    # --- events in, actions out -------------------------------------------------------------------

    def on(self, events: Iterable[Event], now: float) -> list[Action]:
        """Process events and return the actions to execute.

        :param events: the events, oldest first.
        :param now: the time in seconds, on any clock that never goes back.
        """
        self.now = now
        for event in events:
            self._handle(*event)
        while (wake_at := self.wake_at) is not None and wake_at <= now:
            heapq.heappop(self.timers)[2](now)
        self.journaling.flush()
        self.groups.decide()
        self.gates.admit()
        self.fallbacks.flush()
        self.dispatcher.hand_out()
        self.stalls.watch()
        actions, self._actions = self._actions, []
        return actions

    def _handle(self, name: str, *given: Any) -> None:
        """Process an event; a report that cannot be processed costs the runs of its executor only."""
        try:
            self._handlers[name](*given)
        except BaseException as error:  # the values that are reported may raise anything
            told = misled(given[0], name, error) if name in _REPORTS else None
            if told is None or self.lifecycle.is_settling:  # a bug in Feste itself
                raise
            self.on_fault(given[0], told)
            if name == "fetched":
                self._lose_fetches(given[0], told)

    @property
    def wake_at(self) -> float | None:
        """The time at which :meth:`on` must be called again at the latest, on the brain's clock."""
        self._forget_timers()
        return self.timers[0][0] if self.timers else None

    def act(self, *action: Any) -> None:
        """Queue an action.

        :param action: the name and arguments of the action.
        """
        self._actions.append(action)

    def number(self) -> int:
        """Return a number that was not returned before."""
        return next(self._count)

    def later(self, seconds: float, what: Callable[[float], None]) -> int:
        """Schedule a function; return the number of its timer, for :meth:`drop_timer`.

        :param seconds: the delay in seconds.
        :param what: is called with the current time.
        """
        return self.at(self.now + seconds, what)

    def at(self, time: float, what: Callable[[float], None]) -> int:
        """Schedule a function for exactly a time, which a delay may miss by rounding.

        :param time: the time on the brain's clock.
        :param what: is called with the current time.
        :returns: the number of its timer.
        """
        number = next(self._count)
        heapq.heappush(self.timers, (time, number, what))
        return number

    def drop_timer(self, number: int) -> None:
        """Call a scheduled function no more.

        :param number: the number of its timer, which has not gone off yet.
        """
        self._dropped.add(number)
        self._forget_timers()

    def has_timers(self, besides: int | None = None) -> bool:
        """Return whether a function is scheduled.

        :param besides: the number of a timer that does not count, or None.
        """
        return any(n != besides and n not in self._dropped for _, n, _ in self.timers)

    def _forget_timers(self) -> None:
        while self.timers and self.timers[0][1] in self._dropped:
            self._dropped.discard(heapq.heappop(self.timers)[1])

    def measured(self, node: Node) -> float | None:
        """Return how long a node takes, as measured before; may be called from any thread.

        :param node: the node.
        :returns: seconds, or None if nothing is known.
        """
        if node.call is not None:
            return self.latencies.measured(node.call)
        return self.durations.of(node.op.name) or None

    def successor(self, failure: StalledError) -> Brain:
        """Return a new brain to replace this one after a bug made it fail.

        All its runs end, and later reports about them are ignored.

        :param failure: what tells of the bug.
        """
        new = Brain(self.attempts.policy)
        new._count = self._count  # so that no request number is used twice
        new.broken = self.broken
        for run in self.runs:
            run.ended, run.failure = self.now, failure.copy()
            for i, state in enumerate(run.state):
                if state < OPEN:
                    run.state[i], run.errors[i] = INTERRUPTED, failure.copy()
        return new

    # --- runs -------------------------------------------------------------------------------------

    def _on_done_together(self, executor: Executor, outcomes: list[tuple[Any, ...]]) -> None:
        for outcome in outcomes:
            self._handle("done", executor, *outcome)

    def _on_started(self, executor: Executor) -> None:
        self.broken.pop(executor, None)

    def _on_broken(self, executor: Executor, error: FesteError) -> None:
        self.broken[executor] = error
        for run in [r for r in self.runs if r.executor is executor]:
            self._break(run, error)

    def harmed(self, executor: Executor) -> list[Run]:
        """Return the runs that a fault of an executor ends, except those that one has ended before.

        :param executor: the executor.
        """
        return [run for run in self.runs if run.executor is executor and not run.faulty]

    def on_fault(self, executor: Executor, error: FesteError) -> None:
        """End the runs of an executor that did what no executor may; the others go on.

        :param executor: the executor, whose later runs may do better.
        :param error: what it did.
        """
        runs = self.harmed(executor)
        for run in runs:
            run.faulty = True
            self._break(run, error)
            self.interrupt(run)
        if not runs and self._faults.get(executor) != error.message:
            self.act("warn", error)
        self._faults[executor] = error.message

    def _break(self, run: Run, error: FesteError) -> None:
        run.fault = run.fault or error
        self.stop(run, error.message.partition(": ")[0])

    def _on_capacity(self, executor: Executor, where: str) -> None:
        self.windows.look(executor)  # the capacity of places is read after every event

    def _on_submit(self, run: Run) -> None:
        run.started = self.now
        self.runs.append(run)
        for call, latency in run.profiled.items():
            self.latencies.expect(call, latency)
        if RunStarted.name in run.heard:
            begun = RunStarted(run.name, 0.0, len(run.program.nodes), run.calls, run.wall)
            self.act("notify", run, begun)
        if self.nesting.is_orphan(run):
            self.nesting.end(run, 0.0)
            return
        if run.executor in self.broken:  # since the run was planned
            self._break(run, self.broken[run.executor])
        if run.series.stopped:
            self.halt(run)
            return
        for i, pending in enumerate(run.pending):
            if not pending and run.state[i] == WAITING:
                self.lifecycle.ready(run, i)
        self.end_if_done(run)

    def cancel(self, run: Run, grace: float) -> None:
        """Stop a run, and those inside its tasks.

        :param run: the run.
        :param grace: seconds that requests in flight may still take.
        """
        if run.ended is not None:
            return
        if run not in self.runs:  # Ctrl-C came before the run was submitted
            self.runs.append(run)
            run.started = self.now
        run.cancelled = True
        self.halt(run)
        if grace <= 0:
            self.interrupt(run)
        else:
            self.nesting.stop(run, grace)
            self.later(grace, lambda now: self.interrupt(run))

    def stop(self, run: Run, why: str = "") -> None:
        """Start nothing new, neither in a run nor in others of its series.

        :param run: the run.
        :param why: in a few words, if no error tells it.
        """
        series = run.series
        series.stopped, series.why = True, why or series.why
        for each in [r for r in self.runs if r.series is series and not r.stopping]:
            self.halt(each)

    def halt(self, run: Run) -> None:
        """Start nothing new; work that is under way continues."""
        run.stopping = True
        if run.outlet is not None:
            run.outlet.is_open = False
        queued = {QUEUED, GATHERED, WAITING, READY, JOINED}
        self.gates.withdraw(run)
        for i, state in enumerate(run.state):
            if state in queued:
                self.lifecycle.end(run, i, NOT_STARTED)
        run.gatherings.clear()
        for other in self.runs:
            if other.interrupted:  # and went on for what nobody may wait for any more
                self._interrupt_soon(other)
        self.end_if_done(run)

    def _interrupt_soon(self, run: Run) -> None:
        self.later(0.0, lambda now: self.interrupt(run))

    def interrupt(self, run: Run, *, parsing: bool = False) -> None:
        """Give up what is still running, except what other runs wait for if its executor can do it.

        Answers that are here are paid for: they get another second to be parsed.

        :param run: the run.
        :param parsing: give up on answers that are being parsed, too.
        """
        if run.ended is not None:
            return
        run.interrupted = True
        spared = set() if run.faulty else self.joins.awaited(run)
        if not parsing and PARSING in run.state:
            spared.update(i for i, state in enumerate(run.state) if state == PARSING)
            self.later(_PARSING, lambda now: self.interrupt(run, parsing=True))
        for parcel in self.attempts.parcels.values():
            if parcel.run is run and not spared.isdisjoint(parcel.members):
                spared.update(parcel.members)
        for handle, parcel in self.attempts.parcels.items():
            if parcel.run is run and spared.isdisjoint(parcel.members):
                self.attempts.give_up(parcel)
                self.act("cancel", run.executor, handle)
        for chunk in self.dispatcher.chunks.values():
            members = {i for task in chunk for i in task.members}
            if chunk[0].run is run and spared.isdisjoint(members):
                self.act("abandon", run.executor, chunk)
        for i, state in enumerate(run.state):
            if state < OPEN and i not in spared:
                sent = state == SENT
                told = "the run was stopped while this was under way"
                run.errors[i] = Interrupted(
                    f"{told}; it may have been billed" if sent else told,
                    origin=run.program.nodes[i].where,
                    billed="unknown" if sent else "yes" if state == PARSING else "no",
                )
                self.lifecycle.end(run, i, INTERRUPTED)
        self.nesting.stop(run, 0.0)
        self.end_if_done(run)

    def end_if_done(self, run: Run) -> None:
        outlet = run.outlet
        if run.open or run.ended is not None or (outlet is not None and outlet.is_open):
            return
        run.ended = self.now
        self.lists.forget(run)
        self.nesting.ended(run)
        for i in [*run.outputs, *(outlet.due if outlet is not None else ())]:
            if run.state[i] == NOT_STARTED and i not in run.errors:
                node = run.program.nodes[i]
                why = run.series.why or "the run was stopped"
                error = NotStarted(f"not begun: {why}", origin=node.where)
                error.node = node.key
                run.errors[i] = error
        if outlet is not None:
            for i in list(outlet.due):
                self.handing.ended(run, i)
            self._finish(run)
            return
        wanted = [i for i in run.outputs if run.state[i] in VALUED]
        if run.executor.remote and wanted:
            handle = self.number()
            self.fetches[handle] = run, wanted
            refs = [run.values[i] for i in wanted]
            coming = Interrupted("the run was stopped before this had come here")
            run.errors.update(dict.fromkeys(wanted, coming))  # never expose a ref as a value
            self.act("fetch", run.executor, handle, refs)
        else:
            self._finish(run)

    def _on_fetched(self, executor: Executor, handle: int, values: list[Any]) -> None:
        if self.handing.on_fetched(handle, values):
            return
        fetched = self.fetches.get(handle)
        if fetched is None:
            return
        run, wanted = fetched
        brought = dict(zip(wanted, values, strict=True))
        del self.fetches[handle]
        for i, value in brought.items():
            if isinstance(value, FesteError):
                self.lifecycle.lose(run, i, value)
            else:
                del run.errors[i]
                run.values[i] = value
        self._finish(run)

    def _lose_fetches(self, executor: Executor, error: FesteError) -> None:
        """Give up the values that an executor was to bring, since it mixes them up."""
        coming = [(h, run, 1) for h, (run, *_) in self.handing.fetching.items()]
        coming += [(h, run, len(wanted)) for h, (run, wanted) in self.fetches.items()]
        for handle, run, count in coming:
            if run.executor is executor:
                self._on_fetched(executor, handle, [error.copy() for _ in range(count)])

    def _finish(self, run: Run) -> None:
        self.runs.remove(run)
        self.windows.look(run.executor)
        run.series.calls += run.calls
        for scope in run.scopes:
            draw.forget(scope)
        if RunFinished.name in run.heard:
            self.act("notify", run, self.accounts.closing(run))
        self.act("finish", run)
