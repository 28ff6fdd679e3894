"""What a plan will take: tokens, requests, dollars, seconds; and priorities by latency."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Latency, Limits, Price, Profile, PromptCache
from feste.errors import GraphError
from feste.graph import FesteGraph, Prefix
from feste.optimization import CriticalPathOptimization, Optimizer, PassContext
from feste.optimization.analysis.estimates import Estimates
from feste.optimization.analysis.forming import fewest_requests
from feste.optimization.analysis.paths import Paths
from feste.optimization.analysis.ranges import Range, total
from feste.prompt import Prompt
from feste.scheduler.program import Program
from feste.testing import FakeBackend, FakeParams


def known(limits: Limits | None = None, **about: Any) -> FakeBackend:
    """A backend of which something is known beforehand."""
    return FakeBackend("k-1", limits=limits, profile=Profile(**about))


@feste.task
def passed(value: Any) -> Any:
    return value


@feste.task
def said(values: list[Any]) -> str:
    return f"{len(values)} answers"


@feste.task
def load() -> str:
    return "text"


def estimates_of(*nodes: Any, prefixes: Sequence[Prefix] = ()) -> Estimates:
    graph, _, _ = FesteGraph.collect(*nodes)
    plan = Optimizer().run(graph)
    return Estimates(plan.graph.replace(prefixes=prefixes), plan.sketches)


def tokens_of(node: Any) -> tuple[Range, Range]:
    estimate = estimates_of(node).calls[node.key]
    return estimate.input, estimate.output


# --- tokens -----------------------------------------------------------------------------------------


def test_a_known_prompt_has_as_many_tokens_as_its_request() -> None:
    """Those that the request counts itself; at worst each byte of it is one, as a budget reserves."""
    llm = FakeBackend()
    node = llm.complete("some words of a prompt", FakeParams(max_tokens=64))
    node.compute()
    again = llm.complete("some words of a prompt", FakeParams(max_tokens=64))

    (sent,) = llm.requests
    assert tokens_of(again) == (Range(sent.tokens, sent.tokens, sent.size), Range(1, 32, 64))


def test_an_answer_without_a_bound() -> None:
    """Its worst is not known; a likely length is assumed."""
    assert tokens_of(FakeBackend().complete("Hi"))[1] == Range(1, 256, None)


def test_an_embedding_generates_nothing() -> None:
    """Not even one token: it costs no output."""
    assert tokens_of(FakeBackend().embed("Hi"))[1] == Range(0, 0, 0)


def test_an_unknown_prompt_is_what_its_inputs_make_of_it() -> None:
    """At least what is known; likely and worst add what the call before may say."""
    llm = FakeBackend()
    first = llm.complete("Hi", FakeParams(max_tokens=64))
    through = Prompt("{{ x }}")(x=passed(first))

    rest = tokens_of(llm.complete(""))[0].worst
    assert tokens_of(llm.complete(first))[0] == Range(1, 33, (rest or 0) + 64)
    assert tokens_of(llm.complete(through))[0] == Range(1, 33, None)


def test_what_cannot_be_prepared_has_no_tokens() -> None:
    """It is not known what it would have read; an unknown value may be right in the run."""
    wrong: Any = [{"role": "user", "content": float("nan")}]
    llm = FakeBackend()
    hidden: Any = [load()]  # it may return a message

    assert tokens_of(llm.chat(wrong))[0] == Range.of(None)
    assert [c.error for c in estimates_of(llm.chat(hidden)).calls.values()] == [""]


def test_what_a_task_loads_is_not_guessed() -> None:
    """A task without inputs returns any amount of text, and so does one that may return calls."""

    @feste.task(emits=True)
    def agent(value: Any) -> Any:
        return value

    llm = FakeBackend()

    assert tokens_of(llm.complete(load()))[0] == Range(1, None, None)
    assert tokens_of(llm.complete(agent(llm.complete("Hi"))))[0] == Range(1, None, None)


def test_a_variable_used_twice_counts_twice_at_worst() -> None:
    """A request holds a mark for each place of an unknown text."""
    llm = FakeBackend()
    first = llm.chat("Hi", FakeParams(max_tokens=10))
    messages: Any = [{"role": "user", "content": first}, {"role": "user", "content": first}]

    empty: Any = [{"role": "user", "content": ""}] * 2
    rest = tokens_of(llm.chat(empty))[0].worst
    assert tokens_of(llm.chat(messages))[0] == Range(3, 8, (rest or 0) + 20)


def test_equal_draws_pay_their_prompt_once() -> None:
    """Several answers to one prompt: the first call has the prompt, the others only answers."""
    llm = FakeBackend()
    nodes = [llm.chat("some words", FakeParams(max_tokens=4)) for _ in range(3)]
    estimates = estimates_of(nodes)

    assert [estimates.calls[n.key].input.low for n in nodes] == [4, 0, 0]
    assert total(e.output for e in estimates.calls.values()) == Range(3, 6, 12)


# --- requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_requests_of_a_plan_are_those_that_are_sent(seed: int) -> None:
    """Random graphs in which what could be batched is ready at once: as many, of the same sizes."""
    rng = random.Random(seed)
    llm = FakeBackend(limits=Limits(max_items=rng.choice([None, 1, 3, 7])))
    some = [FakeParams(), FakeParams(max_tokens=5), FakeParams(temperature=0), FakeParams(seed=1)]
    nodes: list[Any] = []
    for stage in range(rng.randrange(1, 4)):
        before = nodes[0] if nodes else None
        for _ in range(rng.randrange(1, 40)):
            text = before if stage else f"{rng.randrange(20)} " + "word " * rng.randrange(20)
            step = rng.choice([llm.complete, llm.chat, llm.embed])
            nodes.append(step(text, rng.choice(some)))
        nodes = [said(nodes)]
    graph, _, _ = FesteGraph.collect(nodes)
    plan = Optimizer().run(graph)
    estimates = Estimates(plan.graph, plan.sketches)
    by_row: dict[Any, list[Any]] = {}
    for call in estimates.calls.values():
        by_row.setdefault(call.node.op.name, []).append(call.node)
    least = sum(fewest_requests(plan.graph, some) for some in by_row.values())
    feste.compute(nodes, on_error="return")

    sizes = sorted(request.items for request in llm.requests)
    assert sizes == sorted(len(request.calls) for request in estimates.requests)
    assert least <= len(sizes)


def test_the_bound_counts_equal_draws_once() -> None:
    """With lists, by items; without, by the number of answers that one request may give."""
    few = known(max_draws=4)
    llm = FakeBackend()
    chats = [few.chat("Hi") for _ in range(10)]
    texts = [llm.complete(f"{i % 17}") for i in range(170)]
    graph, _, _ = FesteGraph.collect(chats, texts)

    def nodes(those: list[Any]) -> list[Any]:
        return [graph.nodes[n.key] for n in those]

    assert fewest_requests(graph, nodes(chats)) == 3
    assert fewest_requests(graph, nodes(texts)) == 2
    estimates = estimates_of(chats, texts)
    assert sorted(len(r.calls) for r in estimates.requests) == [3, 3, 4, 80, 90]


def test_calls_with_other_parameters_or_a_seed_share_no_request() -> None:
    """The bound knows it, as the plan does."""
    llm = FakeBackend()
    nodes = [llm.complete(str(i), FakeParams(max_tokens=1 + i % 2)) for i in range(6)]
    nodes += [llm.complete(str(i), FakeParams(seed=1)) for i in range(3)]
    graph, _, _ = FesteGraph.collect(nodes)

    assert fewest_requests(graph, graph.calls()) == len(estimates_of(nodes).requests) == 5


# --- dollars ----------------------------------------------------------------------------------------


def test_dollars_are_the_price_of_the_tokens() -> None:
    """Low, likely and worst of the tokens; the worst of an answer without a bound is not known."""
    llm = known(price=Price(input=1e6, output=2e6))
    bound, free = llm.chat("Hi you", FakeParams(max_tokens=10)), llm.chat("Hi you")
    calls = estimates_of(bound, free).calls

    most = calls[bound.key].input.worst or 0
    assert calls[bound.key].dollars == Range(3 + 2, 3 + 10, most + 20)
    assert calls[free.key].dollars == Range(3 + 2, 3 + 512, None)


def test_an_unknown_price_is_not_zero() -> None:
    """It stays unknown, and the call is not priced."""
    node = FakeBackend().chat("Hi")
    (call,) = estimates_of(node).calls.values()

    assert (call.dollars, call.is_priced) == (Range(None, None, None), False)


def test_what_a_model_only_reads_has_a_price_without_a_bound_of_output() -> None:
    """Output that costs nothing needs no bound."""
    llm = known(price=Price(input=1e6))

    call = estimates_of(llm.chat("Hi")).calls.popitem()[1]
    assert call.dollars == call.input != Range.of(None)


def test_a_shared_prefix_is_written_once_and_read_by_the_others() -> None:
    """By the factors of the cache; at worst, all come too early and pay for writing it."""
    llm = known(price=Price(input=1e6), prompt_cache=PromptCache(minimum=1, write=1.25, read=0.1))
    nodes = [llm.chat("x" * 400 + str(i)) for i in range(3)]
    prefix = Prefix(tuple(n.key for n in nodes), "d", 80)
    calls = [estimates_of(nodes, prefixes=[prefix]).calls[n.key] for n in nodes]

    assert [(c.cached, c.written) for c in calls] == [(0, 80), (80, 0), (80, 0)]
    whole = calls[0].input.likely or 0
    assert calls[0].dollars.likely == pytest.approx(whole + 0.25 * 80)
    assert calls[1].dollars.likely == pytest.approx(whole - 0.9 * 80)
    assert calls[1].dollars.worst == pytest.approx(1.25 * (calls[1].input.worst or 0))


def test_calls_that_do_not_wait_for_each_other_read_the_cache_by_luck() -> None:
    """The lowest price counts it, the likely one does not."""
    llm = known(price=Price(input=1e6), prompt_cache=PromptCache(minimum=1, read=0.1))
    nodes = [llm.chat("x" * 400 + str(i)) for i in range(2)]
    prefix = Prefix(tuple(n.key for n in nodes), "d", 80, waits=False)
    call = estimates_of(nodes, prefixes=[prefix]).calls[nodes[1].key]

    whole = call.input.likely or 0
    assert (call.cached, call.dollars.likely) == (0, whole)
    assert call.dollars.low == pytest.approx(whole - 72)


def test_the_prices_of_the_cache_go_before_its_factors() -> None:
    """Where a price list names them."""
    price = Price(input=1e6, cached=0.5e6)
    llm = known(price=price, prompt_cache=PromptCache(read=0.1))
    nodes = [llm.chat("x" * 400 + str(i)) for i in range(2)]
    prefix = Prefix(tuple(n.key for n in nodes), "d", 80)
    call = estimates_of(nodes, prefixes=[prefix]).calls[nodes[1].key]

    assert call.dollars.likely == pytest.approx((call.input.likely or 0) - 40)


# --- time -------------------------------------------------------------------------------------------


def test_the_run_takes_as_long_as_its_longest_path() -> None:
    """Requests side by side take the time of the longest; those behind each other add up."""
    llm = known(latency=Latency(base=1.0, token=0.1))
    short, long = FakeParams(max_tokens=2), FakeParams(max_tokens=20)
    first = llm.chat("a", long)
    second = llm.chat(first, short)
    estimates = estimates_of(second, llm.chat("b", short))

    assert estimates.seconds == pytest.approx((1.1 + 1.1, 2.0 + 1.1, 3.0 + 1.2))
    assert estimates.depth == 2
    assert [n and n.key for n, _ in estimates.critical_path] == [first.key, second.key]


def test_calls_of_a_list_take_as_long_as_its_longest_answer() -> None:
    """A request has a time for each item, and ends with its last answer."""
    llm = known(latency=Latency(base=1.0, item=0.5, token=0.1))
    nodes = [llm.complete(str(i), FakeParams(max_tokens=10)) for i in range(4)]
    (request,) = estimates_of(nodes).requests

    assert request.seconds == pytest.approx((3.1, 3.5, 4.0))


def test_a_limit_of_concurrency_makes_it_longer() -> None:
    """Ten requests of a second, two at a time."""
    llm = known(limits=Limits(concurrency=2), latency=Latency(base=1.0))

    assert estimates_of([llm.chat(str(i)) for i in range(10)]).seconds == Range.of(5.0)


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        (Limits(requests_per_minute=30), 18.0),  # one every two seconds, the first at once
        (Limits(requests_per_minute=6000), 1.0),
        (Limits(concurrency=2, requests_per_minute=6000), 5.0),
        (Limits(tokens_per_minute=120), 25.0),  # 5 tokens a call, 3 of them generated
    ],
)
def test_limits_by_the_minute_make_it_longer(limits: Limits, seconds: float) -> None:
    llm = known(limits=limits, latency=Latency(base=1.0))
    nodes = [llm.chat(f"{i}", FakeParams(max_tokens=6)) for i in range(10)]

    assert estimates_of(nodes).seconds.likely == pytest.approx(seconds)


def test_a_limit_of_unknown_tokens_makes_the_time_unknown() -> None:
    llm = known(limits=Limits(tokens_per_minute=120), latency=Latency(base=1.0))

    assert estimates_of([llm.chat("no bound")]).seconds.worst is None


def sharing(count: int, **about: Any) -> list[Any]:
    """Calls of a second each that begin alike."""
    llm = known(latency=Latency(base=1.0), **about)
    return [llm.chat("x" * 400 + str(i)) for i in range(count)]


def prefix_of(nodes: list[Any], *, waits: bool = True, lag: float = 2.0) -> Prefix:
    return Prefix(tuple(n.key for n in nodes), "d", 80, waits=waits, lag=lag)


def test_the_others_wait_for_the_one_that_writes_their_prefix() -> None:
    """Its request and the time that the cache takes come first; at best it is cached already."""
    nodes = sharing(3)
    waiting = estimates_of(nodes, prefixes=[prefix_of(nodes)])
    hasty = estimates_of(nodes, prefixes=[prefix_of(nodes, waits=False)])
    path = [(n and n.key, seconds) for n, seconds in waiting.critical_path]

    assert waiting.seconds == waiting.path_seconds == Range(1.0, 1.0 + 2.0 + 1.0, 4.0)
    assert (hasty.seconds, waiting.depth, hasty.depth) == (Range.of(1.0), 2, 1)
    assert path[:2] == [(nodes[0].key, 1.0), (None, 2.0)] and len(path) == 3
    assert [waiting.slack[n.key] for n in nodes] == [0.0, 0.0, 0.0]
    side = nodes[0]._node.call.client.chat("b")
    assert estimates_of(nodes, side, prefixes=[prefix_of(nodes)]).slack[side.key] == 3.0


def test_a_call_that_comes_late_finds_its_prefix_written() -> None:
    """The one that is ready first writes it; a chain whose calls begin alike waits once."""
    llm = known(latency=Latency(base=1.0))
    chain = [llm.chat("start")]
    for _ in range(4):
        chain.append(llm.chat(chain[-1]))

    assert estimates_of(chain[-1], prefixes=[prefix_of(chain, lag=0.5)]).seconds.likely == 5.5
    assert estimates_of(chain[-1], prefixes=[prefix_of(chain[::2], lag=0.5)]).seconds.likely == 5.0
    assert estimates_of(chain[-1], prefixes=[prefix_of(chain[::-1])]).seconds.likely == 7.0


def test_the_call_that_is_ready_first_writes_the_prefix() -> None:
    """Whichever was made first; with equals, of all prefixes the same one, so that none waits twice."""
    llm = known(latency=Latency(base=1.0))
    late, early = llm.chat(llm.chat("a")), llm.chat("b")
    turned = [prefix_of([late, early]), prefix_of([early, late], lag=1.0)]

    assert estimates_of(late, early, prefixes=turned[:1]).seconds.likely == 1.0 + 2.0 + 1.0
    one, two = llm.chat("c"), llm.chat("d")
    both = [prefix_of([one, two]), prefix_of([two, one])]
    assert estimates_of(one, two, prefixes=both).seconds.likely == 1.0 + 2.0 + 1.0


def test_only_prefixes_that_wait_take_time() -> None:
    """Beside those that do not."""
    nodes = sharing(4)
    prefixes = [prefix_of(nodes[:2]), prefix_of(nodes, waits=False, lag=9.0)]

    assert estimates_of(nodes, prefixes=prefixes).seconds.likely == 4.0


def test_a_prefix_inside_another_one_is_waited_for_as_well() -> None:
    """One call writes the outer one, then another the inner one."""
    nodes = sharing(5)
    inner = Prefix(tuple(n.key for n in nodes[2:]), "e", 90, lag=1.0)

    assert estimates_of(nodes, prefixes=[prefix_of(nodes), inner]).seconds.likely == 3.0 + 2.0 + 1.0


def test_answers_to_one_prompt_do_not_wait_for_each_other() -> None:
    """Equal draws are one request."""
    llm = known(latency=Latency(base=1.0))
    nodes = [llm.chat("some words") for _ in range(3)]

    assert estimates_of(nodes, prefixes=[prefix_of(nodes)]).seconds == Range.of(1.0)


def test_a_gate_is_idle_while_all_wait_for_a_prefix() -> None:
    """Not where other requests go through it meanwhile."""
    nodes = sharing(10, limits=Limits(concurrency=1))
    prefix = prefix_of(nodes)
    client = nodes[0]._node.call.client

    assert estimates_of(nodes, prefixes=[prefix]).seconds == Range(10.0, 12.0, 12.0)
    assert estimates_of(nodes, client.chat("b"), prefixes=[prefix]).seconds == Range.of(11.0)


def test_an_unknown_latency_makes_no_time() -> None:
    """But the depth is known: how many requests wait for each other."""
    llm = FakeBackend()
    estimates = estimates_of(llm.chat(known(latency=Latency(base=1.0)).chat("a")))

    assert (estimates.seconds, estimates.depth) == (Range(None, None, None), 2)


def test_slack_is_what_a_node_may_be_late() -> None:
    """None on the longest path."""
    llm = known(latency=Latency(base=1.0))
    first, side = llm.chat("a"), llm.chat("b")
    last = llm.chat(passed([llm.chat(first), side]))
    slack = estimates_of(last).slack

    assert (slack[first.key], slack[last.key]) == (0.0, 0.0)
    assert slack[side.key] == pytest.approx(1.0)


def test_nothing_to_do_takes_nothing() -> None:
    """An empty plan, and one of which all is answered."""
    llm = FakeBackend()
    node = llm.chat("a")
    node.compute()

    for estimates in (estimates_of(), estimates_of(node)):
        assert (estimates.seconds, estimates.depth, estimates.requests) == (Range.of(0.0), 0, [])


# --- paths and priorities ---------------------------------------------------------------------------


def test_a_chain_of_ten_thousand_calls_is_walked_without_recursion() -> None:
    """Each call needs the one before."""
    llm = FakeBackend()
    node = llm.chat("start")
    for _ in range(9_999):
        node = llm.chat(node)
    estimates = estimates_of(node)

    assert (estimates.depth, len(estimates.critical_path)) == (10_000, 10_000)


def test_nodes_need_not_stand_in_order() -> None:
    """A pass may put them in any; a cycle or a missing input is named."""
    llm = FakeBackend()
    first = llm.chat("a")
    second = llm.chat(first)
    graph, _, _ = FesteGraph.collect(second)
    turned = FesteGraph(dict(reversed(graph.nodes.items())), graph.outputs)

    assert Paths(turned).ends([1, 1]) == [2, 1]
    with pytest.raises(GraphError, match="not in the graph"):
        Paths(FesteGraph({second.key: graph.nodes[second.key]}, graph.outputs))
    with pytest.raises(GraphError, match="cycle"):
        Paths(FesteGraph(graph.nodes, graph.outputs, {first.key: second.key}))


def ranks_of(*nodes: Any) -> dict[str, int]:
    graph, _, _ = FesteGraph.collect(*nodes)
    return Optimizer().run(graph).graph.ranks


def test_ranks_are_milliseconds_to_the_end() -> None:
    """What a node and all behind it take, and one for each step; a known answer takes nothing."""
    llm = known(latency=Latency(base=0.2, token=0.01))
    slow, quick = FakeParams(max_tokens=100), FakeParams(max_tokens=2)
    first, other = llm.chat("a", quick), llm.chat("b", slow)
    last = llm.chat(passed([first, other]), quick)
    ranks = ranks_of(last)

    assert ranks[last.key] == 211
    assert ranks[first.key] == 211 + 2 + 211
    assert ranks[other.key] == 211 + 2 + 701
    program = Program(Optimizer().run(FesteGraph.collect(last)[0]).graph)
    assert dict(zip(ranks, program.rank, strict=True)) == ranks


def test_without_latency_the_scheduler_counts_steps() -> None:
    """The pass leaves the graph as it is."""
    graph, _, _ = FesteGraph.collect(FakeBackend().chat(load()))

    assert CriticalPathOptimization().apply(graph, PassContext(context.settings())) is graph


def test_the_longer_request_is_sent_first() -> None:
    """With one request at a time, the order is that of the ranks, not of the program."""
    llm = known(limits=Limits(concurrency=1), latency=Latency(base=0.1, token=0.01))
    bounds = [5, 500, 50, 5000]
    feste.compute([llm.chat(f"{bound}", FakeParams(max_tokens=bound)) for bound in bounds])

    sent = [request.body["max_tokens"] for request in llm.requests]
    assert sent[1:] == sorted(sent[1:], reverse=True)  # the first one found an open gate


def test_cutting_off_rewrites_cuts_off_ranks() -> None:
    """The setting ``max_rewrites`` finds a plan that does harm, whichever pass made it."""
    node = known(latency=Latency(base=1.0)).chat("a")
    graph, _, _ = FesteGraph.collect(node)

    with context.set(max_rewrites=0):
        assert Optimizer().run(graph).graph.ranks == {}
