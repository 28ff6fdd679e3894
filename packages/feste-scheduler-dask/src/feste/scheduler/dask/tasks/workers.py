"""Run tasks on the workers of a cluster: send them, watch them, and report their outcomes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from math import inf
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from distributed.scheduler import KilledWorker

from dask.base import get_annotations
from feste.backend import Backend, Call
from feste.errors import ConfigError, FesteError, WorkerLost
from feste.node import topological
from feste.scheduler import Emission, PyTask, Reporter, context_of, describe
from feste.scheduler.dask.cluster.link import Link
from feste.scheduler.dask.pickling import was_here
from feste.scheduler.dask.preparing import Preparation
from feste.scheduler.dask.tasks.inputs import FIRST, Inputs
from feste.scheduler.dask.tasks.large import Large, quiet
from feste.scheduler.dask.tasks.notes import Note, Notes
from feste.scheduler.dask.tasks.offers import Offers
from feste.scheduler.dask.tasks.outcomes import Emitted, Held, Left, Mixed, Several
from feste.scheduler.dask.tasks.parts import SHARED
from feste.scheduler.dask.tasks.refs import Fetcher, Promises, Ref, Result, lost
from feste.scheduler.dask.tasks.remote import packed, work

__all__ = ["Workers"]

#: Seconds between two checks of the cluster's size.
_REFRESH = 1.0
#: The fewest and the most chunks in flight for each thread, and their seconds of work: so much that
#: no thread waits for the client, and that an adaptive cluster sees enough to grow.
_FEWEST, _MOST = 2, 16
_IN_FLIGHT, _IN_SIGHT = 1.0, 10.0
#: The most names of tasks in the name of their chunk.
_NAMED = 3

Chunk = list[PyTask]


class Workers:
    """The workers, with a thread that talks to them, because pickling and Dask may be slow.

    :param link: the connection.
    :param report: receives the reports.
    :param preparation: what a worker does before all else, or None.
    """

    def __init__(
        self, link: Link, report: Reporter, preparation: Preparation | None = None
    ) -> None:
        self._preparation = preparation
        self._link = link
        self._client = link.client
        self._report = report
        self._offers = Offers(link)
        self._looked = monotonic()
        self._notes = Notes(self._client, self._give_back)
        self._promises = Promises()
        self.fetcher = Fetcher(self._client, self._promises)
        self._large = Large(self._client)
        self.inputs = Inputs(self._client, self._promises, self.fetcher, report)
        self._backends: WeakKeyDictionary[Any, dict[Hashable, Backend]] = WeakKeyDictionary()
        #: The chunks under way, by the number of their promise, and their futures.
        self._chunks: dict[int, Chunk] = {}
        self._futures: dict[int, Any] = {}
        #: The largest known size of the results of tasks, by name.
        self._sizes: dict[str, int] = {}
        #: The keys of nodes whose chunk failed as a whole: they run again, each alone.
        self._apart: set[str] = set()
        #: The places of tasks that were given back while their chunk is under way, by its number.
        self._given_back: dict[int, set[int]] = {}
        #: How many seconds a chunk takes on its worker, about; 0 if that is not known.
        self._pace = 0.0
        self._queue: SimpleQueue[tuple[str, Chunk] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="feste-dask", daemon=True)
        self._thread.start()

    def size(self, task: PyTask) -> float:
        """Return the size of a task's results in bytes; infinity if it must not share a task of Dask.

        :param task: the task.
        """
        return inf if task.key in self._apart else self._sizes.get(task.name, inf)

    def capacity(self, needs: Mapping[str, float]) -> int:
        """Return how many chunks may be in flight.

        :param needs: the resources that each needs.
        """
        wanted = _IN_SIGHT if self._offers.may_grow else _IN_FLIGHT
        each = wanted / self._pace if self._pace else 0.0
        window = int(min(max(each, _FEWEST), _MOST))
        return window * max(1, self._offers.room(needs))

    def run(self, where: str, chunk: Chunk) -> None:
        """Run tasks as one task of Dask.

        :param where: the place where they are counted.
        :param chunk: the tasks; they need equal resources.
        """
        if not self._link.closed:
            self._queue.put((where, chunk))
        else:
            self._fail(-1, chunk, perf_counter(), lost(None))

    def abandon(self, chunk: Chunk) -> None:
        """Cancel tasks.

        :param chunk: any list of tasks; one that does not run here is ignored.
        """
        future = self._futures.pop(id(chunk), None)
        if future is not None:
            self.fetcher.on_loop(self._client.cancel([future], asynchronous=True))

    def close(self) -> None:
        """Give up work under way, and close the link."""
        self._queue.put(None)
        self._thread.join(timeout=1.0)
        self._notes.close()
        self._link.close()
        self._promises.give_up(lost(None))
        with suppress(Empty):
            while True:
                waiting = self._queue.get_nowait()
                if waiting is not None:
                    self.run(*waiting)

    # --- on the thread that talks to Dask ---------------------------------------------------------

    def _serve(self) -> None:
        while True:
            where, chunk = "", None
            with suppress(Empty):
                waiting = self._queue.get(timeout=_REFRESH)
                if waiting is None:
                    return
                where, chunk = waiting
            waiting = None  # so that an idle thread keeps no values alive
            if chunk or self._promises:
                self._look()
            if chunk:
                self._send(where, chunk)

    def _look(self) -> None:
        """Update the size of the cluster; give up waiting tasks if the cluster is gone."""
        if self._link.closed:
            self._promises.give_up(lost(None))
        elif monotonic() - self._looked > _REFRESH:
            self._looked = monotonic()
            with suppress(Exception):  # it is closing; the next check notices that
                if self._offers.look():
                    self._report.capacity("worker")

    def _send(self, where: str, chunk: Chunk) -> None:
        begun = perf_counter()
        number = self._promises.make(lambda error: self._fail(number, chunk, begun, error))
        self._notes.expect(number)
        self._chunks[number] = chunk
        refused: FesteError = lost(None)
        try:
            self._check(where, chunk[0])
            # in the user's context, so that dask.annotate() and similar apply
            future = context_of(chunk[0]).run(self._submit, number, chunk)
            self._futures[id(chunk)] = future
            if self.fetcher.on_loop(self._watch(number, chunk, future, begun)):
                return
        except BaseException as error:  # pickling users' objects failed, or Dask refused
            refused = describe(error)
        if self._promises.keep(number):
            if len(chunk) > 1:
                self._leave(number, chunk)
            else:
                self._fail(number, chunk, begun, refused)

    def _check(self, where: str, task: PyTask) -> None:
        op: Any = task.node.op
        if self._offers.check(op.name, op.resources):
            self._report.capacity(where)

    def _submit(self, number: int, chunk: Chunk) -> Any:
        op: Any = chunk[0].node.op
        try:
            data, futures = packed(chunk, self._large)
        except BaseException as error:  # users' objects may raise anything, even SystemExit
            raise ConfigError(
                f"{op.name} runs on a Dask worker, but it or an argument cannot be sent there: "
                f"{type(error).__name__}: {error}. Give it plain data, or keep the task here with "
                "executor='inline'",
                origin=chunk[0].node.where,
            ) from None
        options: dict[str, Any] = {"key": f"{_name(chunk)}-{uuid4().hex}", "pure": False}
        if "priority" not in get_annotations():
            options["priority"] = chunk[0].run.program.rank[chunk[0].index]
        if op.resources:
            options["resources"] = dict(op.resources)
        if self._preparation is not None:
            options["preparation"] = self._preparation
        with quiet():
            return self._client.submit(work, self._notes.topic, number, data, *futures, **options)

    # --- on the client's loop, mostly --------------------------------------------------------------

    async def _watch(self, number: int, chunk: Chunk, future: Any, begun: float) -> None:
        """Report the end of a chunk on its worker."""
        error: BaseException | None = await future.exception(asynchronous=True)
        if isinstance(error, KilledWorker) and len(chunk) == 1:
            error = await self.fetcher.run_alone(future, lambda: id(chunk) in self._futures)
        if not self._promises.keep(number):
            return
        result = Result(future)
        if future.status != "finished":
            if len(chunk) > 1 and id(chunk) in self._futures:
                self._leave(number, chunk)
            else:
                self._fail(number, chunk, begun, _lost(chunk[0], error))
        elif future.type in (Held, Several):
            self._sort(number, chunk, result, begun)
        else:  # nodes or errors: small, and needed here
            small = result
            if future.type is Mixed:
                small = self._part(_name(chunk), Mixed.without_values, future)
            then = partial(self._sort, number, chunk, result, begun, small)
            self.fetcher.bring([Ref(small)], then)

    def _sort(
        self, number: int, chunk: Chunk, result: Result, begun: float, small: Result | None = None
    ) -> None:
        """Report the outcomes of a chunk."""
        try:
            self._report_each(number, chunk, result, begun, small or result)
        except Exception as error:  # a bug must not leave the run waiting
            self._fail(number, chunk, begun, describe(error))

    def _report_each(
        self, number: int, chunk: Chunk, result: Result, begun: float, small: Result
    ) -> None:
        whole = small.outcome
        if len(chunk) > 1 and whole is not None and not isinstance(whole, Several):
            self._leave(number, chunk)  # it could not be read on the worker, or not be fetched
            return
        note, gone = self._forget(number)
        kinds: Sequence[type] = [Held] * len(chunk)
        if whole is not None:
            kinds = whole.kinds if isinstance(whole, Several) else [type(whole)]
        seconds = note.seconds if note else [(perf_counter() - begun) / len(chunk)] * len(chunk)
        worker = note.worker if note else ""
        self._learn(chunk, note, sum(seconds))
        # values that are larger than expected are not held and sent along with the others
        apart = len(chunk) > 1 and (note is None or sum(note.sizes) > SHARED)
        ended: list[tuple[Any, ...]] = []
        left: Chunk = []
        for at, task in enumerate(chunk):
            if at in gone:
                continue
            if kinds[at] is Left:
                left.append(task)
                continue
            self._apart.discard(task.key)
            if apart and kinds[at] is Held:
                ref = Ref(self._part(task.node.op.name, Several.outcome, result.future, at))
            else:
                ref = Ref(result if kinds[at] is Held else small, at if len(chunk) > 1 else -1)
            ended.append((task, *self._end(task, kinds[at], ref), seconds[at], worker))
        self._finish(chunk, ended, left)

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
        chunk = self._chunks.get(number)
        if chunk is not None:
            gone = self._given_back.setdefault(number, set())
            fresh = [
                at for at in places if at not in gone
            ]  # a chunk that runs again tells it again
            gone.update(fresh)
            self._report.returned([chunk[at] for at in fresh])

    def _forget(self, number: int) -> tuple[Note | None, set[int]]:
        self._chunks.pop(number, None)
        return self._notes.take(number), self._given_back.pop(number, set())

    def _learn(self, chunk: Chunk, note: Note | None, seconds: float) -> None:
        self._pace = 0.8 * (self._pace or seconds) + 0.2 * seconds
        if note is not None:
            for task, size in zip(chunk, note.sizes, strict=True):
                self._sizes[task.name] = max(size, self._sizes.get(task.name, 0))

    def _leave(self, number: int, chunk: Chunk) -> None:
        """Let the tasks of a chunk that failed as a whole run again, each alone: one was guilty."""
        left = self._not_given_back(number, chunk)
        self._apart.update(task.key for task in left)
        self._finish(chunk, [], left)

    def _fail(self, number: int, chunk: Chunk, begun: float, error: FesteError) -> None:
        if self._link.closed:  # first, so that the run begins nothing else
            self._report.broken(self._link.lost)
        seconds = perf_counter() - begun
        tasks = self._not_given_back(number, chunk)
        self._apart.difference_update(task.key for task in tasks)
        self._finish(chunk, [(task, False, error.copy(), seconds) for task in tasks])

    def _not_given_back(self, number: int, chunk: Chunk) -> Chunk:
        _, gone = self._forget(number)
        return [task for at, task in enumerate(chunk) if at not in gone]

    def _finish(
        self, chunk: Chunk, ended: list[tuple[Any, ...]], left: Sequence[PyTask] = ()
    ) -> None:
        self._futures.pop(id(chunk), None)
        if ended:
            self._report.done_together(ended)
        if left:
            self._report.returned(left)
        self._report.free("worker", chunk)

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


def _name(chunk: Chunk) -> str:
    """Return what Dask's dashboard calls a chunk: the names of its tasks."""
    names = dict.fromkeys(task.node.op.name for task in chunk)
    return "+".join(islice(names, _NAMED)) + ("+\N{HORIZONTAL ELLIPSIS}" * (len(names) > _NAMED))


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
