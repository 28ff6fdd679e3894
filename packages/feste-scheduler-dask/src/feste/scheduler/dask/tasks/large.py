"""Large values of the client that tasks on workers need: each is sent once in a run.

A value becomes a Dask task that only holds it, and tasks get its future. So workers share it among
them, and Dask makes it again if the worker that has it dies, which it does not do for scattered data.
"""

from __future__ import annotations

import contextvars
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, SupportsIndex
from uuid import uuid4
from weakref import WeakKeyDictionary

import dask
from dask.sizeof import sizeof
from feste.errors import NodeError
from feste.scheduler import PyTask
from feste.scheduler.dask.pickling import Pickler, dumps
from feste.scheduler.dask.tasks.outcomes import Failed, Held
from feste.scheduler.dask.tasks.refs import FIRST, Ref

__all__ = ["Large", "quiet"]

#: The size in bytes from which a value is sent by itself.
_LARGE = 256 * 1024
#: The most values that are remembered for a run: those that were needed last.
_MOST = 64
#: What may contain large values, but is not one: it is pickled anew, as a call has copied it.
_INSIDE = (list, tuple, dict, set, frozenset, type, FunctionType, BuiltinFunctionType, CodeType)
_NEVER = frozenset((int, float, bool, type(None), complex, *_INSIDE))

_setting = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Let Dask send much at once without advice that is not for users of Feste."""
    with _setting, dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 PiB"}):
        yield


class Large:
    """The large values that were sent to the workers of a cluster, by run.

    :param client: a ``distributed.Client``.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._runs: WeakKeyDictionary[Any, _Sent] = WeakKeyDictionary()

    def packed(self, chunk: Sequence[PyTask], parts: Any, first: int) -> tuple[bytes, list[Any]]:
        """Pickle what tasks need, apart from large values.

        :param chunk: the tasks, of one run.
        :param parts: what they need.
        :param first: the number of results on workers that they are given besides.
        :returns: the bytes, and the futures of large values, which follow those results.
        """
        run = chunk[0].run
        sent = self._runs.get(run)
        if sent is None:
            data = dumps(parts)
            if len(data) < _LARGE:
                return data, []
            sent = self._runs[run] = _Sent(self._client)
            run.on_finish(sent.clear)
        with io.BytesIO() as file:
            pickler = _Apart(file, sent, _shared(chunk), first)
            pickler.dump(parts)
            return file.getvalue(), pickler.futures


class _Sent:
    """What a run has sent: futures by the identity of values, which stay as they are meanwhile.

    :param client: the client.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._futures: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._is_over = False

    def future(self, value: Any) -> Any:
        """Return the future of a large value; send it if it is new.

        :param value: the value.
        """
        known = self._futures  # the run may end meanwhile
        _, future = known.pop(id(value), (None, None))
        if future is None:
            arrays: list[pickle.PickleBuffer] = []
            sealed = _Sealed(dumps(value, arrays=arrays), *arrays)
            # not with the annotations of the task that is the first to need it
            future = contextvars.Context().run(self._send, sealed)
        if not self._is_over:
            known[id(value)] = value, future
            if len(known) > _MOST:
                known.popitem(last=False)
        return future

    def _send(self, sealed: _Sealed) -> Any:
        key = f"value-{uuid4().hex}"
        with quiet():
            return self._client.submit(opened, sealed, key=key, pure=False, priority=FIRST)

    def clear(self) -> None:
        """Forget everything: the run has ended."""
        self._is_over = True
        self._futures = OrderedDict()


class _Apart(Pickler):
    """Leaves large values out: in their places stand their positions among a task's results."""

    def __init__(self, file: Any, sent: _Sent, shared: set[int], first: int) -> None:
        super().__init__(file, protocol=5)
        self._sent = sent
        self._shared = shared
        self._first = first
        self.futures: list[Any] = []
        #: The positions of values by their identity, which the values themselves keep valid.
        self._places: dict[int, tuple[int, Any]] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if id(obj) not in self._shared and (type(obj) in _NEVER or not _is_large(obj)):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = self._first + len(self.futures), obj
            self.futures.append(self._sent.future(obj))
        return self._places[id(obj)][0]


def _shared(chunk: Sequence[PyTask]) -> set[int]:
    """Return the identities of large results of nodes that several nodes need, also lists and dicts."""
    return {
        id(value)
        for task in chunk
        for dep, value in zip(task.run.program.deps[task.index], task.values, strict=False)
        if type(value) not in (Ref, PyTask)
        and len(task.run.program.consumers[dep]) > 1
        and _is_large(value)
    }


def _is_large(value: Any) -> bool:
    if type(value) in (str, bytes):  # there may be millions
        return len(value) >= _LARGE
    try:
        return int(sizeof(value)) >= _LARGE
    except BaseException:  # an object of the user's
        return False


class _Sealed:
    """A pickled value and its arrays, which the scheduler passes on without reading it."""

    __slots__ = ("arrays", "data")

    def __init__(self, data: bytes, *arrays: Any) -> None:
        self.data = data
        self.arrays = arrays

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        buffers = (
            a if isinstance(a, pickle.PickleBuffer) else pickle.PickleBuffer(a) for a in self.arrays
        )
        return (_Sealed, (self.data, *buffers))

    def __dask_tokenize__(self) -> str:  # else Dask would hash it
        return str(id(self))


def opened(sealed: _Sealed) -> Held | Failed:
    """Return a value on a worker, or the error of reading it.

    :param sealed: the value as it was sent.
    """
    try:
        return Held(pickle.loads(sealed.data, buffers=sealed.arrays))
    except BaseException as error:  # an unknown class, or one that fails to unpickle
        kind = type(error).__name__
        told = f"a large argument of the task cannot be read on a worker: {kind}: {error}"
        if isinstance(error, ImportError):
            told += ". Install it on the workers, or send it there with client.upload_file()"
        return Failed.of(NodeError(told, cause_type=kind))
