"""The cap on what runs may spend: it holds, it stops cleanly, and a rerun buys only the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import BatchRule, Limits, Operation, Price, Profile, Request, Response
from feste.budget import Budget
from feste.errors import (
    BudgetExceeded,
    CallError,
    CallTimeout,
    ConfigError,
    InvalidRequest,
    MalformedResponse,
    NotStarted,
    RunFailed,
    ServerError,
)
from feste.scheduler.run import Run
from feste.testing import FakeBackend, FakeParams, VirtualClock

PRICE = Price(input=1_000.0, output=10_000.0)  # dear, so that sums are easy to read
PRICED = Profile(price=PRICE)
SHORT = FakeParams(max_tokens=8)


def priced(**given: Any) -> FakeBackend:
    return FakeBackend(profile=PRICED, **given)


def cost_of(llm: FakeBackend, requests: list[Request] | None = None) -> float:
    """What a provider would bill for all requests that came to it."""
    usages = [llm.answer(request).usage for request in requests or llm.requests]
    return sum(PRICE.dollars(usage.input, usage.output) for usage in usages if usage)


def started(clock: VirtualClock, *args: Any, **settings: Any) -> Run:
    run = clock.run(*args, **settings)
    clock.tell(0.0, ("submit", run))
    return run


def calls(llm: FakeBackend, count: int) -> list[Any]:
    return [llm.chat(f"call {i}", SHORT) for i in range(count)]


def test_a_run_spends_up_to_its_cap_and_tells_how_much() -> None:
    """Nothing is sent that could exceed the cap; what was in flight is delivered."""
    llm = priced()
    nodes = calls(llm, 100)
    with pytest.raises(RunFailed) as caught:
        feste.compute(nodes, budget=2.0)
    error = caught.value.__cause__

    assert isinstance(error, BudgetExceeded)
    assert (error.cap, error.unit, error.reserved) == (2.0, "dollars", 0.0)
    assert error.spent == pytest.approx(cost_of(llm)) and 1.5 < error.spent <= 2.0
    assert "budget of $2.00 is reached" in str(error) and "larger budget=" in str(error)
    values = caught.value.partial[0]
    assert sum(isinstance(value, str) for value in values) == len(llm.requests)
    left = [value for value in values if not isinstance(value, str)]
    assert {type(value) for value in left} == {NotStarted}
    assert "the budget of $2.00 is reached" in str(left[0])


def test_a_rerun_buys_only_the_rest(tmp_path: Any) -> None:
    """The same nodes, or a store, keep what was bought under a cap that was too small."""
    llm = priced()
    nodes = calls(llm, 60)
    with pytest.raises(RunFailed):
        feste.compute(nodes, budget=1.0)
    bought = len(llm.requests)
    feste.compute(nodes, budget=10.0)

    assert 0 < bought < 60 and len(llm.requests) == 60

    stored = priced()
    with context.set(store=tmp_path / "runs.db", keep="none"):
        again = calls(stored, 60)
        with pytest.raises(RunFailed, match=r"runs\.db"):
            feste.compute(again, budget=1.0)
        feste.compute(again, budget=10.0)
    assert len(stored.requests) == 60


def mixed(llm: Any, params: Any, budget: float) -> list[BaseException]:
    """100 calls against one cap: lazy and eager ones, in eight threads."""
    errors: list[BaseException] = []
    budget_of = context.set(budget=budget)

    def lazy(part: int) -> None:
        try:
            feste.compute([llm.chat(f"lazy {part} {i}", params) for i in range(20)], progress=False)
        except RunFailed as error:
            errors.append(error.__cause__ or error)

    def eager(part: int) -> None:
        try:
            with context.set(eager=True):
                for i in range(5):
                    llm.chat(f"eager {part} {i}", params)
        except (BudgetExceeded, NotStarted) as error:
            errors.append(error)

    with budget_of:
        kinds = [lazy] * 4 + [eager] * 4
        threads = [threading.Thread(target=kind, args=(i,)) for i, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return errors


def test_the_cap_of_a_block_holds_for_all_threads() -> None:
    """20 times 100 calls, lazy and eager, in eight threads: never more than the cap is spent."""
    for _ in range(20):
        llm = priced()
        errors = mixed(llm, SHORT, 1.5)

        assert 0.5 < cost_of(llm) <= 1.5
        assert errors and {type(error) for error in errors} == {BudgetExceeded}


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    pytest.importorskip("feste.backend.openai")
    from feste.testing import SimServer

    with SimServer("feste.backend.openai.testing:OpenAIWire") as running:
        yield running


def test_the_cap_holds_over_sockets(server: Any) -> None:
    """The ledger of a server, faults that are billed included, stays below the cap in 20 of 20 runs."""
    from feste.backend.openai import ChatParams, OpenAI
    from feste.testing import Fault
    from feste.testing.sim_answers import words

    for part in range(20):
        server.reset()
        if part % 7 == 0:  # each takes a second or two, for retries wait
            server.add(Fault(kind="reset_after", times=3), Fault(status=500, times=3))
            server.add(Fault(kind="garbage", times=2))
        llm = OpenAI("sim-1", base_url=server.url + "/v1", profile=PRICED)
        errors = mixed(llm, ChatParams(max_tokens=16), 5.0)
        spent = sum(
            PRICE.dollars(words(entry["prompt"]), words(entry["answer"]))
            for entry in server.ledger()
        )

        assert 0 < spent <= 5.0
        assert any(isinstance(error, BudgetExceeded) for error in errors)


# --- on the virtual clock ---------------------------------------------------------------------------


def flaky(llm: FakeBackend, rate: float, seed: int) -> tuple[VirtualClock, list[Request]]:
    """A provider that fails now and then; also the requests that it generated an answer to."""
    made: list[Request] = []

    def answer(request: Request) -> Response:
        chance = clock.rng.random()
        if chance < rate / 2:
            raise ServerError("oops")
        made.append(request)
        if chance < rate:
            raise CallTimeout("late") if chance < 0.8 * rate else MalformedResponse("garbage")
        return llm.answer(request)

    clock = VirtualClock(answer, seed=seed)
    return clock, made


@pytest.mark.parametrize("seed", range(20))
def test_retries_and_lost_answers_count(seed: int) -> None:
    """What may have been billed stays reserved, and each retry is reserved anew."""
    llm = priced(limits=Limits(concurrency=16))
    clock, made = flaky(llm, 0.3, seed)
    run = started(clock, calls(llm, 200), budget=3.0)
    clock.drive()

    (budget,) = run.caps
    assert isinstance(run.fault, BudgetExceeded)
    assert cost_of(llm, made) <= 3.0
    assert budget.pending == 0 and budget.spent + budget.reserved <= 3.0
    assert any(record.billed == "unknown" for record in run.requests) and run.reserved[
        "dollars"
    ] == pytest.approx(budget.reserved)
    assert run.spent["dollars"] == pytest.approx(budget.spent)
    assert all(gate.in_flight == 0 for gate in clock.brain.gates.by_scope.values())


def test_a_call_waits_for_what_is_under_way() -> None:
    """A reservation is a bound: what it leaves over is used before the run stops."""
    llm = priced(limits=Limits(concurrency=64))
    wide = FakeParams(max_tokens=100)  # a dollar and more is reserved, 4 cents are spent
    clock = VirtualClock(llm.answer)
    run = started(clock, [llm.chat(f"call {i}", wide) for i in range(128)], budget=4.0)
    clock.drive()

    assert clock.peak < 4
    assert 40 < len(clock.sent) and 2.8 < run.spent["dollars"] <= 4.0


def test_tokens_can_be_capped() -> None:
    """Without any price: read and generated tokens together."""
    llm = FakeBackend(limits=Limits(concurrency=4))
    clock = VirtualClock(llm.answer)
    run = started(clock, calls(llm, 300), budget="1_000 tokens")
    clock.drive()

    usages = [llm.answer(request).usage for _, request in clock.sent]
    assert 800 < sum(usage.total for usage in usages if usage) <= 1000
    assert "1,000 tokens is reached" in str(run.fault)


def test_a_call_of_unknown_price_is_refused_before_the_run() -> None:
    """Under a cap in dollars nothing is sent that nobody can price; the error names what to do."""
    known, llm = priced(), FakeBackend()
    with pytest.raises(ConfigError, match=r"profile=Profile\(price=Price.*feste-core\[prices\]"):
        feste.compute(known.chat("Hi", SHORT), llm.chat("Hi", SHORT), budget=100.0)

    assert not known.requests and not llm.requests
    feste.compute(llm.chat("Hi", SHORT), budget="100 tokens")


def test_a_call_without_a_bound_is_refused() -> None:
    """It may generate any number of tokens."""
    llm = priced()
    with pytest.raises(RunFailed, match="give it max_tokens=") as caught:
        feste.compute(llm.chat("Hi"), budget=100.0)

    assert isinstance(caught.value.__cause__, ConfigError) and not llm.requests


def test_vectors_need_no_bound_of_output() -> None:
    """They generate nothing, and say so."""
    llm = priced()
    feste.compute([llm.embed(f"text {i}") for i in range(5)], budget=10.0)

    assert len(llm.requests) == 1


def test_text_of_any_language_stays_below_the_bound() -> None:
    """A token has a byte at least: the bytes of a request are more than its tokens, with its frame."""
    llm = priced()
    for text in ("", "naïve", "漢字" * 50, "🙂" * 50, '\x00\\"' * 20):
        request = llm._prepare_chat(text, SHORT)

        assert request.size >= len(text.encode()) + 20


def test_what_costs_nothing_needs_no_budget(tmp_path: Any) -> None:
    """Kept and replayed answers pass under a cap of nothing."""
    llm = priced()
    node = llm.chat("Hi", SHORT)
    with context.set(store=tmp_path / "runs.db"):
        feste.compute(node)
        feste.compute(node, budget=0)
        with pytest.raises(RunFailed, match=r"budget of \$0\.00"):
            feste.compute(llm.chat("Ho", SHORT), budget=0)


def test_tasks_count_against_the_cap_of_their_run() -> None:
    """A task that computes cannot go around the cap, nor lift it."""
    llm = priced()

    @feste.task
    def agent(step: int) -> Any:
        feste.compute(calls(llm, 60), budget=100.0, progress=False)

    with pytest.raises(RunFailed):
        feste.compute(agent(1), budget=1.0)

    assert 0.5 < cost_of(llm) <= 1.0


def test_one_budget_can_be_given_again() -> None:
    """The same object goes on counting; the same number begins anew."""
    llm = priced()
    mine = Budget.of(1.0)
    assert mine is not None
    feste.compute(calls(llm, 5), budget=mine)
    spent = mine.spent
    with pytest.raises(RunFailed):
        feste.compute(calls(llm, 100), budget=mine)

    assert 0 < spent < mine.spent <= 1.0


def test_two_caps_at_once_are_an_error() -> None:
    """A block's cap holds for the process: another thread cannot set another one meanwhile."""
    problems: list[BaseException] = []

    def other() -> None:
        try:
            with context.set(budget=5.0):
                pass
        except ConfigError as error:
            problems.append(error)

    with context.set(budget=5.0):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    assert len(problems) == 1 and "another thread" in str(problems[0])


@pytest.mark.parametrize("wrong", [-1, True, "five", float("nan"), float("inf"), "1.5 tokens", [5]])
def test_a_wrong_budget_is_refused(wrong: Any) -> None:
    """The error says what a budget looks like."""
    with pytest.raises(ConfigError, match="expected dollars as a number"):
        context.settings(budget=wrong)


def test_the_environment_sets_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """``FESTE_BUDGET`` takes both forms."""
    declared = context.SETTINGS["budget"]

    assert str(declared.parse("budget", "2.5")).startswith("$2.50")
    assert declared.parse("budget", "20,000 tokens").unit == "tokens"
    assert declared.parse("budget", "") is None


def test_a_call_that_waited_to_be_sent_again_says_why_it_was_not() -> None:
    """An error that is usually overcome is not taken for the provider's last word."""
    llm = priced()
    failing = iter([ServerError("down")])

    def answer(request: Request) -> Response:
        for error in failing:
            raise error
        return llm.answer(request)

    clock = VirtualClock(answer)
    run = started(clock, *calls(llm, 40), budget=1.0, on_error="return")
    clock.drive()

    (i,) = run.failed
    assert run.errors[i].message == "down; not tried again: the budget of $1.00 is reached"


def test_a_run_stopped_by_its_cap_loses_no_error_of_a_call() -> None:
    """A call that waits for its retry as the cap is reached ends with its own error."""
    llm = priced(limits=Limits(concurrency=1))
    first: list[CallError] = [ServerError("oops")]

    def answer(request: Request) -> Response:
        if first:
            raise first.pop()
        return llm.answer(request)

    clock = VirtualClock(answer)
    run = started(clock, calls(llm, 40), budget=0.2)
    clock.drive()

    assert run.count_states().keys() <= {"done", "failed", "not_started"}
    assert isinstance(run.fault, BudgetExceeded) and not any(s < 9 for s in run.state)


def test_an_answer_without_a_count_costs_what_was_set_aside() -> None:
    """Garbage was paid, and no provider says how much: both purchases count as their bound."""
    llm = priced()

    def answer(request: Request) -> Response:
        raise MalformedResponse("garbage")

    clock = VirtualClock(answer)
    run = started(clock, llm.chat("Hi", SHORT), budget=3.0)
    clock.drive()

    bounds = [PRICE.dollars(request.size, 8) for _, request in clock.sent]
    assert len(bounds) == 2 and run.spent["dollars"] == pytest.approx(sum(bounds))


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (10.0, "$10.00 left, and the plan needs at most"),
        (0.000001, "it will stop there"),
        ("100000 tokens", "100,000 tokens left, and the plan needs at most"),
        ("1 tokens", "it will stop there"),
    ],
)
def test_explain_tells_whether_a_plan_fits(budget: Any, told: str) -> None:
    llm = priced()
    explained = feste.explain([llm.chat(f"{i}", SHORT) for i in range(5)], budget=budget)

    assert told in " ".join(str(explained).split())
    assert not llm.requests


def test_explain_tells_that_a_price_is_missing() -> None:
    told = str(feste.explain(FakeBackend().chat("Hi", SHORT), budget=1.0))

    assert "a price is not known, which is refused" in " ".join(told.split())


def test_a_run_at_its_cap_holds_up_no_other() -> None:
    """Its next request waits for those under way; another run's have the other lanes meanwhile."""
    llm = FakeBackend(limits=Limits(concurrency=4))
    params = FakeParams(max_tokens=100)
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 100.0)
    capped = started(clock, [llm.chat(f"{i}", params) for i in range(4)], budget="300 tokens")
    other = clock.run([llm.chat(f"other {i}", params) for i in range(4)])
    clock.tell(1.0, ("submit", other))
    clock.drive()

    began = [at for at, request in clock.sent if "other" in str(request.body)]
    assert began[:2] == [1.0, 1.0]
    assert max(began) <= 101.0
    assert capped.count_states() == {"done": 4}
    assert not clock.brain.gates.short


def lists(llm: FakeBackend) -> list[Any]:
    """Calls that share requests as lists: of vectors, and of texts of any length."""
    texts = [f"text {i} " + "word " * (i % 7) for i in range(60)]
    return [llm.embed(text) for text in texts[:30]] + [llm.complete(t, SHORT) for t in texts[30:]]


def draws(llm: FakeBackend) -> list[Any]:
    """Equal calls, which become several answers to one prompt; and lists of such."""
    same = [llm.chat("the same question " * 9, SHORT) for _ in range(40)]
    return same + [llm.complete(f"question {i % 5}", SHORT) for i in range(60)]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("make", [lists, draws])
def test_a_shared_request_is_cut_to_what_there_is_room_for(make: Any, share: float) -> None:
    """Grouping calls never makes a budget buy nothing: a smaller request goes, then the others."""
    bounds = feste.explain(make(priced())).dollars.worst
    assert bounds is not None
    bought = []
    for optimize in (None, False):
        llm = priced(limits=Limits(concurrency=8))
        nodes = make(llm)
        clock = VirtualClock(llm.answer)
        given = {} if optimize is None else {"optimize": optimize}
        run = started(clock, nodes, budget=share * bounds, **given)
        clock.drive()

        (budget,) = run.caps
        assert (budget.pending, budget.reserved) == (0, pytest.approx(0.0, abs=1e-9))
        assert budget.spent == pytest.approx(cost_of(llm, [r for _, r in clock.sent]))
        assert budget.spent <= budget.cap and run.spent["dollars"] == pytest.approx(budget.spent)
        assert run.reserved["dollars"] == pytest.approx(0.0, abs=1e-9)
        assert all(gate.in_flight == 0 for gate in clock.brain.gates.by_scope.values())
        assert not clock.brain.gates.short
        done = run.count_states().get("done", 0)
        assert done == len(nodes) or isinstance(run.fault, BudgetExceeded)
        bought.append((done, len(clock.sent)))
    (together, requests), (alone, _) = bought
    assert together >= alone > 0 and requests <= together


@pytest.mark.parametrize("make", [lists, draws])
def test_what_explain_says_is_enough_is_enough(make: Any) -> None:
    """It counts what will be reserved: with as much, nothing waits and no request is cut."""
    plan = feste.explain(make(priced()))
    assert plan.dollars.worst is not None
    told = str(feste.explain(make(priced()), budget=plan.dollars.worst))
    assert "and the plan needs at most" in " ".join(told.split())
    llm = priced(limits=Limits(concurrency=64))
    clock = VirtualClock(llm.answer)
    run = started(clock, make(llm), budget=plan.dollars.worst)
    clock.drive()

    assert run.count_states() == {"done": plan.calls}
    assert {at for at, _ in clock.sent} == {0.0} and len(clock.sent) == plan.requests


def test_explain_says_that_answers_in_prompts_are_reserved_by_their_bytes() -> None:
    """How many bytes they have is not known before: so it says how much they are taken to be."""
    llm = priced()
    told = str(feste.explain(llm.chat(llm.chat("Hi", SHORT), SHORT), budget=10.0))

    assert "a token for each of its bytes is set aside" in " ".join(told.split())


def test_the_calls_of_a_cut_request_keep_their_order_and_their_answers() -> None:
    """The first ones are bought first, and a rerun buys the rest."""
    llm = priced()
    greedy = FakeParams(max_tokens=8, temperature=0)
    nodes = [llm.complete(f"text {i}", greedy) for i in range(16)]
    with pytest.raises(RunFailed) as caught:
        feste.compute(nodes, budget=0.4)
    values = caught.value.partial[0]
    bought = [isinstance(value, str) for value in values]

    assert 0 < sum(bought) < 16 and bought == sorted(bought, reverse=True)
    (again,) = feste.compute(nodes, budget=10.0)
    assert again[: sum(bought)] == values[: sum(bought)]
    fresh = priced()
    (other,) = feste.compute([fresh.complete(f"text {i}", greedy) for i in range(16)])
    assert [str(value) for value in again] == [str(value) for value in other]


def test_a_deadline_does_not_count_what_the_rest_of_a_cut_request_waits() -> None:
    """It counts from when a call is sent first; the parts of this list go one after the other."""
    llm = priced()
    nodes = [llm.complete(f"text {i}", FakeParams(max_tokens=100)) for i in range(16)]
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 10.0)
    run = started(clock, nodes, budget=4.0, deadline=15.0)
    clock.drive()

    assert run.count_states() == {"done": 16} and clock.now > 30.0


def test_a_single_call_that_does_not_fit_stops_the_run() -> None:
    """A list of calls that are too dear each is cut to one, and the error names what that may cost."""
    llm = priced()
    nodes = [llm.complete(f"text {i}", FakeParams(max_tokens=100)) for i in range(16)]
    with pytest.raises(RunFailed, match="the next one may cost") as caught:
        feste.compute(nodes, budget=0.5)
    error = caught.value.__cause__

    assert isinstance(error, BudgetExceeded) and not llm.requests
    assert "may cost $1." in str(error)


def test_a_list_that_a_server_refuses_is_cut_by_a_budget_as_well() -> None:
    """Both ways to send less at once: every call is answered once, and none is lost."""
    llm = priced(limits=Limits(concurrency=4))

    def answer(request: Request) -> Response:
        if request.items > 3:
            raise InvalidRequest("too many items", billed="no")
        return llm.answer(request)

    nodes = [llm.complete(f"text {i}", SHORT) for i in range(16)]
    bound = feste.explain(nodes).dollars.worst
    assert bound is not None
    for share in (0.15, 0.3, 0.6):
        clock = VirtualClock(answer)
        run = started(
            clock, [llm.complete(f"text {i}", SHORT) for i in range(16)], budget=share * bound
        )
        clock.drive()

        assert run.count_states().get("done", 0) >= 16 * share
        assert all(gate.in_flight == 0 for gate in clock.brain.gates.by_scope.values())
        assert run.caps[0].pending == 0 and not clock.brain.gates.short


class Picky(FakeBackend):
    """Its lists cannot be packed again with fewer calls."""

    @staticmethod
    def _pack_all(backend: FakeBackend, requests: Sequence[Request]) -> Request:
        if len(requests) < 16:
            raise ValueError("no list of fewer")
        return FakeBackend._pack(backend, requests)

    complete = Operation(
        prepare=FakeBackend._prepare_complete,
        send=FakeBackend._send,
        parse=FakeBackend._parse_text,
        batch=BatchRule("prompt", "prompt", 16, pack=_pack_all, unpack=FakeBackend._unpack),
    )


def test_a_list_that_cannot_be_cut_fails_its_calls() -> None:
    """A plugin may raise at any time: the run ends, and nothing stays set aside."""
    llm = Picky(profile=PRICED)
    clock = VirtualClock(llm.answer)
    nodes = [llm.complete(f"text {i}", SHORT) for i in range(16)]
    run = started(clock, nodes, llm.chat("another", SHORT), budget=0.8)
    clock.drive()

    assert run.count_states() == {"failed": 16, "done": 1}
    assert "no list of fewer" in str(run.errors[run.failed[0]])
    assert run.caps[0].pending == 0 and not clock.brain.gates.short
    assert all(gate.in_flight == 0 for gate in clock.brain.gates.by_scope.values())
