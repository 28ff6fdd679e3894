"""The hands: what does the work that the brain decides on.

An :class:`Executor` starts things and reports how they went; it never decides. The brain calls it
from one thread, so none of its methods may wait. To run Feste's graphs elsewhere, derive from it and
offer the class by the hook ``feste_schedulers``; :class:`feste.scheduler.LocalExecutor` is a good
base, since requests usually stay where the gate is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request
from feste.graph import FesteGraph

if TYPE_CHECKING:
    from feste.scheduler.run import Run

__all__ = ["Executor", "Post", "PyTask", "Scheduler"]

Post = Callable[[tuple[Any, ...]], None]
"""How hands report: ``post(("done", task, ok, value, seconds))`` and the like; thread-safe."""


class PyTask:
    """One piece of Python to run: a user's task, or a half of an operation.

    :param run: the run it belongs to.
    :param index: its node's position.
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
        return self.run.program.nodes[self.index].key


class Executor:
    """The interface of hands; every method returns at once, results are posted.

    Posted reports, as tuples: ``("done", task, ok, value, seconds)`` when a task ended (``ok`` False:
    ``value`` is the exception); ``("returned", tasks)`` for tasks of a chunk that were not begun;
    ``("many", reports)`` for several of these at once; ``("free", where, chunk)`` when a chunk is through; ``("sent", handle, ok, value, seconds)`` when a
    request ended; ``("fetched", handle, values)``; ``("capacity",)`` when :meth:`capacity` changed.

    :param target: what the setting ``scheduler`` was: a name, a URL or an object.
    """

    def __init__(self, target: Any = None) -> None:
        self.target = target

    def start(self, post: Post) -> None:
        """Get ready; called once before anything else.

        :param post: where to report.
        """
        raise NotImplementedError

    def send(self, handle: int, call: Call[Any], request: Request) -> None:
        """Send a request; reports ``sent``.

        :param handle: the brain's number for it.
        :param call: the operation to send it with.
        :param request: the request.
        """
        raise NotImplementedError

    def call(self, where: str, chunk: list[PyTask]) -> None:
        """Run tasks one after the other; reports ``done`` for each as it ends, then ``free``.

        A task whose inputs failed within the chunk, and those after one that returned nodes, are not
        begun: they are reported as ``returned``.

        :param where: what :meth:`place` said, or ``"thread"`` for the halves of operations.
        :param chunk: the tasks, in order; the list is the chunk's identity.
        """
        raise NotImplementedError

    def reclaim(self, chunk: list[PyTask]) -> None:
        """Take back what is not begun of a chunk, if it is no further than the last time it was asked;
        reports ``returned``.

        :param chunk: the list that was given to :meth:`call`.
        """

    def abandon(self, chunk: list[PyTask]) -> None:
        """Give a chunk up, as far as it can be stopped: its run is over. It still reports ``free``.

        :param chunk: the list that was given to :meth:`call`.
        """

    def fetch(self, handle: int, refs: Sequence[Any]) -> None:
        """Bring values here; reports ``fetched``. Hands whose results are the values need it not.

        :param handle: the brain's number for it.
        :param refs: results that were posted.
        """
        raise NotImplementedError

    def release(self, ref: Any) -> None:
        """Forget a result that nobody needs any more.

        :param ref: a result that was posted.
        """

    def cancel(self, handle: int) -> None:
        """Stop waiting for a request; it still reports ``sent``, with an Interrupted error.

        :param handle: the brain's number for it.
        """
        raise NotImplementedError

    def capacity(self, where: str) -> int:
        """Return how many chunks may run at once.

        :param where: what :meth:`place` said, or ``"thread"``.
        """
        raise NotImplementedError

    def place(self, task: Any) -> str:
        """Return where the calls of a task run.

        :param task: the op of a node that is no call of an operation.
        """
        if getattr(task, "is_async", False):
            return "async"
        return getattr(task, "executor", "thread")

    @property
    def stale(self) -> bool:
        """Whether the next run shall have new hands: what these need is closed."""
        return False

    #: Whether posted results are only references, to be fetched.
    remote = False
    #: Whether small tasks, and chains of them, are given as one chunk.
    chunking = True

    def close(self) -> None:
        """Stop; nothing is called after it."""
        raise NotImplementedError


class Scheduler:
    """A whole scheduler, for those who need more than other hands: it runs the graph itself.

    :param target: what the setting ``scheduler`` was.
    """

    def __init__(self, target: Any = None) -> None:
        self.target = target

    def run(self, graph: FesteGraph, keys: Sequence[str]) -> Sequence[Any]:
        """Return the values of some keys of an optimized graph.

        :param graph: the graph; ``dict(graph)`` is a Dask graph.
        :param keys: the wanted keys.
        """
        raise NotImplementedError
