"""The cluster that ``scheduler="dask"`` starts where there is none.

Its scheduler is in this process, on 127.0.0.1, with the dashboard off. Its workers are fresh
interpreters, and their nannies are in another: the nannies of a plain ``LocalCluster`` would run
the user's main script again in each worker, paid calls and all, if it has no
``if __name__ == "__main__"``.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time

import distributed
from dask.system import CPU_COUNT

from feste.errors import ConfigError

__all__ = ["OwnCluster"]

_MOST_PROCESSES = 8
#: Seconds that the first worker may take to come, and workers to go.
_START, _END = 60.0, 5.0


class OwnCluster:
    """A scheduler here, and worker processes of this machine.

    :raises ConfigError: if the workers do not start.
    """

    def __init__(self) -> None:
        self._scheduler = distributed.LocalCluster(
            n_workers=0,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
            # after one more try of what a lost worker was at, it is lost
            scheduler_kwargs={"dashboard": False, "allowed_failures": 1},
        )
        self.client = distributed.Client(self._scheduler, set_as_default=False)
        self._workers = _start_workers(self.client.scheduler.address)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + _START
        while not self.client.nthreads():
            if self._workers.poll() is not None:
                raise ConfigError(f"Dask's workers ended with code {self._workers.returncode}")
            if time.monotonic() > until:
                raise ConfigError(f"no Dask worker has started in {_START:.0f} seconds")
            time.sleep(0.02)

    def close(self) -> None:
        """End the workers, then the scheduler."""
        self._workers.terminate()
        try:
            self._workers.wait(_END)
        except subprocess.TimeoutExpired:  # busy with a task that does not end
            os.killpg(self._workers.pid, signal.SIGKILL)
            self._workers.wait()
        self.client.close()
        self._scheduler.close()


def _start_workers(address: str) -> subprocess.Popen[bytes]:
    processes = min(CPU_COUNT, _MOST_PROCESSES)
    options = {
        "nworkers": processes,
        "nthreads": math.ceil(CPU_COUNT / processes),
        "host": "127.0.0.1",
        "death-timeout": 15,
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dask", "worker", address, "--no-dashboard"),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        stdin=subprocess.DEVNULL,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "DASK_LOGGING__DISTRIBUTED": "error",
        },
        start_new_session=True,  # Ctrl-C is the client's to handle
    )
