"""Tasks that return nodes: the graph grows while it runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest

import feste
from feste.delayed import FesteDelayed
from feste.errors import (
    GraphError,
    InvalidRequest,
    NodeError,
    NotStarted,
    RunFailed,
    UpstreamFailed,
)
from feste.optimization import Optimizer
from feste.plugins import registry
from feste.prompt import Prompt
from feste.scheduler.driver import driver
from feste.testing import FakeBackend, FakeParams, fresh_draws

LONG = 30.0
EMITS = pytest.mark.parametrize("emits", [True, False])


@feste.task
def increment(x: int) -> int:
    return x + 1


@feste.task
def total(*parts: Any) -> Any:
    return sum(parts)


def failed(*args: Any, **settings: Any) -> RunFailed:
    with pytest.raises(RunFailed) as caught:
        feste.compute(*args, **settings)
    return caught.value


@dataclass
class Pair:
    left: Any
    right: Any


# --- what may be returned ------------------------------------------------------------------------


@EMITS
def test_a_returned_node_is_resolved(emits: bool) -> None:
    """The value of the task is that of the node, whether or not it said that it emits."""
    choose = feste.task(emits=emits)(lambda x: increment(x) if x else "no")

    assert feste.compute(choose(1), choose(0)) == (2, "no")
    assert total(choose(1), choose(2)).compute() == 5


@EMITS
def test_containers_with_nodes_come_back_in_their_shape(emits: bool) -> None:
    """Lists, dicts, dataclasses with nodes inside are made of the values."""

    @feste.task(emits=emits)
    def builds(x: int) -> Any:
        one = increment(x)
        return [one, {"k": (one, "plain")}, Pair(one, [increment(one)])]

    assert builds(1).compute() == [2, {"k": (2, "plain")}, Pair(2, [3])]


@pytest.mark.parametrize("executor", ["thread", "inline", "process", "async"])
def test_from_everywhere_a_task_may_run(executor: Any) -> None:
    """Nodes come back from threads, from Feste's own thread, from coroutines and other processes."""

    def builds(x: int) -> Any:
        return [increment(x), total(increment(x), 5)]

    async def builds_later(x: int) -> Any:
        await asyncio.sleep(0)
        return builds(x)

    if executor == "async":
        node = feste.task(emits=True)(builds_later)(1)
    else:
        node = feste.task(emits=True, executor=executor)(builds)(1)

    assert node.compute() == [2, 7]


def test_a_chain_of_tasks_behind_an_emitter() -> None:
    """What needs the emitter waits for the nodes that it returned."""
    node: Any = feste.task(emits=True)(lambda: increment(1))()
    for _ in range(50):
        node = increment(node)

    assert node.compute() == 52


def test_many_emitters_side_by_side() -> None:
    """Each grows the graph by its own; every value is in its place."""
    emit = feste.task(emits=True)(lambda i: [increment(i), increment(-i)])

    assert feste.compute([emit(i) for i in range(1000)])[0] == [[i + 1, 1 - i] for i in range(1000)]
    assert feste.last_report().states == {"done": 3000}  # type: ignore[union-attr]


def test_five_hundred_levels_deep() -> None:
    """A node that returns a node that returns a node: no recursion, and each runs once."""
    ran: list[int] = []

    @feste.task(emits=True)
    def down(depth: int) -> Any:
        ran.append(depth)
        return total(down(depth - 1), 1) if depth else 0

    assert down(500).compute() == 500
    assert ran == list(range(500, -1, -1))


def test_a_branch_costs_only_what_it_takes() -> None:
    """Of two branches only the one that the task chose is run."""
    llm = FakeBackend(model="emits-branch")

    @feste.task(emits=True)
    def route(text: str) -> Any:
        return llm.chat("long") if len(text) > 3 else llm.chat("short")

    feste.compute(route("hello"), route("hi"))

    assert sorted(r.body["messages"][0]["content"] for r in llm.requests) == ["long", "short"]


def test_an_agent_asks_until_it_is_content() -> None:
    """A loop whose end nobody knows before: the task looks at the answer and asks again."""
    llm = FakeBackend(model="emits-agent")

    @feste.task(emits=True)
    def agent(answer: str, rounds: int) -> Any:
        return (answer, rounds) if rounds == 5 else agent(llm.chat(f"Better: {answer}"), rounds + 1)

    answer, rounds = agent(llm.chat("Begin"), 0).compute()

    assert rounds == 5 and answer.startswith("emits-agent:")
    assert len(llm.requests) == 6
    assert feste.last_report().states == {"done": 12}  # type: ignore[union-attr]


def test_map_and_reduce_over_a_list_that_the_model_made() -> None:
    """The width of the graph may depend on an answer."""
    llm = FakeBackend(model="emits-map")

    @feste.task(emits=True)
    def each(text: str) -> Any:
        return [llm.complete(f"part {c}", FakeParams(temperature=0.0)) for c in text[-8:]]

    join = feste.task("".join)

    answer = llm.chat("How many?")
    parts = each(answer)
    joined, values = feste.compute(join(parts), parts)

    assert joined == "".join(values) and len(values) == 8
    assert len(values) == len(answer.compute()[-8:])


def test_emitted_calls_are_optimized_like_any_others() -> None:
    """Calls that a task returns together share requests, and equal pure ones are merged."""
    llm = FakeBackend(model="emits-batch")
    emit = feste.task(emits=True)(
        lambda: [[llm.complete(f"{i}") for i in range(32)], [llm.embed("same") for _ in range(9)]]
    )
    texts, vectors = emit().compute()

    assert len(set(texts)) == 32 and len(vectors) == 9
    assert sorted(r.items for r in llm.requests) == [1, 16, 16]


def test_emitted_answers_are_paid_answers() -> None:
    """They stay: the emitter computed again replays its value, and a failed run loses nothing."""
    llm = FakeBackend(model="emits-keep")
    emit = feste.task(emits=True)(lambda: [llm.chat("a"), llm.chat("b")])
    node = emit()
    first = node.compute()

    assert node.compute() == first and len(llm.requests) == 2
    assert feste.last_report().states == {"kept": 1}  # type: ignore[union-attr]


# --- nodes that are known already ----------------------------------------------------------------


def test_a_returned_node_that_is_in_the_run_is_not_run_twice() -> None:
    """A task may return a node of the graph around it, waiting, running or done."""
    ran: list[str] = []
    may_end = threading.Event()

    @feste.task
    def slow() -> str:
        ran.append("slow")
        may_end.wait(LONG)
        return "slow"

    @feste.task
    def quick() -> str:
        ran.append("quick")
        return "quick"

    running, done = slow(), quick()
    waiting = feste.task(lambda x: ran.append("waiting") or x.upper())(running)

    @feste.task(emits=True)
    def emits(_: str) -> Any:
        may_end.set()
        return [running, waiting, done]

    got, *rest = feste.compute(emits(done), running, waiting, done)

    assert got == ["slow", "SLOW", "quick"] and rest == ["slow", "SLOW", "quick"]
    assert sorted(ran) == ["quick", "slow", "waiting"]


def test_inputs_of_a_known_node_are_not_run_again_for_it() -> None:
    """What a known node was made of may be gone by then: it is not needed, so it is not made anew."""
    ran: list[str] = []

    @feste.task
    def effect() -> int:
        ran.append("effect")
        return 1

    known = increment(increment(effect()))
    gone = feste.task(lambda x: x)(known)

    @feste.task(emits=True)
    def emits(_: int) -> Any:
        return known + 1

    assert feste.compute(emits(gone), known) == (4, 3)
    assert ran == ["effect"]


def test_a_returned_node_that_is_done_is_not_computed_again() -> None:
    """While a task may still return nodes, values are held for them: one node is one draw."""
    llm = FakeBackend(model="emits-gone")
    ran: list[str] = []

    @feste.task
    def shout(text: str) -> str:
        ran.append(text)
        return text.upper()

    call = llm.chat("hello")
    loud = shout(call)
    length = feste.task(len)(loud)

    @feste.task(emits=True)
    def emits(_: int) -> Any:
        return [loud, call]

    assert emits(length).compute() == [call.compute().upper(), call.compute()]
    assert len(llm.requests) == 1 and len(ran) == 1


def test_a_call_in_flight_returned_with_others_of_its_kind() -> None:
    """A batch of returned calls does not wait for one of them that is on its way already."""
    llm = FakeBackend(model="emits-flying", latency=0.02)
    flying = llm.complete("flying")

    @feste.task(emits=True)
    def emits() -> Any:
        while not llm.requests:
            pass
        return [flying, llm.complete("new"), llm.complete("newer")]

    first, got = feste.compute(flying, emits())

    assert got[0] == first and len(set(got)) == 3
    assert sorted(r.items for r in llm.requests) == [1, 2]


def test_a_grouped_call_returned_with_others_stays_in_its_group() -> None:
    """A call that waits for its batch is answered with that batch."""
    llm = FakeBackend(model="emits-group")
    returned = threading.Event()

    @feste.task
    def late() -> str:
        returned.wait(LONG)
        return "late"

    held = late()
    group = [llm.complete("early"), llm.complete("early too")]
    waits = [llm.complete(held), llm.complete(held)]

    @feste.task(emits=True)
    def emits() -> Any:
        returned.set()
        return [*waits, *group, llm.complete("new")]

    got, early, lates = feste.compute(emits(), group, waits)

    assert got[:4] == [*lates, *early]
    assert sum(r.items for r in llm.requests) == 5


def test_two_tasks_return_the_same_new_node() -> None:
    """A node that several tasks return is one node: one draw, one request."""
    llm = FakeBackend(model="emits-same")
    node = llm.chat("shared")
    emit = feste.task(emits=True)(lambda i: [node, i])

    got = feste.compute([emit(i) for i in range(20)])[0]

    assert len({text for text, _ in got}) == 1
    assert len(llm.requests) == 1


def test_a_node_of_another_run_is_joined() -> None:
    """A returned node that another run is at is waited for, not asked for again."""
    llm = FakeBackend(model="emits-joins", latency=0.05)
    node = llm.chat("shared")
    thread = threading.Thread(target=node.compute)
    thread.start()
    while not llm.requests:
        pass

    assert feste.task(emits=True)(lambda: node)().compute() == node.compute()
    thread.join(LONG)
    assert len(llm.requests) == 1


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_returned_node_that_needs_its_own_emitter_is_a_cycle() -> None:
    """It would wait for itself: an error that names the node, and no hang."""
    box: list[Any] = []

    @feste.task(emits=True)
    def loops(how: str) -> Any:
        return {"itself": box[-1], "needs": increment(box[-1]), "list": [1, total(box[-1], 1)]}[how]

    for how in ("itself", "needs", "list"):
        node = loops(how)
        box.append(node)
        error = failed(node, increment(node))

        assert isinstance(error.errors[0], GraphError)
        assert f"{node.key} returned a node that needs {node.key}" in str(error.errors[0])
        assert error.report.states["failed"] == 1


def test_two_emitters_that_need_each_other_are_a_cycle() -> None:
    """Each alone would be fine; whoever closes the circle fails, and the other with it."""
    box: dict[str, Any] = {}
    both = threading.Barrier(2)

    @feste.task(emits=True)
    def needs(name: str) -> Any:
        both.wait(LONG)
        return increment(box[name])

    box["a"] = needs("b")
    box["b"] = needs("a")
    error = failed(box["a"], box["b"])

    assert [type(e) for e in error.errors] == [GraphError]
    assert {type(p) for p in error.partial} == {GraphError, UpstreamFailed}


def test_an_emitted_node_that_fails_fails_its_emitter() -> None:
    """The emitter is poisoned, what is beside the failed node is delivered, and the report adds up."""
    llm = FakeBackend(model="emits-fail", fail={"bad": InvalidRequest("refused")})
    good = llm.chat("good")

    @feste.task(emits=True)
    def emits() -> Any:
        return [good, llm.chat("bad")]

    node = emits()
    error = failed(node, increment(node))

    assert [type(e) for e in error.errors] == [InvalidRequest]
    assert all(isinstance(p, UpstreamFailed) for p in error.partial)
    assert {p.roots for p in error.partial} == {tuple(error.errors)}
    assert sum(error.report.states.values()) == error.report.nodes == 4
    assert "test_emits.py:" in error.errors[0].origin
    assert good.compute() and len(llm.requests) == 2


def test_returning_what_has_failed_already_names_the_root() -> None:
    """A node that failed, or was skipped, before it was returned poisons the emitter at once."""

    @feste.task
    def breaks() -> int:
        raise ValueError("first")

    bad = breaks()
    skipped = increment(bad)
    over = threading.Event()
    watch = feste.task(lambda x: x)(skipped)

    class Watches:
        @feste.hookimpl
        def feste_node_finished(self, event: Any) -> None:
            if event.key == watch.key:
                over.set()

    @feste.task(emits=True)
    def late(what: str) -> Any:
        over.wait(LONG)
        return bad if what == "bad" else increment(skipped)

    part = Watches()
    registry().manager.register(part)
    try:
        error = failed(watch, late("bad"), late("skipped"))
    finally:
        registry().manager.unregister(part)

    assert [type(e) for e in error.errors] == [NodeError]
    assert [p.roots for p in error.partial] == [tuple(error.errors)] * 3


def test_stop_ends_a_growing_run() -> None:
    """With ``on_error="stop"`` nothing that a task returns afterwards is begun."""
    failed_first = threading.Event()
    ran: list[int] = []

    @feste.task
    def breaks() -> None:
        failed_first.set()
        raise ValueError("broken")

    @feste.task(emits=True)
    def emits() -> Any:
        failed_first.wait(LONG)
        while not driver().brain.runs[0].stopping:
            time.sleep(0.001)
        return feste.task(lambda: ran.append(1))()

    error = failed(emits(), breaks(), on_error="stop")

    assert ran == []
    assert isinstance(error.partial[0], NotStarted)
    assert sum(error.report.states.values()) == error.report.nodes


def test_a_pass_that_breaks_on_what_was_emitted_fails_the_emitter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiling what a task returned may raise anything; the node fails, the run does not hang."""
    honest = Optimizer.run

    def run(self: Any, graph: Any, settings: Any = None) -> Any:
        if threading.current_thread().name == "feste-grow":
            raise SystemExit("a pass that wants to end it all")
        return honest(self, graph, settings)

    monkeypatch.setattr(Optimizer, "run", run)
    error = failed(feste.task(emits=True)(lambda: increment(1))(), increment(5))

    assert "SystemExit" in str(error.errors[0]) and error.partial[1] == 6


# --- draws ---------------------------------------------------------------------------------------

PROGRAM = """if True:
    import feste
    from feste.testing import FakeBackend

    llm = FakeBackend(model="emits-draws")

    @feste.task(emits=True)
    def ask(i):
        return [llm.chat("same"), llm.chat("same"), follow(i)]

    @feste.task(emits=True)
    def follow(i):
        return llm.chat("same")

    print(*[str(x) for x in sum(feste.compute([ask(i) for i in range(3)])[0], [])], sep="\\n")
    print(llm.chat("same").compute())
"""


def run_program() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_draws_of_emitted_nodes_repeat_in_a_new_process() -> None:
    """A draw's identity comes from the program, not from the order in which threads ran."""
    first, second = run_program(), run_program()

    assert first == second and len(first) == 10


def test_draws_count_from_the_start_when_a_task_runs_again() -> None:
    """The emitting task is the scope: run again, it makes the same draws as the first time."""
    llm = FakeBackend(model="emits-again")
    seen: list[Any] = []
    fresh_draws()

    @feste.task(emits=True)
    def ask() -> Any:
        nodes = [llm.chat("same"), llm.chat("same")]
        seen.append(nodes)
        return nodes

    node = ask()
    node.compute(keep="none")
    node.compute(keep="none")

    draws = [[n._node.draw for n in nodes] for nodes in seen]
    assert draws[0] == draws[1]
    assert len({str(d) for d in draws[0]}) == 2
    assert draws[0][0].scope == node._node.draw.inner


def test_the_same_program_gives_equal_answers_with_and_without_optimizing() -> None:
    """Growing the graph does not depend on what passes do with it."""
    llm = FakeBackend(model="emits-equal")

    @feste.task(emits=True)
    def ask(text: str) -> Any:
        return [llm.complete(f"{text} {i % 3}") for i in range(9)]

    def program(**settings: Any) -> Any:
        fresh_draws()
        return feste.compute([ask(f"{i % 2}") for i in range(4)], **settings)[0]

    assert program() == program(optimize=False) == program(optimize={"batch": False})
    assert isinstance(ask("x"), FesteDelayed)


# --- returned nodes whose values are known ----------------------------------------------------------


def test_a_returned_node_that_has_its_answer_already() -> None:
    """It ends at once as it joins the run, and is held for the task all the same."""
    backend = FakeBackend()
    chat = backend.chat("c")
    known = chat.compute()

    @feste.task
    def undeclared(key: int) -> Any:
        return [chat, "x"]

    @feste.task(emits=True)
    def declared(key: int) -> Any:
        return {"it": chat, "too": Prompt("Hello {{ x }}")(x=key)}

    assert feste.compute(undeclared(1)) == ([known, "x"],)
    assert feste.compute(declared(2)) == ({"it": known, "too": "Hello 2"},)
    assert backend.complete(declared(3)["too"]).compute()
    assert len(backend.requests) == 2


def test_a_returned_prompt_of_constants() -> None:
    """It is rendered when the returned nodes are optimized, so its value is known from the start."""

    @feste.task
    def greet(name: str) -> Any:
        return Prompt("Hello {{ x }}")(x=name)

    assert feste.compute(greet("Ada")) == ("Hello Ada",)


def test_going_on_after_a_failure_keeps_the_answers_that_were_there() -> None:
    """Of three returned calls one failed; the second run has the two others, and asks once more."""
    backend = FakeBackend(fail={"bad": InvalidRequest("no")})

    @feste.task(emits=True)
    def three() -> Any:
        return [backend.chat("one"), backend.chat("bad"), backend.chat("two")]

    node = three()
    with pytest.raises(RunFailed):
        node.compute()
    backend.fail.clear()
    values = node.compute()

    assert None not in values and len(set(values)) == 3


def test_a_returned_cycle_buys_nothing() -> None:
    """What came with it cannot be used by anyone, so it is not asked for."""
    backend = FakeBackend()
    own: list[Any] = []

    @feste.task(emits=True)
    def loop() -> Any:
        return [backend.chat("1"), backend.chat("2"), increment(own[0])]

    own.append(loop())
    with pytest.raises(RunFailed, match="a cycle"):
        own[0].compute()

    assert backend.requests == []
