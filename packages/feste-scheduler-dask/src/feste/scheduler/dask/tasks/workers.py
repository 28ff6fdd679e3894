"""Run tasks on the workers of a cluster: pickle them, send them, and give them up."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping
from contextlib import suppress
from pkgutil import resolve_name
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any
from uuid import uuid4

from dask.base import get_annotations
from dask.task_spec import Task
from feste.errors import ConfigError, FesteError
from feste.scheduler import PyTask, Reporter, context_of, describe
from feste.scheduler.dask.cluster.link import Link
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.preparing import Preparation
from feste.scheduler.dask.tasks.ends import Ends, Sent
from feste.scheduler.dask.tasks.inputs import Inputs
from feste.scheduler.dask.tasks.known import Known
from feste.scheduler.dask.tasks.large import Large, quiet
from feste.scheduler.dask.tasks.offers import Offers
from feste.scheduler.dask.tasks.refs import Fetcher, Promises, lost
from feste.scheduler.dask.tasks.remote import packed, work

__all__ = ["Workers"]

#: Seconds between two checks of the cluster's size.
_REFRESH = 1.0
#: The fewest and the most chunks in flight for each thread, and their seconds of work: so much that
#: no thread waits for the client, and that an adaptive cluster sees enough to grow.
_FEWEST, _MOST = 2, 16
_IN_FLIGHT, _IN_SIGHT = 1.0, 10.0
#: The function that runs a chunk, by its name: a worker that cannot import it fails the task, where it
#: would end with an object that it cannot even read.
_WORK = Task(None, resolve_name, f"{work.__module__}:{work.__name__}")

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
        self._preparation = dumps(preparation) if preparation is not None else b""
        self._link = link
        self._client = link.client
        self._report = report
        self._offers = Offers(link)
        self._looked = monotonic()
        self._promises = Promises()
        self.fetcher = Fetcher(self._client, self._promises)
        self.known = Known()
        self._ends = Ends(link, report, self._promises, self.fetcher, self.known)
        self._large = Large(self._client)
        self.inputs = Inputs(self._client, self._promises, self.fetcher, report)
        self._queue: SimpleQueue[tuple[str, Chunk] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="feste-dask", daemon=True)
        self._thread.start()

    def capacity(self, needs: Mapping[str, float]) -> int:
        """Return how many chunks may be in flight.

        :param needs: the resources that each needs.
        """
        wanted = _IN_SIGHT if self._offers.may_grow else _IN_FLIGHT
        each = wanted / self.known.pace if self.known.pace else 0.0
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
            self._ends.fail(Sent(chunk), lost(None))

    def abandon(self, chunk: Chunk) -> None:
        """Cancel tasks.

        :param chunk: any list of tasks; one that does not run here is ignored.
        """
        future = self._ends.forget(chunk)
        if future is not None:
            self.fetcher.on_loop(self._client.cancel([future], asynchronous=True))

    def close(self) -> None:
        """Give up work under way, and close the link."""
        self._queue.put(None)
        self._thread.join(timeout=1.0)
        self._ends.notes.close()
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
        sent = Sent(chunk)
        self._ends.expect(sent)
        refused: FesteError = lost(None)
        try:
            self._check(where, chunk[0])
            # in the user's context, so that dask.annotate() and similar apply
            sent.future = context_of(chunk[0]).run(self._submit, sent)
            if self._ends.watch(sent):
                return
        except BaseException as error:  # pickling users' objects failed, or Dask refused
            refused = describe(error)
        self._ends.refuse(sent, refused)

    def _check(self, where: str, task: PyTask) -> None:
        op: Any = task.node.op
        if self._offers.check(op.name, op.resources):
            self._report.capacity(where)

    def _submit(self, sent: Sent) -> Any:
        chunk = sent.tasks
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
        options: dict[str, Any] = {"key": f"{sent.name}-{uuid4().hex}", "pure": False}
        if "priority" not in get_annotations():
            options["priority"] = chunk[0].run.program.rank[chunk[0].index]
        if op.resources:
            options["resources"] = dict(op.resources)
        if self._preparation:
            options["preparation"] = self._preparation
        with quiet():
            return self._client.submit(
                operator.call, _WORK, self._ends.notes.topic, sent.number, data, *futures, **options
            )
