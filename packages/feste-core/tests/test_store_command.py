"""``feste store``: looking into a store from the command line."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feste.errors import InvalidRequest
from feste.store import schema
from feste.store.contents.reader import Reader
from feste.store.contents.summary import summarize
from feste.store.journal import Journal
from feste.store.rows import Wanted

Run = Callable[..., subprocess.CompletedProcess[str]]


def fill(path: Path, filler: Any, call: Any) -> None:
    """Two sessions: answers, a failed request, a lost one that was answered later, tasks."""
    with filler(path) as first:
        first.buy(call("one"))
        first.buy(call("two"), call("three"))
        first.fail(call("bad"), error=InvalidRequest("no such thing"))
        first.lose(call("lost"))
        first.lose(call("gone"))
        first.task("mail")
        first.task("pay", "failed")
        first.task("ship", "unknown")
    with filler(path) as second:
        second.buy(call("lost"))
        second.buy(call("four", model="m-2"), usage=None)


def json_of(done: subprocess.CompletedProcess[str]) -> Any:
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_list_shows_each_session_with_its_totals(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    """Number, program, how it ended, calls, requests, tokens; it fits 80 columns."""
    fill(store, filler, call)

    done = feste_command("store", "list", store)
    first, second = json_of(feste_command("store", "list", store, "--json"))
    heads = [line.split() for line in done.stdout.splitlines() if "began" in line]

    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    assert heads[0][:4] == ["session", "began", "program", "ended"]
    assert [first[n] for n in ("id", "calls", "requests", "failed", "unknown")] == [1, 3, 5, 1, 2]
    assert [first[n] for n in ("input_tokens", "output_tokens", "state")] == [20, 10, "closed"]
    assert [second[n] for n in ("id", "calls", "requests", "pid")] == [2, 2, 2, os.getpid()]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["began"])


def test_show_counts_and_names_what_has_no_answer(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    """Totals by operation and model; the unknown window and the tasks by name."""
    fill(store, filler, call)
    lost, gone = call("lost").key, call("gone").key

    done = feste_command("store", "show", store)
    lines = done.stdout.splitlines()
    data = json_of(feste_command("store", "show", store, "--json"))

    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, lines[1:])) <= 80  # the first is the path
    assert lines[1].startswith("  2 sessions, 6 answers, 10 prompts; ")
    assert "  echo.chat  m-1        4         6       1        2         30          15" in lines
    assert "  echo.chat  m-2        1         1       0        0          -           -" in lines
    assert "2 requests may have been billed without an answer:" in lines
    assert lines[lines.index(f"    {lost}") + 1] == "      answered by a later request"
    assert lines[lines.index(f"    {gone}") + 1] == "      no answer since"
    assert data["tasks"] == {"mail": {"answered": 1}, "pay": {"failed": 1}, "ship": {"unknown": 1}}
    assert [(t["name"], t["outcome"]) for t in data["unfinished"]] == [
        ("pay", "failed"),
        ("ship", "unknown"),
    ]
    assert any(line.startswith("  pay('pay') of session 1, begun ") for line in lines)
    assert [t["asked"] for t in data["unfinished"]] == [
        {"args": ["pay"], "kwargs": {}},
        {"args": ["ship"], "kwargs": {}},
    ]
    assert [[c["kept"] for c in r["calls"]] for r in data["unanswered"]] == [[True], [False]]
    assert "CallTimeout: no answer after 60 s" in " ".join(done.stdout.split())
    assert "$" not in done.stdout


def test_show_of_one_session(store: Path, filler: Any, call: Any, feste_command: Run) -> None:
    """``--session`` leaves out what others did; an unknown one is an error."""
    fill(store, filler, call)

    data = json_of(feste_command("store", "show", store, "--session", 2, "--json"))
    wrong = feste_command("store", "show", store, "--session", 9)

    assert [s["id"] for s in data["sessions"]] == [2]
    assert [(o["model"], o["calls"]) for o in data["operations"]] == [("m-1", 1), ("m-2", 1)]
    assert data["unanswered"] == [] and data["tasks"] == {}
    assert wrong.returncode == 1
    assert f"feste: {store} has no session 9" in wrong.stderr


def test_a_store_that_is_being_written(
    store: Path, call: Any, feste_command: Run, left_open: Any
) -> None:
    """Its session is running, and its request under way or unknown; nothing waits for a lock."""
    left_open(store, "hello")

    (session,) = json_of(feste_command("store", "list", store, "--json"))
    shown = feste_command("store", "show", store)

    assert (session["state"], session["unknown"], session["ended"]) == ("running", 1, None)
    assert "1 request under way or unknown:" in shown.stdout
    assert call("hello").key in shown.stdout


def test_a_session_that_was_killed(
    store: Path, filler: Any, call: Any, feste_command: Run, left_open: Any
) -> None:
    """Its request is unknown, before and after the next session; reading changes nothing."""
    process = left_open(store, "hello")
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = store.read_bytes(), Path(f"{store}-wal").read_bytes()

    (session,) = json_of(feste_command("store", "list", store, "--json"))
    shown = feste_command("store", "show", store).stdout
    after = store.read_bytes(), Path(f"{store}-wal").read_bytes()
    with filler(store) as next_one:
        next_one.buy(call("other"))
    sessions = json_of(feste_command("store", "list", store, "--json"))

    assert before == after
    assert (session["state"], session["unknown"]) == ("killed", 1)
    assert "1 request may have been billed without an answer:" in shown
    assert [s["state"] for s in sessions] == ["killed", "closed"]
    assert [s["unknown"] for s in sessions] == [1, 0]


@pytest.mark.parametrize(
    ("newest", "changes", "state"),
    [
        (True, {}, "running"),
        (False, {}, "killed"),
        (True, {"host": "elsewhere"}, "unknown"),
        (True, {"pid": 2**22 + 1}, "killed"),
    ],
)
def test_what_became_of_a_session_that_did_not_close(
    store: Path, filler: Any, newest: bool, changes: Any, state: str
) -> None:
    """Only the newest can be at work, and only a process of this machine is known to be."""
    with filler(store) as session:
        own = session.journal.run(lambda conn: conn.execute("SELECT * FROM sessions").fetchone())
        row = {**schema.row_of("sessions", own), **changes, "id": 2 if newest else 0}
        session.journal.run(lambda conn: schema.write(conn, "sessions", row))

    with Reader(store) as reader:
        summary = summarize(reader)

    assert summary.sessions[2 if newest else 0].state == state


def test_what_a_provider_sent_cannot_act_on_the_terminal(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    """Control characters and directions of writing are shown escaped, and JSON escapes them."""
    evil = "\x1b]0;owned\x07\u202e\x9b31m\x7f"
    with filler(store) as session:
        session.buy(call("x", model=f"m{evil}"))
        session.lose(call("y"))
        session.fail(call("z"), error=InvalidRequest(f"see {evil}"))
        session.task(f"t{evil}", "unknown")
    runs = [
        feste_command("store", *arguments)
        for arguments in (
            ("show", store),
            ("show", store, "--json"),
            ("list", store),
            ("export", store, "--out", "-"),
            ("show", f"{store}{evil}"),
        )
    ]

    for done in runs:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr)
    assert r"\x1b]0;owned" in runs[0].stdout


def test_a_damaged_row_is_named_and_not_counted(
    store: Path, filler: Any, call: Any, feste_command: Run, damage: Any
) -> None:
    """Of requests, sessions and answers; what a session quarantined is told too."""
    with filler(store) as session:
        first = session.buy(call("one"))
        session.buy(call("two"))
        session.buy(call("three"))
    damage(store, f"UPDATE requests SET input_tokens = 999999 WHERE id = {first}")
    damage(store, "UPDATE answers SET response = replace(response, 'reply', 'raply') WHERE id = 2")
    journal = Journal(store)
    found: list[Any] = []
    two = call("two")
    journal.recall([Wanted(two.key, two.draws[0], True)], lambda ok, value: found.append(value))
    journal.close()

    done = feste_command("store", "show", store, "--json")
    data = json.loads(done.stdout)
    text = feste_command("store", "show", store)

    assert found[0][0].damaged == 1
    assert [(o["requests"], o["input_tokens"]) for o in data["operations"]] == [(2, 20)]
    assert data["damaged"] == [f"requests {first}"]
    assert done.stderr == f"feste: 1 damaged row left out: requests {first}\n"
    assert [row["place"] for row in data["quarantine"]] == ["answers"]
    assert "1 damaged row in quarantine:" in text.stdout


def test_the_store_of_the_settings(
    store: Path, filler: Any, call: Any, feste_command: Run, tmp_path: Path
) -> None:
    """Without a path FESTE_STORE is meant; without both, the error says what to give."""
    fill(store, filler, call)

    named = feste_command("store", "list", env={**os.environ, "FESTE_STORE": str(store)})
    unnamed = feste_command("store", "list")

    assert named.returncode == 0 and "session" in named.stdout
    assert unnamed.returncode == 1
    assert unnamed.stderr == ("feste: no store is named: give its path, or set FESTE_STORE\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"just a text that is long enough to be no database" * 100, "not a store of Feste"),
    ],
)
@pytest.mark.parametrize(
    "action", ["list", "show", "export --out -", "purge --all --yes", "purge --all --dry-run"]
)
def test_what_is_no_store_is_told_without_a_traceback(
    tmp_path: Path, feste_command: Run, content: bytes | None, said: str, action: str
) -> None:
    """One line, exit code 1; no file appears or changes."""
    path = tmp_path / "x.db"
    if content is not None:
        path.write_bytes(content)
    command, *more = action.split()

    done = feste_command("store", command, path, *more)

    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr and done.stderr.startswith("feste: ")
    assert done.stderr.count("\n") == 1
    assert [p.read_bytes() for p in tmp_path.iterdir() if p.name == "x.db"] == (
        [] if content is None else [content]
    )


def test_what_the_system_refuses_is_told_without_a_traceback(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    """One line, exit code 1."""
    with filler(store) as session:
        session.buy(call("one"))
    lock = Path(f"{store}.lock")
    lock.unlink()
    lock.mkdir()

    for arguments in (("salvage", store), ("purge", store, "--all", "--yes")):
        done = feste_command("store", *arguments)

        assert done.returncode == 1 and "irectory" in done.stderr, done
        assert done.stderr.startswith("feste: ") and done.stderr.count("\n") == 1


def test_a_damaged_file_is_told_without_a_traceback(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    """The error says what to do."""
    with filler(store) as session:
        for number in range(50):
            session.buy(call(f"text {number}" * 50))
    size = store.stat().st_size
    with store.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 8192))

    for arguments in (("show", store), ("export", store, "--out", "-")):
        done = feste_command("store", *arguments)

        assert done.returncode == 1
        assert "Traceback" not in done.stderr and "salvage" in done.stderr

    with store.open("r+b") as file:  # SQLite takes it for no database
        file.write(b"damaged")
    done = feste_command("store", "list", store)
    store.with_name(f"{store.name}.lock").unlink()  # nor is there a trace that it ever was a store
    foreign = feste_command("store", "list", store)

    assert done.returncode == 1 and "feste store salvage" in done.stderr
    assert foreign.returncode == 1 and "not a store of Feste" in foreign.stderr


def test_verify_and_salvage(
    store: Path, filler: Any, call: Any, feste_command: Run, damage: Any, tmp_path: Path
) -> None:
    """The exit code tells whether the store is good; what is good is found again."""
    with filler(store) as session:
        session.buy(call("one"))
        session.buy(call("two"))

    good = feste_command("store", "verify", store)
    damage(store, "UPDATE answers SET kept = 0 WHERE id = 1")
    bad = feste_command("store", "verify", store)
    data = json.loads(feste_command("store", "verify", store, "--json").stdout)
    saved = feste_command("store", "salvage", store)
    again = feste_command("store", "verify", store)
    missing = feste_command("store", "salvage", tmp_path / "no.db")

    assert (good.returncode, bad.returncode, again.returncode) == (0, 1, 0)
    assert " good; 1 session, 2 answers, 2 prompts, 2 requests" in " ".join(good.stdout.split())
    assert "row 1 of answers is not as it was written" in " ".join(bad.stdout.split())
    assert (data["bad"]["answers"], data["opens"]) == (1, True)
    assert saved.returncode == 0 and "answers: kept 1, lost 1" in saved.stdout
    assert missing.returncode == 1 and missing.stderr.startswith("feste: there is no store")


def test_nothing_comes_back_after_a_purge(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    """Salvage finds rows in freed pages; a purge leaves none there."""
    with filler(store) as session:
        for number in range(40):
            session.buy(call(f"apricot {number}"))
    feste_command("store", "purge", store, "--session", 1, "--yes")
    with store.open("r+b") as file:
        file.write(b"damaged")

    saved = feste_command("store", "salvage", store)
    shown = feste_command("store", "show", store, "--json")

    assert "answers: kept 0" in saved.stdout, saved
    assert json_of(shown)["prompts"] == 0


#: Makes the terminal the one whose Ctrl-C interrupts the process.
ON_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # off in what a script runs behind it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from feste.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


def on_a_terminal(answer: str, *arguments: object) -> tuple[int, str]:
    """Run the command on a terminal of 80 columns and answer its question."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, *map(str, arguments)],
        stdin=side,
        stdout=side,
        stderr=side,
        close_fds=True,
        start_new_session=True,
    )
    os.close(side)
    shown = b""
    answered = False
    try:
        while True:
            ready, _, _ = select.select([main], [], [], 60)
            assert ready, shown
            try:
                part = os.read(main, 4096)
            except OSError:  # how Linux says that the other side is closed
                part = b""
            if not part:
                break
            shown += part
            if not answered and b"[y/N]" in shown:
                os.write(main, answer.encode())
                answered = True
        return process.wait(60), shown.decode()
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [("y\n", 0, 0), ("yes\n", 0, 0), ("n\n", 1, 6), ("\n", 1, 6), ("\x03", 130, 6), ("\x04", 1, 6)],
)
def test_purge_asks_on_a_terminal(
    store: Path, filler: Any, call: Any, answer: str, code: int, left: int, feste_command: Run
) -> None:
    """Only a yes deletes; no, nothing, Ctrl-C and the end of input do not."""
    fill(store, filler, call)

    found, shown = on_a_terminal(answer, "store", "purge", store, "--all")

    assert found == code
    assert "6 answers, 10 prompts, 10 requests will be deleted" in " ".join(shown.split())
    assert "Traceback" not in shown
    assert json_of(feste_command("store", "show", store, "--json"))["answers"] == left


def test_purge_without_a_terminal_needs_yes(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    """Nothing is deleted by a script that does not say so; --dry-run only counts."""
    fill(store, filler, call)
    purge = ("store", "purge", store)

    unasked = feste_command(*purge, "--all", stdin=subprocess.DEVNULL)
    counted = feste_command(*purge, "--session", 1, "--dry-run")
    still = json_of(feste_command("store", "show", store, "--json"))
    done = feste_command(*purge, "--session", 1, "--yes")
    data = json_of(feste_command("store", "show", store, "--json"))

    assert unasked.returncode == 1 and "--yes" in unasked.stderr
    assert still["answers"] == 6
    assert "3 answers, 5 prompts, 5 requests would be deleted" in " ".join(counted.stdout.split())
    assert "3 answers, 5 prompts, 5 requests deleted" in " ".join(done.stdout.split())
    assert "3 starts of once=True tasks fit too and are left" in done.stdout
    assert (data["answers"], len(data["unfinished"])) == (3, 2)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("", 1, "say what is deleted"),
        ("--all --session 1", 1, "--all takes no other choice"),
        ("--prompts --tasks all", 1, "exclude each other"),
        ("--before yesterday", 2, "neither an age such as 30d nor a date"),
        ("--before 9999999999d", 2, "neither"),
        ("--tasks some", 2, "invalid choice"),
    ],
)
def test_purge_refuses_what_is_unclear(
    store: Path,
    filler: Any,
    call: Any,
    feste_command: Run,
    options: str,
    code: int,
    said: str,
) -> None:
    """Nothing is deleted then."""
    with filler(store) as session:
        session.buy(call("one"))

    done = feste_command("store", "purge", store, *options.split(), "--yes")

    assert done.returncode == code and said in " ".join(done.stderr.split())
    assert json_of(feste_command("store", "show", store, "--json"))["answers"] == 1


def test_purge_of_nothing_does_not_ask(
    store: Path, filler: Any, call: Any, feste_command: Run
) -> None:
    with filler(store) as session:
        session.buy(call("one"))

    done = feste_command("store", "purge", store, "--model", "other", stdin=subprocess.DEVNULL)

    assert (done.returncode, done.stderr) == (0, "") and "0 answers, 0 prompts" in " ".join(
        done.stdout.split()
    )


def test_purge_of_a_store_that_is_being_written(
    store: Path, feste_command: Run, left_open: Any
) -> None:
    """It is refused, with the process; counting works."""
    process = left_open(store, "hello")

    done = feste_command("store", "purge", store, "--all", "--yes")
    counted = feste_command("store", "purge", store, "--all", "--dry-run")

    assert done.returncode == 1
    assert f"is being written by process {process.pid}" in done.stderr
    assert "1 prompt, 1 request would be deleted" in " ".join(counted.stdout.split())


def test_purge_by_date(store: Path, filler: Any, call: Any, feste_command: Run) -> None:
    """An age or a local date."""
    with filler(store) as session:
        session.buy(call("one"))
    purge = ("store", "purge", store, "--dry-run", "--before")

    counts = [
        feste_command(*purge, when, env={**os.environ, "TZ": "Asia/Tokyo"}).stdout.split(": ")[1]
        for when in ("30d", "0m", "2001-01-31", "2101-01-31", "2101-01-31T10:00+02:00")
    ]

    assert [count.startswith("1 answer,") for count in counts] == [False, True, False, True, True]


def test_a_reader_that_has_seen_enough(store: Path, filler: Any, call: Any, tmp_path: Path) -> None:
    """``| head`` ends the export without a traceback."""
    with filler(store) as session:
        session.buy(*[call(f"{number} " * 3000) for number in range(60)])
    command = f"{sys.executable} -m feste store export {store} --out - | head -c 10"

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)

    assert done.stdout == '{"key":"' + done.stdout[8:] and len(done.stdout) == 10
    assert done.stderr == ""


def test_the_command_loads_no_plugin() -> None:
    """Looking into a store needs no backend, no Dask, no templates."""
    code = """
import contextlib, io, sys
from feste.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main(["store", "list", "no-such.db"])
print([name for name in ("openai", "cohere", "dask", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr) == ("[]\n", "")
