"""The process behind `SimServer`: ``python -m feste.testing.sim_process``.

It reads one JSON line of configuration from stdin, listens on two loopback ports, prints one JSON
line ``{"port": ..., "control": ...}``, and serves until stdin gets another byte or closes, or its
parent ends. Clients use the one port, `SimServer` the other: it must get through in an outage too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from feste.testing.sim_http import Connection, Reply, Request
from feste.testing.sim_provider import Provider, faults_of

__all__ = ["main"]

_BACKLOG = 4096


class Control:
    """Answers `SimServer`.

    :param provider: the provider that it asks about.
    """

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    def arrive(self, request: Request) -> None:
        """Do nothing, because no one counts these requests."""

    def leave(self, request: Request, *, early: bool = False) -> None:
        """Do nothing."""

    async def answer(self, request: Request) -> Reply:
        """Answer one request."""
        answer: object = {}
        match request.path:
            case "/totals":
                answer = asdict(self.provider.totals())
            case "/requests":
                answer = [entry.logged() for entry in self.provider.ledger.log]
            case "/faults":
                self.provider.faults.add(faults_of(json.loads(request.body)))
            case "/reset":
                self.provider.forget()
                os.ftruncate(self.provider.ledger.file, 0)
            case _:
                return Reply.whole(404, b"{}")
        return Reply.whole(200, json.dumps(answer).encode())


class Door:
    """The port of the clients, which an outage closes for a while.

    :param config: the configuration that `SimServer` sends.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.provider = Provider(config, self.refuse)
        self.connections: set[Connection] = set()
        self.reserved: socket.socket | None = None
        self.opening: asyncio.Task[None] | None = None

    async def open(self, port: int = 0) -> int:
        """Listen, and return the port."""
        loop = asyncio.get_running_loop()
        taken, self.reserved = self.reserved, None
        if taken is None:
            taken = _bound(port)
        self.server = await loop.create_server(
            lambda: Connection(self.provider, self.connections), sock=taken, backlog=_BACKLOG
        )
        return int(taken.getsockname()[1])

    def refuse(self, seconds: float) -> None:
        """Reset all connections, and refuse new ones for a while."""
        if self.reserved is not None:
            return
        port = self.server.sockets[0].getsockname()[1]
        self.server.close()
        self.reserved = _bound(port)  # nobody else gets the port; who does not listen refuses
        for connection in list(self.connections):
            connection.reset()
        self.opening = asyncio.get_running_loop().create_task(self.open_after(seconds))

    async def open_after(self, seconds: float) -> None:
        """Listen again after a while."""
        await asyncio.sleep(seconds)
        await self.open()

    def close(self) -> None:
        """Stop listening, and drop all connections."""
        if self.opening is not None:
            self.opening.cancel()
        if self.reserved is not None:
            self.reserved.close()
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


async def _serve(config: Mapping[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    door = Door(config)
    port = await door.open(config["port"])
    control, links = Control(door.provider), set[Connection]()
    desk = await loop.create_server(lambda: Connection(control, links), "127.0.0.1", 0)
    stop = asyncio.Event()

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would still be held at exit
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, daemon=True).start()
    sys.stdout.write(json.dumps({"port": port, "control": desk.sockets[0].getsockname()[1]}) + "\n")
    sys.stdout.flush()
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:  # a fork may hold stdin open, so check both
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1)
    desk.close()
    door.close()
    for link in list(links):
        link.transport.abort()


def main() -> None:
    """Read the configuration from stdin and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes stdin
    asyncio.run(_serve(json.loads(sys.stdin.buffer.readline())))


if __name__ == "__main__":
    main()
