"""Which workers can send the requests of which backends: each reads its own keys.

Before a run all workers in use must be able to send for all of its backends. A worker that comes
later and lacks something is left out, and asked again now and then; the others go on.
"""

from __future__ import annotations

import asyncio
import pickle
import warnings
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress

from feste.backend import Backend
from feste.errors import ConfigError, FesteError, FesteWarning, MissingKey, WorkerLost
from feste.scheduler.dask.pickling import dumps

__all__ = ["Packed", "Preflight", "checked", "warn"]

Packed = Mapping[Hashable, bytes]
"""Pickled backends by their tokens."""


def checked(worker: str, backends: Sequence[bytes]) -> list[FesteError | None]:
    """Return what would keep backends from sending requests from this worker, for each; or None.

    :param worker: the name of this worker.
    :param backends: the pickled backends.
    """
    return [_checked(worker, data) for data in backends]


def _checked(worker: str, data: bytes) -> FesteError | None:
    try:
        backend: Backend = pickle.loads(data)
    except Exception as error:  # the class of a user's backend may not exist here
        return ConfigError(
            f"the Dask worker {worker} cannot make a backend of the run: {type(error).__name__}: {error}. "
            "Install what it needs on the workers"
        )
    try:
        backend.preflight()
    except MissingKey as error:
        names = " and ".join(secret.name for secret in backend.secrets if not secret.is_set)
        return MissingKey(
            f"no API key on the Dask worker {worker}: the environment variable {names} is not set there. "
            'With requests_on="workers" keys are read where requests leave: set it where the worker is '
            "started, or in prepare_worker"
            if names
            else f"on the Dask worker {worker}: {error}"
        )
    except Exception as error:  # a plugin may raise anything
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        return ConfigError(f"on the Dask worker {worker}: {kind}{error}")
    return None


class Preflight:
    """The client's side; all but :meth:`new` is for the loop of the Dask client.

    :param ask: asks the worker at an address, with what and pickled arguments.
    """

    def __init__(
        self, ask: Callable[[str, str, bytes], Awaitable[list[FesteError | None]]]
    ) -> None:
        self._ask = ask
        #: What all workers in use can send for.
        self._known: Packed = {}
        #: What keeps workers from being used, by address.
        self.lacks: dict[str, FesteError] = {}
        self._one_by_one = asyncio.Lock()

    def new(self, clients: Sequence[Backend]) -> Packed:
        """Return those of the backends that are not checked yet.

        :param clients: the backends.
        :raises ConfigError: if one cannot be sent, as with a literal key.
        """
        return {c.token: _packed(c) for c in clients if c.token not in self._known}

    async def check(
        self, new: Packed, workers: Callable[[], Mapping[str, str]]
    ) -> FesteError | None:
        """Return what keeps new backends from being used, or all workers from being used.

        :param new: the backends.
        :param workers: returns the names of all workers by their address.
        """
        async with self._one_by_one:
            names = workers()
            known = {**self._known, **new}
            in_use = {a: n for a, n in names.items() if a not in self.lacks}
            found = await asyncio.gather(*(self._compare(a, n, new) for a, n in in_use.items()))
            for address, error in zip(in_use, found, strict=True):
                if isinstance(error, WorkerLost):
                    self._leave_out(address, error)
                elif error is not None:
                    return error
            if in_use:
                self._known = known
            for address in names.keys() & self.lacks.keys() - in_use.keys():
                self._note(address, await self._compare(address, names[address], known))
            return (
                None if names.keys() - self.lacks.keys() else next(iter(self.lacks.values()), None)
            )

    async def meet(self, address: str, name: str) -> None:
        """Note whether a worker can be used that has come, or was left out.

        :param address: its address.
        :param name: its name.
        """
        async with self._one_by_one:
            self._note(address, await self._compare(address, name, self._known))

    def forget(self, address: str) -> None:
        """Note that a worker is gone.

        :param address: its address.
        """
        self.lacks.pop(address, None)

    async def _compare(self, address: str, name: str, backends: Packed) -> FesteError | None:
        if not backends:
            return None
        try:
            errors = await self._ask(address, "check", dumps(list(backends.values())))
        except Exception as error:  # it is gone, or busy
            return WorkerLost(
                f"the Dask worker {name} does not answer: {type(error).__name__}: {error}",
                billed="no",
            )
        return next((error for error in errors if error is not None), None)

    def _note(self, address: str, error: FesteError | None) -> None:
        if error is None:
            self.lacks.pop(address, None)
        else:
            self._leave_out(address, error)

    def _leave_out(self, address: str, error: FesteError) -> None:
        told = str(error) != str(self.lacks.get(address)) and not isinstance(error, WorkerLost)
        self.lacks[address] = error
        if told:
            warn(error)


def warn(error: FesteError) -> None:
    """Say that a worker is left out; where warnings are errors, the loop has to run on.

    :param error: why.
    """
    with suppress(FesteWarning):
        warnings.warn(f"a worker sends no requests: {error}", FesteWarning, stacklevel=2)


def _packed(client: Backend) -> bytes:
    try:
        return dumps(client)
    except Exception as error:  # a literal key, or whatever a user's backend holds
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(
            f'requests_on="workers" sends {type(client).__name__} to the workers, which cannot be done: '
            f"{kind}{error}"
        ) from None
