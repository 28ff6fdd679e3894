"""The main program of a worker process: reads work from a socket, answers, until it closes."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection

from feste import blocking
from feste.scheduler.processes import answer


def main(fd: int) -> None:
    """Serve until the parent closes its end, or dies.

    :param fd: the descriptor of the socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    blocking.become("worker")
    busy = threading.Event()
    threading.Thread(target=_end_with_parent, args=(fd, busy), daemon=True).start()
    connection = Connection(fd)
    while True:
        try:
            data = connection.recv_bytes()
            if not data:  # the parent's last word
                return
            busy.set()
            told = answer(data)
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # a pipe that nobody reads, or no stream at all
                    stream.flush()
            connection.send_bytes(told)
            busy.clear()
        except (EOFError, OSError):
            return


def _end_with_parent(fd: int, busy: threading.Event) -> None:
    """End this process soon after the other end of the socket is gone, whatever it is at."""
    hung_up = select.poll()
    hung_up.register(fd, 0)  # only that the other end is closed
    hung_up.poll()
    if not busy.is_set():
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
