"""What a store costs: puts and gets, a first run beside one without it, a replay, opening, bytes.

    python benchmarks/store.py [--calls 10000] [--opened 10000,100000] [--folder .]

Prints seconds and microseconds of CPU (all threads of the process) a call. All of it runs in one
process, one after the other, against a simulated provider in another one, so the ratios hold when the
machine's speed drifts; "together" means that many operations wait, so that one commit serves many.
The folder should be on the disk that a real store would be on: its sync is a large part of the cost.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import feste
from feste.backend import Limits, Request, Response, Usage
from feste.backend.openai import OpenAI
from feste.draw import Draw
from feste.store.journal import Journal
from feste.store.rows import Answer, Wanted
from feste.testing import SimServer, fresh_draws

WORDS = "a question of usual length about a text that a program has read somewhere, number"


class Timer:
    """Seconds and CPU of a ``with`` block."""

    def __enter__(self) -> Timer:
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall = time.perf_counter() - self.began[0]
        self.cpu = time.process_time() - self.began[1]


def call(i: int) -> Answer:
    """A call like those of a chat, and its answer."""
    body = {"model": "sim", "messages": [{"role": "user", "content": f"{WORDS} {i}"}]}
    draw = Draw("main", f"{i:024x}", 0)
    request = Request("openai", "chat", "https://api.openai.com/v1", body, draws=(draw,))
    text = {"index": 0, "message": {"role": "assistant", "content": "word " * 40}}
    payload = {"id": f"chatcmpl-{i}", "object": "chat.completion", "choices": [text]}
    return Answer(request, Response(payload, Usage(20, 40), request_id=f"req-{i}"))


def put(journal: Journal, answer: Answer, then: Callable[[bool, Any], None]) -> None:
    """Note a request and then its answer, as a run does."""

    def noted(ok: bool, number: Any) -> None:
        assert ok, number
        journal.record([answer], then, number=number, response=answer.response)

    journal.intend(answer.request, [answer.request], noted)


def one_by_one(each: list[Any], do: Callable[[Any, Callable[[bool, Any], None]], None]) -> float:
    """Operations a second, each begun when the one before is done."""
    with Timer() as timer:
        for thing in each:
            done = threading.Event()
            do(thing, lambda ok, value, done=done: done.set())  # type: ignore[misc]
            done.wait()
    return len(each) / timer.wall


def together(each: list[Any], do: Callable[[Any, Callable[[bool, Any], None]], None]) -> float:
    """Operations a second, all begun at once."""
    left, done = len(each), threading.Event()

    def then(ok: bool, value: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    with Timer() as timer:
        for thing in each:
            do(thing, then)
        done.wait()
    return len(each) / timer.wall


def commits(path: Path, count: int) -> float:
    """Commits a second of one row each, without Feste: what the disk does."""
    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("PRAGMA synchronous = FULL")
    conn.execute("CREATE TABLE plain (id INTEGER PRIMARY KEY, text TEXT)")
    with Timer() as timer:
        for _ in range(count):
            conn.execute("INSERT INTO plain (text) VALUES (?)", ("x" * 600,))
    conn.close()
    return count / timer.wall


def journal(folder: Path, count: int) -> None:
    """Puts and gets of the journal itself."""
    answers = [call(i) for i in range(count)]
    for answer in answers:
        answer.request.key  # noqa: B018 - computed by preparing a request
    few = answers[: max(100, count // 20)]
    plain = commits(folder / "plain.db", 2 * len(few))
    kept = Journal(folder / "puts.db")
    alone = one_by_one(few, lambda a, then: put(kept, a, then))
    group = together(answers[len(few) :], lambda a, then: put(kept, a, then))
    print(f"puts/s (a request and its answer): {alone:9,.0f} one by one  {group:9,.0f} together")
    print(
        f"  beside bare commits of SQLite:   {2 * alone / plain:9.2f} x         {2 * group / plain:9.1f} x"
    )

    def get(answer: Answer, then: Callable[[bool, Any], None]) -> None:
        kept.recall([Wanted(answer.request.key, answer.request.draws[0], True)], then)

    alone, group = one_by_one(few, get), together(answers, get)
    print(f"gets/s:                            {alone:9,.0f} one by one  {group:9,.0f} together")
    kept.close()


@contextmanager
def measured(what: str, calls: int, beside: Timer | None = None) -> Iterator[Timer]:
    fresh_draws()  # as in a process of its own
    with Timer() as timer:
        yield timer
    feste.store.close()
    ratio = f"{timer.wall / beside.wall:6.2f} x" if beside else ""
    print(f"{what:24}{timer.wall:8.2f} s {1e6 * timer.cpu / calls:8.0f} us CPU a call {ratio}")


def runs(folder: Path, calls: int) -> None:
    """A program of many calls: without a store, with one, and again."""
    store = folder / "runs.db"
    with SimServer(
        "feste.backend.openai.testing:OpenAIWire", base=0.02, log_bodies=False
    ) as server:
        llm = OpenAI(
            "sim", base_url=f"{server.url}/v1", api_key="none", limits=Limits(concurrency=64)
        )

        def compute(count: int = calls, **settings: Any) -> list[Any]:
            (values,) = feste.compute([llm.chat(f"{WORDS} {i}") for i in range(count)], **settings)
            return list(values)

        compute(200)
        with measured("without a store", calls) as bare:
            compute()
        with measured("first run with a store", calls, bare):
            first = compute(store=store)
        sent = len(server.ledger())
        with measured("replay", calls, bare):
            again = compute(store=store)
        assert (again, len(server.ledger())) == (first, sent)
    print(f"bytes a call: {store.stat().st_size / calls:,.0f}")


def opening(folder: Path, count: int) -> None:
    """Open a store that has this many answers."""
    path = folder / f"{count}.db"
    kept = Journal(path)
    for start in range(0, count, 10_000):
        batch = [call(i) for i in range(start, min(start + 10_000, count))]
        together(batch, lambda a, then: put(kept, a, then))
    kept.close()
    with Timer() as timer:
        kept = Journal(path)
    kept.close()
    size = path.stat().st_size / 2**20
    print(f"opening {count:9,} answers: {timer.wall:6.2f} s ({size:,.0f} MiB)", flush=True)
    path.unlink()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--calls", type=int, default=10_000)
    options.add_argument("--opened", default="10000,100000")
    options.add_argument("--folder", default=".", help="where the files are made, and removed")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="feste-store-", dir=given.folder) as made:
        folder = Path(made)
        journal(folder, given.calls)
        runs(folder, given.calls)
        for count in given.opened.split(","):
            opening(folder, int(count))


if __name__ == "__main__":
    main()
