"""The thread that drives the brain: it waits for events, passes them on, and executes the actions.

A process has one driver, made on first use; a forked child makes its own. Callers submit a run and
wait on their own thread.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from feste import store
from feste.errors import ConfigError, FesteError, PluginWarning, Rejected, StalledError
from feste.events import Event
from feste.scheduler import logs, stalls
from feste.scheduler.brain import Brain
from feste.scheduler.emission import Emission
from feste.scheduler.executor import Executor, Reporter
from feste.scheduler.faults import raised
from feste.scheduler.growth import compile_emission
from feste.scheduler.observers import Lane, Observers
from feste.scheduler.program import Program
from feste.scheduler.run import Run
from feste.scheduler.work import describe

__all__ = ["Driver", "driver"]

#: The actions that are methods of an executor.
_FOR_EXECUTORS = {"call", "reclaim", "abandon", "cancel", "fetch", "release"}
#: Seconds that the brain's thread gets to end.
_PATIENCE = 1.0


class Driver:
    """The thread that runs the brain, and the executors it uses."""

    def __init__(self) -> None:
        self.brain = Brain()
        self._events: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._executors: dict[Hashable, Executor] = {}
        #: Stale ones that a run still uses.
        self._retiring: set[Executor] = set()
        #: Held by who starts the executor with a name.
        self._starting: dict[Hashable, threading.RLock] = {}
        self._observers = Observers()
        self._growth = Lane("feste-grow")
        self._closed = False
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._loop, name="feste-brain", daemon=True)
        self._thread.start()

    # --- from other threads -----------------------------------------------------------------------

    def executor(self, name: Hashable, make: Callable[[], Executor]) -> Executor:
        """Return the executor with this name; make and start it on first use.

        :param name: identifies the executor.
        :param make: makes it.
        """
        self._retire()
        with self._lock:
            found = self._executors.get(name)
            if found is not None:
                return found
            starting = self._starting.setdefault(name, threading.RLock())
        with starting:  # which may take long, if it is a cluster: others must not wait for it
            found = self._executors.get(name)
            if found is None:
                found = make()
                self._events.put(("started", found))
                found.start(Reporter(self._events.put, found))
                with self._lock:
                    self._executors[name] = found
                    self._starting.pop(name, None)
            return found

    def _retire(self) -> None:
        """Close the executors that are stale, except those that a run still uses."""
        with self._lock:
            stale = [name for name, one in self._executors.items() if _is_stale(one)]
            self._retiring |= {self._executors.pop(name) for name in stale}
            over = self._retiring - {run.executor for run in list(self.brain.runs)}
            self._retiring -= over
        for executor in over:
            _close_executor(executor)
            gone = ConfigError("the cluster that the run was planned for was closed: run again")
            self._events.put(("broken", executor, gone))  # for a run that is only about to begin

    def submit(self, run: Run) -> None:
        """Start a run.

        :param run: the run; its ``finished`` is set when it has ended.
        :raises FesteError: if Python is shutting down.
        """
        if self._closed and not threading.current_thread().daemon:  # daemons end with Python anyway
            raise FesteError("no run can begin any more: Python is ending")
        run.wall = time.time()
        told = self._observers.heard()
        run.observed, run.heard = bool(told), told | logs.wanted()
        self._events.put(("submit", run))

    def add(self, run: Run, program: Program, tokens: Sequence[Sequence[Any]]) -> None:
        """Add nodes to a run that is open for more.

        :param run: the run.
        :param program: the nodes.
        :param tokens: for each of its outputs, what the run's outlet gets with the result.
        """
        self._events.put(("added", run, program, tokens))

    def seal(self, run: Run) -> None:
        """Let a run end as soon as all that was added to it has ended.

        :param run: the run.
        """
        self._events.put(("sealed", run))

    def stop(self, run: Run, grace: float) -> None:
        """Stop a run.

        :param run: the run.
        :param grace: seconds that requests in flight may still take.
        """
        self._events.put(("stop", run, grace))

    def close(self) -> None:
        """End the thread and close all executors."""
        if self._closed:
            return
        self._closed = True
        self._events.put(("close",))
        self._thread.join(timeout=_PATIENCE)
        for executor in (*self._executors.values(), *self._retiring):
            _close_executor(executor)
        self._growth.close()
        self._observers.close()

    # --- the thread ---------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Process one batch of events; return False to stop. No event outlives the call."""
        get = self._events.get
        clock = time.monotonic
        wake = self.brain.wake_at
        wait = None if wake is None else _wait(wake - clock())
        if self.brain.runs:  # what was lost reports nothing, so look now and then
            wait = stalls.PATIENCE if wait is None else min(wait, stalls.PATIENCE)
        events = []
        try:
            events.append(get(timeout=wait))
            for _ in range(1000):
                events.append(self._events.get_nowait())
        except Empty:
            pass
        if any(e[0] == "close" for e in events):
            return False
        try:
            for name, *given in self.brain.on(events, clock()):
                if name in _FOR_EXECUTORS:
                    self._tell(name, *given)
                else:
                    getattr(self, f"_{name}")(*given)
        except BaseException:  # a bug in Feste itself: fail all runs rather than hang
            self._broken(traceback.format_exc())
        return True

    def _broken(self, trace: str) -> None:
        failure = StalledError(f"Feste's scheduler broke; please report this:\n{trace}")
        broken, self.brain = self.brain, self.brain.successor(failure)
        for run in broken.runs:
            self._observers.then(run.finish)

    def _tell(self, method: str, executor: Executor, *given: Any) -> None:
        """Call a method of an executor; if it raises, that is the end of what it was called for."""
        try:
            getattr(executor, method)(*given)
        except BaseException as error:  # a plugin may raise anything; other executors' runs go on
            told = raised(executor, method, error)
            report = Reporter(self._events.put, executor)
            if method == "call":
                where, chunk = given
                report.done_together([(task, False, told.copy(), 0.0) for task in chunk])
                report.free(where, chunk)
            elif method == "send":
                report.sent(given[0], False, Rejected(told.message, billed="unknown"), 0.0)
            elif method == "fetch":
                report.fetched(given[0], [told.copy() for _ in given[1]])
            else:
                report.fault(told)

    def _send(self, run: Run, *given: Any) -> None:
        run.context.copy().run(self._tell, "send", run.executor, *given)

    def _warn(self, error: FesteError) -> None:
        self._observers.warn(error)

    def _ask(self, ticket: int, question: Callable[..., None]) -> None:
        put = self._events.put
        question(then=lambda ok, value: put(("told", ticket, ok, value)))

    def _hand(self, run: Run, tokens: Sequence[Any], ok: bool, value: Any) -> None:
        assert run.outlet is not None
        run.outlet.take((tokens, ok, value))

    def _notify(self, run: Run, event: Event) -> None:
        self._observers.tell(event, run.context, plugins=run.observed)

    def _finish(self, run: Run) -> None:
        self._observers.then(run.finish)

    def _grow(self, run: Run, i: int, emission: Emission) -> None:
        """Collect and optimize the nodes that a task returned, on a separate thread."""

        def grow() -> None:
            try:
                program = compile_emission(run, i, emission)
            except BaseException as error:  # an optimization may raise anything: the node fails
                program = describe(error)
            self._events.put(("grown", run, i, program, emission))

        self._growth.put(grow)


def _is_stale(executor: Executor) -> bool:
    """Return whether an executor is stale, as one is that cannot tell."""
    try:
        return executor.stale
    except Exception as error:  # of a plugin, while another executor is looked up
        warnings.warn(str(raised(executor, "stale", error)), PluginWarning, stacklevel=4)
        return True


def _close_executor(executor: Executor) -> None:
    try:
        executor.close()
    except Exception as error:  # of a plugin, while another executor is looked up, or at the end
        warnings.warn(str(raised(executor, "close", error)), PluginWarning, stacklevel=4)


def _wait(seconds: float) -> float:
    """Clamp a timeout to what a queue accepts; a plugin may have produced any number."""
    return min(max(0.0, seconds), 3600.0)


_driver: Driver | None = None
_lock = threading.Lock()
_inherited: list[Driver | None] = []


def driver() -> Driver:
    """Return the driver of this process."""
    global _driver
    if _driver is not None:  # no lock: a loop that is collected as garbage asks for it anywhere
        return _driver
    with _lock:
        if _driver is None:
            _driver = Driver()
        return _driver


def _forget() -> None:
    """Make a forked child use its own driver, because the parent's threads do not exist there.

    The parent's driver is kept untouched: its loops, clients and workers must not be closed here.
    """
    global _driver, _lock
    _inherited.append(_driver)
    _driver = None
    _lock = threading.Lock()


def _close() -> None:
    if _driver is not None:
        _driver.close()
    store.close()  # after the last answer has come


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_close)
