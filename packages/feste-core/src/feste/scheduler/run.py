"""The state of one run, as the brain updates it and as its waiters and its report read it."""

from __future__ import annotations

import contextvars
import itertools
import threading
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from feste import context, fused
from feste.backend import Backend, Call, Latency, Request
from feste.blocking import in_loop
from feste.context import Settings, caps, everywhere
from feste.draw import Determinism
from feste.errors import CallError, FesteError, Interrupted
from feste.events import CAUSES
from feste.node import Node
from feste.optimization.analysis.profiles import Profiles
from feste.optimization.optimizer import is_enabled
from feste.scheduler.batching.batcher import Gathering
from feste.scheduler.batching.feeders import Feeders
from feste.scheduler.program import Program
from feste.scheduler.request_log import RequestLog
from feste.scheduler.series import Series
from feste.scheduler.states import (
    CACHED,
    NOT_STARTED,
    OPEN,
    REPLAYED,
    STATES,
    VALUED,
    WAITING,
)
from feste.scheduler.totals import Totals
from feste.scheduler.workers import Workers

if TYPE_CHECKING:
    from feste.scheduler.executor import Executor
    from feste.scheduler.handing import Outlet, Pieces
    from feste.scheduler.parcel import Parcel
    from feste.store.answers import Answers
    from feste.store.journal import Journal
    from feste.store.rows import Earlier

__all__ = ["Run", "Scope"]

Scope = tuple[str, ...]
"""What an outage or a refusal concerns: endpoint and account, and perhaps the model."""

_names = itertools.count(1)

#: The current task: its run's name, its position, and the task that surrounds that run.
around: ContextVar[tuple[str, int, Any] | None] = ContextVar("feste_around", default=None)


class Run:
    """The state of a program that is being run.

    :param program: the program; it grows when a task emits nodes.
    :param settings: the snapshot of the settings.
    :param executor: the executor.
    :param answers: the store and the cache that it uses, or None.
    :param prefix: the prefix of the run's name.
    """

    def __init__(
        self,
        program: Program,
        settings: Settings,
        executor: Executor,
        answers: Answers | None = None,
        prefix: str = "run",
    ) -> None:
        count = len(program.nodes)
        self.name = f"{prefix}-{next(_names)}"
        self.program = program
        self.settings = settings
        self.executor = executor
        self.answers = answers
        #: The context that its tasks, halves, requests and observers get copies of.
        self.context = contextvars.copy_context()
        self.context.run(context.enter, everywhere(settings))
        self.around = around.get()
        self.steps_around = fused.around.get()
        self.on_error: str = settings["on_error"]
        self.keep: str = settings["keep"]
        self.deadline: float | None = settings["deadline"]
        self.patience: float | None = settings["outage_patience"]
        self.max_failures: int | float | None = settings["max_failures"]
        #: What it may spend at most; and, for caps in dollars, the prices of its models.
        self.caps = caps(settings)
        self.profiles = Profiles()
        #: Whether its caller waits on the thread of an event loop, which stands still meanwhile.
        self.blocks_loop = in_loop()
        #: The names of the events that somebody wants, and whether any plugin does.
        self.observed = False
        self.heard: frozenset[str] = frozenset()
        #: Takes results one by one, as they end; None if all are read when the run has ended.
        self.outlet: Outlet | None = None
        #: Receives the text of its only output as it arrives, if that is a call; or None.
        self.pieces: Pieces | None = None

        self.state = bytearray(count)
        self.pending = [len(d) for d in program.deps]
        self.uses = [len(c) for c in program.consumers]
        for i in program.outputs:
            self.uses[i] += 1
        self.values: list[Any] = [None] * count
        self.errors: dict[int, FesteError] = {}
        self.failed: list[int] = []
        self.ready: dict[str, list[tuple[int, int, Any]]] = {}
        self.gatherings: dict[int, Gathering] = {}
        #: When nodes became ready, on the brain's clock; below 0 those that did not.
        self.ready_at = array("d", [-1.0]) * count
        #: When a call's account was last written, before that when its node was made; and the account.
        self.since = array("d", bytes(8 * count))
        self.totals: list[Totals | None] = [None] * count
        self.open = count
        #: Nodes whose task has returned nodes.
        self.emitters: set[int] = set()
        #: Unfinished nodes whose task may return nodes (``emits=True``).
        self.emitting = {i for i, n in enumerate(program.nodes) if n.op.emits}
        #: Values kept while a task is emitting: a node that it returns may need them.
        self.held: list[int] = []
        self.gone = bytearray(count)
        self.scopes: set[str] = set()

        self.started = 0.0
        self.wall = 0.0
        self.ended: float | None = None
        self.stopping = False
        self.cancelled = False
        #: The runs that stop with it; set before it is submitted.
        self.series = Series()
        #: Why it was stopped, as an error if that is not told by a node's own.
        self.fault: FesteError | None = None
        #: The first error of a call that was left, since its backend refuses all calls; or None.
        self.left: FesteError | None = None
        #: The accounts and models that refused all its calls, each with the refusal.
        self.closed: dict[Scope, CallError] = {}
        #: Whether it is over but for nodes that other runs wait for.
        self.interrupted = False
        #: Whether its executor did what none may: then other runs wait for none of its nodes.
        self.faulty = False
        self.requests = RequestLog(self.name)
        #: The accounts of operations and models, by client.
        self.rows: dict[tuple[int, str, str], Totals] = {}
        #: The same of the runs that its tasks began and that have ended, and how many these are.
        self.inner: dict[tuple[int, str, str], Totals] = {}
        self.inner_runs = 0
        #: The number of requests by the number of calls in them, of further attempts by the cause.
        self.sizes: Counter[int] = Counter()
        self.retries: Counter[str] = Counter()
        #: Backend, model, reason, start and end of the times for which a gate was closed.
        self.closings: list[tuple[str, str, str, float, float]] = []
        self.in_flight = self.peak = 0
        #: How often its failures opened a breaker.
        self.openings = 0
        #: What calls have waited for until they were packed: others, or their gate; and the sums of
        #: their gate as they began to wait.
        self.batched: dict[int, tuple[float, ...]] = {}
        self.arrived: dict[int, tuple[Any, tuple[float, ...]]] = {}
        #: The number of requests that wait for their next attempt; until when (on the brain's clock)
        #: the provider of a gate that this run queues at has asked to wait, and until when it is
        #: left alone, since it is down; and what such a gate lacks, by position in CAUSES.
        self.retrying = 0
        self.resumes_at = self.down_until = 0.0
        self.lacks: int | None = None
        #: What it spent under caps, and what is still reserved, by unit: ``dollars``, ``tokens``.
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.reserved: defaultdict[str, float] = defaultdict(float)
        #: When the first attempt of each call was made, if there is a deadline.
        self.begun: dict[int, float] = {}
        #: Of calls whose bought answers are being parsed: their request, and their place in it.
        self.fresh: dict[int, tuple[Parcel, int]] = {}
        #: Tokens of the requests so far, where providers reported them.
        self.input_tokens = 0
        self.output_tokens = 0
        self.spans: list[tuple[str, str, float, float, float, bool, str]] = []
        self.workers = Workers()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls = sum(n.op.kind == "call" for n in program.nodes)
        self.calls_done = 0
        if answers is not None:
            for node in program.nodes:
                self._reserve(node)
        for members, several in program.batches:
            gathering = Gathering(members, several)
            self.gatherings.update((i, gathering) for i in members)

        #: The groups whose calls may still share requests, or None; and when those of its calls that
        #: are on their way are expected to end, on the brain's clock.
        self.feeders = Feeders(self, program.groups) if program.groups else None
        self.expected: dict[int, float] = {}
        #: What profiles say of its operations; asked here, since it is code of plugins.
        self.profiled = self._latencies() if program.groups else {}

        #: What the requests of calls begin with, as for the program.
        self.prefixes = program.prefixes

        #: Calls whose answers are looked up or kept: their requests, as they would be sent alone.
        self.asked: dict[int, Request] = {}
        #: Whether its calls may take the answers of equal ones under way.
        self.shares = settings["max_rewrites"] is None and is_enabled("cse", settings["optimize"])
        #: How calls got their answers, where they did not buy them: REPLAYED, CACHED or SHARED.
        self.sources: dict[int, int] = {}
        #: Earlier requests whose answers are not known, each with the position of its call.
        self.unknown: list[tuple[int, Earlier]] = []
        #: The tokens of answers that were replayed or cached, when they were bought.
        self.reused_input_tokens = 0.0
        self.reused_output_tokens = 0.0
        #: How many backends each call has left behind, and the errors for which in this run.
        self.turns: dict[int, int] = {}
        self.passed_on: dict[int, list[FesteError]] = {}
        #: How many calls were bought although equal ones have their answers: new samples.
        self.resampled = 0
        #: How many stored answers were damaged, and how many new ones could not be stored.
        self.damaged = 0
        self.unfit = 0
        #: Why the store could not be written, which stopped the run, or None.
        self.unwritten: FesteError | None = None

        #: The bug in the scheduler that ended the run, or None.
        self.failure: FesteError | None = None
        self.finished = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def on_finish(self, callback: Callable[[], None]) -> None:
        """Register a callback for the end of the run; it is called at once if that has passed.

        :param callback: a quick function; usually called on one of Feste's threads.
        """
        with self._lock:
            if not self.finished.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def finish(self) -> None:
        """Mark the run as ended and call the callbacks."""
        with self._lock:
            self.finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def append(self, node: Node, rank: int, keepers: tuple[Node, ...]) -> int:
        """Add a node to the program and its state to the run; return its position.

        :param node: the node, as for :meth:`Program.append`.
        :param rank: its priority.
        :param keepers: the user's nodes that receive its value.
        """
        position = self.program.append(node, rank, keepers)
        self.state.append(WAITING)
        self.pending.append(0)
        self.uses.append(0)
        self.values.append(None)
        self.ready_at.append(-1.0)
        self.since.append(0.0)
        self.totals.append(None)
        self.gone.append(0)
        self.open += 1
        self.calls += node.op.kind == "call"
        if node.op.emits:
            self.emitting.add(position)
        self._reserve(node)
        return position

    def connect(self, i: int, deps: Sequence[int]) -> None:
        """Set the inputs of a node, which has none yet, or has let go of them.

        :param i: the node's position.
        :param deps: the positions of its inputs.
        """
        self.program.connect(i, deps)
        for d in deps:
            self.uses[d] += 1
            if self.state[d] not in VALUED:
                self.pending[i] += 1
        if self.feeders is not None:
            self.feeders.connected(i, deps)

    def _reserve(self, node: Node) -> None:
        """Keep what a task's own calls bought in earlier sessions for the time that it runs."""
        if self.answers is None or node.op.kind != "task":
            return
        for task in fused.tasks_of(node):
            if task.draw is not None and task.determinism is not Determinism.PURE:
                self.answers.reserve(task.draw.inner)

    def has_shown(self, members: list[int]) -> bool:
        """Return whether the reader of a stream has the first pieces of an answer.

        :param members: the positions of the calls that are answered.
        """
        return self.pieces is not None and self.pieces.begun and members == self.outputs

    def clients(self) -> list[Backend]:
        """Return the backends whose operations it calls; may be called from any thread."""
        calls = [n.call for n in self.program.nodes]
        clients = [c.client for call in calls if call for c in (call, *(o for o, _ in call.rest))]
        return list({id(client): client for client in clients}.values())

    def is_inside(self, run: Run, i: int) -> bool:
        """Whether this run was started inside a task, directly or through nested runs.

        :param run: the task's run.
        :param i: the position of the task's node.
        """
        task = self.around
        while task is not None and task[:2] != (run.name, i):
            task = task[2]
        return task is not None

    def results(self) -> list[Any]:
        """Return the value or the error of each output."""
        return [self.errors[i] if i in self.errors else self._value(i) for i in self.outputs]

    def _value(self, i: int) -> Any:
        if self.state[i] < OPEN:  # the run was stopped but did not end in time
            return Interrupted("this was still under way", origin=self.program.nodes[i].where)
        return self.values[i]

    @property
    def reused(self) -> int:
        """How many answers were not bought now, with those that still could not be parsed."""
        kept = (REPLAYED, CACHED)
        shown = {i for i, state in enumerate(self.state) if state in kept}
        return len(shown.union(i for i, source in self.sources.items() if source in kept))

    @property
    def store(self) -> Journal | None:
        """Where requests are noted before they are sent, and answers kept; or None."""
        return self.answers.store if self.answers is not None else None

    @property
    def outputs(self) -> list[int]:
        """The positions of the requested nodes."""
        return self.program.outputs

    def count_states(self) -> dict[str, int]:
        """Return how many nodes ended in each state; the counts add up to all nodes of the run."""
        counts = Counter(self.state)
        if self.open:  # the run was stopped but did not end in time
            counts[NOT_STARTED] += sum(counts[state] for state in range(OPEN))
        return {name: counts[state] for state, name in STATES.items() if counts[state]}

    def count_failures(self) -> dict[str, int]:
        """Return how many nodes failed by themselves, by the name of the error's class."""
        return dict(Counter(type(self.errors[i]).__name__ for i in self.failed).most_common())

    def sum_waits(self) -> dict[str, float]:
        """Return the seconds that calls have waited, summed over calls, by cause."""
        sums = [sum(seconds) for seconds in zip(*(row.times for row in list(self.rows.values())))]
        return {cause: waited for cause, waited in zip(CAUSES, sums) if waited}

    def _latencies(self) -> dict[Call[Any], Latency]:
        """Return how long the requests of its calls take, where profiles tell."""
        models = {n.call: n.call.model(n.args) for n in self.program.nodes if n.call is not None}
        known = ((c, self.profiles.of(c.client, model).latency) for c, model in models.items())
        return {call: latency for call, latency in known if latency is not None}
