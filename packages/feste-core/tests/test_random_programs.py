"""Random programs against random servers on the virtual clock: they end, and nothing is lost or doubled.

A program has calls that share requests, bad items, prompts, tools and emitting tasks. A server limits
lists, fails now and then, throttles, or returns too few answers. One to three runs share the nodes,
and some are stopped. Then the server is calm and everything is computed again. With a store, the
process is killed at any time, and the program starts anew.
"""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import draw
from feste.backend import BatchRule, Operation, Request, Response
from feste.draw import Draw
from feste.errors import (
    FesteError,
    InvalidRequest,
    OutputMismatch,
    RateLimited,
    ServerError,
)
from feste.node import PENDING
from feste.prompt import Prompt
from feste.scheduler.run import Run
from feste.scheduler.states import OPEN
from feste.store.opened import opened
from feste.testing import FakeBackend, VirtualClock

ask = Prompt("Ask {{ x }}")
PROGRAMS = 250
STORED = 40


@feste.task
def plain(x: Any) -> Any:
    return x


@feste.task
def broken(x: Any) -> Any:
    raise ValueError(x)


@feste.task(emits=True)
def agent(llm: FakeBackend, x: Any, calls: int) -> Any:
    return [llm.complete(f"emitted {x} {i}") for i in range(calls)]


class Server:
    """A provider with its own limits and moods; all of its choices come from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.limit = self.rng.choice([1, 2, 3, 5, 7, 16, 100])
        self.short = self.rng.random() < 0.2  # it returns too few answers
        self.faults = self.rng.choice([0.0, 0.0, 0.1, 0.4])
        self.throttling = self.rng.choice([0.0, 0.0, 0.2])
        self.unreadable = self.rng.choice([0.0, 0.1, 0.4])
        self.calm = False
        self.answered: Counter[Draw] = Counter()
        self.llm = self._backend()

    def _backend(self) -> FakeBackend:
        server = self

        class Odd(FakeBackend):
            plugin = "fake"

            def _parse(self, response: Response, arguments: Any) -> Any:
                if not server.calm and server.rng.random() < server.unreadable:
                    raise OutputMismatch("cannot be read")
                return FakeBackend._parse_text(self, response, arguments)

            chat = Operation(
                prepare=FakeBackend._prepare_chat, send=FakeBackend._send, parse=_parse
            )
            complete = Operation(
                prepare=FakeBackend._prepare_complete,
                send=FakeBackend._send,
                parse=_parse,
                batch=BatchRule(
                    "prompt", "prompt", 16, pack=FakeBackend._pack, unpack=FakeBackend._unpack
                ),
            )

        return Odd()

    def answer(self, request: Request) -> Response:
        given = request.body.get("prompt", request.body.get("input"))
        items = given if isinstance(given, list) else [given]
        if not self.calm and self.rng.random() < self.faults:
            raise ServerError("oops", retry_after=self.rng.choice([None, 1.0]))
        if not self.calm and self.rng.random() < self.throttling:
            raise RateLimited("slow down", retry_after=self.rng.choice([None, 0.5, 3.0]))
        if len(items) > max(1, self.limit) or "bad" in str(request.body):
            raise InvalidRequest("refused")
        response = self.llm.answer(request)
        if self.short and len(items) > 2:
            return Response({"answers": response.payload["answers"][:-1]}, response.usage)
        if request.operation != "embed":
            self.answered.update(request.draws)
        return response


def program(rng: random.Random, llm: FakeBackend) -> list[Any]:
    """Up to 40 nodes of all kinds."""
    nodes: list[Any] = []
    for i in range(rng.randint(1, 40)):
        texts = [n for n in nodes if n._node.op.name != "embed"]  # a template takes no vectors
        some = rng.choice(texts) if texts and rng.random() < 0.5 else i
        kind = rng.choice(["complete"] * 4 + ["bad", "embed", "chat", "chain", "agent", "prompt"])
        if kind == "complete":
            nodes.append(llm.complete(f"good {i % 7}"))
        elif kind == "bad":
            nodes.append(llm.complete(f"bad {i}"))
        elif kind == "embed":
            nodes.append(llm.embed(f"good {i % 5}"))
        elif kind == "chat":
            nodes.append(llm.chat(f"good {i}"))
        elif kind == "chain":
            nodes.append(llm.complete(ask(x=broken(i) if rng.random() < 0.1 else plain(some))))
        elif kind == "agent":
            nodes.append(agent(llm, plain(some), rng.randint(1, 6)))
        else:
            nodes.append(llm.complete(ask(x=f"good {i}")))
    return nodes


def check_ended(clock: VirtualClock, runs: list[Run]) -> None:
    """Every run has ended with all of its nodes, and the brain holds nothing of it any more."""
    brain = clock.brain
    for run in runs:
        assert run.ended is not None and run.open == 0
        assert all(state >= OPEN for state in run.state)
    assert not brain.runs and not brain.joins.under_way
    assert not any(brain.dispatcher.busy.values()) and not brain.dispatcher.chunks
    assert not brain.attempts.parcels and not brain.attempts.retrying
    assert all(not gate.in_flight and not len(gate) for gate in brain.gates.by_scope.values())


@pytest.mark.parametrize("stops", ["never", "with long grace", "at any time"])
def test_programs_end_and_buy_nothing_twice(stops: str) -> None:
    """Whatever happens, every run ends; what was answered is not asked again; limits are true."""
    graces = {"never": [], "with long grace": [1e6], "at any time": [0.0, 0.5, 2.0, 1e6]}[stops]
    for seed in range(PROGRAMS):
        rng = random.Random(seed)
        draw.forget()
        server = Server(seed)
        clock = VirtualClock(server.answer, places=rng.choice([1, 2, 6]), seed=seed)
        clock.request_seconds = lambda request, rng=rng: rng.choice([0.1, 1.0, 1.0, 3.0])
        clock.task_seconds = lambda task, rng=rng: rng.choice([0.0, 0.0, 0.0, 0.003, 0.02, 1.0])
        nodes = program(rng, server.llm)
        runs: list[Run] = []
        for _ in range(rng.randint(1, 3)):
            chosen = [n for n in nodes if rng.random() < 0.8] or nodes[:1]
            on_error, keep = rng.choice(["raise", "return", "stop"]), rng.choice(["paid", "all"])
            run = clock.run(chosen, on_error=on_error, keep=keep)
            at = rng.choice([0.0, 0.0, 0.5, 2.0, 5.0])
            clock.tell(at, ("submit", run))
            if graces and rng.random() < 0.7:
                stopped = at + rng.choice([0.0, 0.1, 0.5, 1.0, 1.005, 2.0, 4.0, 8.0])
                clock.tell(stopped, ("stop", run, rng.choice(graces)))
            runs.append(run)
        clock.drive()
        check_ended(clock, runs)
        server.calm = True
        last = clock.run(nodes, on_error="return")
        clock.tell(0.0, ("submit", last))
        clock.drive()
        check_ended(clock, [last])

        if 0.0 not in graces and 0.5 not in graces and not server.short:
            assert not [d for d, times in server.answered.items() if times > 1], seed
        for learnt in clock.brain.lists.limits.values():
            assert server.short or learnt.items <= server.limit < 16, seed
        for node in nodes:
            assert node._node.value is PENDING or node._node.paid is None
        check_values(seed, last, nodes)


def check_values(seed: int, last: Run, nodes: list[Any]) -> None:
    """After all of it each node has a value of its own kind, or the refusal that it must have."""
    for node, value in zip(nodes, last.results(), strict=True):
        kind = node._node.op.name
        if isinstance(value, FesteError):
            assert "bad" in str(value) or "refused" in str(value) or "ValueError" in str(value), (
                seed
            )
        else:
            assert isinstance(value, list if kind == "agent" else str) or kind == "embed", seed


# --- with a store: killed at any virtual time, and run again --------------------------------------


class Numbering(Server):
    """A server whose answers are numbered over all processes, so that no two are equal."""

    def __init__(self, seed: int, numbers: Iterator[int], generated: Counter[str]) -> None:
        super().__init__(seed)
        self.numbers = numbers
        self.generated = generated

    def answer(self, request: Request) -> Response:
        response = super().answer(request)
        if request.operation == "embed":
            return response
        answers = [f"#{next(self.numbers)} {text}" for text in response.payload["answers"]]
        if len(answers) == request.items:  # else the list is too short, and none can be used
            self.generated.update(map(str, request.draws))
        return Response({"answers": answers}, response.usage)


def stored(path: Path, query: str) -> list[Any]:
    with sqlite3.connect(path) as conn:
        return conn.execute(query).fetchall()


def unknown_draws(path: Path) -> Counter[str]:
    """The draws of the requests in a store whose answers are not known."""
    found = stored(path, "SELECT calls FROM requests WHERE outcome IN ('unknown', 'sent')")
    return Counter(drawn for (calls,) in found for _, drawn in json.loads(calls))


def test_killed_programs_keep_what_they_had_and_buy_only_the_rest(
    tmp_path: Path, restart: Callable[[], None]
) -> None:
    """What a process got, later ones get; what was bought twice is unknown, and the run names it."""
    for seed in range(STORED):
        rng = random.Random(seed)
        path = tmp_path / f"{seed}.db"
        numbers, generated, seen = itertools.count(1), Counter[str](), dict[str, Any]()
        kills = [rng.choice([0.5, 2.0, 6.0, 30.0]) for _ in range(rng.randint(1, 3))]
        for kill in (*kills, None):
            restart()
            server = Numbering(seed, numbers, generated)
            server.calm = kill is None
            clock = VirtualClock(server.answer, places=rng.choice([1, 6]), seed=seed)
            clock.store_seconds = rng.choice([0.0, 0.1])
            clock.request_seconds = lambda request, rng=rng: rng.choice([0.1, 1.0, 3.0])
            nodes = program(random.Random(seed), server.llm)
            run = clock.run(nodes, on_error="return", store=path)
            clock.tell(0.0, ("submit", run))
            if kill is not None and rng.random() < 0.5:  # stopped by Ctrl-C instead
                clock.tell(kill, ("stop", run, rng.choice([0.0, 0.5, 1e6])))
                kill = 1e9
            clock.drive(until=kill)
            if kill in (None, 1e9):
                check_ended(clock, [run])
                assert not clock.brain.journaling.intending
            for node in run.program.nodes:
                if node.op.kind == "call" and node.value is not PENDING:
                    assert seen.setdefault(str(node.draw), node.value) == node.value, seed
        check_values(seed, run, nodes)
        unknown = unknown_draws(path)
        named = {earlier.draw for _, earlier in run.unknown}
        for drawn, times in generated.items():
            assert times - 1 <= unknown[drawn], (seed, drawn)
            assert times == 1 or drawn in named, (seed, drawn)


def test_a_full_store_stops_the_run_and_loses_nothing(
    tmp_path: Path, restart: Callable[[], None]
) -> None:
    """No request leaves that was not noted; what was answered before is replayed afterwards."""
    failures = 0
    for seed in range(STORED):
        restart()
        rng = random.Random(seed)
        path = tmp_path / f"{seed}.db"
        server = Server(seed)
        server.calm, server.short = True, False
        clock = VirtualClock(server.answer, seed=seed, store_seconds=0.01)
        nodes = program(rng, server.llm)
        run = clock.run(nodes, store=path, on_error="return")
        clock.tell(0.0, ("submit", run))
        clock.drive(until=rng.choice([0.0, 0.5, 1.5, 2.5]))
        opened(path).run(lambda conn: conn.execute("PRAGMA max_page_count = 1").fetchall())
        clock.drive()
        check_ended(clock, [run])
        ((noted,),) = stored(path, "SELECT count(*) FROM requests")
        assert len(clock.sent) <= noted, seed
        failures += run.unwritten is not None
        ((kept,),) = stored(path, "SELECT count(*) FROM answers WHERE draw LIKE 'main/%'")
        restart()
        clock = VirtualClock(server.answer, seed=seed)
        again = clock.run(program(random.Random(seed), server.llm), store=path, on_error="return")
        clock.tell(0.0, ("submit", again))
        clock.drive()
        check_ended(clock, [again])
        assert again.count_states().get("replayed", 0) >= kept, seed
    assert failures > STORED / 3
