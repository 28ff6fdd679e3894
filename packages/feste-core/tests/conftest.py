"""What several tests share: stores to look at, programs to interrupt, plugins to install."""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from feste.backend import Request, Response, Usage
from feste.draw import Draw
from feste.errors import CallTimeout, FesteError, NodeError
from feste.store.journal import Journal
from feste.store.rows import Answer


def asked(text: str, *, model: str = "m-1", n: int = 0, plugin: str = "echo") -> Request:
    """The request of a call."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    draws = (Draw("main", mark, n),)
    return Request(plugin, "chat", "https://api.test/v1", body, draws=draws)


def said(text: str) -> dict[str, Any]:
    """The payload of a reply."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Filler:
    """A session that writes a store, one operation after the other.

    :param path: the store.
    :param prompts: whether prompts are kept.
    """

    def __init__(self, path: Path, *, prompts: bool = True) -> None:
        self.journal = Journal(path)
        self.prompts = prompts

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.journal.close()

    def _wait(self, start: Callable[[Any], None]) -> Any:
        done: Future[Any] = Future()

        def then(ok: bool, value: Any) -> None:
            if ok:
                done.set_result(value)
            else:
                done.set_exception(value)

        start(then)
        return done.result(60)

    def send(self, *calls: Request) -> int:
        """Send a request whose end is not written."""
        return self._wait(
            lambda then: self.journal.intend(
                calls[0], calls, then, run="run-1", prompts=self.prompts
            )
        )

    def buy(
        self,
        *calls: Request,
        payload: Any = None,
        usage: Usage | None = Usage(10, 5),
        request_id: str | None = "r-1",
    ) -> int:
        """Send a request and keep the answers to its calls."""
        number = self.send(*calls)
        response = Response(said("reply") if payload is None else payload, usage, {}, request_id)
        answers = [Answer(call, response) for call in calls]
        unfit = self._wait(
            lambda then: self.journal.record(answers, then, number=number, response=response)
        )
        assert unfit == []
        return number

    def cached(self, call: Request, text: str) -> None:
        """Keep an answer that a cache had, so that no request was sent."""
        answer = Answer(call, Response(said(text)), source="cache")
        self._wait(lambda then: self.journal.record([answer], then, prompts=self.prompts))

    def lose(self, *calls: Request) -> int:
        """Send a request that ends without an answer."""
        number = self.send(*calls)
        self._end(number, "unknown", CallTimeout("no answer after 60 s"))
        return number

    def fail(self, *calls: Request, error: FesteError, response: Response | None = None) -> int:
        """Send a request that ends in an error."""
        number = self.send(*calls)
        self._end(number, "failed", error, response)
        return number

    def task(self, name: str, outcome: str = "answered") -> str:
        """Start a ``once=True`` task that ends like that; return its key."""
        call = Request(
            "task",
            name,
            "plugin:task",
            {"args": [name], "kwargs": {}},
            draws=(Draw("main", name, 0),),
        )
        if outcome == "answered":
            self.buy(call, payload=f"result of {name}", usage=None)
        else:
            error = NodeError(f"{name} broke") if outcome == "failed" else CallTimeout("lost")
            self._end(self.send(call), outcome, error)
        return call.key

    def _end(self, number: int, outcome: Any, error: FesteError, response: Any = None) -> None:
        self.journal.finish(number, outcome, error, response)
        self.journal.run(lambda conn: None)  # nothing else waits for it


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The path of a store that does not exist yet."""
    return tmp_path / "runs.db"


@pytest.fixture
def filler() -> type[Filler]:
    """The class of sessions that fill stores."""
    return Filler


@pytest.fixture
def call() -> Callable[..., Request]:
    """A function that makes requests of calls."""
    return asked


@pytest.fixture
def feste_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command line as a process of its own."""

    def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "feste", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)

    return run


@pytest.fixture
def damage() -> Callable[[Path, str], None]:
    """A function that changes a store as no program does."""

    def change(path: Path, statement: str) -> None:
        conn = sqlite3.connect(path)
        with conn:
            conn.execute(statement)
        conn.close()

    return change


@pytest.fixture
def left_open(tmp_path: Path) -> Any:
    """A function that starts a process which sends a request and holds the store; it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path, text: str) -> subprocess.Popen[str]:
        code = """
            import json, sys
            from feste.backend import Request
            from feste.draw import Draw
            from feste.store.journal import Journal
            body = {"model": "m-1", "messages": [{"role": "user", "content": sys.argv[2]}]}
            call = Request("echo", "chat", "https://api.test/v1", body, draws=(Draw("main", "f", 0),))
            Journal(sys.argv[1]).intend(call, [call], lambda ok, value: print(value, flush=True))
            sys.stdin.read()
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(path), text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Started:
    """A program under test, as a process of its own: what it prints, and signals to it.

    :param folder: where it is written; a file ``answer`` there is its first argument.
    :param text: the program.
    :param arguments: its further arguments.
    """

    def __init__(self, folder: Path, text: str, *arguments: str) -> None:
        path = folder / "program.py"
        path.write_text(text)
        self.answer = folder / "answer"
        self.process = subprocess.Popen(
            [sys.executable, str(path), str(self.answer), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def until(self, *words: str) -> None:
        """Read until each of the words has begun a line."""
        assert self.process.stdout is not None
        left = list(words)
        while left:
            line = self.process.stdout.readline()
            assert line, (self.lines, self.process.stderr and self.process.stderr.read())
            self.lines.append(line.rstrip())
            if line.split(" ")[0].rstrip() == left[0]:
                left.pop(0)

    def interrupt(self) -> None:
        """Send Ctrl-C."""
        time.sleep(0.2)  # it waits by now: one that is about to wait may miss a signal for a while
        self.process.send_signal(signal.SIGINT)

    def end(self) -> list[str]:
        """Read the rest, and return all lines."""
        out, self.errors = self.process.communicate(timeout=60)
        self.lines += out.splitlines()
        return self.lines


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """A function that starts a program; it is killed at the end."""
    started: list[Started] = []

    def begin(text: str, *arguments: str) -> Started:
        started.append(Started(tmp_path, text, *arguments))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


_GOOD = """
@feste.hookimpl
def feste_backends():
    return {"good": "feste.testing:FakeBackend"}
"""
_numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Install throw-away distributions: ``install(name, source)`` returns the module's name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def add(
        name: str = "good",
        source: str = _GOOD,
        *,
        dist: str | None = None,
        version: str = "1.0",
        entry: str | None = None,
        folder: Path = tmp_path,
        metadata: bool = True,
        requires: str = "",
    ) -> str:
        module = f"feste_test_plugin_{next(_numbers)}"
        dist = f"feste-{name}" if dist is None else dist
        info = folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        if metadata:
            head = f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n"
            needs = f"Requires-Dist: {requires}\n" if requires else ""
            (info / "METADATA").write_text(head + needs)
        points = info / "entry_points.txt"
        text = points.read_text() if points.exists() else "[feste]\n"
        points.write_text(f"{text}{name} = {(entry or '{module}').format(module=module)}\n")
        head = "import feste\nfrom feste.context import Setting\n"
        (folder / f"{module}.py").write_text(head + source)
        return module

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("feste_test_plugin_"):
            del sys.modules[module]
