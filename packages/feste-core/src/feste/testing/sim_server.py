"""A simulated provider in its own process: the handle that tests and benchmarks use.

`SimServer` starts ``python -m feste.testing.sim_process`` on a free loopback port, controls it over
a second one, and ends it. No method needs an event loop, so all may be called
from a running one too; each blocks for one small local request.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, get_args

from feste.backend import Price, PromptCache
from feste.testing.sim_faults import Fault, FaultKind, Outage
from feste.testing.sim_limits import ServerLimits, Wait
from feste.testing.sim_types import Billed, LedgerEntry, LoggedRequest, Totals

__all__ = [
    "Billed",
    "Fault",
    "LedgerEntry",
    "LoggedRequest",
    "Outage",
    "ServerLimits",
    "SimServer",
    "Totals",
]


class SimServer:
    """A simulated provider in its own process.

    A request for k answers takes ``base + slope * k`` seconds. Use it as a context manager, or call
    `start` and `close`. The process also ends if its parent ends in any way.

    If a client leaves, the generation continues and is billed, as at most providers.

    :param wire: the wire format, as ``"module:Class"``, or several of them for one port.
    :param base: the fixed duration of a request in seconds.
    :param slope: the additional seconds for each answer.
    :param wire_options: keyword arguments of the wire; for several wires, a list of them.
    :param headers: headers of every reply.
    :param limits: what an account may send; the rest is answered 429.
    :param faults: what goes wrong: a share of requests for each kind, as in
        ``{"reset_after": 0.01, "garbage": 0.01}``, or faults and outages. They outlast a `reset`.
    :param waits: how replies that ask to wait say for how long, one of them for each by chance:
        in whole ``"seconds"``, as a ``"fraction"``, in ``"milliseconds"`` (of a header of their
        own), as a ``"date"``, 2 minutes too ``"long"``, or not at all (``"none"``).
    :param prompt_cache: the prompt cache, which makes prompts cheaper that begin alike; None for a
        provider that has none.
    :param price: what tokens cost, for the dollars of the log and the totals.
    :param seed: the seed of chance. What happens to a request depends on it, on the body and on
        how often that body has come, so it does not depend on the order of arrival.
    :param port: the port; 0 takes a free one.
    :param ledger_path: the file of the ledger; it is appended to and remains after `close`. By
        default the ledger is a temporary file that `close` deletes.
    :param log_bodies: keep the bodies of requests; False saves memory in long benchmarks.
    :param start_timeout: the seconds that the process may take to start.
    :raises ValueError: if the arguments are inconsistent.

    Example::

        with SimServer("feste.backend.openai.testing:OpenAIWire", base=0.02) as server:
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="test")
    """

    def __init__(
        self,
        wire: str | Sequence[str],
        *,
        base: float = 0.0,
        slope: float = 0.0,
        wire_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
        limits: ServerLimits | None = None,
        faults: Mapping[FaultKind, float] | Sequence[Fault | Outage] = (),
        waits: Sequence[Wait] = ("seconds",),
        prompt_cache: PromptCache | None = None,
        price: Price | None = None,
        seed: int = 0,
        port: int = 0,
        ledger_path: str | os.PathLike[str] | None = None,
        log_bodies: bool = True,
        start_timeout: float = 60.0,
    ) -> None:
        wires = [wire] if isinstance(wire, str) else list(wire)
        if isinstance(wire_options, Mapping):
            options = [dict(wire_options)]
        else:
            options = [dict(some) for some in wire_options or [{}] * len(wires)]
        if not wires or len(wires) != len(options):
            raise ValueError(f"{len(wires)} wires, but options for {len(options)}")
        if any(":" not in name for name in wires):
            raise ValueError(f"a wire is given as 'module:Class', not {wires}")
        if base < 0 or slope < 0:
            raise ValueError("base and slope are seconds and cannot be negative")
        if not waits or not set(waits) <= set(get_args(Wait)):
            raise ValueError(f"waits are one or more of {', '.join(get_args(Wait))}, not {waits}")
        if isinstance(faults, Mapping):
            faults = [Fault(kind=k, times=None, probability=p) for k, p in faults.items()]
        self._config = {
            "wires": list(zip(wires, options, strict=True)),
            "base": base,
            "slope": slope,
            "headers": dict(headers or {}),
            "limits": None if limits is None else asdict(limits),
            "faults": [asdict(fault) for fault in faults],
            "waits": list(waits),
            "prompt_cache": None if prompt_cache is None else asdict(prompt_cache),
            "price": None if price is None else asdict(price),
            "seed": seed,
            "port": port,
            "log_bodies": log_bodies,
        }
        self._given_path = None if ledger_path is None else Path(ledger_path).absolute()
        self._start_timeout = start_timeout
        self._ledger: Path | None = self._given_path
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[..., SimServer] | None = None
        self._stderr: IO[bytes] | None = None
        self._port = self._control_port = 0

    def __repr__(self) -> str:
        return f"<SimServer {self.url}>" if self._process else "<SimServer not running>"

    def __enter__(self) -> SimServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> SimServer:
        """Start the process and wait until it listens; do nothing if it runs already.

        :returns: the server itself.
        :raises RuntimeError: if it does not start; the message contains its output.
        """
        if self._process is not None:
            return self
        scratch: Path | None = None
        if self._given_path is None:
            handle, name = tempfile.mkstemp(prefix="feste-ledger-", suffix=".jsonl")
            os.close(handle)
            scratch = Path(name)
        self._ledger = self._given_path or scratch
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "feste.testing.sim_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._stop = weakref.finalize(
            self, _stop, self._process, self._stderr, scratch, os.getpid()
        )
        ready = self._handshake(self._process, {**self._config, "ledger": str(self._ledger)})
        if not ready:
            self._process.kill()
            code, text = self._process.wait(), self._errors()
            self.close()
            raise RuntimeError(f"SimServer did not start (exit code {code}):\n{text}")
        ports = json.loads(ready)
        self._port, self._control_port = ports["port"], ports["control"]
        return self

    def close(self) -> None:
        """End the process and wait for it; do nothing if that was done before."""
        self._process = None
        if self._stop is not None:
            self._stop()

    @property
    def url(self) -> str:
        """The address ``http://127.0.0.1:port``, without a path."""
        self._running()
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._running().pid

    @property
    def ledger_path(self) -> Path:
        """The file of the ledger: one JSON object per line, written before the answer is sent."""
        if self._ledger is None:
            raise RuntimeError("SimServer has no ledger before it was started")
        return self._ledger

    def requests(self) -> list[LoggedRequest]:
        """Return the log: all requests in order of arrival, including those in flight.

        :returns: the requests since the start or the last reset.
        """
        return [
            LoggedRequest(
                **{**entry, "body": _decoded(entry["body"]), "billed": Billed(**entry["billed"])}
            )
            for entry in self._control("GET", "requests")
        ]

    def ledger(self) -> list[LedgerEntry]:
        """Return the ledger: one entry for each generated answer.

        :returns: the entries, read from `ledger_path`; a line that a crash cut off is skipped.
        """
        if self._given_path is None:
            self._running()
        lines = self.ledger_path.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]

    def totals(self) -> Totals:
        """Return what the server has seen, in numbers: cheap, also while a million requests run.

        :returns: the totals since the start or the last reset.
        """
        found = self._control("GET", "totals")
        statuses = {int(status): count for status, count in found["statuses"].items()}
        return Totals(**{**found, "statuses": statuses, "billed": Billed(**found["billed"])})

    def add(self, *faults: Fault | Outage) -> None:
        """Add faults and outages; each request gets the first one that fits.

        :param faults: they are appended to the existing ones, and go with a `reset`.
        """
        self._control("POST", "faults", [asdict(fault) for fault in faults])

    def reset(self) -> None:
        """Clear the log, ledger, totals, prompt cache, added faults and counters of samples.

        Limits begin anew, with full buckets.
        """
        self._control("POST", "reset", {})

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("SimServer is not running; use it inside its 'with' block")
        return self._process

    def _control(self, method: str, name: str, payload: object = None) -> Any:
        process = self._running()
        link = http.client.HTTPConnection("127.0.0.1", self._control_port, timeout=60)
        try:
            body = None if payload is None else json.dumps(payload)
            link.request(method, f"/{name}", body, {"connection": "close"})
            reply = link.getresponse()
            data = json.loads(reply.read())
        except (OSError, http.client.HTTPException) as error:
            code, text = process.poll(), self._errors()
            raise RuntimeError(f"SimServer is gone (exit code {code}):\n{text}") from error
        finally:
            link.close()
        if reply.status != 200:
            raise RuntimeError(f"SimServer answered {reply.status} to {name}: {data}")
        return data

    def _handshake(self, process: subprocess.Popen[bytes], config: object) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self._start_timeout, process.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(config).encode() + b"\n")
                process.stdin.flush()
            return process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()

    def _errors(self) -> str:
        if self._stderr is None or self._stderr.closed:
            return ""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()


def _decoded(body: str) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return body


def _stop(
    process: subprocess.Popen[bytes], stderr: IO[bytes], scratch: Path | None, owner: int
) -> None:
    if os.getpid() != owner:  # a fork must not end its parent's server
        return
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.write(b"\n")  # if a fork holds the pipe open, closing it would not be seen
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    stderr.close()
    if scratch is not None:
        scratch.unlink(missing_ok=True)
