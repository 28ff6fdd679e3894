"""The main program of a worker process: reads work from a socket, answers, until it closes."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from feste import blocking
from feste.scheduler.processes import reply
from feste.scheduler.work import describe, evaluate, result_of


def work(data: bytes) -> tuple[bool, Any]:
    """Return whether it went well, and the result or the error.

    :param data: what :mod:`feste.scheduler.processes` sent: over a socket of our own parent.
    """
    try:
        op, args, kwargs, values = pickle.loads(data)
        return True, result_of(evaluate(op.fn, args, kwargs, values))
    except BaseException as error:  # a task may raise anything, SystemExit too
        return False, describe(error)


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
            answer = reply(lambda data=data: work(data))  # type: ignore[misc]
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # a pipe that nobody reads, or no stream at all
                    stream.flush()
            connection.send_bytes(answer)
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
