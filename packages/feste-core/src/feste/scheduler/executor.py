"""The interface of executors, which do the work that the brain decides on.

An :class:`Executor` starts work and reports outcomes; it decides nothing. To run Feste's graphs
elsewhere, derive from it and register the class with the hook ``feste_schedulers``;
:class:`feste.scheduler.LocalExecutor` is a good base, since requests usually stay where the gate is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from feste.backend import Backend, Call, OnChunk, Request, Response
from feste.context import Settings
from feste.errors import CallError, FesteError, Rejected
from feste.fused import tasks_of
from feste.graph import FesteGraph
from feste.scheduler.faults import fault, is_number, plain
from feste.scheduler.inputs import compute_together

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["CHUNK", "QUICK", "Executor", "PyTask", "Reporter", "Scheduler"]

#: The place for Feste's own short work: prompts and the halves of operations. It is separate from
#: users' tasks, so that long tasks do not delay calls.
QUICK = "quick"

#: Small tasks share a chunk until its expected duration reaches this many seconds, in this process.
CHUNK = 0.001
_CHUNKED = ("thread", QUICK, "inline")

Report = tuple[Any, ...]


class Reporter:
    """Report outcomes from an executor to the brain; every method may be called from any thread.

    :param put: receives each report, a tuple of its name, the executor and the arguments.
    :param executor: the executor that reports.

    >>> reports = []
    >>> Reporter(reports.append, "executor").capacity("thread")
    >>> reports
    [('capacity', 'executor', 'thread')]
    """

    __slots__ = ("executor", "put")

    def __init__(self, put: Callable[[Report], None], executor: Any) -> None:
        self.put = put
        self.executor = executor

    def done(self, task: PyTask, ok: bool, value: Any, seconds: float, worker: str = "") -> None:
        """Report the end of a task.

        :param task: the task.
        :param ok: whether it returned.
        :param value: its return value, or the :class:`~feste.errors.FesteError` that it ended with.
        :param seconds: its duration in seconds.
        :param worker: the name of the worker that ran it; empty for this process.
        """
        self.put(("done", self.executor, *self._ended(task, ok, value, seconds, worker)))

    def done_together(self, outcomes: Sequence[tuple[Any, ...]]) -> None:
        """Report the end of several tasks at once, which wakes the brain only once.

        :param outcomes: for each task the arguments of :meth:`done`, without a worker for tasks that
            this process ran.
        """
        self.put(("done_together", self.executor, [self._ended(*o) for o in outcomes]))

    def returned(self, tasks: Sequence[PyTask]) -> None:
        """Return tasks of a chunk that were not started.

        :param tasks: the tasks.
        """
        self.put(("returned", self.executor, tasks))

    def free(self, where: str, chunk: list[PyTask]) -> None:
        """Report that a chunk has finished and its place is free.

        :param where: the place, as given to :meth:`Executor.call`.
        :param chunk: the same list object that was given to :meth:`Executor.call`.
        """
        self.put(("free", self.executor, where, chunk))

    def sent(self, handle: int, ok: bool, value: Any, seconds: float, worker: str = "") -> None:
        """Report the end of a request.

        :param handle: the brain's number for the request.
        :param ok: whether a response arrived.
        :param value: the :class:`~feste.backend.Response`, or a :class:`~feste.errors.CallError`.
        :param seconds: its duration in seconds.
        :param worker: the name of the worker that sent it; empty for this process.
        """
        if ok and not isinstance(value, Response):
            ok = False
            value = fault(self.executor, f"reported sent with {value!r}, which is no Response")
        if not ok and not isinstance(value, CallError):
            told = value if _is_error(value) else self._no_error("sent", value)
            value = Rejected(told.message, billed="unknown")
        seconds, worker, wrong = self._seen("sent", seconds, worker)
        self.put(("sent", self.executor, handle, ok, value, seconds, worker))
        if wrong is not None:  # only now: what was paid for is kept
            self.fault(wrong)

    def fetched(self, handle: int, values: Sequence[Any]) -> None:
        """Deliver the values that :meth:`Executor.fetch` was asked for.

        :param handle: the brain's number for the fetch.
        :param values: for each reference its value, or the FesteError that replaces it.
        """
        self.put(("fetched", self.executor, handle, values))

    def broken(self, error: FesteError) -> None:
        """Report that the executor can do no more work: its runs end, with what they have.

        :param error: why.
        """
        told = error if _is_error(error) else self._no_error("broken", error)
        self.put(("broken", self.executor, told))

    def fault(self, error: FesteError) -> None:
        """Report that the executor did what no executor may: its runs end, and later ones may begin.

        :param error: what it did.
        """
        self.put(("fault", self.executor, error))

    def capacity(self, where: str) -> None:
        """Report that :meth:`Executor.capacity`, or :attr:`Executor.window`, changed.

        :param where: the place that it changed for.
        """
        self.put(("capacity", self.executor, where))

    def _ended(
        self, task: PyTask, ok: bool, value: Any, seconds: float, worker: str = ""
    ) -> tuple[Any, ...]:
        if not ok and not _is_error(value):
            value = self._no_error("done", value)
        seconds, worker, wrong = self._seen("done", seconds, worker)
        if wrong is not None:  # before its run may be over
            self.fault(wrong)
        return task, ok, value, seconds, worker

    def _no_error(self, method: str, value: Any) -> FesteError:
        said = f"{value!r}, which is no error of Feste"
        told = fault(self.executor, f"reported {method} with {said}")
        told.__cause__ = value if isinstance(value, BaseException) else None
        return told

    def _seen(self, method: str, seconds: Any, worker: Any) -> tuple[float, str, FesteError | None]:
        """Return seconds and worker as they must be, and the error if they are not."""
        is_right = is_number(seconds) and math.isfinite(seconds)
        if is_right and isinstance(worker, str):
            return plain(seconds), worker, None
        wrong = f"{worker=}" if is_right else f"{seconds=}"
        return 0.0, "", fault(self.executor, f"reported {method} with {wrong}")


def _is_error(value: object) -> bool:
    return isinstance(value, FesteError)


class PyTask:
    """One piece of Python to run: a user's task, or one half of an operation.

    :param run: the run it belongs to; executors do not use it.
    :param index: the position of its node in the run.
    :param stage: ``"run"`` for a task or prompt, otherwise the half of the call.
    :param fn: the function to call.
    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: the values for the slots. A PyTask here stands for its result: it is an earlier
        task of the same chunk.
    :param name: the name used in measurements and reports.
    :param members: the positions of all nodes that wait for it, where these are several: the calls
        of a list that is packed or unpacked.
    """

    __slots__ = (
        "args",
        "fn",
        "index",
        "kwargs",
        "members",
        "name",
        "node",
        "ok",
        "replayed",
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
        members: Sequence[int] = (),
    ) -> None:
        self.run = run
        self.members = members or (index,)
        self.index = index
        #: Its node, as it was when the task was made.
        self.node = run.program.nodes[index]
        self.stage = stage
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.values = values
        self.name = name
        self.ok: bool | None = None
        #: Whether its result came from a store.
        self.replayed = False
        self.result: Any = None

    @property
    def key(self) -> str:
        """The key of its node."""
        return self.node.key

    @property
    def is_operator(self) -> bool:
        """Whether it only applies operators, which is cheaper than to send it elsewhere."""
        return all(task.op.identity.startswith("operator.") for task in tasks_of(self.node))


class Executor:
    """The interface of executors; the brain calls it from one thread, so no method may block.

    Work that ends later is reported to the :class:`Reporter` given to :meth:`start`. An exception
    from :meth:`place`, :meth:`call`, :meth:`send` or :meth:`fetch` fails what it was called for, one
    from another method ends the executor's runs, as does a report that makes no sense; runs on other
    executors go on.

    :param target: the value of the setting ``scheduler``: a name, a URL or an object.

    >>> from feste.scheduler import LocalExecutor
    >>> class InOneThread(LocalExecutor):
    ...     def capacity(self, where):
    ...         return 1 if where == "thread" else super().capacity(where)
    >>> import feste
    >>> feste.compute(feste.task(abs)(-1), scheduler=InOneThread)
    (1,)
    """

    #: The names of the settings that an executor is made with, besides ``scheduler``: its constructor
    #: takes them as keywords. Each combination of their values has an executor of its own.
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, target: Any = None) -> None:
        self.target = target

    def start(self, report: Reporter) -> None:
        """Prepare for work; called once, before all other methods, on the first caller's thread.

        :param report: receives all reports.
        """
        raise NotImplementedError

    def preflight(self, clients: Sequence[Backend]) -> None:
        """Raise what would keep requests from being sent; called before a run, on its caller's thread.

        :param clients: the backends that the run may use.
        :raises ConfigError: if a key is missing where their requests would be sent from.
        """
        for client in clients:
            client.preflight()

    @property
    def window(self) -> int | None:
        """How many requests it takes at once, of all accounts together; None for any number."""
        return None

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        """Send a request; report ``sent`` when it ends.

        :param handle: the brain's number for the request.
        :param call: the operation that sends it.
        :param request: the request.
        :param on_chunk: receives pieces of the text as they arrive, on any thread; or None.
        """
        raise NotImplementedError

    def call(self, where: str, chunk: list[PyTask]) -> None:
        """Run tasks in order; report ``done`` as each one ends, then ``free``.

        Tasks whose inputs failed within the chunk, and tasks after one that returned nodes, are not
        started: report them as ``returned``.

        :param where: the result of :meth:`place`, or :data:`QUICK` for the halves of operations.
        :param chunk: the tasks in order; the list object identifies the chunk.
        """
        raise NotImplementedError

    def compute_collections(self, inputs: Sequence[Any]) -> list[Any]:
        """Compute the Dask collections among the inputs of a run, on the thread of its caller.

        It may block, and what it raises is raised there.

        :param inputs: collections, and futures of ``distributed``.
        :returns: for each its value, or a :class:`~feste.scheduler.Later`: then its node, whose op is
            :data:`feste.scheduler.COLLECTION`, is run by :meth:`call` with what that holds.
        """
        return compute_together(inputs)

    def reclaim(self, chunk: list[PyTask]) -> None:
        """Return the unstarted tasks of a chunk if it has made no progress since the last call.

        Reports ``returned``. Called only where :meth:`chunk_seconds` is a millisecond at most.

        :param chunk: the list given to :meth:`call`.
        """

    def abandon(self, chunk: list[PyTask]) -> None:
        """Stop a chunk if it can be stopped, because its run has ended. It still reports ``free``.

        :param chunk: the list given to :meth:`call`.
        """

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Bring remote results here; report ``fetched``. Called only if ``remote`` is True.

        :param handle: the brain's number for the fetch.
        :param refs: results that were reported earlier.
        """
        raise NotImplementedError

    def release(self, ref: Any) -> None:
        """Release a result that nothing needs any more.

        :param ref: a result that was reported earlier.
        """

    def cancel(self, handle: int) -> None:
        """Stop waiting for a request; it still reports ``sent``, with an Interrupted error.

        :param handle: the brain's number for the request.
        """
        raise NotImplementedError

    def has_lost(self, work: int | list[PyTask]) -> bool:
        """Return whether it will never report some work: a run that waits for nothing else ends.

        :param work: the handle of a request that was sent, or a chunk that was called, and has not
            been reported yet.
        """
        return False

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once in one place.

        :param where: the result of :meth:`place`, or :data:`QUICK`.
        """
        raise NotImplementedError

    def place(self, task: Any) -> str:
        """Return the name of the place where a task runs.

        :param task: the op of a node that is not a call of an operation.
        """
        return "async" if task.is_async else str(task.executor)

    def chunk_seconds(self, where: str) -> float:
        """Return how many seconds of expected work may share a chunk; 0 if no tasks share one.

        Above a millisecond, work is first spread over the free places, and the executor itself has to
        return what waits behind a task that takes longer than expected.

        :param where: as for :meth:`capacity`.
        """
        return CHUNK if where in _CHUNKED else 0.0

    @property
    def stale(self) -> bool:
        """Whether the next run needs a new executor, since something this one needs is closed."""
        return False

    #: Whether reported results are references that must be fetched.
    remote = False

    def close(self) -> None:
        """Stop; no method is called afterwards."""
        raise NotImplementedError


class Scheduler:
    """A whole scheduler, for plugins that need more than an executor: it runs the graph itself.

    :param target: the value of the setting ``scheduler``.

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
        """Run an optimized graph and return the values of the given keys.

        :param graph: the graph; ``dict(graph)`` is a Dask graph.
        :param keys: the wanted keys.
        :param settings: the settings of the run.
        """
        raise NotImplementedError
