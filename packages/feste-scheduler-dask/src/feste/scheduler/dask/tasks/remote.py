"""Run users' tasks on a worker, and tell the client what they took."""

from __future__ import annotations

import asyncio
import io
import pickle
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

import distributed

from feste.errors import NodeError
from feste.scheduler import Emission, PyTask, describe, evaluate, inside, result_of
from feste.scheduler.dask.preparing import Preparation
from feste.scheduler.dask.tasks.outcomes import Emitted, Failed, Held, Left, Outcome, Several
from feste.scheduler.dask.tasks.refs import Ref, Result

if TYPE_CHECKING:
    from feste.scheduler.dask.tasks.large import Large

__all__ = ["packed", "work"]

#: Seconds after which a chunk gives back the tasks that it has not begun; expected are 0.02 at most.
TAIL = 0.1


def packed(chunk: Sequence[PyTask], large: Large) -> tuple[bytes, list[Any]]:
    """Return tasks as bytes, and the futures of what they need besides: results and large values.

    :param chunk: the tasks; each may need earlier ones.
    :param large: sends the large values.
    """
    places = {id(task): at for at, task in enumerate(chunk)}
    results: dict[int, Result] = {}
    numbers: dict[int, int] = {}
    items = []
    for task in chunk:
        values = list(task.values)
        holes = []  # slot, number of the result or -1 for this chunk, place in it or -1 for all
        for slot, value in enumerate(values):
            if type(value) is Ref:
                results[id(value.result)] = value.result
                number = numbers.setdefault(id(value.result), len(numbers))
                holes.append((slot, number, value.at))
            elif type(value) is PyTask:
                holes.append((slot, -1, places[id(value)]))
        for slot, _, _ in holes:
            values[slot] = None
        items.append((task.node.op, task.args, task.kwargs, values, holes))
    data, values = large.packed(chunk, items, len(results))
    return data, [*(result.future for result in results.values()), *values]


def work(
    topic: str, number: int, data: bytes, *results: Any, preparation: Preparation | None = None
) -> Any:
    """Run tasks on a worker and return their outcomes, of one task its own; never raises.

    :param topic: where to tell the client what the tasks took.
    :param number: the client's number for them.
    :param data: the bytes of :func:`packed`.
    :param results: the results on workers and the large values that they need.
    :param preparation: what the worker does first, or None.
    """
    if preparation is not None:
        failed = preparation.done(str(distributed.get_worker().name))
        if failed is not None:
            return failed
    with inside("worker"):
        try:
            items = _read(data, results)
        except BaseException as error:  # what a user's object does when it is unpickled
            return Failed.of(describe(error))
        return _Chunk(topic, number, items, results).run()


class _Unpickler(pickle.Unpickler):
    """Puts large values back where they were left out.

    :param data: the bytes.
    :param results: what a task of Dask was given.
    """

    def __init__(self, data: bytes, results: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._results = results

    def persistent_load(self, pid: int) -> Any:
        """Return a large value.

        :param pid: its position.
        """
        outcome = self._results[pid]
        if type(outcome) is Failed:
            raise outcome.raised()
        return outcome.value


def _read(data: bytes, results: Sequence[Any]) -> Any:
    try:
        return _Unpickler(data, results).load()
    except ImportError as error:
        raise NodeError(
            f"a worker lacks something that the task needs: {type(error).__name__}: {error}. "
            "Install it on the workers, or send it there with client.upload_file()",
            cause_type=type(error).__name__,
        ) from None


class _Chunk:
    """Tasks that share one task of Dask.

    :param topic: as for :func:`work`.
    :param number: as for :func:`work`.
    :param items: the tasks, as :func:`packed` made them.
    :param results: as for :func:`work`.
    """

    def __init__(self, topic: str, number: int, items: Sequence[Any], results: Sequence[Any]):
        self._worker = distributed.get_worker()
        self._topic = topic
        self._number = number
        self._items = items
        self._results = results
        self._left = deque(range(len(items)))
        self._outcomes: list[Outcome] = [Left()] * len(items)

    def run(self) -> Outcome | Several:
        """Run the tasks in order, and tell what they took as the last act."""
        if len(self._items) > 1:
            self._worker.loop.add_callback(self._worker.loop.call_later, TAIL, self._give_back)
        seconds = [0.0] * len(self._items)
        while self._left:
            try:
                at = self._left.popleft()
            except IndexError:  # given back in the meantime
                break
            begun = perf_counter()
            self._outcomes[at] = self._outcome(*self._items[at])
            seconds[at] = perf_counter() - begun
        sizes = [o.__sizeof__() if type(o) is Held else 0 for o in self._outcomes]
        # in the same stream as the end of Dask's task, so the client has it before that
        self._tell(name=str(self._worker.name), seconds=seconds, sizes=sizes)
        return self._outcomes[0] if len(self._outcomes) == 1 else Several.of(self._outcomes)

    def _outcome(self, op: Any, args: Any, kwargs: Any, values: list[Any], holes: Any) -> Outcome:
        for slot, number, at in holes:
            outcome = self._outcomes[at] if number < 0 else self._results[number]
            if isinstance(outcome, Several):
                outcome = outcome.outcomes[at]
            if type(outcome) is not Held:  # a result that could not be sent here, or a failed task
                return Left() if number < 0 else outcome
            values[slot] = outcome.value
        try:
            value = evaluate(op.fn, args, kwargs, values)
            value = result_of(_awaited(value) if op.is_async else value)
        except BaseException as error:  # a task may raise anything, even SystemExit
            return Failed.of(describe(error))
        return Emitted(value) if type(value) is Emission else Held(value)

    def _tell(self, **what: Any) -> None:
        self._worker.log_event(self._topic, {"number": self._number, **what})

    def _give_back(self) -> None:
        """Give back what waits behind a long task; runs on the worker's loop."""
        taken = []
        while self._left:
            try:
                taken.append(self._left.popleft())
            except IndexError:  # its thread took the last one
                break
        if taken:
            self._tell(left=taken)


# --- users' async tasks share one loop per worker, as in a single process -------------------------

_loop: asyncio.AbstractEventLoop | None = None
_lock = threading.Lock()


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on the loop for users' tasks, and block this thread until it ends."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            name = "feste-tasks"
            threading.Thread(target=_run, args=(_loop,), name=name, daemon=True).start()
    ended: Future[Any] = Future()
    asyncio.run_coroutine_threadsafe(_end(coroutine, ended), _loop)
    return ended.result()


async def _end(coroutine: Coroutine[Any, Any, Any], ended: Future[Any]) -> None:
    try:
        ended.set_result(await coroutine)
    except BaseException as error:  # asyncio itself would let SystemExit end the loop
        ended.set_exception(error)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    with inside("worker"):
        while True:
            with suppress(SystemExit, KeyboardInterrupt):  # of a task that user code started
                loop.run_forever()
