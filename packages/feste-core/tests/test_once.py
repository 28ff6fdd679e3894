"""Tasks with `once=True` run at most once for each of their calls, however often a program runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, errors
from feste.scheduler import LocalExecutor, context_of, evaluate, result_of
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
    with pytest.raises(errors.RunFailed, match=r"plain data: args\[0\] is an object"):
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


# --- what must not happen twice -------------------------------------------------------------------


def again_and_again(path: Path, restart: Callable[[], None], program: Callable[[], Any]) -> Any:
    """Run a program three times, as three processes; return what the last one gave."""
    for _ in range(3):
        restart()
        with context.set(store=path, on_error="return"):
            values = program()
    return values


def test_one_of_two_equal_calls_that_raised_is_not_run_again(
    path: Path, restart: Callable[[], None]
) -> None:
    """The call that succeeded does not take the place of the other, one at a time or in a list."""
    ran: list[int] = []

    @feste.task(once=True)
    def pay(amount: int) -> int:
        ran.append(amount)
        if len(ran) == 2:
            raise OSError("no answer after the transfer")
        return amount

    for at_once in (False, True):
        del ran[:]
        path = path.with_name(f"{at_once}.db")

        def program(at_once: bool = at_once) -> Any:
            if at_once:
                with context.set(optimize=False):
                    return feste.compute([pay(100), pay(100)])[0]
            return [pay(100).compute() for _ in range(2)]

        values = again_and_again(path, restart, program)
        assert ran == [100, 100]
        assert sorted(type(v).__name__ for v in values) == ["NotRepeated", "int"]


def test_an_edited_program_repeats_nothing(path: Path, restart: Callable[[], None]) -> None:
    """A result that another call of it took is that call's from then on."""
    llm = FakeBackend()
    send("ann", text=llm.chat("x")).compute(store=path)
    with context.set(store=path):
        for _ in range(3):
            restart()
            with context.set(eager=True):  # an equal call, written otherwise, stands before it now
                send("ann", text=llm.chat("x"))
            send("ann", text=llm.chat("x")).compute()
    assert sent == ["ann", "ann"]  # two calls since the edit, each made once


def test_a_call_that_still_runs_is_not_run_beside_itself(path: Path) -> None:
    """Given up by Ctrl-C or a cancelled await, its thread runs on."""
    import threading
    import time

    going, ran = threading.Event(), []

    @feste.task(once=True)
    def slow(x: int) -> int:
        ran.append(x)
        going.wait(30)
        return x

    async def cancelled(node: Any) -> None:
        task = asyncio.ensure_future(feste.acompute(node, store=path))
        while not ran:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    node = slow(7)
    asyncio.run(cancelled(node))
    with pytest.raises(errors.RunFailed, match="still runs in this process"):
        node.compute(store=path)
    going.set()
    deadline = time.monotonic() + 30
    while True:
        try:
            assert node.compute(store=path) == 7
            break
        except errors.RunFailed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert ran == [7]


def test_an_emitted_call_needs_a_store_too() -> None:
    @feste.task(emits=True)
    def emitting() -> Any:
        return send("ann")

    sent.clear()
    with pytest.raises(errors.RunFailed, match="needs a store"):
        emitting().compute()
    assert not sent


def test_letting_a_call_run_again_leaves_the_others_alone(
    path: Path, restart: Callable[[], None]
) -> None:
    """The command in the message works as it is, and what had succeeded is not repeated."""
    import shlex

    path = path.parent / "a folder" / "runs.db"
    fail = [False, True]

    @feste.task(once=True)
    def pay(amount: int) -> int:
        sent.append(amount)
        if fail[(len(sent) - 1) % 2] and len(sent) < 3:
            raise OSError("no")
        return amount

    def program() -> Any:
        with context.set(store=path, on_error="return"):
            return [pay(100).compute() for _ in range(2)]

    program()
    restart()
    (error,) = (e for e in program() if isinstance(e, errors.FesteError))
    restart()
    command = shlex.split(str(error).partition("run again: feste ")[2].partition(" (at")[0])
    done = subprocess.run(
        [sys.executable, "-m", "feste", *command, "--yes"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert program() == [100, 100] and len(sent) == 3


def test_what_a_task_raised_is_kept_without_keys_and_prompts(path: Path) -> None:
    @feste.task(once=True)
    def leak(text: str) -> None:
        raise ValueError(f"{text} api_key=sk-abcdef1234567890")

    with pytest.raises(errors.RunFailed):
        leak("SECRET").compute(store=path, store_prompts=False)
    with pytest.raises(errors.RunFailed):
        leak("told").compute(store=path)
    feste.store.close()
    data = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"SECRET" not in data and b"sk-abcdef" not in data and b"told" in data


@pytest.mark.parametrize("lost", ["answer", "request", "both"])
def test_a_call_whose_rows_are_damaged_is_not_run_again(
    path: Path, restart: Callable[[], None], lost: str
) -> None:
    """What is left tells that it was run, so it is not run again."""
    import sqlite3
    from contextlib import closing

    send("ann").compute(store=path)
    with pytest.raises(errors.RunFailed):
        send("broken").compute(store=path)
    feste.store.close()
    with closing(sqlite3.connect(path)) as conn:
        if lost != "request":
            conn.execute("UPDATE answers SET response = replace(response, 'ann', 'bob')")
        if lost == "both":
            conn.execute("DELETE FROM answers")
            Path(f"{path}.lock").unlink()
        if lost == "request":
            conn.execute("UPDATE requests SET operation = 'x' WHERE outcome = 'failed'")
        conn.commit()
    for _ in range(2):
        restart()
        values = feste.compute([send("ann"), send("broken")], store=path, on_error="return")[0]
        assert isinstance(values[1], errors.NotRepeated)
        assert isinstance(values[0], dict if lost == "request" else errors.NotRepeated)
    assert sent == ["ann", "broken"]


def test_a_call_that_is_cancelled_before_it_begins_can_run_later(path: Path) -> None:
    """Its start was being noted; the note is taken back."""
    import time

    from feste.store.opened import opened

    node = send_async("eve")

    async def cancelled() -> None:
        journal = opened(path)
        task = asyncio.ensure_future(feste.acompute(node, store=path))
        held = asyncio.to_thread(journal.run, lambda conn: time.sleep(0.3))
        await asyncio.gather(held, asyncio.sleep(0.15))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    deadline = time.monotonic() + 30
    while True:
        try:
            assert node.compute(store=path) == "sent to eve"
            break
        except errors.RunFailed as failed:  # until the note is taken back
            assert "still runs" in str(failed) and time.monotonic() < deadline
            time.sleep(0.01)
    assert sent == ["eve"]


class Elsewhere(LocalExecutor):
    """An executor with a place of its own, which knows of tasks only what is public."""

    def place(self, task: Any) -> str:
        return "elsewhere"

    def capacity(self, where: str) -> int:
        return 2 if where == "elsewhere" else super().capacity(where)

    def start(self, report: Any) -> None:
        self.report = report
        super().start(report)

    def call(self, where: str, chunk: Any) -> None:
        if where != "elsewhere":
            super().call(where, chunk)
            return

        def work() -> None:
            for task in chunk:
                given = task.fn, task.args, task.kwargs, task.values
                value = context_of(task).run(evaluate, *given)
                value = asyncio.run(value) if asyncio.iscoroutine(value) else value
                self.report.done(task, True, result_of(value), 0.0)
            self.report.free(where, chunk)

        threading.Thread(target=work).start()


def test_an_executor_of_a_plugin_runs_it_once_too(path: Path, restart: Callable[[], None]) -> None:
    """Whoever calls a task's function: a rerun finds that it has run, and what it returned."""

    def program() -> Any:
        calls = [send("ann"), send("ann"), send_async("eve")]
        return feste.compute(calls, scheduler=Elsewhere, store=path)

    first = program()
    assert sorted(sent) == ["ann", "ann", "eve"]
    assert feste.last_report().states == {"done": 3}
    restart()

    assert program() == first
    assert sorted(sent) == ["ann", "ann", "eve"]
    assert feste.last_report().states == {"replayed": 3}
