"""The main program beside a cluster of our own: keeps its workers, until the parent is gone.

It is a program, not a part of the user's process, since nannies start workers with
``multiprocessing``, which runs the main module again in each of them.
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
    """Keep workers until the parent says so, closes its end of the pipe, or dies.

    :param address: of the scheduler.
    :param processes: how many workers.
    :param threads: how many threads each has.
    """
    nannies = [
        distributed.Nanny(address, nthreads=threads, host="127.0.0.1", dashboard=False)
        for _ in range(processes)
    ]
    starting = asyncio.gather(*nannies)  # goes on while this waits
    await asyncio.to_thread(os.read, sys.stdin.fileno(), 1)
    with contextlib.suppress(Exception):
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(n.close(timeout=PATIENCE / 2) for n in nannies))
    starting.cancel()
    os.killpg(0, signal.SIGKILL)  # whoever is left, this process too: nothing more to say


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
