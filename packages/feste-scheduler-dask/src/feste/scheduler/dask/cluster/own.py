"""The cluster that ``scheduler="dask"`` starts if there is none.

Its scheduler is in this process, on 127.0.0.1, without a dashboard; its workers belong to a
separate program. The workers of a plain ``LocalCluster`` would run the user's main script again,
with its paid calls, if it lacks ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, ClassVar

import distributed as _untyped

from dask.system import CPU_COUNT
from feste.errors import ConfigError

__all__ = ["OwnCluster"]

_dask: Any = _untyped
_MOST_PROCESSES = 8
#: Seconds for the first worker to start, and for all workers to end.
_START, _END = 60.0, 4.0


_lock = threading.Lock()


class OwnCluster:
    """A scheduler in this process, with worker processes on this machine; all who take it share it.

    :raises ConfigError: if the workers do not start.
    """

    _shared: ClassVar[OwnCluster | None] = None

    @classmethod
    def take(cls) -> OwnCluster:
        """Return the cluster of this process, which is started if need be, until :meth:`give_back`.

        :raises ConfigError: if the workers do not start.
        """
        with _lock:
            if cls._shared is None or cls._shared.client.status != "running":
                cls._shared = cls()
            cls._shared._takers += 1
            return cls._shared

    def give_back(self) -> None:
        """Close the cluster if nobody else uses it."""
        with _lock:
            self._takers -= 1
            if self._takers:
                return
            if OwnCluster._shared is self:
                OwnCluster._shared = None
        self._close()

    def __init__(self) -> None:
        self._takers = 0
        self._scheduler = _dask.LocalCluster(
            n_workers=0,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            scheduler_kwargs={"dashboard": False},
        )
        # distributed closes clusters by itself when Python ends: this runs before that
        atexit.register(_be_quiet)
        self.client: Any = _dask.Client(self._scheduler, set_as_default=False)
        self._workers = _start_workers(self.client.scheduler.address)
        try:
            self._wait()
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._attend, name="feste-own-workers", daemon=True).start()

    def _attend(self) -> None:
        """Let runs end, and the next one start another cluster, if the program of the workers is killed."""
        self._workers.wait()
        self.client.close()

    def _wait(self) -> None:
        until = time.monotonic() + _START
        while not self.client.nthreads():
            if self._workers.poll() is not None:
                raise ConfigError(f"Dask's workers ended with code {self._workers.returncode}")
            if time.monotonic() > until:
                raise ConfigError(f"no Dask worker has started in {_START:.0f} seconds")
            time.sleep(0.02)

    def _close(self) -> None:
        """Give up work under way; end the scheduler, then the workers."""
        _be_quiet()
        self.client.close()
        self._scheduler.close()
        try:
            self._workers.communicate(b".", timeout=_END)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._workers.pid, signal.SIGKILL)
            self._workers.wait()


def _be_quiet() -> None:
    """Let Dask log no traceback if a connection ends while data is under way."""
    logging.getLogger("distributed.batched").setLevel(logging.WARNING)


def _start_workers(address: str) -> subprocess.Popen[bytes]:
    processes = min(CPU_COUNT, _MOST_PROCESSES)
    threads = math.ceil(CPU_COUNT / processes)
    program = [sys.executable, "-P", "-m", "feste.scheduler.dask.cluster.nannies"]
    return subprocess.Popen(
        [*program, address, str(processes), str(threads)],
        stdin=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
            "DASK_LOGGING__DISTRIBUTED": "critical",
        },
        start_new_session=True,  # the client handles Ctrl-C
    )
