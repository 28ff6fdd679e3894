"""A program with a store is killed again and again: no answer is lost, swapped or bought twice.

``CHAOS=full`` runs the long form: 10,000 calls and 50 kills.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import (
    Backend,
    BatchRule,
    Limits,
    Operation,
    Request,
    Response,
    operation,
)
from feste.testing import SimServer

HERE = Path(__file__).parent
LONG = 60.0
FULL = os.environ.get("CHAOS") == "full"
CALLS, KILLS = (9_999, 50) if FULL else (1_998, 10)
IN_FLIGHT = 32

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX here"),
    pytest.mark.timeout(1200 if FULL else 120),
]


class Crashes:
    """A provider, a store, and programs that are killed while they use them.

    :param folder: the folder of all files.
    :param shape: the graph of the program.
    :param calls: the number of its calls.
    :param concurrency: its limit of requests in flight.
    :param wire: options of the wire.
    """

    def __init__(
        self, folder: Path, shape: str, calls: int, concurrency: int = IN_FLIGHT, **wire: Any
    ) -> None:
        self.store, self.side = folder / "runs.db", folder / "side.jsonl"
        self.side.touch()
        self.shape, self.calls, self.concurrency = shape, calls, concurrency
        self.kills = 0
        self.server = SimServer("crash_program:Wire", base=0.01, wire_options=wire)

    def generated(self) -> int:
        """How many answers the provider has made."""
        return self.server.ledger_path.read_bytes().count(b"\n")

    @contextmanager
    def program(self, path: str = "/say", **more: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Start the program; it is killed at the end, if it has not ended."""
        todo = {
            "url": self.server.url + path,
            "store": str(self.store),
            "side": str(self.side),
            "shape": self.shape,
            "calls": self.calls,
            "concurrency": self.concurrency,
            **more,
        }
        process = subprocess.Popen(
            [sys.executable, str(HERE / "crash_program.py"), json.dumps(todo)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def stop_at(self, count: int, sign: int = signal.SIGKILL, **more: Any) -> int:
        """Run the program until the provider has made so many answers; return its exit code."""
        with self.program(**more) as process:
            deadline = time.monotonic() + LONG  # ends a test that is broken
            while self.generated() < count:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, f"no progress at {self.generated()} answers"
                time.sleep(0.001)
            process.send_signal(sign)
            process.communicate(timeout=LONG)
        self.kills += 1
        return process.returncode

    def crash(self, seed: int, kills: int, **more: Any) -> None:
        """Kill the program at random points of its progress.

        :param seed: of the points.
        :param kills: how often.
        """
        print(f"seed {seed}")  # shown if the test fails
        last = self.calls * 9 // 10
        for point in sorted(random.Random(seed).sample(range(1, last), kills)):
            self.stop_at(max(point, self.generated() + 1), **more)

    def end(self, **more: Any) -> Any:
        """Run the program until it ends by itself; return what it tells."""
        with self.program(**more) as process:
            out, errors = process.communicate(timeout=LONG)
        assert (process.returncode, errors) == (0, b"")
        return json.loads(out)


@pytest.fixture
def crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(HERE))  # where the server finds the wire
    made: list[Crashes] = []

    def make(*args: Any, **kwargs: Any) -> Crashes:
        made.append(Crashes(tmp_path, *args, **kwargs))
        made[-1].server.start()
        return made[-1]

    yield make
    for one in made:
        one.server.close()


def rows(store: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as conn:
        return conn.execute(query).fetchall()


def check(crashes: Crashes, told: Any, most: int) -> None:
    """See that the last run delivers what was paid for, and that nothing else was paid for.

    :param told: what the last run told.
    :param most: the most calls that can be in flight.
    """
    from crash_program import prompts_of

    values = told["values"]
    prompts = prompts_of(crashes.shape, values)
    ledger = crashes.server.ledger()
    made = defaultdict(set)
    for entry in ledger:
        made[entry["prompt"]].add(entry["answer"])
    acknowledged = {tuple(json.loads(line)) for line in crashes.side.read_text().splitlines()}

    assert len(values) == crashes.calls
    # what any of the runs had was not taken back
    assert acknowledged == set(enumerate(values))
    # each call has an answer to its own prompt, and no two calls have the same one
    assert all(value in made[prompt] for value, prompt in zip(values, prompts, strict=True))
    assert len(set(values)) == len(values)
    # nothing was sent that depends on an answer which a kill then lost
    assert set(made) == set(prompts)
    assert len(ledger) - len(values) <= crashes.kills * most
    check_unknown(crashes, told, ledger)


def check_unknown(crashes: Crashes, told: Any, ledger: list[Any]) -> None:
    """See that the store, and the report of the last run, name all that may be paid for twice."""
    store = crashes.store
    answered = {
        i for (i,) in rows(store, "SELECT request_id FROM requests WHERE outcome='answered'")
    }
    lost = Counter(entry["prompt"] for entry in ledger if entry["request"] not in answered)
    texts = {
        key: json.loads(text)[-1]["texts"][0]
        for key, text in rows(store, "SELECT key, request FROM prompts")
    }
    unknown: Counter[str] = Counter()
    prompts_sent: dict[float, set[str]] = {}
    for calls, sent in rows(store, "SELECT calls, sent FROM requests WHERE outcome = 'unknown'"):
        named = [texts[key] for key, _ in json.loads(calls)]
        unknown.update(named)
        prompts_sent[sent] = set(named)

    print(
        f"{crashes.kills} kills: {len(ledger)} answers made, {lost.total()} of them lost in flight"
    )
    # every answer that was made and not kept was in flight when a program was killed
    assert lost <= unknown, lost - unknown
    # and every one that was kept is delivered
    assert len(ledger) - lost.total() == len(told["values"])
    if told["keys"]:
        from crash_program import prompts_of

        asked = dict(zip(told["keys"], prompts_of(crashes.shape, told["values"]), strict=True))
        reported = {asked[call] for call, _ in told["unknown"]}
        assert reported == set(unknown)
        assert all(asked[call] in prompts_sent[sent] for call, sent in told["unknown"])
    assert not rows(store, "SELECT * FROM requests WHERE outcome = 'sent'")


def test_a_pipeline_that_is_killed_loses_nothing(crashes: Any) -> None:
    """Three steps, many kills: the next run goes on where the last one was killed."""
    all_of_it = crashes("steps", CALLS)
    all_of_it.crash(seed=1, kills=KILLS)

    check(all_of_it, all_of_it.end(), IN_FLIGHT)


def test_lists_that_are_killed_lose_nothing(crashes: Any) -> None:
    """One request answers many calls: all of their answers are kept, or none."""
    lists = crashes("lists", 480, concurrency=4)
    lists.crash(seed=2, kills=4)

    check(lists, lists.end(), 4 * 16)


def test_an_eager_program_that_is_killed_loses_nothing(crashes: Any) -> None:
    """Each call is one run, and at most one is in flight."""
    eager = crashes("steps", 90)
    eager.crash(seed=3, kills=3, eager=True)

    check(eager, eager.end(eager=True), 1)


@pytest.mark.parametrize("eager", [False, True], ids=["lazy then eager", "eager then lazy"])
def test_the_other_mode_goes_on(crashes: Any, eager: bool) -> None:
    """What one mode has paid for, the other one finds: the calls are the same."""
    mixed = crashes("steps", 120)
    mixed.crash(seed=4, kills=2, eager=eager)

    check(mixed, mixed.end(eager=not eager), IN_FLIGHT)


def test_a_rerun_sends_nothing(crashes: Any) -> None:
    """A program that has ended is replayed: the same values, no request."""
    whole = crashes("steps", 240)
    first = whole.end()
    again = whole.end()

    assert again["values"] == first["values"]
    assert (again["states"]["replayed"], whole.generated()) == (240, 240)
    check(whole, again, 0)


def test_nothing_is_ahead_of_the_store(crashes: Any, tmp_path: Path) -> None:
    """At the moment a request arrives, the file has it, and the answers that it is made of."""
    watched = crashes("steps", 240, store=str(tmp_path / "runs.db"))

    check(watched, watched.end(), 0)


class Hold:
    """Keeps others from writing the store for a moment.

    :param store: the store.
    """

    def __init__(self, store: Path) -> None:
        self.conn = sqlite3.connect(store, isolation_level=None, check_same_thread=False)
        self.released = threading.Event()
        self.timer = threading.Timer(0.3, self._release)

    def begin(self) -> None:
        self.conn.execute("BEGIN IMMEDIATE")
        self.timer.start()

    def _release(self) -> None:
        self.released.set()
        self.conn.execute("ROLLBACK")
        self.conn.close()


@pytest.mark.parametrize("held", ["request", "answer"])
def test_nothing_goes_on_before_the_file_has_it(tmp_path: Path, held: str) -> None:
    """While a request cannot be noted it is not sent; while an answer cannot, nothing uses it."""
    store = tmp_path / "runs.db"
    seen = []

    class Slow(Backend):
        @operation
        async def ask(self, prompt: str) -> str:
            if held == "answer" and prompt == "held":
                hold.begin()
            seen.append(hold.released.is_set())
            return prompt

    @feste.task
    def use(answer: str) -> None:
        seen.append(hold.released.is_set())

    hold = Hold(store)
    try:
        feste.compute(Slow().ask("the store is open now"), store=store)
        seen.clear()
        if held == "request":
            hold.begin()
        feste.compute(use(Slow().ask("held")), store=store)
    finally:
        if hold.timer.ident:
            hold.timer.join()
        feste.store.close()

    assert seen == [held == "request", True]


def unpacking(look: Callable[[], None], unpack_seconds: float) -> Any:
    """A backend whose lists of two take a while to unpack; it looks when it sends and unpacks."""

    class Slow(Backend):
        limits = Limits(concurrency=2)

        def _prepare(self, text: str) -> Request:
            return Request(self.plugin, "say", self.endpoint, {"texts": [text]})

        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            look()
            return Response({"texts": request.body["texts"]})

        def _parse(self, response: Response, arguments: Any) -> str:
            return str(response.payload["texts"][0])

        @staticmethod
        def _pack(client: Any, requests: Any) -> Request:
            return replace(requests[0], body={"texts": [r.body["texts"][0] for r in requests]})

        @staticmethod
        def _unpack(client: Any, request: Request, response: Response) -> list[Response]:
            time.sleep(unpack_seconds)
            look()
            return [replace(response, payload={"texts": [t]}) for t in response.payload["texts"]]

        say = Operation(
            prepare=_prepare,
            send=_send,
            parse=_parse,
            batch=BatchRule("text", "texts", 2, pack=_pack, unpack=_unpack),
        )

    return Slow()


def test_lists_that_are_not_kept_count_as_in_flight(tmp_path: Path) -> None:
    """While answered lists are unpacked no others take their places: a crash would lose both."""
    store = tmp_path / "runs.db"
    most: list[int] = []
    llm = unpacking(
        lambda: most.append(len(rows(store, "SELECT id FROM requests WHERE outcome = 'sent'"))),
        unpack_seconds=0.05,
    )
    values = feste.compute([llm.say(str(i)) for i in range(24)], store=store)[0]
    feste.store.close()

    assert values == [str(i) for i in range(24)]
    assert len(most) == 24
    assert max(most) <= 2


def test_another_server_is_another_call(crashes: Any) -> None:
    """What one endpoint answered is not taken for the answer of another."""
    both = crashes("flat", 40, paths=["/say", "/other"])
    ones, others = both.end(), both.end(path="/other")

    assert both.generated() == 80
    assert "replayed" not in others["states"], ones["states"]


def test_ctrl_c_keeps_what_was_answered(crashes: Any) -> None:
    """Ctrl-C ends a run in order: requests in flight are waited for, and a rerun buys the rest."""
    flat = crashes("flat", 400)
    code = flat.stop_at(150, signal.SIGINT)
    kept = len(rows(flat.store, "SELECT * FROM answers"))
    made = flat.generated()
    told = flat.end()

    assert code == 130
    assert (kept, told["states"]["replayed"]) == (made, made)
    assert not told["unknown"]
    check(flat, told, 0)


def test_a_list_that_is_unpacked_after_its_run_was_given_up_is_kept(tmp_path: Path) -> None:
    """What was paid for is written even if nobody waits for it any more: a rerun buys nothing."""
    sent: list[float] = []
    llm = unpacking(lambda: sent.append(time.monotonic()), unpack_seconds=2.5)
    store = tmp_path / "runs.db"

    async def give_up() -> None:
        computing = asyncio.ensure_future(feste.acompute(llm.say("a"), llm.say("b"), store=store))
        while not sent:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # it is answered at once, and then unpacked
        computing.cancel()
        with suppress(asyncio.CancelledError):
            await computing

    asyncio.run(give_up())
    deadline = time.monotonic() + LONG
    while not rows(store, "SELECT 1 FROM answers") and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = len(rows(store, "SELECT 1 FROM answers"))
    feste.store.close()

    assert kept == 2
    assert len(sent) == 2  # once sent, once unpacked
