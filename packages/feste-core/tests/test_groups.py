"""Requests that are formed while the graph runs: few, early, and never waited for in vain."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

import feste
from feste.backend import BatchRule, Limits, Operation, Request, Response
from feste.errors import CallError, InvalidRequest, RateLimited, ServerError
from feste.scheduler.batching.queue import Queue
from feste.scheduler.brain import Brain
from feste.scheduler.run import Run
from feste.scheduler.states import OPEN
from feste.testing import FakeBackend, FakeParams, VirtualClock
from feste.testing.workloads import (
    WORKLOADS,
    Kit,
    WideBackend,
    random_graph,
    retrieval,
    simulate,
    two_stages,
)

SEEDS = range(5)
#: The fewest requests that can answer each workload whose calls can be aligned: the sum over the kinds
#: of the longest chain of one kind.
BOUNDS = {
    "two_stages": 2,
    "map_reduce": 4,
    "ragged": 8,
    "tree_of_thought": 8,
    "straggler": 2,
    "retrieval": 4,
}
FULL = os.environ.get("CHAOS") == "full"
GRAPHS = 10_000 if FULL else 1_500

pytestmark = pytest.mark.timeout(1200 if FULL else 120)


def mean(values: Any) -> float:
    given = list(values)
    return sum(given) / len(given)


# --- the workloads --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOUNDS)
def test_for_cost_the_fewest_requests_are_sent(name: str) -> None:
    for seed in SEEDS:
        assert len(simulate(WORKLOADS[name], seed, objective="cost").sent) == BOUNDS[name]


@pytest.mark.parametrize("name", WORKLOADS)
def test_by_default_few_requests_cost_little_time(name: str) -> None:
    alone = [simulate(WORKLOADS[name], seed, optimize={"batch": False}) for seed in SEEDS]
    shared = [simulate(WORKLOADS[name], seed) for seed in SEEDS]

    assert mean(len(c.sent) for c in alone) >= 2.5 * mean(len(c.sent) for c in shared)
    assert mean(c.now for c in shared) <= 1.12 * mean(c.now for c in alone)


@pytest.mark.parametrize("name", WORKLOADS)
def test_for_latency_no_call_waits(name: str) -> None:
    alone = [
        simulate(WORKLOADS[name], seed, noise=0.0, slope=0.0, optimize={"batch": False})
        for seed in SEEDS
    ]
    shared = [
        simulate(WORKLOADS[name], seed, noise=0.0, slope=0.0, objective="latency") for seed in SEEDS
    ]

    assert [c.now for c in shared] == pytest.approx([c.now for c in alone])


def test_crossing_kinds_wait_for_each_other_only_for_cost() -> None:
    """A then B beside B then A: three requests are the fewest, since two would need a cycle."""
    assert {len(simulate(WORKLOADS["crossed"], s, objective="cost").sent) for s in SEEDS} == {3}


def test_requests_grow_while_no_slot_is_free() -> None:
    """With four slots, what is ready leaves together as soon as one is free."""
    alone = simulate(retrieval, 0, limits=Limits(concurrency=4), optimize={"batch": False})
    for objective in ("balanced", "latency"):
        shared = simulate(retrieval, 0, limits=Limits(concurrency=4), objective=objective)

        assert shared.peak <= 4
        assert len(shared.sent) * 6 < len(alone.sent)
        assert shared.now * 3 < alone.now


def test_unrelated_work_delays_no_request() -> None:
    """48 pipelines of three calls end as early beside six chains of long work as by themselves."""

    def pipelines(rng: random.Random, kit: Kit) -> list[Any]:
        made = []
        for _ in range(48):
            last: list[Any] = []
            for kind in "abc":
                last = [kit.call(kind, kit.work(0.1, rng.uniform(0.05, 0.15), *last))]
            made += last
        return made

    def mixed(rng: random.Random, kit: Kit) -> list[Any]:
        made = pipelines(rng, kit)
        for _ in range(6):
            last: list[Any] = []
            for _ in range(10):
                last = [kit.work(1.5, rng.uniform(1.2, 1.8), *last)]
            made += last
        return made

    def last_request(clock: VirtualClock) -> float:
        return max(at for at, _ in clock.sent)

    for objective in ("balanced", "cost"):
        by_itself = simulate(pipelines, 3, objective=objective)
        beside = simulate(mixed, 3, objective=objective)
        assert len(beside.sent) == len(by_itself.sent)
        assert last_request(beside) <= 1.1 * last_request(by_itself)


def test_a_slow_sibling_holds_up_nobody() -> None:
    """Fast items' second calls start within 0.3 s, while one item's first step takes 2 s."""

    def siblings(rng: random.Random, kit: Kit) -> list[Any]:
        made = []
        for i in range(40):
            seconds = 2.0 if i == 7 else 0.05
            made.append(kit.call("b", kit.work(seconds, seconds, kit.call("a"))))
        return made

    clock = simulate(siblings, 0, noise=0.0, slope=0.0)
    second = [at for at, r in clock.sent if r.body["max_tokens"] == 1 + ord("b")]
    ready = 0.5 + 0.05

    assert len(second) == 2
    assert min(second) <= ready + 0.3


# --- what may go wrong ----------------------------------------------------------------------------


class Watched(Brain):
    """A brain whose groups are compared with the graph after each event."""

    def on(self, events: Any, now: float) -> Any:
        actions = super().on(events, now)
        for run in self.runs:
            check(run)
        return actions


def check(run: Run) -> None:
    """Compare the counters with what they stand for, found by walking through the graph."""
    feeders = run.feeders
    if feeders is None:
        return
    deps, state = run.program.deps, run.state
    behind: dict[int, bool] = {}

    def is_behind(i: int) -> bool:
        if i not in behind:
            behind[i] = False
            behind[i] = any(
                state[d] < OPEN and (d in feeders.held or is_behind(d)) for d in deps[i]
            )
        return behind[i]

    for i, queue in feeders.queue_of.items():
        if i in queue.near or i in queue.far:
            assert state[i] < OPEN and i in feeders.held
            assert (i in queue.far) == is_behind(i), i
        if i in queue.present:
            assert i in feeders.held
    assert feeders.emitters == {i for i in feeders._emitters if not is_behind(i)}


def check_ended(run: Run, brain: Brain) -> None:
    """Nothing is left over, so no later decision is wrong; and it did not have to be ended."""
    assert run.failure is None
    assert not run.open
    for gate in brain.gates.by_scope.values():
        assert (gate.coming, gate.in_flight, len(gate)) == (0, 0, 0)
    if run.feeders is not None:
        assert not run.feeders.held
        assert not any(run.feeders._behind.values())
        for queue in run.feeders.queues.values():
            assert not (queue.near or queue.far or queue.present)


@feste.task(pure=True)
def joined(*parts: Any) -> str:
    return "|".join(map(str, parts))


@feste.task(pure=True)
def picky(part: Any) -> str:
    if hash(str(part)) % 3 == 0:
        raise ValueError(part)
    return str(part)


@feste.task(emits=True)
def agent(llm: FakeBackend, part: Any, depth: int) -> Any:
    if depth == 0:
        return part
    found = [llm.complete(joined(part, i)) for i in range(2)]
    return agent(llm, joined(llm.embed(joined(*found))[0], part), depth - 1)


def any_program(rng: random.Random, llm: FakeBackend, size: int) -> list[Any]:
    made: list[Any] = []

    def some() -> Any:
        return rng.choice(made[-12:]) if made and rng.random() < 0.8 else f"text {rng.randrange(6)}"

    for _ in range(size):
        kind = rng.randrange(10)
        params = FakeParams(
            max_tokens=rng.choice([None, 5, 7]), temperature=rng.choice([None, 0.0])
        )
        if kind < 4:
            made.append(llm.complete(joined(some()), params))
        elif kind < 6:
            made.append(joined(llm.embed(joined(some()))[0]))
        elif kind == 6:
            made.append(joined(some(), some()))
        elif kind == 7:
            made.append(picky(some()))
        elif kind == 8:
            made.append(joined(llm.chat(joined(some()))))
        else:
            made.append(joined(agent(llm, some(), rng.randrange(3))))
    return rng.sample(made, k=min(len(made), 4))


class Moody:
    """Answers like a FakeBackend, and fails now and then."""

    def __init__(self, rng: random.Random, llm: FakeBackend) -> None:
        self.rng = rng
        self.llm = llm

    def __call__(self, request: Request) -> Response:
        luck = self.rng.random()
        error: CallError | None = None
        if luck < 0.06:
            error = ServerError("busy")
        elif luck < 0.1:
            error = RateLimited("slow down", retry_after=self.rng.choice([None, 0.5, 5.0]))
        elif luck < 0.13:
            error = InvalidRequest("no")
        if error is not None:
            raise error
        return self.llm.answer(request)


@pytest.mark.parametrize("part", range(4))
def test_no_random_graph_waits_for_ever(part: int) -> None:
    """Whatever fails, grows, joins or is stopped, all ends, and the counters are true all the time."""
    for seed in range(part, GRAPHS, 4):
        rng = random.Random(seed)
        llm = FakeBackend(limits=Limits(concurrency=rng.choice([None, 1, 2, 50])))
        brain = (Watched if seed % 5 == 0 else Brain)(seed=seed)
        clock = VirtualClock(
            Moody(rng, llm) if rng.random() < 0.6 else llm.answer,
            request_seconds=lambda request, rng=rng: rng.choice([0.1, 0.5, 0.5, 2.0]),
            task_seconds=lambda task, rng=rng: rng.choice([0.0, 0.0, 0.01, 0.3]),
            places=rng.choice([1, 3, 100]),
            brain=brain,
        )
        nodes = any_program(rng, llm, rng.randrange(3, 26))
        objective = rng.choice(["balanced", "cost", "latency"])
        runs = []
        for _ in range(rng.choice([1, 1, 2])):  # the second one joins the first one's calls
            run = clock.run(
                rng.sample(nodes, k=rng.randint(1, len(nodes))),
                objective=objective,
                on_error=rng.choice(["return", "stop"]),
                keep=rng.choice(["paid", "none"]),
            )
            at = rng.choice([0.0, 0.0, 0.3, 1.0])
            clock.tell(at, ("submit", run))
            if rng.random() < 0.1:
                clock.tell(at + rng.choice([0.1, 0.6, 2.0]), ("stop", run, rng.choice([0.0, 1.0])))
            runs.append(run)
        clock.drive()
        for run in runs:
            check_ended(run, brain)


def test_workloads_of_any_size_end() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        size, limit = rng.randrange(12, 120), rng.choice([1, 4, 10_000])

        def sized(rng: random.Random, kit: Kit, size: int = size) -> list[Any]:
            return random_graph(rng, kit, size)

        for objective in ("balanced", "cost", "latency"):
            simulate(sized, seed, objective=objective, limits=Limits(concurrency=limit))


def test_a_failing_feeder_does_not_hold_up_the_others() -> None:
    """The last call that could come does not: the others leave at that moment."""

    @feste.task(pure=True)
    def late(fails: bool, x: int) -> str:
        if fails:
            raise ValueError("no")
        return f"text {x}"

    llm = FakeBackend()
    clock = VirtualClock(
        llm.answer,
        task_seconds=lambda task: (
            {True: 3.0, False: 0.1}[task.args[0]] if task.stage == "run" else 0.0
        ),
    )
    calls = [llm.complete(late(x == 3, x)) for x in range(4)]
    clock.compute(calls, on_error="return", objective="cost")

    assert [(at, r.items) for at, r in clock.sent] == [(pytest.approx(3.0), 3)]


def test_a_replayed_call_leaves_its_group(tmp_path: Any, restart: Any) -> None:
    """Answers from a store do not travel; the rest shares a request, and nothing waits for them."""

    @feste.task(pure=True)
    def after(x: int) -> str:
        return f"text {x}"

    def program(count: int) -> tuple[FakeBackend, list[Any]]:
        llm = FakeBackend()
        return llm, [llm.embed(after(x)) for x in range(count)]

    def seconds(task: Any) -> float:
        return 0.1 * task.args[0] if task.node.op.name == "after" else 0.0

    for count, fresh in ((3, 3), (5, 2)):
        restart()
        llm, calls = program(count)
        clock = VirtualClock(llm.answer, task_seconds=seconds)
        clock.compute(calls, store=tmp_path / "a.db", objective="cost")
        assert [r.items for _, r in clock.sent] == [fresh]


def test_what_a_task_returns_joins_the_group_under_way() -> None:
    """An agent's call and a call of the main program share a request."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def branch(x: str) -> Any:
        return llm.embed(f"emitted {x}")

    @feste.task(pure=True)
    def slow(x: str) -> str:
        return x

    clock = VirtualClock(
        llm.answer,
        task_seconds=lambda task: {"slow": 0.4, "branch": 0.3}.get(task.node.op.name, 0.0),
    )
    nodes = [llm.embed(slow("a")), llm.embed(slow(slow("b"))), branch("c"), branch("d")]
    clock.compute(nodes, objective="cost")

    assert [r.items for _, r in clock.sent] == [4]


@pytest.mark.parametrize(("objective", "items"), [("cost", [3]), ("latency", [1, 2])])
def test_a_task_that_may_return_calls_is_waited_for(objective: str, items: list[int]) -> None:
    """Nothing else can come but what it returns; once it has, nothing is waited for."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def branch(x: str) -> Any:
        return [llm.embed("one more"), llm.embed("and another")]

    early = feste.task(pure=True)(lambda x: x)
    clock = VirtualClock(
        llm.answer, task_seconds=lambda t: 2.0 if t.node.op.name == "branch" else 0.0
    )
    clock.compute([llm.embed(early("a")), branch("b")], objective=objective)

    assert [r.items for _, r in clock.sent] == items


@pytest.mark.parametrize(("objective", "items"), [("cost", [1, 2]), ("latency", [1, 1, 1])])
def test_for_cost_what_comes_through_another_group_is_waited_for(
    objective: str, items: list[int]
) -> None:
    """A call needs one of another kind, whose own input takes a second: that is worth a request."""
    llm = FakeBackend()
    after = feste.task(pure=True)(lambda seconds, x: f"after {x}")
    clock = VirtualClock(
        llm.answer,
        task_seconds=lambda t: t.args[0] if t.stage == "run" and t.node.op.kind == "task" else 0.0,
    )
    other = llm.complete(after(1.0, "b"), FakeParams(max_tokens=3))
    clock.compute(
        [llm.complete(after(0.0, "a")), llm.complete(after(0.0, other))], objective=objective
    )

    assert sorted(r.items for _, r in clock.sent) == items


def test_a_full_request_does_not_wait() -> None:
    """The sixteenth call fills a request, though four more are known to come; so do few large ones."""
    llm = FakeBackend()

    @feste.task(pure=True)
    def after(x: int) -> str:
        return f"text {x}"

    def seconds(task: Any) -> float:
        return 0.1 * (1 + task.args[0]) if task.node.op.name == "after" else 0.0

    clock = VirtualClock(llm.answer, task_seconds=seconds, places=100)
    clock.compute([llm.complete(after(x)) for x in range(20)], objective="cost")

    assert [(at, r.items) for at, r in clock.sent] == [
        (pytest.approx(1.6), 16),
        (pytest.approx(2.0), 4),
    ]


def test_a_limit_of_tokens_counts_what_waits() -> None:
    """What was sent, or does not come after all, no longer fills a request."""

    class Small(FakeBackend):
        embed = Operation(
            prepare=FakeBackend._prepare_embed,
            send=FakeBackend._send,
            parse=FakeBackend._parse_vector,
            batch=BatchRule(
                "text", "input", 96, FakeBackend._pack, FakeBackend._unpack, max_tokens=100
            ),
        )

    llm = Small()
    clock = VirtualClock(llm.answer)
    run = clock.run(llm.embed("x"))
    queue = Queue(run, llm.embed)
    request = llm.embed.prepare(["x" * 100])  # 26 tokens
    for i in range(3):
        queue.add(i, request, rank=0)
        run.program.rank.append(0)
    assert not queue.is_full(96)
    queue.add(3, request, rank=0)
    assert queue.is_full(96)

    assert [i for i, _ in queue.take(2)] == [0, 1]
    assert (queue.tokens, queue.is_full(96)) == (52, False)
    queue.remove(2)
    assert (queue.tokens, list(queue.present)) == (26, [3])


def test_a_learnt_limit_fills_a_request_too() -> None:
    """A server that took no more than four at a time gets four as soon as they are there."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if request.items > 4:
            raise InvalidRequest("too many")
        return llm.answer(request)

    @feste.task(pure=True)
    def after(x: int) -> str:
        return f"text {x}"

    def seconds(task: Any) -> float:
        return 0.1 * task.args[0] if task.node.op.name == "after" else 0.0

    clock = VirtualClock(answer, task_seconds=seconds, places=100)
    clock.compute([llm.complete(f"learn {x}") for x in range(8)])
    learnt, begun = len(clock.sent), clock.now
    clock.compute([llm.complete(after(x)) for x in range(8)], objective="cost")

    assert [(at - begun, r.items) for at, r in clock.sent[learnt:]] == [
        (pytest.approx(0.3), 4),
        (pytest.approx(0.7), 4),
    ]


def test_runs_do_not_wait_for_each_other_in_a_circle() -> None:
    """Each run's calls could be joined by one behind a task that the other run is doing."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def branch(x: str) -> Any:
        return llm.embed(f"emitted {x}")[0]

    after = feste.task(pure=True)(lambda x: f"after {x}")
    first = feste.task(pure=True)(lambda x: x)
    both = [branch(first("a")), branch(first("b"))]
    nodes = [[both[0], llm.embed(after(both[1]))], [both[1], llm.embed(after(both[0]))]]

    def seconds(task: Any) -> float:
        """Each run is early with the task that the other one needs."""
        late = task.args[:1] == (("b",) if task.run is runs[0] else ("a",))
        return 0.5 if late and task.stage == "run" else 0.1

    clock = VirtualClock(llm.answer, task_seconds=seconds, places=100)
    runs = [clock.run(some, objective="cost", keep="none") for some in nodes]
    for run in runs:
        clock.tell(0.0, ("submit", run))
    clock.drive()

    for run in runs:
        check_ended(run, clock.brain)


def test_other_parameters_share_no_request() -> None:
    llm = WideBackend()
    slow = feste.task(pure=True)(lambda x: x)
    nodes = [llm.complete(slow(f"{i}"), FakeParams(max_tokens=5 + i % 2)) for i in range(6)]
    clock = VirtualClock(llm.answer, task_seconds=lambda task: 0.1 if task.stage == "run" else 0.0)
    clock.compute(nodes, objective="cost")

    assert sorted(r.items for _, r in clock.sent) == [3, 3]
    assert {r.body["max_tokens"] for _, r in clock.sent} == {5, 6}


def test_without_the_pass_calls_are_sent_as_they_come() -> None:
    assert len(simulate(two_stages, 0, optimize={"batch": False}).sent) == 128
    assert len(simulate(two_stages, 0, optimize=False).sent) == 128
