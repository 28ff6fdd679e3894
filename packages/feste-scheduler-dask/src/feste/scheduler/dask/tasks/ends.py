"""Watch chunks on workers, and report what has become of their tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from distributed.scheduler import KilledWorker

from feste.backend import Backend, Call
from feste.errors import ConfigError, FesteError, WorkerLost
from feste.node import topological
from feste.scheduler import Emission, PyTask, Reporter, describe
from feste.scheduler.dask.cluster.link import Link
from feste.scheduler.dask.pickling import was_here
from feste.scheduler.dask.tasks.known import Known
from feste.scheduler.dask.tasks.notes import Note, Notes
from feste.scheduler.dask.tasks.outcomes import Emitted, Held, Left, Mixed, Several
from feste.scheduler.dask.tasks.parts import SHARED
from feste.scheduler.dask.tasks.refs import FIRST, Fetcher, Promises, Ref, Result, lost

__all__ = ["Ends", "Sent"]

#: The most names of tasks in the name of their chunk.
_NAMED = 3

Chunk = list[PyTask]


class Sent:
    """A chunk that is one task of Dask.

    :param tasks: the chunk.
    """

    __slots__ = ("begun", "future", "gone", "number", "tasks")

    def __init__(self, tasks: Chunk) -> None:
        self.tasks = tasks
        self.begun = perf_counter()
        #: The number of its promise; below 0 if it was not even sent.
        self.number = -1
        self.future: Any = None
        #: The places of tasks that it gave back while it was under way.
        self.gone: set[int] = set()

    @property
    def name(self) -> str:
        """What Dask's dashboard calls it: the names of its tasks."""
        names = dict.fromkeys(task.node.op.name for task in self.tasks)
        more = "+\N{HORIZONTAL ELLIPSIS}" if len(names) > _NAMED else ""
        return "+".join(islice(names, _NAMED)) + more

    @property
    def is_alone(self) -> bool:
        """Whether it has one task only."""
        return len(self.tasks) == 1

    @property
    def left(self) -> Chunk:
        """The tasks that it has not given back."""
        return [task for at, task in enumerate(self.tasks) if at not in self.gone]


class Ends:
    """The chunks under way on the workers of a cluster.

    :param link: the connection.
    :param report: receives the reports.
    :param promises: records the pending results.
    :param fetcher: fetches results.
    :param known: learns from them.
    """

    def __init__(
        self, link: Link, report: Reporter, promises: Promises, fetcher: Fetcher, known: Known
    ) -> None:
        self._link = link
        self._client = link.client
        self._report = report
        self._promises = promises
        self._fetcher = fetcher
        self.notes = Notes(link.client, self._give_back)
        self._known = known
        self._backends: WeakKeyDictionary[Any, dict[Hashable, Backend]] = WeakKeyDictionary()
        #: The chunks under way, by number and by the identity of their list.
        self._numbered: dict[int, Sent] = {}
        self._chunks: dict[int, Sent] = {}

    # --- from other threads -----------------------------------------------------------------------

    def expect(self, sent: Sent) -> None:
        """Expect the end of a chunk, which is about to be sent.

        :param sent: the chunk.
        """
        sent.number = self._promises.make(lambda error: self.fail(sent, error))
        self._numbered[sent.number] = self._chunks[id(sent.tasks)] = sent
        self.notes.expect(sent.number)

    def watch(self, sent: Sent) -> bool:
        """Report the end of a chunk when it comes; return False if the client's loop has ended.

        :param sent: the chunk, which has been sent.
        """
        return bool(self._fetcher.on_loop(self._watch(sent)))

    def refuse(self, sent: Sent, error: FesteError) -> None:
        """Report a chunk that could not be sent.

        :param sent: the chunk.
        :param error: why.
        """
        if not self._promises.keep(sent.number):
            return  # it was given up before
        if sent.is_alone:
            self.fail(sent, error)
        else:
            self._leave(sent)

    def forget(self, chunk: Chunk) -> Any:
        """Return the future of a chunk that is wanted no more, or None.

        :param chunk: any list of tasks.
        """
        sent = self._chunks.pop(id(chunk), None)
        return sent and sent.future

    def fail(self, sent: Sent, error: FesteError) -> None:
        """Report that all tasks of a chunk have failed.

        :param sent: the chunk.
        :param error: why.
        """
        if self._link.closed:  # first, so that the run begins nothing else
            self._report.broken(self._link.lost)
        seconds = perf_counter() - sent.begun
        self._known.apart.difference_update(task.key for task in sent.left)
        self._finish(sent, [(task, False, error.copy(), seconds) for task in sent.left])

    # --- on the client's loop ---------------------------------------------------------------------

    async def _watch(self, sent: Sent) -> None:
        future = sent.future
        error: BaseException | None = await future.exception(asynchronous=True)
        if isinstance(error, KilledWorker) and sent.is_alone:
            error = await self._fetcher.run_alone(future, lambda: self._is_wanted(sent))
        if not self._promises.keep(sent.number):
            return
        result = Result(future)
        if future.status != "finished":
            if sent.is_alone or not self._is_wanted(sent):
                self.fail(sent, _lost(sent.tasks[0], error))
            else:
                self._leave(sent)
        elif future.type in (Held, Several):
            self._sort(sent, result, result)
        else:  # nodes or errors: small, and needed here
            small = result
            if future.type is Mixed:
                small = self._part(sent.name, Mixed.without_values, future)
            self._fetcher.bring([Ref(small)], partial(self._sort, sent, result, small))

    def _is_wanted(self, sent: Sent) -> bool:
        return id(sent.tasks) in self._chunks

    def _sort(self, sent: Sent, result: Result, small: Result) -> None:
        """Report the outcomes of a chunk.

        :param sent: the chunk.
        :param result: what it has left on its worker.
        :param small: the same without values, if these are not all that there is.
        """
        try:
            self._report_each(sent, result, small)
        except Exception as error:  # a bug must not leave the run waiting
            self.fail(sent, describe(error))

    def _report_each(self, sent: Sent, result: Result, small: Result) -> None:
        tasks, whole = sent.tasks, small.outcome
        if not sent.is_alone and whole is not None and not isinstance(whole, Several):
            self._leave(sent)  # it could not be read on the worker, or not be fetched
            return
        kinds: Sequence[type] = [Held] * len(tasks)
        if whole is not None:
            kinds = whole.kinds if isinstance(whole, Several) else [type(whole)]
        note = self.notes.take(sent.number)
        each = (perf_counter() - sent.begun) / len(tasks)
        worker, seconds, sizes = note or Note("", [each] * len(tasks), [SHARED + 1])
        self._known.learn(tasks, note, sum(seconds))
        # values that are larger than expected are not held and sent along with the others
        apart = not sent.is_alone and sum(sizes) > SHARED
        ended: list[tuple[Any, ...]] = []
        left: Chunk = []
        for at, task in enumerate(tasks):
            if at in sent.gone:
                continue
            if kinds[at] is Left:
                left.append(task)
                continue
            self._known.apart.discard(task.key)
            if apart and kinds[at] is Held:
                ref = Ref(self._part(task.node.op.name, Several.outcome, result.future, at))
            else:
                ref = Ref(result if kinds[at] is Held else small, -1 if sent.is_alone else at)
            ended.append((task, *self._end(task, kinds[at], ref), seconds[at], worker))
        self._finish(sent, ended, left)

    def _part(self, name: str, take: Callable[..., Any], future: Any, *args: Any) -> Result:
        """Return a part of what a chunk has left on its worker, taken there."""
        options: dict[str, Any] = {"pure": False, "priority": FIRST}
        return Result(
            self._client.submit(take, future, *args, key=f"{name}-{uuid4().hex}", **options)
        )

    def _end(self, task: PyTask, kind: type, ref: Ref) -> tuple[bool, Any]:
        """Return whether a task returned, and its result or error."""
        if kind is Held:
            return True, ref
        if kind is not Emitted or not ref.ok:
            return False, ref.value
        try:
            self._adopt(task.run, ref.value)
        except Exception as error:  # a backend whose configuration cannot be read
            return False, describe(error)
        return True, ref.value

    def _give_back(self, number: int, places: Sequence[int]) -> None:
        """Return tasks that wait behind a long one; their chunk is still under way."""
        sent = self._numbered.get(number)
        if sent is not None:
            fresh = [
                at for at in places if at not in sent.gone
            ]  # one that runs again tells it again
            sent.gone.update(fresh)
            self._report.returned([sent.tasks[at] for at in fresh])

    def _leave(self, sent: Sent) -> None:
        """Let the tasks of a chunk that failed as a whole run again, each alone: one was guilty."""
        self._known.apart.update(task.key for task in sent.left)
        self._finish(sent, [], sent.left)

    def _finish(
        self, sent: Sent, ended: list[tuple[Any, ...]], left: Sequence[PyTask] = ()
    ) -> None:
        self._numbered.pop(sent.number, None)
        self._chunks.pop(id(sent.tasks), None)
        self.notes.take(sent.number)
        if ended:
            self._report.done_together(ended)
        if left:
            self._report.returned(left)
        self._report.free("worker", sent.tasks)

    def _adopt(self, run: Any, emission: Emission) -> None:
        """Replace backends that were made on workers by equal ones of the run, if there are any."""
        here = self._backends.get(run)
        if here is None:
            here = self._backends[run] = {c.token: c for c in run.clients()}
        for node in topological(emission.nodes):
            op = node.op
            if isinstance(op, Call) and not was_here(op.client):
                client = here.setdefault(op.client.token, op.client)
                node.op = op if client is op.client else op.operation.__get__(client, type(client))


def _lost(task: PyTask, error: BaseException | None) -> FesteError:
    if isinstance(error, KilledWorker):
        return WorkerLost(
            f"the Dask workers that ran {task.name} died, {error.allowed_failures + 1} in a row; it "
            "may need more memory than there is",
            billed="no",
        )
    if isinstance(error, ImportError):
        return ConfigError(
            f"the Dask workers cannot run tasks of Feste: {type(error).__name__}: {error}. Install "
            "feste-scheduler-dask there, in the version of the client"
        )
    return lost(error)
