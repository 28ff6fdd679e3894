"""What does the work that the brain decides on: the interface of executors.

An :class:`Executor` starts things and reports how they went; it never decides. To run Feste's graphs
elsewhere, derive from it and offer the class by the hook ``feste_schedulers``;
:class:`feste.scheduler.LocalExecutor` is a good base, since requests usually stay where the gate is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feste.backend import Call, OnChunk, Request
from feste.context import Settings
from feste.graph import FesteGraph

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["QUICK", "Executor", "PyTask", "Reporter", "Scheduler"]

#: The place of Feste's own short pieces, prompts and the halves of operations. It is apart from that
#: of users' tasks: calls go out however long these take.
QUICK = "quick"

Report = tuple[Any, ...]


class Reporter:
    """How an executor tells the brain what happened; every method may be called from any thread.

    :param put: takes each report, as a tuple of its name, the executor and the arguments.
    :param executor: who reports.

    >>> reports = []
    >>> Reporter(reports.append, "executor").capacity("thread")
    >>> reports
    [('capacity', 'executor', 'thread')]
    """

    __slots__ = ("executor", "put")

    def __init__(self, put: Callable[[Report], None], executor: Any) -> None:
        self.put = put
        self.executor = executor

    def done(self, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        """Say that a task ended.

        :param task: the task.
        :param ok: whether it returned.
        :param value: what it returned, or the :class:`~feste.errors.FesteError` that it ended with.
        :param seconds: how long it ran.
        """
        self.put(("done", self.executor, task, ok, value, seconds))

    def done_together(self, outcomes: Sequence[tuple[PyTask, bool, Any, float]]) -> None:
        """Say that several tasks ended: one report wakes the brain once.

        :param outcomes: for each task the arguments of :meth:`done`.
        """
        self.put(("done_together", self.executor, outcomes))

    def returned(self, tasks: Sequence[PyTask]) -> None:
        """Give back tasks of a chunk that were not started.

        :param tasks: the tasks.
        """
        self.put(("returned", self.executor, tasks))

    def free(self, where: str, chunk: list[PyTask]) -> None:
        """Say that a chunk is finished: its place is free.

        :param where: where it ran, as :meth:`Executor.call` was told.
        :param chunk: the very list that was given to :meth:`Executor.call`.
        """
        self.put(("free", self.executor, where, chunk))

    def sent(self, handle: int, ok: bool, value: Any, seconds: float) -> None:
        """Say that a request ended.

        :param handle: the brain's number for it.
        :param ok: whether it was answered.
        :param value: the :class:`~feste.backend.Response`, or a :class:`~feste.errors.CallError`.
        :param seconds: how long it took.
        """
        self.put(("sent", self.executor, handle, ok, value, seconds))

    def fetched(self, handle: int, values: Sequence[Any]) -> None:
        """Hand over values that the brain asked for.

        :param handle: the brain's number for them.
        :param values: a value, or the FesteError in its place, for each reference.
        """
        self.put(("fetched", self.executor, handle, values))

    def capacity(self, where: str) -> None:
        """Say that :meth:`Executor.capacity` changed.

        :param where: for which place.
        """
        self.put(("capacity", self.executor, where))


class PyTask:
    """One piece of Python to run: a user's task, or a half of an operation.

    :param run: the run it belongs to; executors need nothing of it.
    :param index: its node's position in the run.
    :param stage: ``"run"`` for a task or prompt, else which half of a call.
    :param fn: what to call.
    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: what goes into the slots; a PyTask stands for its result, which an earlier one
        of the same chunk gives.
    """

    __slots__ = (
        "args",
        "fn",
        "index",
        "kwargs",
        "name",
        "node",
        "ok",
        "result",
        "run",
        "stage",
        "values",
    )

    def __init__(
        self,
        run: Run,
        index: int,
        stage: str,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        values: list[Any],
        name: str,
    ) -> None:
        self.run = run
        self.index = index
        #: The node it is of, as it was when the task was made.
        self.node = run.program.nodes[index]
        self.stage = stage
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.values = values
        self.name = name
        self.ok: bool | None = None
        self.result: Any = None

    @property
    def key(self) -> str:
        """The key of its node."""
        return self.node.key


class Executor:
    """The interface of executors. The brain calls it from one thread: every method returns at once.

    Work that ends later is told to the :class:`Reporter` that :meth:`start` is given. What
    :meth:`place` raises fails the node that it was asked about; no other method may raise.

    :param target: what the setting ``scheduler`` was: a name, a URL or an object.

    >>> from feste.scheduler import LocalExecutor
    >>> class InOneThread(LocalExecutor):
    ...     def capacity(self, where):
    ...         return 1 if where == "thread" else super().capacity(where)
    >>> import feste
    >>> feste.compute(feste.task(abs)(-1), scheduler=InOneThread)
    (1,)
    """

    def __init__(self, target: Any = None) -> None:
        self.target = target

    def start(self, report: Reporter) -> None:
        """Get ready; called once before anything else, on the thread of the first run's caller.

        :param report: whom to tell what happened.
        """
        raise NotImplementedError

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request; reports ``sent``.

        :param handle: the brain's number for it.
        :param call: the operation to send it with.
        :param request: the request.
        :param on_chunk: gets pieces of the answer's text as they come, on any thread; or None.
        """
        raise NotImplementedError

    def call(self, where: str, chunk: list[PyTask]) -> None:
        """Run tasks one after the other; reports ``done`` for each as it ends, then ``free``.

        A task whose inputs failed within the chunk, and those after one that returned nodes, are not
        begun: they are reported as ``returned``.

        :param where: what :meth:`place` said, or :data:`QUICK` for the halves of operations.
        :param chunk: the tasks, in order; the list is the chunk's identity.
        """
        raise NotImplementedError

    def reclaim(self, chunk: list[PyTask]) -> None:
        """Return the unstarted tasks of a chunk if it has made no progress since the last call.

        Reports ``returned``.

        :param chunk: the list that was given to :meth:`call`.
        """

    def abandon(self, chunk: list[PyTask]) -> None:
        """Give a chunk up, as far as it can be stopped: its run is over. It still reports ``free``.

        :param chunk: the list that was given to :meth:`call`.
        """

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Bring values here; reports ``fetched``. Only executors with ``remote = True`` are asked.

        :param handle: the brain's number for it.
        :param refs: results that were reported.
        """
        raise NotImplementedError

    def release(self, ref: Any) -> None:
        """Forget a result that nobody needs any more.

        :param ref: a result that was reported.
        """

    def cancel(self, handle: int) -> None:
        """Stop waiting for a request; it still reports ``sent``, with an Interrupted error.

        :param handle: the brain's number for it.
        """
        raise NotImplementedError

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once.

        :param where: what :meth:`place` said, or :data:`QUICK`.
        """
        raise NotImplementedError

    def place(self, task: Any) -> str:
        """Return where the calls of a task run.

        :param task: the op of a node that is no call of an operation.
        """
        if task.kind == "prompt":
            return QUICK
        return "async" if task.is_async else str(task.executor)

    @property
    def stale(self) -> bool:
        """Whether the next run shall have new hands: what these need is closed."""
        return False

    #: Whether reported results are only references, to be fetched.
    remote = False
    #: Whether small tasks, and chains of them, are given as one chunk.
    chunking = True

    def close(self) -> None:
        """Stop; nothing is called after it."""
        raise NotImplementedError


class Scheduler:
    """A whole scheduler, for those who need more than another executor: it runs the graph itself.

    :param target: what the setting ``scheduler`` was.

    >>> import feste
    >>> class InOrder(Scheduler):
    ...     def run(self, graph, keys, settings):
    ...         from dask.local import get_sync
    ...         return get_sync(dict(graph), list(keys))
    >>> feste.compute(feste.task(abs)(-1), scheduler=InOrder)
    (1,)
    """

    def __init__(self, target: Any = None) -> None:
        self.target = target

    def run(self, graph: FesteGraph, keys: Sequence[str], settings: Settings) -> Sequence[Any]:
        """Return the values of some keys of an optimized graph.

        :param graph: the graph; ``dict(graph)`` is a Dask graph.
        :param keys: the wanted keys.
        :param settings: the settings of the run.
        """
        raise NotImplementedError
