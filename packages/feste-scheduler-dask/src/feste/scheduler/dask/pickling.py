"""Pickling between the client and workers: by value, backends by name.

If a task returns a call of a backend that it was given, the client gets its own backend object
back, with its connections and other state.
"""

from __future__ import annotations

import io
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import cloudpickle

from feste.backend import Backend
from feste.node import process_name

__all__ = ["Pickler", "dumps", "was_here"]

_backends: WeakValueDictionary[str, Backend] = WeakValueDictionary()
_numbers = itertools.count()
_lock = threading.Lock()


def dumps(value: Any, protocol: int = 5, arrays: list[pickle.PickleBuffer] | None = None) -> bytes:
    """Return a value as bytes for ``pickle.loads``.

    :param value: the value; functions and classes that others cannot import go by value.
    :param protocol: the pickle protocol; 5 and above can leave large buffers out.
    :param arrays: collects the buffers; None leaves them in the bytes.
    """
    beside = arrays.append if arrays is not None and protocol >= 5 else None
    with io.BytesIO() as file:
        Pickler(file, protocol=protocol, buffer_callback=beside).dump(value)
        return file.getvalue()


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles by value, and backends by name."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Backend):
            return (_arrived, (_name(obj), *obj.__reduce__()))
        return super().reducer_override(obj)


def was_here(backend: Backend) -> bool:
    """Return True if a backend was made in this process before it went to a worker.

    :param backend: a backend that came from a worker.
    """
    return str(backend.__dict__.get("_name", "")).startswith(f"{process_name()}-")


def _name(backend: Backend) -> str:
    """Return the name of a backend, the same in every process."""
    with _lock:
        name: str = backend.__dict__.setdefault("_name", f"{process_name()}-{next(_numbers)}")
        _backends.setdefault(name, backend)
    return name


def _arrived(name: str, build: Callable[..., Backend], args: tuple[Any, ...]) -> Backend:
    with _lock:
        backend = _backends.get(name)
        if backend is None:
            backend = _backends[name] = build(*args)
            backend.__dict__["_name"] = name
    return backend
