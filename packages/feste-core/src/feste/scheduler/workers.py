"""Which worker did what in a run, where its executor names workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from feste.scheduler.executor import PyTask

__all__ = ["WorkerRow", "Workers"]


@dataclass(slots=True)
class WorkerRow:
    """What one worker did.

    :param worker: its name.
    :param tasks: the number of tasks that it ran; tasks that ``fuse`` put together count as one.
    :param busy: the seconds that they took, summed: two at once count twice.
    :param requests: the number of requests that it sent, including failed ones.
    :param in_flight: the seconds that these were in flight, summed likewise.
    """

    worker: str
    tasks: int = 0
    busy: float = 0.0
    requests: int = 0
    in_flight: float = 0.0


class Workers:
    """The workers that did something in a run.

    >>> workers = Workers()
    >>> workers.sent([3, 4], 0.5, "worker-1")
    >>> workers.rows["worker-1"].requests, workers.take(3), workers.take(9)
    (1, 'worker-1', '')
    """

    __slots__ = ("_of", "rows")

    def __init__(self) -> None:
        #: Each worker's row, by its name.
        self.rows: dict[str, WorkerRow] = {}
        #: The last worker of each node that has not ended.
        self._of: dict[int, str] = {}

    def ran(self, task: PyTask, seconds: float, worker: str) -> None:
        """Note that a worker ran a piece of Python.

        :param task: the piece.
        :param seconds: its duration in seconds.
        :param worker: the worker's name.
        """
        row = self._row(worker)
        row.tasks += 1
        row.busy += seconds
        self.put(task.members, worker)

    def sent(self, members: Iterable[int], seconds: float, worker: str) -> None:
        """Note that a worker sent a request.

        :param members: the positions of its calls.
        :param seconds: its duration in seconds.
        :param worker: the worker's name.
        """
        row = self._row(worker)
        row.requests += 1
        row.in_flight += seconds
        self.put(members, worker)

    def put(self, members: Iterable[int], worker: str) -> None:
        """Note which worker nodes were on.

        :param members: the positions of nodes that have not ended.
        :param worker: the worker's name.
        """
        self._of.update(dict.fromkeys(members, worker))

    def of(self, i: int) -> str:
        """Return the last worker that a node was on, or an empty string for this process.

        :param i: the position of a node that has not ended.
        """
        return self._of.get(i, "")

    def take(self, i: int) -> str:
        """Return what :meth:`of` does, and forget it.

        :param i: the position of the node, which ends.
        """
        return self._of.pop(i, "")

    def _row(self, worker: str) -> WorkerRow:
        row = self.rows.get(worker)
        if row is None:
            row = self.rows[worker] = WorkerRow(worker)
        return row
