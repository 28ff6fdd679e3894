"""What a user wants done on each worker before its first work: once in each process."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import pickle
import threading
import warnings
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from feste import __version__ as VERSION
from feste.errors import ConfigError, FesteWarning, NodeError
from feste.node import process_name
from feste.scheduler import describe, inside
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.tasks.outcomes import Failed

__all__ = ["Preparation", "Prepare", "cannot_run", "check_workers", "prepare", "prepared"]

#: Seconds that all workers may take to say which version they have.
_PATIENCE = 3.0

Prepare = Callable[[], Any] | str
"""A function, sync or async, or its ``"module:name"``."""

_numbers = itertools.count()
_lock = threading.Lock()
#: What came of it in this process, by name.
_outcomes: dict[str, NodeError | None] = {}


class Preparation:
    """What workers do first, on its way to them.

    :param name: distinguishes it from that of other clients, and from an earlier attempt.
    :param prepare: what to call.
    :raises ConfigError: if it cannot be sent.
    """

    def __init__(self, name: str, prepare: Prepare) -> None:
        self.name = name
        try:
            self._data = dumps(prepare)
        except BaseException as error:  # what it holds may be anything
            raise ConfigError(
                f"prepare_worker={prepare!r} cannot be sent to Dask workers: {type(error).__name__}: "
                f"{error}"
            ) from None

    def done(self, worker: str) -> Failed | None:
        """Prepare this process if that is not done yet; blocks until it is.

        :param worker: the name of the worker, for the error.
        :returns: why it failed, or None.

        >>> preparation = Preparation("a client", lambda: print("loading the model"))
        >>> preparation.done("a worker")
        loading the model
        >>> preparation.done("a worker")
        """
        with _lock:
            if self.name not in _outcomes:
                _outcomes[self.name] = _called(self._data, worker)
            error = _outcomes[self.name]
        return None if error is None else Failed.of(error)  # each time another


def _called(data: bytes, worker: str) -> NodeError | None:
    try:
        with inside("worker"):  # where it may start no run of its own
            prepare = pickle.loads(data)
            if isinstance(prepare, str):
                prepare = resolve_name(prepare)
            done = prepare()
            if inspect.iscoroutine(done):
                asyncio.run(done)
    except BaseException as error:  # users' code may raise anything, even SystemExit
        told = describe(error)
        failed = NodeError(
            f"prepare_worker failed on the Dask worker {worker}: {told}",
            cause_type=type(error).__name__,
            traceback=getattr(told, "traceback", ""),
        )
        failed.__cause__ = error
        return failed
    return None


def cannot_run(address: str, error: Exception) -> ConfigError:
    """Return the error for a worker that lacks Feste, or has one that does not fit.

    :param address: the address of the worker.
    :param error: what its Python said.
    """
    return ConfigError(
        f"the Dask worker {address} cannot run Feste: {type(error).__name__}: {error}. "
        "Install feste-scheduler-dask there, in the version of the client"
    )


def check_workers(client: Any) -> None:
    """Raise, before anything is paid for, if a worker lacks Feste; warn if its version is another.

    :param client: a ``distributed.Client``.
    :raises ConfigError: naming the worker.
    """
    try:  # with a function that any worker knows, and can fail in
        told = client.run(
            resolve_name, f"{__name__}:VERSION", on_error="return", callback_timeout=_PATIENCE
        )
    except TimeoutError:  # one is too busy to answer: its first work will tell
        return
    for address, version in told.items():
        if isinstance(version, (ImportError, AttributeError)):
            raise cannot_run(address, version)
    others = {a: v for a, v in told.items() if isinstance(v, str) and v != VERSION}
    if others:
        address, version = next(iter(others.items()))
        warnings.warn(
            f"the Dask worker {address} has Feste {version}, this process {VERSION}, and so it is for "
            f"{len(others)} of {len(told)} workers: install one version everywhere",
            FesteWarning,
            stacklevel=2,
        )


def prepared(client: Any, function: Prepare | None) -> Preparation | None:
    """Prepare all workers that there are.

    :param client: a ``distributed.Client``.
    :param function: the setting ``prepare_worker``.
    :returns: what workers that come later have to do, or None.
    :raises FesteError: if one of the workers cannot be prepared.
    """
    if function is None:
        return None
    preparation = Preparation(f"{process_name()}-{next(_numbers)}", function)
    for outcome in client.run(prepare, preparation, on_error="return").values():
        if isinstance(outcome, Failed):
            raise outcome.raised()
        # any other error is of a worker that is gone: the one after it is prepared by its first work
    return preparation


async def prepare(preparation: Preparation, dask_worker: Any) -> Failed | None:
    """Prepare a worker while its event loop runs on, for it may take minutes.

    :param preparation: what to do.
    :param dask_worker: the worker; Dask gives it under this name.
    :returns: why it failed, or None.
    """
    return await asyncio.to_thread(preparation.done, str(dask_worker.name))
