"""A simulated provider in its own process: the handle that tests and benchmarks use.

`SimServer` starts ``python -m feste.testing.sim_process`` on a free loopback port, controls it over
the ``/_sim/`` paths of that port, and ends it. No method needs an event loop, so all may be called
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
from typing import IO, Any

from feste.backend import PromptCache
from feste.testing.sim_types import Billed, Fault, LedgerEntry, LoggedRequest

__all__ = ["Billed", "Fault", "LedgerEntry", "LoggedRequest", "SimServer"]


class SimServer:
    """A simulated provider in its own process.

    A request for k answers takes ``base + slope * k`` seconds. Use it as a context manager, or call
    `start` and `close`. The process also ends if its parent ends in any way.

    If a client leaves, the generation continues and is billed, as at most providers.

    :param wire: the wire format, as ``"module:Class"``, or several of them for one port.
    :param base: the fixed duration of a request in seconds.
    :param slope: the additional seconds for each answer.
    :param wire_options: keyword arguments of the wire; for several wires, a list of them.
    :param headers: headers of every reply, for example rate limits.
    :param max_concurrency: above this number of concurrent requests, answer 429.
    :param prompt_cache: the prompt cache, which makes prompts cheaper that begin alike; None for a
        provider that has none.
    :param seed: the seed for the probabilities of faults.
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
        max_concurrency: int | None = None,
        prompt_cache: PromptCache | None = None,
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
        self._config = {
            "wires": list(zip(wires, options, strict=True)),
            "base": base,
            "slope": slope,
            "headers": dict(headers or {}),
            "max_concurrency": max_concurrency,
            "prompt_cache": None if prompt_cache is None else asdict(prompt_cache),
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
        self._port = 0

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
        self._port = int(json.loads(ready)["port"])
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
            LoggedRequest(**{**entry, "body": _decoded(entry["body"])})
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

    def peak(self) -> int:
        """Return the maximum number of requests that were in flight at once.

        A server without latency answers a request as soon as it has read it, so its peak is 1.

        :returns: the number; it includes refused requests.
        """
        return int(self._control("GET", "state")["peak"])

    def in_flight(self) -> int:
        """Return the number of requests in flight now.

        :returns: the number; a request whose client left is not in flight.
        """
        return int(self._control("GET", "state")["in_flight"])

    def billed(self) -> Billed:
        """Return what all requests cost since the start or the last reset.

        An answer is billed as soon as it is generated, whether or not a client receives it.

        :returns: the sums over all requests, embeddings included.
        """
        return Billed(**self._control("GET", "billed"))

    def committed(self) -> int:
        """Return the number of prefixes in the prompt cache that a request would find now.

        A prompt has a prefix for each multiple of the cache's `step` and for each breakpoint, so a
        test that waits for a write to commit waits until this number has grown.

        :returns: the number; prefixes that are not committed yet or expired do not count.
        """
        return int(self._control("GET", "committed"))

    def add(self, *faults: Fault) -> None:
        """Add faults; each request gets the first one that fits.

        :param faults: the faults; they are appended to the existing ones.
        """
        self._control("POST", "faults", [asdict(fault) for fault in faults])

    def reset(self) -> None:
        """Clear the log, ledger, bill, prompt cache, peak, faults and counters of sampled answers."""
        self._control("POST", "reset", {})

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("SimServer is not running; use it inside its 'with' block")
        return self._process

    def _control(self, method: str, name: str, payload: object = None) -> Any:
        process = self._running()
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            body = None if payload is None else json.dumps(payload)
            link.request(method, f"/_sim/{name}", body, {"connection": "close"})
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
