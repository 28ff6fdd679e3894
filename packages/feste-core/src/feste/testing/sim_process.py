"""The process behind `SimServer`: ``python -m feste.testing.sim_process``.

It reads one JSON line of configuration from stdin, listens on a loopback port, prints one JSON line
``{"port": ...}``, and serves until stdin gets another byte or closes, or its parent ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

from feste.backend import PromptCache
from feste.testing.sim_cache import Lookup, PrefixCache, PromptPart
from feste.testing.sim_http import Connection, Reply, Request
from feste.testing.sim_types import Billed, Fault, LedgerEntry
from feste.testing.wire import Answer, Call, Refusal, Wire

__all__ = ["Simulator", "main"]

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Simulator:
    """The server without its connections: latency, faults, log, ledger, prompt cache.

    :param config: the configuration that `SimServer` sends.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.wires = [_load(name, options) for name, options in config["wires"]]
        self.base: float = config["base"]
        self.slope: float = config["slope"]
        self.headers: dict[str, str] = config["headers"]
        self.max_concurrency: int | None = config["max_concurrency"]
        self.log_bodies: bool = config["log_bodies"]
        self.seed: int = config["seed"]
        options = config["prompt_cache"] or {"minimum": sys.maxsize}  # which no prompt reaches
        self.prompt_cache = PromptCache(**options)
        self.ledger = os.open(config["ledger"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.in_flight = self.admitted = self.arrived = 0
        self.forget()

    def forget(self) -> None:
        """Clear all but the ledger: the log, faults, peak, counters, bill and prompt cache."""
        self.log: list[Request] = []
        self.faults: list[list[Any]] = []
        self.draws: Counter[tuple[str, str]] = Counter()
        self.random = random.Random(self.seed)
        self.peak = self.in_flight
        self.billed = Billed()
        self.prefixes = PrefixCache(self.prompt_cache)

    def control(self, request: Request) -> Reply:
        """Answer a control request of `SimServer`."""
        answer: object = {}
        match request.path.removeprefix("/_sim/"):
            case "state":
                answer = {"peak": self.peak, "in_flight": self.in_flight}
            case "billed":
                answer = asdict(self.billed)
            case "committed":
                answer = self.prefixes.committed()
            case "requests":
                answer = [entry.logged() for entry in self.log]
            case "faults":
                faults = [Fault(**entry) for entry in json.loads(request.body)]
                self.faults += [[fault, fault.times] for fault in faults]
            case "reset":
                self.forget()
                os.ftruncate(self.ledger, 0)
            case _:
                return Reply.whole(404, b"{}")
        return Reply.whole(200, json.dumps(answer).encode())

    def arrive(self, request: Request) -> None:
        """Record the arrival of a request."""
        self.arrived += 1
        request.id = f"req_{self.arrived:08d}"
        request.started = time.monotonic()
        self.log.append(request)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)

    def leave(self, request: Request) -> None:
        """Record that a request ended or its client left; only the first call counts."""
        if request.finished is None:
            request.finished = time.monotonic()
            self.in_flight -= 1

    async def answer(self, request: Request) -> Reply | None:
        """Answer one request; return None if its fault leaves it without a reply."""
        fault = self._strike(request)
        wire = self._wire_of(request.path)
        body, request.body = request.body, request.body if self.log_bodies else b""
        try:
            if fault and fault.kind in ("hang", "reset_before"):
                return None
            if fault and fault.kind == "status":
                raise Refusal(fault.status, "A scripted fault.")
            if wire is None:
                raise Refusal(404, f"Invalid URL ({request.method} {request.path})")
            reply = await self._generated(request, body, wire)
        except Refusal as refusal:
            reply = self._refused(wire, refusal)
        except Exception as error:
            traceback.print_exc()
            reply = self._refused(wire, Refusal(500, f"The wire failed: {error!r}"))
        reply.headers = {"x-request-id": request.id, **self.headers, **reply.headers}
        return _hit(reply, fault) if fault else reply

    def _strike(self, request: Request) -> Fault | None:
        for entry in self.faults:
            fault: Fault = entry[0]
            fits = entry[1] != 0 and fault.path in (None, request.path)
            if not fits or (fault.match is not None and not _holds(request.body, fault.match)):
                continue
            if fault.probability < 1 and self.random.random() >= fault.probability:
                continue
            if entry[1] is not None:
                entry[1] -= 1
            request.fault = fault.kind
            return fault
        return None

    def _wire_of(self, path: str) -> Wire | None:
        for wire in self.wires:
            if any(path == own or path.startswith(own + "/") for own in wire.paths):
                return wire
        return None

    def _refused(self, wire: Wire | None, refusal: Refusal) -> Reply:
        body = (wire or self.wires[0]).error(refusal)
        return Reply.whole(refusal.status, json.dumps(body).encode(), refusal.headers)

    async def _generated(self, request: Request, raw: bytes, wire: Wire) -> Reply:
        if self.max_concurrency is not None and self.admitted >= self.max_concurrency:
            raise Refusal(429, "Too many requests at once.", code="rate_limit_exceeded")
        self.admitted += 1
        try:
            body = {} if request.method == "GET" else _json_object(raw)
            draw = partial(self._draw, request.path)
            lookups: list[Lookup] = []
            read = partial(self._read, request.path, lookups)
            call = Call(request.id, request.method, request.path, request.headers, body, draw, read)
            plan = wire.plan(call)
            delay = self.base + (0 if body.get("stream") is True else self.slope * plan.items)
            if delay > 0:
                await asyncio.sleep(delay)
            answer = plan.generate()
            self._bill(request, answer)
            for lookup in lookups:
                self.prefixes.write(lookup)
        finally:
            self.admitted -= 1
        headers = dict(answer.headers)
        if answer.events is None:
            return Reply.whole(200, _encode(answer.body).encode(), headers)
        headers = {"content-type": "text/event-stream; charset=utf-8", **headers}
        pause = self.slope * plan.items / max(1, len(answer.events))
        return Reply(200, answer.events, headers, pause=pause)

    def _draw(self, path: str, key: str) -> int:
        self.draws[path, key] += 1
        return self.draws[path, key] - 1

    def _read(
        self,
        path: str,
        lookups: list[Lookup],
        scope: Hashable,
        parts: Sequence[PromptPart],
        *,
        explicit: bool = False,
    ) -> Billed:
        lookups.append(self.prefixes.read((path, scope), parts, explicit=explicit))
        return lookups[-1].billed

    def _bill(self, request: Request, answer: Answer) -> None:
        self.billed += answer.billed
        request.items = len(answer.items)
        lines = []
        for item in answer.items:
            entry = LedgerEntry(
                request=request.id,
                path=request.path,
                prompt=item.prompt,
                answer=item.answer,
                key=item.key,
                sample=item.sample,
            )
            lines.append(json.dumps(entry) + "\n")
        if lines:
            os.write(self.ledger, "".join(lines).encode())


def _load(name: str, options: Mapping[str, Any]) -> Wire:
    module, _, attribute = name.partition(":")
    return cast("Wire", getattr(importlib.import_module(module), attribute)(**options))


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refusal(400, "The body of the request is not valid JSON.") from None
    if not isinstance(body, dict):
        raise Refusal(400, "The body of the request must be a JSON object.")
    return body


def _holds(body: bytes, text: str) -> bool:
    spellings = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return any(spelling.encode("utf-8", "surrogatepass") in body for spelling in spellings)


def _hit(reply: Reply, fault: Fault) -> Reply | None:
    """Apply a fault to a reply; return None if nothing is to be sent."""
    headers = {**reply.headers, **fault.headers}
    match fault.kind:
        case "reset_after":
            return None
        case "garbage":
            return _scripted(
                200, "this is {not JSON" if fault.body is None else fault.body, headers
            )
        case "status" if fault.body is not None:
            return _scripted(fault.status, fault.body, headers)
        case "truncated":
            size, pieces = reply.size, reply.pieces
            half = (
                [b"".join(pieces)[: size // 2]] if size is not None else pieces[: len(pieces) // 2]
            )
            return Reply(reply.status, half, headers, size, reply.pause, cut=True)
        case "drip":
            pieces = reply.pieces
            if reply.size is not None:
                body, step = b"".join(pieces), reply.size // 16 + 1
                pieces = [body[at : at + step] for at in range(0, reply.size, step)]
            return Reply(reply.status, pieces, headers, reply.size, fault.pause)
    reply.headers = headers
    return reply


def _scripted(status: int, body: object, headers: dict[str, str]) -> Reply:
    headers = {name.lower(): value for name, value in headers.items()}
    data = body if isinstance(body, str) else json.dumps(body)
    if headers.get("content-type", "").startswith("text/event-stream"):
        del headers["content-type"]
    return Reply.whole(status, data.encode(), headers)


async def _serve(config: Mapping[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    simulator = Simulator(config)
    connections: set[Connection] = set()
    server = await loop.create_server(
        lambda: Connection(simulator, connections), "127.0.0.1", config["port"], backlog=4096
    )
    stop = asyncio.Event()

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would still be held at exit
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, daemon=True).start()
    sys.stdout.write(json.dumps({"port": server.sockets[0].getsockname()[1]}) + "\n")
    sys.stdout.flush()
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:  # a fork may hold stdin open, so check both
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1)
    server.close()
    for connection in list(connections):
        connection.transport.abort()


def main() -> None:
    """Read the configuration from stdin and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes stdin
    asyncio.run(_serve(json.loads(sys.stdin.buffer.readline())))


if __name__ == "__main__":
    main()
