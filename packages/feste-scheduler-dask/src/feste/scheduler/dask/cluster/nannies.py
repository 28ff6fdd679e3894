"""The program that keeps the workers of our own cluster until the parent process ends.

It is separate from the user's process because nannies start workers with ``multiprocessing``, which
runs the main module again in each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import distributed

#: Seconds that workers get to end by themselves.
PATIENCE = 1.0


async def main(address: str, processes: int, threads: int) -> None:
    """Keep workers running until the parent sends a byte, closes its end of the pipe, or dies.

    :param address: the address of the scheduler.
    :param processes: the number of workers.
    :param threads: the number of threads of each worker.
    """
    nannies = [
        distributed.Nanny(address, nthreads=threads, host="127.0.0.1", dashboard=False)
        for _ in range(processes)
    ]
    starting = asyncio.gather(*nannies)  # runs while the next line waits
    await asyncio.to_thread(os.read, sys.stdin.fileno(), 1)
    with contextlib.suppress(Exception):
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(n.close(timeout=PATIENCE / 2) for n in nannies))
    starting.cancel()
    os.killpg(0, signal.SIGKILL)  # kill the remaining processes, including this one


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
