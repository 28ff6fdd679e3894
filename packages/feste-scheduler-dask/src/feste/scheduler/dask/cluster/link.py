"""Turn the setting ``scheduler`` into a connected ``distributed.Client``."""

from __future__ import annotations

import gc
import ipaddress
import traceback
import warnings
from typing import Any
from urllib.parse import urlsplit

import distributed as _untyped

from feste.errors import ConfigError, FesteWarning
from feste.scheduler.dask.cluster.own import OwnCluster

__all__ = ["Link", "check_target"]

_dask: Any = _untyped
_NAMES = ("dask", "distributed")
#: Encrypted, with certificates on both sides; or within a process.
_SAFE = ("tls://", "wss://", "inproc://")


def check_target(target: Any, allow_insecure: bool = False) -> None:
    """Refuse targets that are not safe or not possible to connect to.

    :param target: the setting.
    :param allow_insecure: allow the network without TLS.
    :raises ConfigError: for a network address without TLS, or an object that is not a client.
    """
    if isinstance(target, str):
        if target not in _NAMES and not allow_insecure:
            _check_address(target, f"scheduler={target!r}")
    elif not isinstance(target, (_dask.Client, _dask.deploy.Cluster, type)):
        raise ConfigError(
            f"scheduler={target!r}: of distributed, a Client or a cluster can run a graph"
        )


def _check_address(address: str, what: str) -> None:
    """Raise for an address where others can listen or read along."""
    if not address.startswith(_SAFE) and not _is_loopback(address):
        raise ConfigError(
            f"{what} is on the network without TLS: whoever reads or joins an unencrypted connection "
            "of a Dask cluster can run code on its workers. Use TLS (tls://..., with the certificates "
            "in the Dask configuration distributed.comm.tls), addresses on this machine "
            '(host="127.0.0.1"), or allow_insecure=True in a network where you trust everyone'
        )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Link:
    """A client of a cluster, with everything that was made to have one.

    :param target: the setting.
    :param allow_insecure: allow the network without TLS.
    :raises ConfigError: if it does not lead to a working cluster.
    """

    def __init__(self, target: Any, allow_insecure: bool = False) -> None:
        self._cluster: OwnCluster | None = None
        self._owned = True
        self._closed = False
        self._by_name = target in _NAMES or isinstance(target, type)
        given = _current() if self._by_name else target
        if isinstance(given, _dask.Client):
            self.client: Any = given
            self._owned = False
        else:
            self.client = self._connect(given)
        self._address = getattr(self.client.scheduler, "address", "?")
        try:
            self._check(allow_insecure)
        except BaseException:
            self.close()
            raise

    def _check(self, allow_insecure: bool) -> None:
        if self.client.status != "running":
            raise ConfigError(
                f"the distributed.Client is {self.client.status}: make a new one, or leave it open "
                "until the run has ended"
            )
        if self.client.asynchronous:
            raise ConfigError(
                "an asynchronous distributed.Client needs its event loop, which a blocking run "
                "would stop: use await feste.acompute(...)"
            )
        workers = self.client.nthreads()
        if not allow_insecure:
            # one that is reached on this machine may listen elsewhere, too, and then says so
            for address in (self._address, self.client.scheduler_info()["address"]):
                _check_address(address, f"the Dask scheduler {address}")
            for address in workers:
                _check_address(address, f"the Dask worker {address}")
        if not workers:
            warnings.warn(
                f"the Dask cluster at {self._address} has no workers yet; what they are to do waits until "
                "it has",
                FesteWarning,
                stacklevel=3,
            )

    def _connect(self, given: Any) -> Any:
        if given is None:
            self._cluster = OwnCluster.take()
            return self._cluster.client
        try:
            return _dask.Client(given, set_as_default=False)
        except Exception as error:  # no server, not Dask, or no certificates
            told = f"{type(error).__name__}: {error}"
            # free the half-made client now: run later on a Dask thread, its __del__ would block it
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        if isinstance(given, str) and given.startswith("tls://"):
            told += (
                ". For tls:// set ca-file, client.cert and client.key of distributed.comm.tls in the "
                "configuration of Dask"
            )
        raise ConfigError(f"scheduler={given!r}: no connection: {told}")

    def threads(self) -> int:
        """Return the workers' number of threads; it asks the scheduler, so not for the brain."""
        return sum(self.client.nthreads().values())

    @property
    def closed(self) -> bool:
        """Whether this link or its client was closed by anyone, or its cluster is gone.

        A client that connects anew counts as closed: Dask has cancelled all that it waited for.
        """
        return self._closed or self.client.status != "running"

    @property
    def lost(self) -> ConfigError:
        """The error for runs that need a cluster which is gone."""
        return ConfigError(
            f"the connection to the Dask scheduler at {self._address} is lost: it ended, or the client "
            "was closed. What was paid for is in .partial, and in the store if there is one: run again, "
            "on a cluster or without, to go on"
        )

    @property
    def stale(self) -> bool:
        """Whether the same setting would give another client now."""
        if self.closed:
            return True
        current = _current() if self._by_name else None
        return current is not None and current is not self.client

    def close(self) -> None:
        """Close the client and cluster that were made for this link."""
        if self._closed:
            return
        self._closed = True
        if self._cluster is not None:
            self._cluster.give_back()
        elif self._owned:
            self.client.close()


def _current() -> Any:
    """Return the user's own client, or None: the context's, or the newest default client."""
    try:
        client = _dask.default_client()
    except ValueError:
        return None
    return client if client.status == "running" else None
