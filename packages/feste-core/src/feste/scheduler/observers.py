"""Threads beside the brain's: one runs observers, which may be slow; one compiles emissions."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from contextvars import Context
from queue import SimpleQueue
from typing import Any

from feste import blocking
from feste.errors import FesteError, FesteWarning, PluginWarning
from feste.events import EVENTS, Event
from feste.plugins import registry
from feste.scheduler import logs
from feste.wording import printable, raised_at

__all__ = ["Lane", "Observers"]

#: Seconds that a lane gets to finish when it is closed.
_PATIENCE = 1.0


class Lane:
    """A thread, started on first use, that runs functions one after the other.

    :param name: the name of the thread.
    :param role: the role of the thread; see :mod:`feste.blocking`.
    """

    def __init__(self, name: str, role: blocking.Role = "") -> None:
        self.name = name
        self.role = role
        self.used = False
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def put(self, what: Callable[[], None]) -> None:
        """Queue a function; only the brain's thread may call this.

        :param what: a function without arguments.
        """
        if not self.used:
            self.used = True
            self._thread.start()
        self._queue.put(what)

    def _loop(self) -> None:
        with blocking.inside(self.role):
            while self._turn():
                pass

    def _turn(self) -> bool:
        what = self._queue.get()
        if what is None:
            return False
        try:
            what()
        except BaseException:  # report the error, then continue with the next function
            told = threading.ExceptHookArgs((*sys.exc_info(), self._thread))
            threading.excepthook(told)
        return True

    def close(self) -> None:
        """End the thread after all queued functions have run."""
        if self.used:
            self._queue.put(None)
            self._thread.join(timeout=_PATIENCE)


class Observers:
    """Send events to plugins, in order, on a separate thread that may be slow."""

    def __init__(self) -> None:
        self._lane = Lane("feste-observers", "hook")
        self._ignored: set[Any] = set()

    def heard(self) -> frozenset[str]:
        """Return the names of the events that plugins implement hooks for."""
        hook = registry().manager.hook
        names = (event.name for event in EVENTS)
        return frozenset(n for n in names if getattr(hook, f"feste_{n}").get_hookimpls())

    def tell(
        self, event: Event | Callable[[], Event], context: Context, *, plugins: bool = True
    ) -> None:
        """Send an event to all observers, and to the log.

        :param event: the event, or a function that makes it on the observers' thread.
        :param context: that of the run, of which they get copies.
        :param plugins: whether any plugin observed runs as this one began.
        """
        tell = context.copy().run
        self._lane.put(lambda: tell(self._tell, event() if callable(event) else event, plugins))

    def _tell(self, event: Event, plugins: bool) -> None:
        try:
            logs.log(event)
        finally:  # a handler that raises is told on stderr as an error of this thread
            if plugins:
                self._tell_plugins(event)

    def _tell_plugins(self, event: Event) -> None:
        for impl in getattr(registry().manager.hook, f"feste_{event.name}").get_hookimpls():
            if impl.plugin in self._ignored:
                continue
            try:
                impl.function(*([event] if impl.argnames else []))
            except BaseException as error:  # an observer must never stop a run
                self._ignored.add(impl.plugin)
                warnings.warn(
                    f"the observer {impl.plugin_name} raised {type(error).__name__}: "
                    f"{printable(str(error))} (at {raised_at(error)}); it is told no more",
                    FesteWarning,
                    stacklevel=2,
                )

    def warn(self, error: FesteError) -> None:
        """Warn of something that no run is there to be told of.

        :param error: says what.
        """
        self._lane.put(lambda: warnings.warn(str(error), PluginWarning, stacklevel=2))

    def then(self, what: Callable[[], None]) -> None:
        """Run a function after all events sent before have been handled.

        :param what: a quick function.
        """
        if self._lane.used:
            self._lane.put(what)
        else:
            what()

    def close(self) -> None:
        """End the thread after all events have been handled."""
        self._lane.close()
