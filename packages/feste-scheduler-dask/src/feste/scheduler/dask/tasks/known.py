"""What earlier chunks have taught about tasks: the size of their results, and how long chunks take."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from feste.scheduler import PyTask
from feste.scheduler.dask.tasks.notes import Note

__all__ = ["Known"]


class Known:
    """What is known of the tasks of a cluster, by their names.

    >>> known = Known()
    >>> known.pace
    0.0
    """

    def __init__(self) -> None:
        #: How many seconds a chunk takes on its worker, about; 0 if that is not known.
        self.pace = 0.0
        #: The keys of nodes whose chunk failed as a whole: they run again, each alone.
        self.apart: set[str] = set()
        #: The largest results of tasks in bytes, by name.
        self.sizes: dict[str, int] = {}

    def size(self, task: PyTask) -> float:
        """Return the size of a task's results in bytes; infinity if it must not share a task of Dask.

        :param task: the task.
        """
        return inf if task.key in self.apart else self.sizes.get(task.name, inf)

    def learn(self, tasks: Sequence[PyTask], note: Note | None, seconds: float) -> None:
        """Remember the largest results, and the mean time of chunks.

        :param tasks: the tasks of a chunk.
        :param note: what its worker told, or None.
        :param seconds: how long it took there.
        """
        self.pace = 0.8 * (self.pace or seconds) + 0.2 * seconds
        if note is not None:
            for task, size in zip(tasks, note.sizes, strict=True):
                self.sizes[task.name] = max(size, self.sizes.get(task.name, 0))
