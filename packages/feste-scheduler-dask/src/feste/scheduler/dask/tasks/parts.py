"""Split a chunk into parts that run in one place each, and count it as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from feste.scheduler import PyTask, Reporter
from feste.scheduler.dask.tasks.refs import Ref

__all__ = ["BULKY", "SHARED", "PartReporter", "Parts", "lists_of", "refs_of", "split"]

#: A result of more bytes is alone in a task of Dask: others would be held and sent along with it.
BULKY = 65_536
#: The most bytes of results that share one.
SHARED = 1_048_576

Chunk = list[PyTask]


def lists_of(task: PyTask) -> Iterator[list[Any]]:
    """Yield the lists that may contain Refs: a task's values, and arguments of a call's halves.

    :param task: the task.
    """
    yield task.values
    if task.stage != "run":
        yield from (a for a in task.args if type(a) is list)


def refs_of(chunk: Chunk) -> list[Ref]:
    """Return the results on workers that tasks need.

    :param chunk: the tasks.
    """
    return [v for task in chunk for values in lists_of(task) for v in values if type(v) is Ref]


class Parts(NamedTuple):
    """A chunk that was split; each part runs in order, no part needs another.

    :param here: operators on values of this process, which would cost more to send.
    :param there: for workers, each to be one task of Dask.
    :param returned: tasks that need another part, so that their turn comes later.
    """

    here: Chunk
    there: list[Chunk]
    returned: Chunk


def split(chunk: Chunk, size: Callable[[PyTask], float]) -> Parts:
    """Split a chunk for workers.

    :param chunk: the tasks.
    :param size: returns the size of a task's result in bytes; infinity if it must be alone.
    """
    parts = Parts([], [], [])
    shared: Chunk = []
    room = 0.0
    homes: dict[int, Chunk] = {}
    able: set[int] = set()
    for task in chunk:
        inputs = [homes[id(v)] for v in task.values if type(v) is PyTask]
        takes = size(task)
        if (
            task.is_operator
            and all(home is parts.here for home in inputs)
            and not any(type(v) is Ref for v in task.values)
        ):
            home = parts.here
        elif inputs:
            home = inputs[0]
            if takes > BULKY or id(home) not in able or any(i is not home for i in inputs):
                home = parts.returned
        elif takes > BULKY:
            home = []
            parts.there.append(home)
        else:
            if not shared or takes > room:
                shared, room = [], SHARED
                able.add(id(shared))
                parts.there.append(shared)
            room -= takes
            home = shared
        homes[id(task)] = home
        home.append(task)
    return parts


class _Whole:
    """A chunk that was split.

    :param where: the place where the brain counts it.
    :param chunk: the chunk.
    :param parts: its parts.
    """

    __slots__ = ("chunk", "left", "parts", "where")

    def __init__(self, where: str, chunk: Chunk, parts: Sequence[Chunk]) -> None:
        self.where = where
        self.chunk = chunk
        self.parts = parts
        self.left = len(parts)


class PartReporter(Reporter):
    """Reports a chunk as free where the brain counts it, when all its parts are.

    :param report: the reporter to forward to.
    """

    __slots__ = ("_lock", "_parts", "_wholes")

    def __init__(self, report: Reporter) -> None:
        super().__init__(report.put, report.executor)
        self._lock = threading.Lock()
        self._parts: dict[int, _Whole] = {}
        self._wholes: dict[int, _Whole] = {}

    def split(self, where: str, chunk: Chunk, parts: Sequence[Chunk]) -> None:
        """Note the parts of a chunk, before they run.

        :param where: the place where the brain counts the chunk.
        :param chunk: the chunk.
        :param parts: its parts; the chunk itself may be the only one.
        """
        whole = _Whole(where, chunk, parts)
        with self._lock:
            self._wholes[id(chunk)] = whole
            self._parts.update((id(part), whole) for part in parts)
        if not parts:
            self._end(whole)

    def parts(self, chunk: Chunk) -> Sequence[Chunk]:
        """Return the parts of a chunk; of one that was not split, or has ended, itself.

        :param chunk: the chunk.
        """
        whole = self._wholes.get(id(chunk))
        return [chunk] if whole is None else whole.parts

    def free(self, where: str, chunk: Chunk) -> None:
        """Report that a chunk has finished, or that a part has.

        :param where: the place where it ran.
        :param chunk: the chunk, or the part.
        """
        with self._lock:
            whole = self._parts.pop(id(chunk), None)
            if whole is not None:
                whole.left -= 1
                if whole.left:
                    return
        if whole is None:
            super().free(where, chunk)
        else:
            self._end(whole)

    def _end(self, whole: _Whole) -> None:
        del self._wholes[id(whole.chunk)]
        super().free(whole.where, whole.chunk)
