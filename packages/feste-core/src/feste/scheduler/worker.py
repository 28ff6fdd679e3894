"""The main program of a worker process: reads work from a socket, answers, until it closes."""

from __future__ import annotations

import pickle
import signal
import socket
import sys
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
    """Serve until the parent closes its end.

    :param fd: the descriptor of the socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(socket.socket(fileno=fd).detach())
    with blocking.inside("worker"):
        while True:
            try:
                data = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(reply(lambda data=data: work(data)))  # type: ignore[misc]


if __name__ == "__main__":
    main(int(sys.argv[1]))
