"""On a full disk nothing more is sent, answers in hand are still kept, and none that was is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")

SCRIPT = '''
"""Fill the disk of a store: python -c ... HOW PATH."""

import sys
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

from feste.backend import Request, Response
from feste.draw import Draw
from feste.errors import JournalFailed
from feste.store.journal import Journal
from feste.store.rows import Answer, Wanted
from feste.store.repair.verify import verify

how, path = sys.argv[1], Path(sys.argv[2])

def request(n):
    return Request("fake", "chat", "plugin:fake", {"prompt": f"question {n}"},
                   draws=(Draw("main", f"{n:x}", 0),))

def answer(n, size):
    return Answer(request(n), Response(f"answer {n} " + "x" * size))

def ask(method, *args, **kwargs):
    told = Future()
    method(*args, then=lambda ok, value: told.set_result((ok, value)), **kwargs)
    return told.result(60)

journal = Journal(path)
hand = [ask(journal.intend, request(n), [request(n)])[1] for n in range(8)]
if how == "size":
    import resource
    limit = path.with_name(path.name + "-wal").stat().st_size + 500_000
    limit = max(limit, 4_500_000)  # the reserve is a file, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
elif how == "pages":
    journal.run(lambda conn: conn.execute("PRAGMA max_page_count = 100"))
numbers = dict(enumerate(hand))
kept = {}
for n in range(100, 1100):
    ok, number = ask(journal.intend, request(n), [request(n)])
    if ok:
        numbers[n] = number
        ok, _ = ask(journal.record, [answer(n, 30_000)], number=number)
    if not ok:
        break
    kept[n] = 30_000
assert not ok and kept, "the disk never became full"
assert isinstance(journal._writer.failed, JournalFailed), journal._writer.failed
assert not path.with_name(path.name + ".reserve").exists()
for n, number in enumerate(hand):  # what the provider sends now was paid for
    ok, told = ask(journal.record, [answer(n, 20_000)], number=number)
    if ok:
        kept[n] = 20_000
    else:
        assert isinstance(told, JournalFailed), told
    ok, told = ask(journal.intend, request(50), [request(50)])
    assert not ok and isinstance(told, JournalFailed), told
if how == "disk":
    assert set(range(8)) <= set(kept), kept  # the reserve was freed for them
journal.close()
verdict = verify(path)
assert not verdict.problems, verdict.problems
with closing(Journal(path, read_only=True)) as journal:
    for n, size in kept.items():
        ok, (found,) = ask(journal.recall, [Wanted(request(n).key, request(n).draws[0], True)])
        assert found.response == answer(n, size).response, n
    rows = dict(journal.run(lambda conn: conn.execute("SELECT id, outcome FROM requests").fetchall()))
for n, number in numbers.items():
    assert rows[number] == ("answered" if n in kept else "sent"), (n, rows[number])
print(len(kept))
'''


def fills(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)

    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 5


@pytest.mark.parametrize("how", ["pages", "size"])
def test_a_store_that_cannot_grow_keeps_what_it_has(tmp_path: Path, how: str) -> None:
    """By a limit of SQLite, and by one of the system for files."""
    fills(sys.executable, "-c", SCRIPT, how, str(tmp_path / "s.db"))


def test_a_full_disk_has_room_for_the_answers_in_hand(tmp_path: Path) -> None:
    """A real one, in a namespace of its own."""
    mount = f'mount -t tmpfs -o size=12m none "{tmp_path}"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*inside, mount], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"this system lets nobody mount: {error}")

    fills(
        *inside,
        f'{mount} && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        SCRIPT,
        "disk",
        str(tmp_path / "s.db"),
    )
