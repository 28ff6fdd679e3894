"""One run: what the brain knows of it, and what its waiters and its report read."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from feste.backend import Backend
from feste.context import Settings
from feste.errors import FesteError, Interrupted
from feste.events import RequestFinished
from feste.node import Node
from feste.scheduler.batcher import Group
from feste.scheduler.program import Program

if TYPE_CHECKING:
    from feste.scheduler.executor import Executor

__all__ = [
    "DONE",
    "FAILED",
    "FINISHING",
    "INTERRUPTED",
    "KEPT",
    "NOT_STARTED",
    "OPEN",
    "READY",
    "SHARED",
    "SKIPPED",
    "STATES",
    "VALUED",
    "WAITING",
    "Run",
]

# The states of a node. Up to OPEN it is on its way; the others are final.
WAITING, READY, RUNNING, PREPARING, GROUPED, QUEUED, SENT, PARSING, JOINED, OPEN = range(10)
DONE, KEPT, SHARED, FAILED, SKIPPED, INTERRUPTED, NOT_STARTED = range(10, 17)
#: The final states of nodes that have a value.
VALUED = (DONE, KEPT, SHARED)
#: Added to the rank of what finishes a paid call: it goes before anything that only begins.
FINISHING = 1 << 40
STATES = {
    DONE: "done",
    KEPT: "kept",
    SHARED: "shared",
    FAILED: "failed",
    SKIPPED: "skipped",
    INTERRUPTED: "interrupted",
    NOT_STARTED: "not_started",
}

_names = itertools.count(1)

#: The task that runs here: its run's name, its position, and the task around that run.
around: ContextVar[tuple[str, int, Any] | None] = ContextVar("feste_around", default=None)


class Run:
    """A program being run.

    :param program: the program; it grows when a task emits nodes.
    :param settings: the snapshot of the settings.
    :param executor: the hands.
    :param prefix: what the run's name begins with.
    """

    def __init__(
        self, program: Program, settings: Settings, executor: Executor, prefix: str = "run"
    ) -> None:
        count = len(program.nodes)
        self.name = f"{prefix}-{next(_names)}"
        self.program = program
        self.settings = settings
        self.executor = executor
        self.context = contextvars.copy_context()
        self.around = around.get()
        self.on_error: str = settings["on_error"]
        self.keep: str = settings["keep"]
        self.observed = False

        self.state = bytearray(count)
        self.pending = [len(d) for d in program.deps]
        self.uses = [len(c) for c in program.consumers]
        for i in program.outputs:
            self.uses[i] += 1
        self.values: list[Any] = [None] * count
        self.errors: dict[int, FesteError] = {}
        self.failed: list[int] = []
        self.ready: dict[str, list[tuple[int, int, Any]]] = {}
        self.groups: dict[int, Group] = {}
        self.ready_at: list[float] = [0.0] * count
        self.open = count
        #: Nodes whose task has returned nodes.
        self.emitters: set[int] = set()
        #: Unfinished nodes whose task may return nodes (``emits=True``).
        self.emitting = {i for i, n in enumerate(program.nodes) if n.op.emits}
        #: Values kept while a task is emitting: a node that it returns may need them.
        self.held: list[int] = []
        self.gone = bytearray(count)
        self.scopes: list[str] = []

        self.started = 0.0
        self.wall = 0.0
        self.ended: float | None = None
        self.stopping = False
        self.cancelled = False
        self.flying = 0
        self.requests: list[RequestFinished] = []
        #: Requests that wait for the time of their next try, and until when a gate that this run
        #: queues at is closed, on the brain's clock.
        self.retrying = 0
        self.resumes_at = 0.0
        #: Tokens of the requests so far, as far as providers said.
        self.input_tokens = 0
        self.output_tokens = 0
        self.spans: list[tuple[str, str, float, float, float, bool]] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls = sum(n.op.kind == "call" for n in program.nodes)
        self.calls_done = 0
        for members in program.batches:
            group = Group(members)
            self.groups.update((i, group) for i in members)

        #: A defect of the scheduler that ended the run, or None.
        self.failure: FesteError | None = None
        self.finished = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def on_finish(self, callback: Callable[[], None]) -> None:
        """Call back when the run has ended, at once if it has; from the brain's thread.

        :param callback: something quick.
        """
        with self._lock:
            if not self.finished.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def finish(self) -> None:
        """Wake whoever waits."""
        with self._lock:
            self.finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def append(self, node: Node, rank: int, keepers: tuple[Node, ...]) -> int:
        """Add a node to the program and its state to the run; return its position.

        :param node: as for :meth:`Program.append`; likewise the others.
        :param rank: its priority.
        :param keepers: the user's nodes that shall know its value.
        """
        position = self.program.append(node, rank, keepers)
        self.state.append(WAITING)
        self.pending.append(0)
        self.uses.append(0)
        self.values.append(None)
        self.ready_at.append(0.0)
        self.gone.append(0)
        self.open += 1
        self.calls += node.op.kind == "call"
        if node.op.emits:
            self.emitting.add(position)
        return position

    def clients(self) -> list[Backend]:
        """Return the backends whose operations it calls; from any thread."""
        calls = [n.call for n in self.program.nodes]
        return list({id(c.client): c.client for c in calls if c is not None}.values())

    def is_inside(self, run: Run, i: int) -> bool:
        """Whether a task waits for this run: it was begun there, or in a run begun there.

        :param run: the task's run.
        :param i: its node's position.
        """
        task = self.around
        while task is not None and task[:2] != (run.name, i):
            task = task[2]
        return task is not None

    def results(self) -> list[Any]:
        """Return a value or an error for each output."""
        return [self.errors[i] if i in self.errors else self._value(i) for i in self.outputs]

    def _value(self, i: int) -> Any:
        if self.state[i] < OPEN:  # the run did not end in time when it was stopped
            return Interrupted("this was still under way", origin=self.program.nodes[i].where)
        return self.values[i]

    @property
    def outputs(self) -> list[int]:
        """The positions of the wanted nodes."""
        return self.program.outputs

    def count_states(self) -> dict[str, int]:
        """Return how many nodes ended in which state; they add up to all nodes of the run."""
        counts = Counter(self.state)
        if self.open:  # of a run that did not end in time when it was stopped
            counts[NOT_STARTED] += sum(counts[state] for state in range(OPEN))
        return {name: counts[state] for state, name in STATES.items() if counts[state]}
