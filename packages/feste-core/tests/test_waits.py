"""What calls wait for: each second of a call has one cause, and none is lost or counted twice."""

from __future__ import annotations

import dataclasses
import pickle
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Limits, Price, Profile, PromptCache, Request, Response
from feste.errors import CallTimeout, InvalidRequest, RateLimited, ServerError
from feste.events import CAUSES, GateClosed, RequestFinished
from feste.report import RunReport
from feste.scheduler.request_log import RequestLog
from feste.scheduler.run import Run
from feste.scheduler.totals import Totals
from feste.testing import FakeBackend, FakeParams, VirtualClock


class Watched(VirtualClock):
    """A virtual clock that keeps the events of runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[Any] = []

    def _act(self, actions: list[tuple[Any, ...]]) -> None:
        told = [event for name, *_, event in actions if name == "notify"]
        self.events += [event() if callable(event) else event for event in told]
        super()._act(actions)

    def ran(self, *args: Any, **settings: Any) -> Run:
        """Run some arguments to the end; return the run."""
        run = self.run(*args, **settings)
        run.heard = frozenset(["node_finished"])
        self.tell(0.0, ("submit", run))
        self.drive()
        return run


def waits(run: Run) -> dict[str, float]:
    """What a run's calls waited for, without rounding errors."""
    return {cause: round(seconds, 9) for cause, seconds in run.sum_waits().items()}


# --- the whole is the sum -------------------------------------------------------------------------


def faulty(llm: FakeBackend, rng: random.Random, rate: float) -> Any:
    def answer(request: Request) -> Response:
        if rng.random() < rate:
            raise rng.choice(
                [
                    RateLimited("slow down", retry_after=rng.choice([None, 0.5, 30.0])),
                    ServerError("oops"),
                    CallTimeout("late"),
                    InvalidRequest("no"),
                ]
            )
        return llm.answer(request)

    return answer


def clock_of(rng: random.Random, llm: FakeBackend) -> Watched:
    return Watched(
        faulty(llm, rng, rng.choice([0.0, 0.1, 0.5])),
        request_seconds=lambda r: rng.lognormvariate(0, 1),
        task_seconds=lambda t: rng.choice([0.0, 0.001, 0.02, 1.0]),
        places=rng.choice([1, 2, 6]),
        seed=rng.randrange(99),
        store_seconds=rng.choice([0.0, 0.25]),
    )


def spent(row: Totals) -> float:
    """All seconds of an account but those until the inputs were there."""
    return sum(row.times) - row.times[CAUSES.index("dependency")]


@pytest.mark.parametrize("seed", range(40))
def test_the_pieces_of_each_calls_time_add_up(seed: int, tmp_path: Path) -> None:
    """Waits, flight and Python of a call are the time from ready to done; each call has an account."""
    rng = random.Random(seed)
    llm = FakeBackend(limits=Limits(concurrency=rng.choice([None, 1, 3])))
    nodes: list[Any] = []
    for i in range(25):
        prompt = rng.choice(nodes) if nodes and rng.random() < 0.5 else f"prompt {i}"
        nodes.append(llm.chat(prompt, FakeParams(model=f"model-{i}")))
    clock = clock_of(rng, llm)
    store = str(tmp_path / "s.db") if seed % 2 else None
    run = clock.ran(nodes, on_error="return", store=store)

    ended = {event.key: event for event in clock.events}
    done = 0
    for node, totals in zip(run.program.nodes, run.totals, strict=True):
        if totals is not None:
            event = ended[node.key]
            assert spent(totals) == pytest.approx(event.at - event.ready, abs=1e-9)
            assert sum(totals.times) == pytest.approx(event.at, abs=1e-9)
            assert min(totals.times) >= 0
            done += 1
    assert done == sum(run.count_states().get(name, 0) for name in ("done", "failed"))


@pytest.mark.parametrize("seed", range(40))
def test_shared_requests_add_up_too(seed: int) -> None:
    """Whatever calls go through (lists, refused lists, emitted nodes, stops), no second is lost."""
    rng = random.Random(seed)
    limits = Limits(concurrency=rng.choice([None, 1, 3]), max_items=rng.choice([None, 2, 5]))
    llm = FakeBackend(limits=limits)
    emit = feste.task(emits=True)(lambda text: [llm.chat(text), llm.complete(f"{text} and")])
    nodes: list[Any] = []
    for i in range(25):
        some = rng.choice(nodes) if nodes and rng.random() < 0.4 else f"prompt {i % 7}"
        kinds = [llm.chat, llm.complete, llm.complete, lambda text: emit(text)[0]]
        nodes.append(rng.choice(kinds)(some))
    clock = clock_of(rng, llm)
    run = clock.run(nodes, on_error="return")
    run.heard = frozenset(["node_finished"])
    clock.tell(0.0, ("submit", run))
    if rng.random() < 0.3:
        clock.tell(rng.random() * 5, ("stop", run, rng.choice([0.0, 2.0])))
    clock.drive()

    ended = {event.key: event for event in clock.events}
    counted = [n for n, t in zip(run.program.nodes, run.totals, strict=True) if t is not None]
    wall = sum(ended[node.key].at - ended[node.key].ready for node in counted)
    assert sum(map(spent, run.rows.values())) == pytest.approx(wall, abs=1e-9 * len(counted))
    assert run.in_flight == 0
    assert (
        sum(run.sizes.values()) == len(run.requests) == sum(r.requests for r in run.rows.values())
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_request_waits_from_ready_to_sent(seed: int) -> None:
    """What an attempt waited for at its gate is the time from when it could have been sent."""
    rng = random.Random(seed)
    llm = FakeBackend(limits=Limits(concurrency=2))
    run = clock_of(rng, llm).ran([llm.chat(f"{i}") for i in range(20)], on_error="return")

    assert len(run.requests) >= 20
    for request in run.requests:
        here = sum(s for name, s in request.waits.items() if name not in ("batch", "retry"))
        assert here == pytest.approx(request.sent - request.ready, abs=1e-9)
        assert ("retry" in request.waits) <= (request.attempt > 1)


# --- each cause ------------------------------------------------------------------------------------


def test_dependency() -> None:
    """A call waits for its inputs from the start of the run."""
    llm = FakeBackend()
    run = Watched(llm.answer).ran(llm.chat(llm.chat("first")))

    assert waits(run) == {"dependency": 1.0}


def test_emitted_calls_wait_from_when_they_were_made() -> None:
    """A call that a task returned did not exist before."""
    llm = FakeBackend()
    emit = feste.task(emits=True)(lambda text: llm.chat(llm.chat(text + "!")))
    run = Watched(llm.answer).ran(emit(llm.chat("first")))

    assert waits(run) == {"dependency": 1.0}  # of the second returned one, for the first


def test_slot() -> None:
    """One at a time: the second waits for one request, the third for two."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    run = Watched(llm.answer).ran([llm.chat(f"{i}") for i in range(3)])

    assert waits(run) == {"slot": 3.0}
    assert [r.waits for r in run.requests] == [{}, {"slot": 1.0}, {"slot": 2.0}]


def test_rate_limit_and_retry() -> None:
    """While a provider asks to wait, the refused call waits to retry, the others for the limit."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    refused: list[Request] = []

    def answer(request: Request) -> Response:
        if not refused:
            refused.append(request)
            raise RateLimited("slow down", retry_after=10.0)
        return llm.answer(request)

    run = Watched(answer).ran([llm.chat(f"{i}") for i in range(2)])
    first, *others = run.requests

    assert first.error == "RateLimited"
    # the second waited 1 s for the slot, then for the limit; one of the two then for the other
    assert waits(run) == {"slot": 2.0, "rate_limit": 10.0, "retry": 10.0}
    assert run.retries == {"RateLimited": 1}
    assert {r.attempt: r.waits.get("retry") for r in others} == {1: None, 2: 10.0}


def test_outage() -> None:
    """While the provider is down calls wait for it, and not for a slot."""
    llm = FakeBackend(limits=Limits(concurrency=4))
    clock = Watched(llm.answer)

    def answer(request: Request) -> Response:
        if clock.now < 60.0:
            raise ServerError("down")
        return llm.answer(request)

    clock.answer = answer
    run = clock.ran([llm.chat(f"{i}") for i in range(40)])
    told = waits(run)

    assert run.openings
    assert told["outage"] > 36 * 50.0
    assert told["slot"] < told["outage"] / 4


def test_budget() -> None:
    """What does not fit under the cap waits for what is in flight, whose bounds are higher than its cost."""
    price = Price(input=1.0, output=1.0)
    llm = FakeBackend(limits=Limits(concurrency=8), profile=Profile(price=price))
    nodes = [llm.chat(f"question {i}", FakeParams(max_tokens=1000)) for i in range(8)]
    run = Watched(llm.answer).ran(nodes, budget=0.0025)

    assert waits(run)["budget"] == pytest.approx(2.0 + 4.0 + 6.0)  # two fit at a time
    assert not run.failed


def test_quotas_are_limits_too() -> None:
    """A call waits for the quota of requests as for a closed gate, also in a group."""
    limits = Limits(requests_per_minute=6)
    llm = FakeBackend(limits=limits)
    run = Watched(llm.answer).ran([llm.chat(f"{i}") for i in range(20)])
    last = max(run.requests, key=lambda request: request.sent)

    assert last.sent > 60
    assert waits(run)["rate_limit"] > 0.9 * sum(waits(run).values())
    assert last.waits["rate_limit"] > 60


def test_retry() -> None:
    """Between two attempts."""
    llm = FakeBackend()
    answers = iter([ServerError("busy", retry_after=4.0), None])

    def answer(request: Request) -> Response:
        error = next(answers)
        if error is not None:
            raise error
        return llm.answer(request)

    run = Watched(answer).ran(llm.chat("hello"))

    assert waits(run) == {"retry": 4.0}
    assert run.retries == {"ServerError": 1}
    assert run.requests[1].waits == {"retry": 4.0}


def test_worker_and_python() -> None:
    """With one worker, each of three calls is prepared after the others, then parsed."""
    llm = FakeBackend()
    clock = Watched(llm.answer, places=1, task_seconds=lambda task: 1.0)
    run = clock.ran([llm.chat(f"{i}") for i in range(3)], optimize={"batch": False})
    (row,) = RunReport.of(run).operations

    assert row.python == 6.0  # three prepared, three parsed
    assert row.in_flight == 3.0
    assert waits(run)["worker"] > 0


def test_batch() -> None:
    """Those that were prepared first wait for the last one of their request."""
    llm = FakeBackend()
    clock = Watched(llm.answer, places=1, task_seconds=lambda task: float(task.stage == "prepare"))
    run = clock.ran([llm.complete(f"{i}") for i in range(3)])

    assert waits(run) == {"worker": 3.0, "batch": 3.0}  # 0 + 1 + 2 seconds, and 2 + 1 + 0
    (request,) = run.requests
    assert request.items == 3 and request.waits == {"batch": 2.0}


def test_a_group_that_finds_its_gate_full_waits_for_a_slot() -> None:
    """Calls that would be sent but for their gate do not wait for others of their request."""
    ask, list_ = FakeBackend("a"), FakeBackend("b", limits=Limits(concurrency=1))
    nodes = [list_.complete(ask.chat(f"{i}")) for i in range(3)]
    seconds = iter([1.0, 2.0, 3.0, 10.0, 10.0])
    clock = Watched(list_.answer, request_seconds=lambda request: next(seconds))
    run = clock.ran(nodes, objective="latency")

    assert [r.items for r in run.requests] == [1, 1, 1, 1, 2]
    assert waits(run) == {"dependency": 6.0, "slot": 9.0 + 8.0}
    assert run.requests[-1].waits == {"slot": 9.0}


def test_a_group_waits_for_calls_that_are_still_to_come() -> None:
    """The first one waits for the others, since one request is cheaper."""
    ask, list_ = FakeBackend("a"), FakeBackend("b")
    nodes = [list_.complete(ask.chat(f"{i}")) for i in range(3)]
    seconds = iter([1.0, 2.0, 3.0, 10.0, 10.0])
    clock = Watched(list_.answer, request_seconds=lambda request: next(seconds))
    run = clock.ran(nodes, objective="cost")

    assert run.sizes == {1: 3, 3: 1}
    assert waits(run) == {"dependency": 6.0, "batch": 3.0}
    assert run.requests[-1].waits == {"batch": 2.0}


def test_prefix() -> None:
    """The others wait for the answer of the first, and until the cache has it."""
    cache = PromptCache(write=1.25, read=0.1, lag=2.0, breakpoints=True, keys=True)
    llm = FakeBackend(profile=Profile(prompt_cache=cache))
    shared = [{"role": "system", "content": "x" * 8000}]
    nodes = [llm.chat([*shared, {"role": "user", "content": f"{i}"}]) for i in range(5)]
    run = Watched(llm.answer).ran(nodes)

    assert waits(run) == {"prefix": 4 * 3.0}
    assert sorted(r.waits.get("prefix", 0.0) for r in run.requests) == [0.0, 3.0, 3.0, 3.0, 3.0]


def test_store(tmp_path: Path) -> None:
    """Looked up, noted, written: three times the store's time."""
    llm = FakeBackend()
    run = Watched(llm.answer, store_seconds=0.5).ran(llm.chat("hi"), store=str(tmp_path / "s.db"))

    assert waits(run) == {"store": 1.5}
    assert run.requests[0].waits == {"store": 0.5}


def test_equal_call() -> None:
    """A run that waits for another one's request does not wait for anything of its own."""
    llm = FakeBackend()
    node = llm.chat("hello")
    clock = Watched(llm.answer)
    one, two = clock.run(node), clock.run(node)
    clock.tell(0.0, ("submit", one))
    clock.tell(0.25, ("submit", two))
    clock.drive()

    assert waits(one) == {} and waits(two) == {"equal_call": 0.75}
    assert two.count_states() == {"shared": 1}


def test_equal_calls_in_flight() -> None:
    """A call that takes the answer of an equal one waits for that; if it fails, it goes on."""
    errors: list[Any] = [None, ServerError("busy", retry_after=3.0)]

    def answer(request: Request) -> Response:
        error = errors.pop(0) if errors else None
        if error is not None:
            raise error
        return llm.answer(request)

    for expected in ({"equal_call": 0.75}, {"equal_call": 0.75 + 3.0 + 1.0}):
        llm = FakeBackend()
        clock = Watched(answer)
        one, two = clock.run(llm.embed("same")), clock.run(llm.embed("same"))
        clock.tell(0.0, ("submit", one))
        clock.tell(0.25, ("submit", two))
        clock.drive()

        assert waits(two) == expected


def test_the_most_in_flight() -> None:
    """The peak is the run's own."""
    llm = FakeBackend(limits=Limits(concurrency=7))
    run = Watched(llm.answer).ran([llm.chat(f"{i}") for i in range(30)])

    assert run.peak == 7


def test_a_gate_that_closes_is_told_once() -> None:
    """However many requests are refused together; longer waits asked for later are no other closing."""
    llm = FakeBackend(limits=Limits(concurrency=4))
    refused: list[Request] = []

    def answer(request: Request) -> Response:
        if len(refused) < 4:
            refused.append(request)
            raise RateLimited("slow down", retry_after=10.0 + len(refused))
        return llm.answer(request)

    clock = Watched(answer, request_seconds=lambda request: 1.0 + len(refused) / 8)
    run = clock.run([llm.chat(f"{i}") for i in range(9)])
    run.heard = frozenset([GateClosed.name])
    clock.tell(0.0, ("submit", run))
    clock.drive()
    report = RunReport.of(run)

    (event,) = clock.events
    assert (event.at, event.backend, event.reason, event.seconds) == (
        1.0,
        "fake",
        "rate_limit",
        11.0,
    )
    assert report.closings[0].start == 1.0
    for one, two in pairwise(report.closings):
        assert one.end == two.start
    assert report.closings[-1].end == 1.0 + 3 / 8 + 14.0
    assert run.retries == {"RateLimited": 4} and report.failures == {}


def test_a_breaker_that_opens_closes_the_gate_for_a_while() -> None:
    """It is counted, told with its reason, and in the report; knowing it twice is telling it once."""
    llm = FakeBackend()
    clock = Watched(llm.answer)
    run = clock.run(llm.chat("hello"))
    run.heard = frozenset([GateClosed.name])
    clock.tell(0.0, ("submit", run))
    clock.drive(until=0.5)
    (parcel,) = clock.brain.attempts.parcels.values()
    clock.brain.accounts.closed(parcel, "breaker", 7.0)
    clock.brain.accounts.closed(parcel, "breaker", 7.0)
    clock.drive()
    report = RunReport.of(run)

    assert [(event.reason, event.seconds) for event in clock.events] == [("breaker", 7.0)]
    assert report.breaker_openings == len(report.closings) == 1
    assert "the backend was down 1 time" in str(report)


# --- what is kept -----------------------------------------------------------------------------------


def some_requests(count: int) -> list[RequestFinished]:
    rng = random.Random(1)
    return [
        RequestFinished(
            run="run-1",
            at=rng.random() * 1e4,
            backend="fake",
            operation=rng.choice(["chat", "embed"]),
            model=rng.choice(["m-1", "m-2"]),
            items=rng.choice([1, 64]),
            attempt=rng.choice([1, 2]),
            ready=rng.random(),
            sent=rng.random(),
            input_tokens=rng.choice([None, 0, rng.randrange(1 << 40)]),
            output_tokens=rng.choice([None, 0, rng.randrange(1 << 40)]),
            cached_tokens=rng.choice([None, 7]),
            written_tokens=rng.choice([None, 8]),
            status=rng.choice([None, 503]),
            error=rng.choice(["", "ServerError", "RateLimited"]),
            request_id=rng.choice([None, f"req_{rng.getrandbits(128):032x}"]),
            billed=rng.choice(["yes", "no", "unknown"]),
            number=rng.randrange(1 << 40),
            waits={"slot": rng.random(), "retry": rng.random()},
        )
        for _ in range(count)
    ]


def test_packed_requests_are_the_requests() -> None:
    """What was put in comes out, in order, by position, slice and iteration; copies stay as they are."""
    records = some_requests(300)
    log = RequestLog("run-1", records[:200])
    before = log.copy()
    for record in records[200:]:
        log.append(record)

    assert list(log) == log[:] == records and log == records and records == log
    assert (log[-1], log[7:9], len(log)) == (records[-1], records[7:9], 300)
    assert before == records[:200] and before != log
    assert pickle.loads(pickle.dumps(log)) == records
    with pytest.raises(IndexError, match="300 requests, none at 300"):
        log[300]


def test_odd_figures_of_a_plugin_are_unknown() -> None:
    """What is no count is not kept as one, and breaks nothing."""
    odd = dataclasses.replace(
        some_requests(1)[0], input_tokens=-5, output_tokens=1.5, status="busy", billed="perhaps"
    )  # type: ignore[arg-type]
    (kept,) = RequestLog("run-1", [odd])

    assert (kept.input_tokens, kept.output_tokens, kept.status) == (None, None, None)
    assert kept.billed == "unknown"


def test_a_request_takes_less_than_300_bytes() -> None:
    """With an identifier of its own, as providers send it."""
    log = RequestLog("run-1")
    records = some_requests(5000)
    for record in records:
        log.append(dataclasses.replace(record, request_id=f"req_{record.number:032x}"))
    size = sum(map(sys.getsizeof, (log._data, log._ids, *log._ids)))

    assert size / len(log) < 300
