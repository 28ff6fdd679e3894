"""Run one user's task on a worker, and keep and transfer its outcome.

A worker keeps a :class:`Held` (a value), an :class:`Emitted` (a result with nodes) or a
:class:`Failed`. The client learns the class when a result is ready, without fetching it. All three
can always be transferred: what cannot be pickled arrives as a ``Failed`` that explains it, whereas
Dask alone would request such a value for ever.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Coroutine
from typing import Any, SupportsIndex

from dask.sizeof import sizeof
from feste.errors import FesteError, NodeError
from feste.scheduler import Emission, describe, evaluate, inside, result_of
from feste.scheduler.dask.pickling import dumps

__all__ = ["Emitted", "Failed", "Held", "held", "packed", "work"]


def packed(op: Any, args: Any, kwargs: Any, values: list[Any], holes: list[int]) -> bytes:
    """Return a task as bytes, without the results that are on workers already.

    :param op: the task.
    :param args: packed positional arguments.
    :param kwargs: packed keyword arguments.
    :param values: the values for the slots.
    :param holes: the positions of values that are on workers.
    """
    return dumps((op, args, kwargs, values, holes))


def work(data: bytes, *results: Any) -> Any:
    """Run a task on a worker and return its outcome; never raises.

    :param data: the result of :func:`packed`.
    :param results: the outcomes of other tasks that fill the holes.
    """
    with inside("worker"):
        try:
            op, args, kwargs, values, holes = _read(data)
            for position, result in zip(holes, results, strict=True):
                if type(result) is Failed:
                    return result
                values[position] = result.value
            value = evaluate(op.fn, args, kwargs, values)
            value = result_of(_awaited(value) if op.is_async else value)
        except BaseException as error:  # a task may raise anything, even SystemExit
            return Failed.of(describe(error))
    return Emitted(value) if type(value) is Emission else Held(value)


def held(value: Any) -> Held:
    """Take a result of Dask's own into the form in which workers keep results of tasks.

    :param value: the result.
    """
    return Held(value)


def _read(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except ImportError as error:
        raise NodeError(
            f"a worker lacks something that the task needs: {type(error).__name__}: {error}. "
            "Install it on the workers, or send it there with client.upload_file()",
            cause_type=type(error).__name__,
        ) from None


class Held:
    """A value on a worker.

    :param value: the value.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __sizeof__(self) -> int:  # Dask uses it to measure the memory of workers
        return int(sizeof(self.value))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        arrays: list[pickle.PickleBuffer] = []  # sent separately, so that they are not copied
        try:
            data = dumps(self.value, int(protocol), arrays)
        except Exception as error:  # users' objects may raise anything
            return Failed.of(_stuck("sent to another process", error)).__reduce__()
        return (_arrived, (type(self), data, *arrays))


class Emitted(Held):
    """An :class:`~feste.scheduler.emission.Emission` on a worker."""

    __slots__ = ()


class Failed:
    """An error on a worker, as plain data.

    :param error: the error.
    :param cause: the pickled original exception, or empty bytes.
    """

    __slots__ = ("cause", "error")

    def __init__(self, error: FesteError, cause: bytes = b"") -> None:
        self.error = error
        self.cause = cause

    @classmethod
    def of(cls, error: FesteError) -> Failed:
        """Return the outcome for an error; its cause is kept if it can be pickled.

        :param error: the error.
        """
        try:
            return cls(pickle.loads(dumps(error)), _pickled(error.__cause__))
        except Exception:  # an error class of the user that cannot be pickled
            return cls(NodeError(str(error), cause_type=type(error).__name__))

    def raised(self) -> FesteError:
        """Return the error, with its cause if that can be unpickled here."""
        if self.cause:
            try:
                cause = pickle.loads(self.cause)
                cause.add_note(f"On the worker:\n{getattr(self.error, 'traceback', '')}")
                self.error.__cause__ = cause
            except Exception:  # its class exists on the worker only
                pass
            self.cause = b""
        return self.error

    def __repr__(self) -> str:
        return f"Failed({self.error!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Failed, (self.error, self.cause))


def _pickled(cause: BaseException | None) -> bytes:
    if cause is None:
        return b""
    # drop the frames, which in the client would keep their variables alive; the text is kept
    cause.__traceback__ = cause.__cause__ = cause.__context__ = None
    try:
        data = dumps(cause)
        pickle.loads(data)
    except Exception:  # see Held
        return b""
    return data


def _arrived(kind: Callable[[Any], Any], data: bytes, *arrays: Any) -> Any:
    try:
        return kind(pickle.loads(data, buffers=arrays))
    except Exception as error:  # an unknown class, or one that fails to unpickle
        return Failed.of(_stuck("read in another process", error))


def _stuck(what: str, error: Exception) -> NodeError:
    kind = type(error).__name__
    return NodeError(f"the result cannot be {what}: {kind}: {error}", cause_type=kind)


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
    return asyncio.run_coroutine_threadsafe(coroutine, _loop).result()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    with inside("worker"):
        loop.run_forever()
