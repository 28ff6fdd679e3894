"""Tasks with `once=True` run at most once for each of their calls, however often a program runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, errors
from feste.testing import FakeBackend

sent: list[Any] = []


@feste.task(once=True)
def send(to: str, text: str = "Hi") -> dict[str, Any]:
    sent.append(to)
    if to == "broken":
        raise ConnectionError("no line")
    if to == "odd":
        return {"set": {1}}
    return {"to": to, "parts": (1, 2)}


@feste.task(once=True)
async def send_async(to: str) -> str:
    await asyncio.sleep(0)
    sent.append(to)
    if to == "broken":
        raise ConnectionError("no line")
    return f"sent to {to}"


@pytest.fixture
def path(tmp_path: Path, restart: Callable[[], None]) -> Path:
    sent.clear()
    return tmp_path / "runs.db"


@pytest.mark.parametrize("eager", [False, True])
def test_a_rerun_returns_the_kept_result(
    path: Path, restart: Callable[[], None], eager: bool
) -> None:
    """Each call runs once; three equal ones are three calls. Lazy and eager runs know each other."""

    def program(eager: bool) -> Any:
        with context.set(eager=eager, store=path):
            calls = [*(send("ann") for _ in range(3)), send("bob", text=FakeBackend().chat("x"))]
            return feste.compute(calls, send_async("eve"))

    first = program(eager)
    assert sorted(sent) == ["ann", "ann", "ann", "bob", "eve"]
    assert first == ([{"to": t, "parts": [1, 2]} for t in ("ann",) * 3 + ("bob",)], "sent to eve")
    for again in (eager, not eager):
        restart()
        assert program(again) == first
    assert len(sent) == 5
    if eager:  # the last run was lazy
        report = feste.last_report()
        assert report is not None and report.states == {"replayed": 6}


def test_other_arguments_are_another_call(path: Path, restart: Callable[[], None]) -> None:
    feste.compute(send("ann"), store=path)
    restart()
    feste.compute(send("ann", text="Ho"), send("ann"), store=path)
    assert sent == ["ann", "ann"]


@pytest.mark.parametrize("task", [send, send_async])
@pytest.mark.parametrize("eager", [False, True])
def test_a_call_that_raised_is_not_run_again(
    path: Path, restart: Callable[[], None], task: Any, eager: bool
) -> None:
    def program() -> Any:
        with context.set(eager=eager, store=path):
            return feste.compute(task("broken"))[0]

    with pytest.raises((errors.RunFailed, ConnectionError)):
        program()
    for _ in range(2):
        restart()
        with pytest.raises((errors.RunFailed, errors.NotRepeated)) as failed:
            program()
        error = failed.value.__cause__ or failed.value
        assert isinstance(error, errors.NotRepeated)
        assert "raised ConnectionError: no line" in str(error)
        assert f"feste store purge {path} --key {error.key}" in str(error)
    assert sent == ["broken"]


def test_in_the_same_process_too(path: Path) -> None:
    node = send("broken")
    with pytest.raises(errors.RunFailed, match="no line"):
        node.compute(store=path)
    with pytest.raises(errors.RunFailed, match="not run again"):
        node.compute(store=path)
    assert sent == ["broken"]


def test_a_call_whose_process_was_killed_is_not_run_again(
    path: Path, restart: Callable[[], None]
) -> None:
    """Nobody knows how far it got, so the user has to look."""
    program = f"""
        import os
        import feste

        @feste.task(once=True)
        def send(to):
            print("sending", flush=True)
            os.kill(os.getpid(), 9)

        send("ann").compute(store={str(path)!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.stdout == "sending\n" and killed.returncode == -9
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout == "" and again.returncode == 1
    assert "NotRepeated: send was started at" in again.stderr
    assert "did not return" in again.stderr


def test_a_result_that_is_no_json_is_an_error_that_says_so(path: Path) -> None:
    node = send("odd")
    with pytest.raises(errors.RunFailed, match=r"send has run.*result cannot be kept"):
        node.compute(store=path)
    with pytest.raises(errors.RunFailed, match="not run again"):
        node.compute(store=path)
    assert sent == ["odd"]
    with pytest.raises(errors.RunFailed, match="send has run"):
        send("odd").compute(store=path)  # another node is another call
    assert sent == ["odd", "odd"]


def test_arguments_must_be_plain_data(path: Path) -> None:
    with pytest.raises(errors.RunFailed, match=r"plain data: args\[0\] is of type object"):
        send(object()).compute(store=path)
    assert not sent


def test_it_needs_a_store() -> None:
    sent.clear()
    with pytest.raises(errors.ConfigError, match=r"send has once=True.*test_once.py"):
        send("ann").compute()
    with context.set(eager=True), pytest.raises(errors.ConfigError, match="needs a store"):
        send("ann")
    assert not sent


@pytest.mark.parametrize("options", [{"pure": True}, {"emits": True}, {"executor": "process"}])
def test_what_does_not_go_with_it(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match="once=True"):
        feste.task(once=True, **options)


def test_a_returned_node_is_refused(path: Path) -> None:
    @feste.task(once=True)
    def wrong() -> Any:
        return FakeBackend().chat("x")

    with pytest.raises(errors.RunFailed, match="result cannot be kept"):
        wrong().compute(store=path)


def test_a_chain_of_them(path: Path, restart: Callable[[], None]) -> None:
    @feste.task(once=True)
    def add(x: int) -> int:
        sent.append(x)
        return x + 1

    def program() -> Any:
        x: Any = 0
        for _ in range(20):
            x = add(x)
        return x.compute(store=path)

    assert program() == 20
    restart()
    assert program() == 20 and sent == list(range(20))
