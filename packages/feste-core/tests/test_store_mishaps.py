"""What happens to stores while programs use them: removed, replaced, interrupted, read-only, foreign."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, errors, store
from feste.backend import Operation, Request, Response, Secret, Usage
from feste.prompt import Prompt
from feste.store import schema
from feste.store.opened import opened
from feste.testing import FakeBackend, fresh_draws

Restart = Callable[[], None]


@pytest.fixture
def path(tmp_path: Path, restart: Restart) -> Path:
    return tmp_path / "runs.db"


def run_with(path: Path, *, then: Callable[[], Any]) -> tuple[Any, FakeBackend]:
    """Run a call, do something, and run another that needs it, all in one run."""
    llm = FakeBackend()

    @feste.task
    def meanwhile(text: str) -> str:
        then()
        return text

    second = llm.chat(meanwhile(llm.chat("first")))
    try:
        return feste.compute(second, store=path)[0], llm
    except errors.RunFailed as failed:
        return failed, llm


# --- files that go away -----------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["file", "lock", "all", "replaced"])
def test_a_store_that_is_removed_during_a_run_ends_it(path: Path, gone: str) -> None:
    """What is written to a file that is no longer there would be lost: nothing more is bought."""

    def remove() -> None:
        if gone == "replaced":
            copy = path.with_name("copy")
            shutil.copy(path, copy)
            os.replace(copy, path)
        for file in list(path.parent.iterdir()):
            if gone == "all" or file.name == {"file": "runs.db", "lock": "runs.db.lock"}.get(gone):
                file.unlink()

    failed, llm = run_with(path, then=remove)
    assert isinstance(failed, errors.RunFailed)
    assert "removed or replaced while it was in use" in str(failed)
    assert len(llm.requests) == 1


def test_two_processes_stay_apart_when_the_lock_is_deleted(path: Path) -> None:
    """As people do who read that it is locked; the first one stops, no answer is overwritten."""
    llm = FakeBackend()
    llm.chat("here").compute(store=path)
    Path(f"{path}.lock").unlink()
    program = "import feste; from feste.testing import FakeBackend; print(FakeBackend().chat('there').compute())"
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "FESTE_STORE": str(path)}, check=True
    )
    llm.chat("here too").compute(store=path)  # opened anew
    store.close()
    with closing(sqlite3.connect(path)) as conn:
        asked = [
            json.loads(text)[4]["messages"][0]["content"]
            for (text,) in conn.execute("SELECT request FROM prompts")
        ]
    assert sorted(asked) == ["here", "here too", "there"]


def test_copying_a_store_does_not_free_its_lock(path: Path, tmp_path: Path) -> None:
    FakeBackend().chat("x").compute(store=path)
    shutil.copytree(path.parent, tmp_path.parent / f"{tmp_path.name}-copy")
    program = f"from feste.store.journal import Journal; Journal({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert f"JournalLocked: {path} is being written by process {os.getpid()}" in done.stderr


def test_a_deleted_store_begins_empty_with_a_warning(path: Path) -> None:
    llm = FakeBackend()
    llm.chat("x").compute(store=path)
    path.unlink()
    with pytest.warns(errors.FesteWarning, match="was deleted since it was last used"):
        llm.chat("x").compute(store=path)
    llm.chat("y").compute(store=path)


def test_a_store_whose_reserve_cannot_be_freed_ends_the_run(path: Path) -> None:
    """As on a file system that has become read-only; nothing hangs."""

    def harm() -> None:
        reserve = Path(f"{path}.reserve")
        reserve.unlink()
        reserve.mkdir()
        pages = "PRAGMA max_page_count = 1"
        opened(path).run(lambda conn: conn.execute(pages).fetchall())

    llm = FakeBackend()

    @feste.task
    def meanwhile(text: str) -> str:
        harm()
        return text + "x" * 100_000

    with pytest.raises(errors.RunFailed, match="could not be written"):
        llm.chat(meanwhile(llm.chat("first"))).compute(store=path)
    store.close()
    assert len(llm.requests) == 1


def test_what_is_committed_is_on_the_disk(path: Path) -> None:
    """Not only a killed process but a power failure loses nothing: each commit syncs the log."""
    FakeBackend().chat("x").compute(store=path)
    for pragma, value in (("journal_mode", "wal"), ("synchronous", 2)):
        found = opened(path).run(
            lambda conn, name=pragma: conn.execute(f"PRAGMA {name}").fetchone()
        )
        assert found == (value,)


def test_a_damaged_note_of_how_far_it_got_is_not_believed(path: Path, restart: Restart) -> None:
    first = FakeBackend().chat("x").compute(store=path)
    restart()
    lock = Path(f"{path}.lock")
    lock.write_bytes(lock.read_bytes().replace(b"answers 1", b"answers 9"))
    assert FakeBackend().chat("x").compute(store=path) == first


# --- interrupts -------------------------------------------------------------------------------------


INTERRUPTED = """
import os, signal, sys, threading, time
from feste import store
from feste.store.opened import opened

signal.signal(signal.SIGINT, signal.default_int_handler)  # off in what a script runs behind it

def interrupt(delay):
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)

interrupts = 0
for attempt in range(100):
    thread = threading.Thread(target=interrupt, args=(attempt % 25 * 0.0004,))
    try:
        thread.start()
        opened(sys.argv[1])
        thread.join()
        time.sleep(0.001)
    except KeyboardInterrupt:
        interrupts += 1
    while True:
        try:
            thread.join()
            store.close()
            break
        except KeyboardInterrupt:
            interrupts += 1
print(interrupts > 50, opened(sys.argv[1]).is_current)
"""


def test_an_interrupt_while_a_store_opens_does_not_lock_it(path: Path) -> None:
    """Whenever Ctrl-C comes, the next run of this process can use the store."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "True True\n", done.stderr


# --- contents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "{}",
        '{"payload":{"answers":["x"]}}',
        '{"payload":{},"usage":"many","request_id":null}',
        '{"payload":{},"usage":[1,2],"request_id":null}',
        '{"payload":{},"usage":[1,"2",3],"request_id":null}',
        '{"payload":{},"usage":null,"request_id":7}',
        '{"payload":{},"usage":null,"request_id":null,"more":1}',
        "no json",
        "[" * 100_000,
    ],
)
def test_a_sealed_row_of_another_form_is_put_aside(path: Path, restart: Restart, text: str) -> None:
    """A store from elsewhere may hold anything; the call is bought."""
    first = FakeBackend().chat("x").compute(store=path)
    store.close()
    with closing(sqlite3.connect(path)) as conn:
        values = conn.execute("SELECT * FROM answers").fetchone()
        schema.write(conn, "answers", {**schema.row_of("answers", values), "response": text})
        conn.commit()
    restart()
    assert FakeBackend().chat("x").compute(store=path) == first
    report = feste.last_report()
    assert report is not None and report.damaged == 1 and report.states == {"done": 1}


@pytest.mark.parametrize("how", ["answer", "odd", "error"])
def test_a_key_that_a_provider_echoes_is_not_stored(path: Path, monkeypatch: Any, how: str) -> None:
    """In an answer, in one that cannot be used, in an error."""
    from feste.backend import Backend

    monkeypatch.setenv("A_KEY", "canary-1234567890")

    class Echo(Backend):
        plugin = "echo"

        def __init__(self, *, api_key: Secret) -> None:
            self.api_key = api_key

        def _prepare(self, prompt: str) -> Request:
            return Request(self.plugin, "chat", "plugin:echo", {"prompt": prompt})

        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            key = os.environ["A_KEY"]
            if how == "error":
                raise errors.InvalidRequest("refused")
            return Response({"text": f"your key is {key}"}, Usage(1, 1))

        def _parse(self, response: Response, arguments: Any) -> str:
            if how == "odd":
                raise errors.MalformedResponse("odd")
            return str(response.payload["text"])

        chat = Operation(prepare=_prepare, send=_send, parse=_parse)

    feste.compute(Echo(api_key=Secret("A_KEY")).chat("x"), store=path, on_error="return")
    feste.compute(
        Echo(api_key=Secret("A_KEY")).chat("x"), cache=path.with_name("c.db"), on_error="return"
    )
    store.close()
    for file in path.parent.iterdir():
        assert b"canary" not in file.read_bytes(), file


@pytest.mark.parametrize("word", ["ollama", "none", "null", "usage"])
def test_a_placeholder_for_a_key_changes_no_answer(path: Path, restart: Restart, word: str) -> None:
    class Local(FakeBackend):
        def __init__(self, api_key: Secret) -> None:
            super().__init__()
            self.api_key = api_key

        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            return Response({"answers": [f"run {word}: none"]})

        chat = Operation(
            prepare=FakeBackend._prepare_chat, send=_send, parse=FakeBackend._parse_text
        )

    first = Local(Secret.of(word, "NO_KEY")).chat("x").compute(store=path)
    restart()
    assert Local(Secret.of(word, "NO_KEY")).chat("x").compute(store=path) == first
    assert feste.last_report().states == {"replayed": 1}  # type: ignore[union-attr]


def test_an_answer_that_cannot_be_read_says_how_to_buy_it_anew(
    path: Path, restart: Restart
) -> None:
    class Odd(FakeBackend):
        def _read(self, response: Response, arguments: Any) -> Any:
            raise errors.MalformedResponse("cannot be read")

        chat = Operation(prepare=FakeBackend._prepare_chat, send=FakeBackend._send, parse=_read)

    with pytest.raises(errors.RunFailed) as failed:
        Odd().chat("x").compute(store=path)
    assert "purge" not in str(failed.value)
    restart()
    with pytest.raises(errors.RunFailed, match=r"feste store purge .*runs.db --key \w{64}"):
        Odd().chat("x").compute(store=path)


@pytest.mark.parametrize("name", ["text.txt", "no\0name", "folder"])
def test_what_cannot_be_a_store_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("not a store")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.FesteError):
        FakeBackend().chat("x").compute(store=f"{tmp_path}/{name}")
    if name != "folder":
        assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_the_store_is_no_cache(path: Path) -> None:
    FakeBackend().chat("x").compute(store=path)
    folder = path.parent.with_name(f"{path.parent.name}-link")
    folder.symlink_to(path.parent)
    with pytest.raises(errors.ConfigError, match="same file"):
        FakeBackend().chat("x").compute(store=path, cache=folder / "runs.db")


# --- draws ------------------------------------------------------------------------------------------


def test_an_edited_program_finds_its_answers_again(path: Path, restart: Restart) -> None:
    """An answer that a new call took is not deleted when the old call is bought again."""
    llm = FakeBackend()
    llm.chat("roll a die").compute(store=path)
    sent = []
    for _ in range(4):
        restart()
        llm.requests.clear()
        written_otherwise = llm.chat(Prompt("roll {{ x }}")(x="a die"))
        with context.set(store=path):
            feste.compute(written_otherwise)
            feste.compute(llm.chat("roll a die"))
        sent.append(len(llm.requests))
    assert sent == [1, 0, 0, 0]


def test_an_answer_in_hand_when_the_store_failed_is_stored_later(
    path: Path, restart: Restart
) -> None:
    class Filling(FakeBackend):
        plugin = "fake"

        def answer(self, request: Request) -> Response:
            pages = "PRAGMA max_page_count = 1"
            opened(path).run(lambda conn: conn.execute(pages).fetchall())
            return Response({"answers": ["text"], "much": "x" * 100_000})

    node = Filling().chat("x")
    with pytest.raises(errors.RunFailed, match="could not keep them"):
        node.compute(store=path)
    assert node.compute(store=path) == "fake-1:text"  # kept by the node, and stored now
    restart()
    llm = FakeBackend()
    feste.compute(llm.chat("x"), store=path)
    assert not llm.requests


def test_the_store_given_to_compute_holds_inside_its_tasks(path: Path, restart: Restart) -> None:
    sent = []

    @feste.task
    def inner(text: str) -> Any:
        llm = FakeBackend()
        value = llm.chat(text).compute()
        sent.append(len(llm.requests))
        return value

    first = inner("x").compute(store=path)
    restart()
    assert inner("x").compute(store=path) == first
    assert sent == [1, 0]


def test_many_unknown_requests_of_one_call(path: Path) -> None:
    """Each is found at once, however many there are."""
    from feste.draw import Draw
    from feste.store.rows import Wanted
    from feste.store.unknown import UnknownRequests

    unknown = UnknownRequests()
    for n in range(20_000):
        unknown.note(
            {
                "id": n,
                "plugin": "p",
                "operation": "o",
                "model": "m",
                "sent": 0.0,
                "outcome": "unknown",
                "calls": json.dumps([["key", f"main/f.{n}"]]),
            }
        )
    mine = [
        unknown.claim(Wanted("key", Draw("main", "f", n), True), answered=False)
        for n in range(10_000)
    ]
    assert [earlier.id for earlier in mine if earlier] == list(range(10_000))
    others = [
        unknown.claim(Wanted("key", Draw("main", "new", n), True), answered=False)
        for n in range(10_001)
    ]
    assert len({e.id for e in others if e}) == 10_000 and others[-1] is None
    assert unknown.claim(Wanted("key", Draw("main", "newer", 0), True), answered=True) is None
    fresh_draws()


def same(tag: str, text: str) -> Any:
    """A text that makes equal requests of calls with different draws."""
    return feste.task(lambda tag, text: text, pure=True)(tag, text)


def test_another_program_that_writes_for_a_moment_is_waited_for(
    path: Path, restart: Restart
) -> None:
    """Also by what reads first: giving a stored answer to a draw, or beginning a once task."""
    llm = FakeBackend()
    feste.compute(llm.chat("first"), store=path)
    restart()
    feste.compute(llm.chat("second"), store=path)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        soon = threading.Timer(0.1, lambda: shell.execute("ROLLBACK"))
        soon.start()
        feste.compute(llm.chat(same("other", "first")), store=path)
        soon.join()
    assert feste.last_report() is not None
    assert feste.last_report().states["replayed"] == 1  # type: ignore[union-attr]


def test_a_number_that_a_purge_freed_serves_one_draw(path: Path, restart: Restart) -> None:
    llm = FakeBackend()
    how: Any = {"store": path, "keep": "none"}
    llm.chat(same("earlier", "Hi")).compute(**how)
    restart()
    one = llm.chat("Hi")
    one.compute(**how)
    store.close()
    subprocess.run(
        [sys.executable, "-m", "feste", "store", "purge", path, "--all", "--yes"], check=True
    )
    llm.chat(same("other", "Hi")).compute(**how)
    one.compute(**how)
    store.close()
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("SELECT count(*) FROM answers").fetchone() == (2,)


@pytest.mark.parametrize("attempt", range(8))
def test_a_store_in_the_place_of_a_deleted_one_knows_nothing_of_it(
    path: Path, restart: Restart, attempt: int
) -> None:
    """Its answers have the same numbers, and the system often gives it the same inode."""
    llm = FakeBackend()
    how: Any = {"store": path, "keep": "none"}
    one, other = llm.chat("Hi"), llm.chat(same("other", "Hi"))
    feste.compute(one, **how)
    feste.compute(other, **how)
    store.close()
    for file in path.parent.iterdir():
        file.unlink()
    feste.compute(other, **how)
    feste.compute(one, **how)
    store.close()
    feste.compute(one, other, **how)
    assert feste.last_report().states["replayed"] == 2  # type: ignore[union-attr]


def test_an_answer_in_a_store_and_a_cache_serves_one_draw(path: Path, restart: Restart) -> None:
    class Counting(FakeBackend):
        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            self.requests.append(request)
            return Response({"answers": [f"answer {len(self.requests)}"]})

        chat = Operation(
            prepare=FakeBackend._prepare_chat, send=_send, parse=FakeBackend._parse_text
        )

    llm, cache = Counting(), path.with_name("cache.db")
    both: Any = {"store": path, "cache": cache}
    feste.compute(llm.chat("Hi"), **both)
    restart()
    feste.compute(llm.chat(same("other", "Hi")), **both)  # takes the answer
    feste.compute(llm.chat("Hi"), **both)
    assert len(llm.requests) == 2
    restart()
    calls = [llm.chat("Hi"), llm.chat(same("other", "Hi"))]
    first, second = feste.compute(*calls, cache=cache, cache_mode="replay-only")
    assert first != second
