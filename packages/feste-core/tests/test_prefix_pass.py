"""Calls that begin alike: one goes first, the others find its prefix in the provider's cache."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

import feste
from feste.backend import Profile, PromptCache, Request, Response
from feste.context import settings
from feste.errors import CallError, InvalidRequest, RateLimited, ServerError
from feste.graph import FesteGraph, Prefix
from feste.optimization import Optimizer
from feste.testing import FakeBackend, FakeParams, VirtualClock, fresh_draws

LONG = "once upon a time " * 1000  # ~4,250 tokens
CACHE = PromptCache(write=1.25, read=0.1, lag=2.0, breakpoints=True, keys=True)


def caching(cache: PromptCache | None = CACHE) -> FakeBackend:
    """A backend with a prompt cache."""
    return FakeBackend(profile=Profile(prompt_cache=cache))


def ask(llm: FakeBackend, own: Any, shared: str = LONG) -> Any:
    system = {"role": "system", "content": shared}
    return llm.chat([system, {"role": "user", "content": own}])


def prefixes(*nodes: Any, **given: Any) -> list[Prefix]:
    graph = FesteGraph.collect(*nodes)[0]
    return list(Optimizer().run(graph, settings(strict=True, **given)).graph.prefixes)


def sizes(*nodes: Any, **given: Any) -> list[tuple[int, bool]]:
    return [(len(p.members), p.waits) for p in prefixes(*nodes, **given)]


def sent(clock: VirtualClock) -> list[tuple[float, int]]:
    """How many requests were sent at each time."""
    return sorted(Counter(at for at, _ in clock.sent).items())


# --- the plan -----------------------------------------------------------------------------------------


def test_calls_with_a_long_common_beginning_are_found() -> None:
    """The prefix has the calls, the length, and what the profile says of the cache."""
    llm = caching()
    nodes = [ask(llm, f"question {i}") for i in range(64)]
    (prefix,) = prefixes(nodes, llm.chat("Something else"))

    assert sorted(prefix.members) == sorted(n.key for n in nodes)
    assert prefix.tokens == len("system: " + LONG) // 4
    assert (prefix.whole, prefix.keyed, prefix.waits) == (1, True, True)
    assert (prefix.lag, prefix.ttl) == (2.0, 300.0)
    remarks = [r.text for p in feste.explain(nodes).plan.passes for r in p.remarks]
    assert any("64 calls of chat begin with the same ~4,252 tokens" in text for text in remarks)


def test_tokens_are_counted_in_bytes_as_in_requests() -> None:
    """A text of two-byte letters has twice the tokens of its length."""
    (latin,), (cyrillic,) = (
        prefixes([ask(caching(), str(i), shared=letter * 8000) for i in range(9)])
        for letter in "aж"
    )

    assert (latin.tokens, cyrillic.tokens) == (2002, 4002)


def test_equal_prefixes_have_equal_digests_in_every_run() -> None:
    """The digest is of the text: it names the prefix for the provider, today and tomorrow."""
    first, second = ([ask(caching(), f"{n} {i}") for i in range(4)] for n in "ab")
    other = [ask(caching(), str(i), shared=LONG + "!") for i in range(4)]

    assert prefixes(first)[0].digest == prefixes(second)[0].digest != prefixes(other)[0].digest


@pytest.mark.parametrize(
    ("cache", "shared", "count"),
    [
        (None, LONG, 64),  # nothing is known of a cache
        (CACHE, "too short", 64),
        (CACHE, LONG, 1),  # nothing to share
        (replace(CACHE, write=3.0), LONG, 2),  # writing costs more than reading saves
        (replace(CACHE, read=1.0), LONG, 64),
        (replace(CACHE, minimum=8_000), LONG, 64),
    ],
)
def test_what_does_not_pay_is_not_planned(
    cache: PromptCache | None, shared: str, count: int
) -> None:
    """No cache, a short prefix, too few uses, or prices that eat the gain."""
    assert prefixes([ask(caching(cache), str(i), shared) for i in range(count)]) == []


def test_a_beginning_inside_a_part_counts_where_no_marks_are_needed() -> None:
    """An implicit cache finds any beginning, in steps; a marked one only whole parts."""
    nodes = [[llm.chat(f"{LONG} {i}") for i in range(8)] for llm in (caching(), _implicit())]

    assert prefixes(nodes[0]) == []
    (prefix,) = prefixes(nodes[1])
    assert prefix.tokens == 4224  # 4,252 in steps of 128
    assert (prefix.whole, prefix.keyed) == (0, False)


def _implicit() -> FakeBackend:
    return caching(PromptCache(read=0.1, step=128, lag=2.0))


def test_beginnings_inside_beginnings() -> None:
    """A call may be in several; the inner ones must be worth it by what they add."""
    llm = caching()
    nodes = [
        llm.chat(
            [
                {"role": "system", "content": LONG},
                {"role": "system", "content": f"part {i % 2} " * 3000},
                {"role": "user", "content": f"question {i}"},
            ]
        )
        for i in range(16)
    ]
    found = prefixes(nodes, objective="cost")

    assert [(len(p.members), p.whole) for p in found] == [(16, 1), (8, 2), (8, 2)]


def test_the_objective_decides_who_waits() -> None:
    """Cost: whatever saves; balanced: what saves a quarter; latency: nobody waits."""
    llm = caching()
    much = [ask(llm, f"question {i}") for i in range(8)]
    little = [ask(llm, f"{i} " + "own text " * 8000, shared=LONG + "?") for i in range(8)]

    assert sizes(much, objective="latency") == [(8, False)]
    assert sizes(much) == [(8, True)]
    assert sizes(little) == [(8, False)]
    assert sizes(little, objective="cost") == [(8, True)]
    assert sizes(much, optimize={"prefix": False}) == []


def test_equal_draws_are_one_use() -> None:
    """Several answers to one prompt are one request, which needs no cache."""
    llm = caching()

    assert prefixes([ask(llm, "same") for _ in range(8)]) == []
    (prefix,) = prefixes([ask(llm, str(i % 4)) for i in range(8)])
    assert len(prefix.members) == 8  # four requests, or more if a server takes no `n`
    assert prefixes([ask(llm, str(i % 2)) for i in range(8)], optimize={"cull": True}) != []


def test_other_models_have_other_caches() -> None:
    """A prefix is shared only by calls of one model and one backend."""
    one, other = caching(), caching()
    other.model = "fake-2"
    named = FakeParams(model="fake-3")
    message = [{"role": "user", "content": LONG}]
    nodes = [ask(one, "a"), ask(other, "b"), one.chat(message, named), other.chat(message)]

    assert prefixes(nodes) == []


def test_a_cut_off_pass_says_only_what_it_did() -> None:
    """With no rewrite left there is no prefix, and no remark on one."""
    nodes = [ask(caching(), f"question {i}") for i in range(8)]
    (report,) = (p for p in feste.explain(nodes, max_rewrites=0).plan.passes if p.name == "prefix")

    assert (report.changed, report.remarks) == (0, [])


# --- the run ------------------------------------------------------------------------------------------


def test_one_goes_first_and_the_others_wait_for_the_cache() -> None:
    """The others are sent when the answer is there and the cache has had its time."""
    llm = caching()
    nodes = [ask(llm, f"question {i}") for i in range(10)]
    alone = llm.chat("Something else")
    clock = VirtualClock(llm.answer)
    values = clock.compute([*nodes, alone])

    assert sent(clock) == [(0.0, 2), (3.0, 9)]
    assert len(set(values)) == 11


def test_late_calls_find_the_cache_warm_until_it_is_cold_again() -> None:
    """A call that comes later needs no leader; after the time to live the next one leads again."""
    llm = caching(replace(CACHE, ttl=10.0))

    @feste.task
    def after(seconds: float) -> str:
        return f"after {seconds}"

    nodes = [ask(llm, after(s)) for s in (0.0, 0.0, 5.0, 60.0, 60.0)]
    clock = VirtualClock(
        llm.answer, task_seconds=lambda task: task.args[0] if task.name == "after" else 0.0
    )
    clock.compute(nodes)

    assert sent(clock) == [(0.0, 1), (3.0, 1), (5.0, 1), (60.0, 1), (63.0, 1)]


def test_the_next_one_leads_if_the_first_fails() -> None:
    """A refused leader holds up nobody for good."""
    llm = caching()
    nodes = [ask(llm, f"{'bad' if i < 2 else 'good'} {i}") for i in range(6)]

    def answer(request: Request) -> Response:
        if "bad" in str(request.body["messages"][1]):
            raise InvalidRequest("no")
        return llm.answer(request)

    clock = VirtualClock(answer)
    values = clock.compute(nodes, on_error="return")

    assert [isinstance(v, Exception) for v in values] == [True, True, False, False, False, False]
    assert sent(clock) == [(0.0, 1), (1.0, 1), (2.0, 1), (5.0, 3)]


def test_another_run_goes_on_if_the_leaders_run_is_stopped() -> None:
    """Prefixes are shared by all runs; what one leaves, the next takes up."""
    llm = caching()
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 60.0)
    first, second = (clock.run([ask(llm, f"{name} {i}") for i in range(3)]) for name in "ab")
    clock.tell(0.0, ("submit", first))
    clock.tell(1.0, ("submit", second))
    clock.tell(2.0, ("stop", first, 0.0))
    clock.drive()

    assert second.count_states() == {"done": 3}
    assert [len(r.draws) for _, r in clock.sent] == [1] * 4


def test_marks_are_sent_but_are_no_part_of_the_request() -> None:
    """The provider is told key and ends; the key of stored answers does not change."""
    fresh_draws()
    llm = caching()
    nodes = [ask(llm, f"question {i}") for i in range(3)]
    (digest,) = {p.digest for p in prefixes(nodes)}
    values = feste.compute(nodes)[0]
    plain = caching(cache=None)
    told = {"key": digest, "ends": [1]}

    assert [r.body["prompt_cache"] for r in llm.requests] == [told] * 3
    fresh_draws()
    assert values == feste.compute([ask(plain, f"question {i}") for i in range(3)])[0]
    assert all("prompt_cache" not in r.body for r in plain.requests)


@pytest.mark.parametrize("error", [InvalidRequest("wrong"), ServerError("down")])
def test_when_all_fail_they_fail_side_by_side(error: CallError) -> None:
    """After three failures in a row the fault is not in one request: nobody waits any more."""
    llm = caching()
    nodes = [ask(llm, f"question {i}") for i in range(64)]

    def answer(request: Request) -> Response:
        raise error.copy()

    plain, clock = VirtualClock(answer), VirtualClock(answer)
    plain.compute(nodes, on_error="return", optimize={"prefix": False})
    clock.compute([ask(llm, f"again {i}") for i in range(64)], on_error="return")

    assert len(clock.sent) == len(plain.sent)
    assert clock.now <= plain.now + 4 * (clock.sent[1][0] + 60)
    assert not clock.brain.prefixes._leading


def test_stopped_leaders_are_no_failures() -> None:
    """Three runs are stopped while theirs leads: the next run still lets one go first."""
    llm = caching()
    clock = VirtualClock(llm.answer, request_seconds=lambda request: 30.0)
    for i in range(3):
        run = clock.run([ask(llm, f"{i} {j}") for j in range(2)])
        clock.tell(float(i), ("submit", run))
        clock.tell(i + 0.5, ("stop", run, 0.0))
    last = clock.run([ask(llm, f"last {j}") for j in range(8)])
    clock.tell(5.0, ("submit", last))
    clock.drive()

    assert len([at for at, _ in clock.sent if at == 5.0]) <= 1
    assert last.count_states() == {"done": 8}


def test_equal_draws_beyond_one_request_wait_too() -> None:
    """Twelve draws of a prompt in requests of four: all are marked, and follow the leader."""
    llm = FakeBackend(profile=Profile(prompt_cache=CACHE, max_draws=4))
    nodes = [ask(llm, "one") for _ in range(12)] + [ask(llm, "two")]
    clock = VirtualClock(llm.answer)
    clock.compute(nodes)

    assert [(at, count) for at, count in sent(clock)] == [(0.0, 1), (3.0, 3)]
    assert all(request.mark for _, request in clock.sent)


def test_forgotten_prefixes() -> None:
    """Of many prefixes only so many are remembered, and none that is in use is forgotten."""
    llm = caching(replace(CACHE, minimum=1))
    clock = VirtualClock(llm.answer)
    for part in range(4):
        clock.compute(
            [ask(llm, f"{i}", shared=f"{part} {j} " * 40) for j in range(600) for i in "ab"]
        )

    assert len(clock.brain.prefixes._warmths) <= 2 * 1024
    assert clock.peak > 1


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_with_prefixes_end(seed: int) -> None:
    """Whatever fails and whoever is stopped: nobody waits for ever, and nothing is asked twice."""
    rng = random.Random(seed)
    llm = caching(replace(CACHE, lag=rng.choice([0.0, 2.0]), ttl=rng.choice([1.0, 300.0])))
    faults = rng.choice([0.0, 0.3, 0.6])
    answered: Counter[Any] = Counter()

    def answer(request: Request) -> Response:
        if rng.random() < faults:
            raise rng.choice(
                [InvalidRequest("no"), ServerError("oops"), RateLimited("slow", retry_after=1.0)]
            )
        answered.update(request.draws)
        return llm.answer(request)

    def some(name: str) -> list[Any]:
        nodes: list[Any] = []
        for i in range(rng.randint(2, 12)):
            own = rng.choice(nodes) if nodes and rng.random() < 0.4 else f"{name} {i % 5}"
            nodes.append(ask(llm, own, shared=LONG + rng.choice("ab")))
        return nodes

    clock = VirtualClock(
        answer, request_seconds=lambda request: rng.expovariate(1.0), places=4, seed=seed
    )
    runs = [clock.run(some(name), on_error="return") for name in "abc"[: rng.randint(1, 3)]]
    for run in runs:
        clock.tell(rng.uniform(0, 3), ("submit", run))
        if rng.random() < 0.3:
            clock.tell(rng.uniform(3, 8), ("stop", run, rng.choice([0.0, 1.0])))
    clock.drive()

    assert all(run.ended is not None and not run.open for run in runs)
    assert max(answered.values(), default=1) == 1
    assert all(not w.held and w.leader is None for w in clock.brain.prefixes._warmths.values())
    assert not clock.brain.prefixes._leading
