"""What tasks on workers end with: kept there, and transferred whatever it is.

A worker keeps a :class:`Held` (a value), an :class:`Emitted` (a result with nodes) or a
:class:`Failed`, of several tasks a :class:`Several`. The client learns the class when a result is
ready, without fetching it. All can always be transferred: what cannot be pickled arrives as a
``Failed`` that explains it, whereas Dask alone would request such a value for ever.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

from distributed.sizeof import safe_sizeof

from feste.errors import FesteError, NodeError
from feste.scheduler import describe
from feste.scheduler.dask.pickling import dumps

__all__ = ["Emitted", "Failed", "Held", "Left", "Mixed", "Outcome", "Several"]

#: The size in bytes of what cannot tell its own, as Dask has it.
_UNKNOWN = 1_000_000


class Held:
    """A value on a worker.

    :param value: the value.
    """

    __slots__ = ("_size", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._size = -1

    def __sizeof__(self) -> int:  # Dask uses it to measure the memory of workers
        if self._size < 0:
            try:
                self._size = safe_sizeof(self.value)
            except BaseException:  # safe_sizeof lets SystemExit through, which would end the worker
                self._size = _UNKNOWN
        return self._size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        arrays: list[pickle.PickleBuffer] = []  # sent separately, so that they are not copied
        try:
            data = dumps(self.value, int(protocol), arrays)
        except BaseException as error:  # users' objects may raise anything, even SystemExit
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
        except BaseException:  # an error class of the user that cannot be pickled
            return cls(NodeError(str(error), cause_type=type(error).__name__))

    def raised(self) -> FesteError:
        """Return the error, with its cause if that can be unpickled here."""
        if self.cause:
            try:
                cause = pickle.loads(self.cause)
                cause.add_note(f"On the worker:\n{getattr(self.error, 'traceback', '')}")
                self.error.__cause__ = cause
            except BaseException:  # its class exists on the worker only
                pass
            self.cause = b""
        return self.error

    def __repr__(self) -> str:
        return f"Failed({self.error!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Failed, (self.error, self.cause))


class Left:
    """The outcome of a task of a chunk that was not begun."""

    __slots__ = ()


Outcome = Held | Failed | Left


class Several:
    """The outcomes of the tasks of a chunk, which are all values.

    :param outcomes: the outcomes, in the order of the tasks.
    :param kinds: their classes on the worker: a value that cannot be sent arrives as an error.
    """

    __slots__ = ("kinds", "outcomes")

    def __init__(self, outcomes: Sequence[Outcome], kinds: Sequence[type] = ()) -> None:
        self.outcomes = outcomes
        self.kinds = kinds or [type(outcome) for outcome in outcomes]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Several:
        """Return the outcomes as one that tells by its class whether all are values.

        :param outcomes: the outcomes.
        """
        return (Several if all(type(o) is Held for o in outcomes) else Mixed)(outcomes)

    def outcome(self, at: int) -> Outcome:
        """Return the outcome of one task.

        :param at: its place in the chunk.
        """
        return self.outcomes[at]

    def __sizeof__(self) -> int:
        return sum(outcome.__sizeof__() for outcome in self.outcomes)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.outcomes, self.kinds))


class Mixed(Several):
    """The outcomes of the tasks of a chunk, some of which are nodes, errors, or not there."""

    __slots__ = ()

    def without_values(self) -> Mixed:
        """Return what the client needs of it: values, which may be large, stay where they are."""
        kept = [Left() if type(outcome) is Held else outcome for outcome in self.outcomes]
        return Mixed(kept, self.kinds)


def _pickled(cause: BaseException | None) -> bytes:
    if cause is None:
        return b""
    # drop the frames, which in the client would keep their variables alive; the text is kept
    cause.__traceback__ = cause.__cause__ = cause.__context__ = None
    try:
        data = dumps(cause)
        pickle.loads(data)
    except BaseException:  # see Held
        return b""
    return data


def _arrived(kind: Callable[[Any], Any], data: bytes, *arrays: Any) -> Any:
    try:
        return kind(pickle.loads(data, buffers=arrays))
    except BaseException as error:  # an unknown class, or one that fails to unpickle
        return Failed.of(_stuck("read in another process", error))


def _stuck(what: str, error: BaseException) -> NodeError:
    told = describe(error).message  # which is one also if the error cannot be printed
    return NodeError(f"the result cannot be {what}: {told}", cause_type=type(error).__name__)
