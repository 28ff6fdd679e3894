"""The main program of a worker process: run the work read from a socket until it closes."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from feste import blocking
from feste.scheduler.hands.messages import receive, send
from feste.scheduler.hands.processes import answer


def main(fd: int) -> None:
    """Serve until the parent closes its end or dies.

    :param fd: the file descriptor of the socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    blocking.become("worker")
    busy = threading.Event()
    threading.Thread(target=_end_with_parent, args=(fd, busy), daemon=True).start()
    parent = socket.socket(fileno=fd)
    while True:
        try:
            work = receive(parent)
            if not work:  # the parent asks the worker to end
                return
            busy.set()
            told = answer(work)
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # a closed pipe, or no stream at all
                    stream.flush()
            send(parent, told)
            busy.clear()
            del told  # so that an idle worker keeps no values alive
        except (EOFError, OSError):
            return


def _end_with_parent(fd: int, busy: threading.Event) -> None:
    """End this process soon after the parent closes its end of the socket, even if it is busy."""
    hung_up = select.poll()
    hung_up.register(fd, 0)  # no flags: wake only on hang-up
    hung_up.poll()
    if not busy.is_set():
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
