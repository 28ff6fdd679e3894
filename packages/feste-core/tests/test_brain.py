"""The brain on the virtual clock: every policy ends, nothing is lost, limits hold."""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import feste
from feste import draw
from feste.backend import Limits, Request, Response
from feste.errors import (
    CallError,
    CallTimeout,
    ContextTooLong,
    FesteError,
    InvalidRequest,
    NotStarted,
    RateLimited,
    ServerError,
)
from feste.testing import FakeBackend, FakeParams, VirtualClock, fresh_draws


@feste.task(pure=True)
def join(*parts: Any) -> str:
    return "|".join(map(str, parts))


@feste.task
def effect(part: Any) -> str:
    return f"<{part}>"


@feste.task
def explode(part: Any) -> str:
    raise ZeroDivisionError(part)


@feste.task(emits=True)
def emit(llm: FakeBackend, part: Any) -> Any:
    return [llm.chat(f"emitted for {part}"), llm.complete(f"and {part}")]


def random_program(rng: random.Random, llm: FakeBackend, size: int, *, failing: bool) -> list[Any]:
    """A graph of calls, prompts, tasks and operators over one another, some equal, some failing."""
    made: list[Any] = []

    def some() -> Any:
        return rng.choice(made) if made and rng.random() < 0.7 else f"constant {rng.randrange(4)}"

    for _ in range(size):
        kind = rng.randrange(9 if failing else 8)
        params = FakeParams(temperature=rng.choice([None, 0.0]), max_tokens=rng.choice([None, 5]))
        if kind == 0:
            made.append(llm.chat(join(some()), params))
        elif kind == 1:
            made.append(llm.complete(join(some(), "x"), params))
        elif kind == 2:
            made.append(llm.complete(f"constant {rng.randrange(6)}", params))
        elif kind == 3:
            made.append(join(llm.embed(f"text {rng.randrange(4)}")[0], some()))
        elif kind == 4:
            made.append(join(some(), [some(), {"a": some()}]))
        elif kind == 5:
            made.append(effect(some()))
        elif kind == 6:
            made.append(join(emit(llm, some())))
        elif kind == 7:
            made.append(join(some()) + "!")
        else:
            made.append(explode(some()))
    return rng.sample(made, k=min(len(made), 5))


def faulty(llm: FakeBackend, rng: random.Random, rate: float) -> Any:
    """Answers, but now and then one of the faults that are sent again, or that are not."""

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


@pytest.mark.parametrize("part", range(8))
def test_random_graphs_end_and_lose_nothing(part: int) -> None:
    """2,000 random graphs under every policy: each ends, and each node has one final state."""
    for seed in range(part * 250, (part + 1) * 250):
        rng = random.Random(seed)
        limits = Limits(concurrency=rng.choice([None, 1, 3]), max_items=rng.choice([None, 1, 2, 5]))
        llm = FakeBackend(limits=limits)
        program = random_program(rng, llm, rng.randrange(1, 30), failing=rng.random() < 0.3)
        clock = VirtualClock(
            faulty(llm, rng, rng.choice([0.0, 0.1, 0.5])),
            request_seconds=lambda r, rng=rng: rng.lognormvariate(0, 1),
            task_seconds=lambda t, rng=rng: rng.choice([0.0, 0.001, 0.02, 1.0]),
            places=rng.choice([1, 2, 6]),
            seed=seed,
        )
        run = clock.run(
            program,
            on_error=rng.choice(["raise", "return", "stop"]),
            optimize=rng.choice([True, True, False, {"batch": False}]),
            keep=rng.choice(["paid", "all", "none"]),
        )
        clock.tell(0.0, ("submit", run))
        if rng.random() < 0.2:
            clock.tell(rng.random() * 5, ("stop", run, rng.choice([0.0, 2.0])))
        clock.drive()

        assert sum(run.count_states().values()) == len(run.state), seed
        assert 0 == run.open
        for i, result in zip(run.outputs, run.results(), strict=True):
            assert (i in run.errors) == isinstance(result, FesteError), seed
        assert 0 == clock.in_flight
        assert not clock.brain.attempts.parcels
        assert not clock.brain.joins.under_way
        assert not any(clock.brain.dispatcher.busy.values())
        for gate in clock.brain.gates.by_scope.values():
            assert 0 == gate.in_flight
            assert 0 == len(gate)


def test_faults_that_pass_change_no_answer() -> None:
    """With faults that end, every answer is the one of a run without faults."""
    for seed in range(60):
        fresh_draws()
        rng = random.Random(seed)
        program = random_program(rng, FakeBackend(), 20, failing=False)
        calm = VirtualClock(FakeBackend().answer).compute(program)
        fresh_draws()
        rng = random.Random(seed)
        program = random_program(rng, FakeBackend(), 20, failing=False)
        left = {"faults": 40}

        def answer(request: Request, rng: random.Random = rng, left: Any = left) -> Response:
            if left["faults"] and rng.random() < 0.3:
                left["faults"] -= 1
                raise RateLimited("slow down", retry_after=rng.choice([None, 1.0]))
            return FakeBackend().answer(request)

        assert calm == VirtualClock(answer, seed=seed).compute(program)


def test_two_runs_share_a_node_in_flight() -> None:
    """A node that is in flight in one run is joined by another that holds it: one request."""
    llm = FakeBackend()
    node = llm.chat("shared")
    clock = VirtualClock(llm.answer)
    first, second = clock.run(join(node)), clock.run(join(node, "b"))
    clock.tell(0.0, ("submit", first))
    clock.tell(0.5, ("submit", second))

    clock.drive()

    assert 1 == len(clock.sent)
    assert second.results()[0] == first.results()[0] + "|b"


def test_the_second_run_takes_over_when_the_first_is_stopped() -> None:
    """Whoever joined a node gets it although the run that had begun it was stopped."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    blocker, node = llm.chat("first in the queue"), llm.chat("shared")
    clock = VirtualClock(llm.answer)
    first, second = clock.run(blocker, node), clock.run(node)
    clock.tell(0.0, ("submit", first))
    clock.tell(0.1, ("submit", second))
    clock.tell(0.5, ("stop", first, 0.0))

    clock.drive()

    assert isinstance(first.results()[1], FesteError)
    assert str(second.results()[0]).startswith("fake-1:")


def test_concurrency_is_never_exceeded() -> None:
    """``Limits(concurrency=3)`` holds over all runs, and is used up while calls wait."""
    llm = FakeBackend(limits=Limits(concurrency=3))
    clock = VirtualClock(llm.answer)
    for _ in range(4):
        clock.tell(0.0, ("submit", clock.run([llm.chat(f"{i}") for i in range(10)])))

    clock.drive()

    assert 3 == clock.peak
    assert -(-40 // 3) == clock.now  # forty seconds of work in three places


def test_slow_start_doubles_every_round_trip() -> None:
    """Without limits the gate begins with ten and doubles: 10, 20, 40, ... up to 512."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer)

    clock.compute([llm.chat(f"{i}") for i in range(2000)])

    rounds: dict[float, int] = {}
    for at, _ in clock.sent:
        rounds[at] = rounds.get(at, 0) + 1
    assert [10, 20, 40, 80, 160, 320, 512, 512, 346] == list(rounds.values())


def test_retry_after_is_obeyed_by_everyone() -> None:
    """After a 429 that asks for 30 s nobody sends to that account for 30 s, and half as many then."""
    llm = FakeBackend()
    refused = []

    def answer(request: Request) -> Response:
        if not refused and "7" in str(request.body):
            refused.append(clock.now)
            raise RateLimited("slow down", retry_after=30.0)
        return llm.answer(request)

    clock = VirtualClock(answer)
    results = clock.compute([llm.chat(f"{i}") for i in range(100)])

    heard = refused[0] + 1.0
    assert not [at for at, _ in clock.sent if heard < at < heard + 30.0]
    assert all(isinstance(r, str) for r in results)
    assert 101 == len(clock.sent)


def test_attempts_are_bounded_when_everything_fails() -> None:
    """A server that always fails gets six tries a call, one that may have billed gets two."""
    llm = FakeBackend()
    for error, tries in ((ServerError("x"), 6), (CallTimeout("x"), 2), (InvalidRequest("x"), 1)):

        def answer(request: Request, error: CallError = error) -> Response:
            raise type(error)("x")

        clock = VirtualClock(answer)
        (result,) = clock.compute(llm.chat("Hi"))

        assert tries == len(clock.sent)
        assert type(error) is type(result)
        assert tries == result.attempts


def test_a_poisoned_item_costs_only_itself() -> None:
    """A list that is refused is halved until the bad item stands alone: the others are answered."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if "poison" in str(request.body):
            raise InvalidRequest("one of them is bad")
        return llm.answer(request)

    clock = VirtualClock(answer)
    results = clock.compute([llm.complete("poison" if i == 5 else f"{i}") for i in range(16)])

    assert [5] == [i for i, r in enumerate(results) if isinstance(r, FesteError)]
    # 16, 8, 4 taken, 4, 2, the good one, the bad one, 2 taken, 8 taken
    assert 9 == len(clock.sent)
    assert not clock.brain.lists.limits


def test_a_server_that_takes_no_lists_is_remembered() -> None:
    """A wrong number of answers sends the calls one by one, and no list goes there again."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        response = llm.answer(request)
        return Response({"answers": response.payload["answers"][:1]})

    clock = VirtualClock(answer)
    first = clock.compute([llm.complete(f"{i}") for i in range(8)])
    assert 1 + 8 == len(clock.sent)
    second = clock.compute([llm.complete(f"again {i}") for i in range(8)])

    assert 1 + 8 + 8 == len(clock.sent)
    assert not any(isinstance(r, FesteError) for r in [*first, *second])


@pytest.mark.parametrize(
    ("limit", "first", "second"), [(4, 2 + 4, 4), (2, 3 + 8, 8), (1, 4 + 16, 16)]
)
def test_a_server_that_takes_shorter_lists_is_remembered(
    limit: int, first: int, second: int
) -> None:
    """A list that is refused only for its length teaches which length is taken, 1 included."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if request.items > limit:
            raise InvalidRequest("too many")
        return llm.answer(request)

    clock = VirtualClock(answer)
    results = clock.compute([llm.complete(f"{i}") for i in range(16)])
    sent = len(clock.sent)
    more = clock.compute([llm.complete(f"again {i}") for i in range(16)])

    assert not any(isinstance(r, FesteError) for r in [*results, *more])
    assert (first, second) == (sent, len(clock.sent) - sent)


def test_a_limit_of_size_is_no_limit_of_items() -> None:
    """Two long texts that were refused together say nothing of many short ones."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if request.size > 5000:
            raise ContextTooLong("too large")
        return llm.answer(request)

    clock = VirtualClock(answer)
    clock.compute([llm.complete(letter * 4000) for letter in "ab"])
    assert 3 == len(clock.sent)
    results = clock.compute([llm.complete(f"short {i}") for i in range(16)])

    assert all(isinstance(r, str) for r in results)
    assert 4 == len(clock.sent)


def test_a_parameter_that_no_call_may_have_costs_few_more_requests() -> None:
    """Where all calls of a list are refused, the search ends at once and each is tried singly."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        raise InvalidRequest("no such parameter")

    clock = VirtualClock(answer)
    results = clock.compute([llm.complete(f"{i}") for i in range(16)])

    assert all(isinstance(r, InvalidRequest) for r in results)
    assert 4 + 16 == len(clock.sent)


@given(
    st.integers(1, 20),
    st.sets(st.integers(0, 39)),
    st.integers(1, 40),
    st.sampled_from([InvalidRequest, ContextTooLong]),
)
def test_every_good_call_is_answered_whatever_a_server_refuses(
    limit: int, bad: set[int], count: int, kind: type[InvalidRequest]
) -> None:
    """For any length that a server takes and any bad items: each good call is answered, once."""
    llm = FakeBackend()
    answered: Counter[str] = Counter()

    def answer(request: Request) -> Response:
        given = request.body["prompt"]
        items = given if isinstance(given, list) else [given]
        if len(items) > limit or any(int(item) in bad for item in items):
            raise kind("refused")
        answered.update(items)
        return llm.answer(request)

    clock = VirtualClock(answer)
    results = clock.compute([llm.complete(str(i)) for i in range(count)])

    assert {i for i, r in enumerate(results) if isinstance(r, FesteError)} == bad & set(
        range(count)
    )
    assert set(answered.values()) <= {1}
    assert len(clock.sent) <= 2 * count + 4
    # what was learnt is true of the server
    assert all(learnt.items <= limit for learnt in clock.brain.lists.limits.values())


def test_the_critical_path_goes_first() -> None:
    """Of many ready calls the one with the longest way behind it is sent first."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    short = [llm.chat(f"short {i}") for i in range(5)]
    long = llm.chat("long")
    for _ in range(4):
        long = llm.chat(join(long))
    clock = VirtualClock(llm.answer)

    clock.compute(short, long)

    assert "long" in str(clock.sent[0][1].body)


def test_stop_starts_nothing_new() -> None:
    """With ``on_error="stop"`` what is in flight is drained, and nothing else begins."""
    llm = FakeBackend(limits=Limits(concurrency=2))

    def answer(request: Request) -> Response:
        if "bad" in str(request.body):
            raise InvalidRequest("no")
        return llm.answer(request)

    clock = VirtualClock(answer, request_seconds=lambda r: 1.0 if "bad" in str(r.body) else 3.0)
    run = clock.run([llm.chat("good"), llm.chat("bad"), llm.chat("later")], on_error="stop")
    clock.tell(0.0, ("submit", run))
    clock.drive()

    assert {"done": 1, "failed": 1, "not_started": 1} == run.count_states()
    assert 2 == len(clock.sent)
    assert isinstance(run.results()[2], NotStarted)


def test_a_slow_task_gives_back_the_rest_of_its_chunk() -> None:
    """Tasks that were handed out behind one that takes longer than thought run elsewhere."""
    slow_key = []

    def seconds(task: Any) -> float:
        if task.stage == "run" and not slow_key and task.index == 500:
            slow_key.append(task.key)
            return 100.0
        return 1e-6

    clock = VirtualClock(FakeBackend().answer, task_seconds=seconds, places=2)
    run = clock.run([effect(i) for i in range(1000)])
    ended: list[float] = []
    done = clock.brain.lifecycle.done

    def spy(run: Any, i: int, value: Any, state: int) -> None:
        ended.append(clock.now)
        done(run, i, value, state)

    clock.brain.lifecycle.done = spy  # type: ignore[method-assign]
    clock.tell(0.0, ("submit", run))
    clock.drive()

    assert 1 == len([at for at in ended if at > 1.0])


def test_a_server_that_refuses_lists_is_remembered() -> None:
    """A list is refused but each of its calls taken: no list goes there again. One bad call is not it."""
    llm = FakeBackend()

    def answer(request: Request) -> Response:
        if isinstance(request.body["prompt"], list) or "poison" in request.body["prompt"]:
            raise InvalidRequest("no")
        return llm.answer(request)

    clock = VirtualClock(answer)
    clock.compute([llm.complete(f"{i} {'poison' if i == 3 else ''}") for i in range(8)])
    assert 3 + 8 == len(clock.sent)  # 8, 4 and 2 are refused; 2 were taken singly: no lists
    clock.compute([llm.complete(f"again {i}") for i in range(8)])

    assert 11 + 8 == len(clock.sent)


def test_throttling_uses_up_no_tries() -> None:
    """Ten refusals for rate and one server fault later the call still has tries left."""
    llm = FakeBackend()
    faults: list[CallError] = [RateLimited("slow") for _ in range(10)] + [ServerError("oops")]

    def answer(request: Request) -> Response:
        if faults:
            raise faults.pop(0)
        return llm.answer(request)

    clock = VirtualClock(answer)
    (result,) = clock.compute(llm.chat("Hi"))

    assert isinstance(result, str)
    assert 12 == len(clock.sent)


def test_a_closed_gate_sets_one_alarm() -> None:
    """While an account waits out a Retry-After, other work leaves no pile of timers."""
    llm = FakeBackend()
    first = []

    def answer(request: Request) -> Response:
        if not first:
            first.append(1)
            raise RateLimited("slow", retry_after=60.0)
        return llm.answer(request)

    clock = VirtualClock(answer, task_seconds=lambda task: 0.002)
    most = []
    hands_call = clock.hands.call

    def spy(where: str, chunk: Any) -> None:
        most.append(len(clock.brain.timers))
        hands_call(where, chunk)

    clock.hands.call = spy  # type: ignore[method-assign]
    clock.compute([llm.chat(f"{i}") for i in range(30)], [effect(i) for i in range(2000)])

    assert max(most) < 60


def test_what_a_task_may_return_is_held() -> None:
    """A value that an emitted node needs is not computed again, however long ago it was done."""
    ran: list[str] = []

    @feste.task
    def once() -> str:
        ran.append("once")
        return "value"

    first = once()

    @feste.task(emits=True)
    def late(_: Any) -> Any:
        return join(first, "late")

    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    (result,) = clock.compute(late(llm.chat(join(first))), keep="none")

    assert "value|late" == result
    assert ["once"] == ran


def test_a_value_that_is_gone_is_not_computed_twice() -> None:
    """Without ``emits=True`` a returned node that needs such a value fails and names the fix."""
    ran: list[str] = []

    @feste.task
    def once() -> str:
        ran.append("once")
        return "value"

    first = once()

    @feste.task
    def late(_: Any) -> Any:
        return join(first, "late")

    llm = FakeBackend()
    clock = VirtualClock(llm.answer)
    (result,) = clock.compute(late(llm.chat(join(first))))

    assert isinstance(result, FesteError)
    assert "emits=True" in str(result)
    assert ["once"] == ran


def test_limits_hold_as_long_as_their_client_lives() -> None:
    """The lowest limit of an account's living clients holds; when its client is gone so is it."""
    narrow, wide = FakeBackend(limits=Limits(concurrency=2)), FakeBackend()
    clock = VirtualClock(wide.answer)
    clock.compute([narrow.chat(f"{i}") for i in range(8)])
    clock.compute([wide.chat(f"wide {i}") for i in range(8)])
    assert 2 == clock.peak
    del narrow
    gc.collect()
    clock.compute([wide.chat(f"alone {i}") for i in range(8)])

    assert 8 == clock.peak


def test_scopes_of_emitted_nodes_do_not_pile_up() -> None:
    """However deep tasks emit, the names of their draws stay short, and go with the run."""

    @feste.task(emits=True)
    def down(n: int) -> Any:
        return down(n - 1) if n else effect("end")

    clock = VirtualClock(FakeBackend().answer)
    run = clock.run(down(300))
    clock.tell(0.0, ("submit", run))
    clock.drive()

    assert ["<end>"] == run.results()
    assert 50 > max(len(scope) for scope in run.scopes)
    assert not set(run.scopes) & set(draw._counters)


def test_a_run_counts_what_waits_for_its_time() -> None:
    """Requests that wait to be tried again, and until when a gate is closed: for the progress bar."""
    llm = FakeBackend()
    faults: list[CallError] = [ServerError("oops") for _ in range(3)]
    faults.append(RateLimited("slow", retry_after=50.0))
    seen: list[tuple[int, float]] = []

    def answer(request: Request) -> Response:
        seen.append((run.retrying, run.resumes_at))
        if faults:
            raise faults.pop(0)
        return llm.answer(request)

    clock = VirtualClock(answer)
    run = clock.run([llm.chat(str(i)) for i in range(3)])
    clock.tell(0.0, ("submit", run))
    clock.drive()

    assert 0 < max(retrying for retrying, _ in seen) <= 3
    assert 51.0 < seen[-1][1] < 60.0
    assert run.retrying == 0


def test_waiting_for_a_place_is_no_attempt() -> None:
    """A call that waited long to be sent at all is tried again like any other."""
    llm = FakeBackend(limits=Limits(concurrency=1))
    failed: set[str] = set()

    def answer(request: Request) -> Response:
        text = request.body["messages"][0]["content"]
        if text == "39" and text not in failed:
            failed.add(text)
            raise ServerError("one hiccup")
        return llm.answer(request)

    clock = VirtualClock(answer, request_seconds=lambda request: 60.0)
    values = clock.compute([llm.chat(str(i)) for i in range(40)])

    assert clock.now > 1800 and failed == {"39"}
    assert not any(isinstance(value, Exception) for value in values)
