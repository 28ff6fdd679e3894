"""Chains of tasks become one node, and nobody can tell from what they do."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import feste
from feste import context, draw
from feste.errors import GraphError, InvalidRequest, NodeError, RunFailed, UpstreamFailed
from feste.fused import Fused, tasks_of, watched
from feste.graph import FesteGraph
from feste.optimization import FuseOptimization, Optimizer
from feste.prompt import Prompt
from feste.testing import FakeBackend, VirtualClock, fresh_draws

ran: list[Any] = []

#: How the two ways are named in `both`: they must agree.
WAYS: list[Any] = [{"fuse": True}, {"fuse": False}]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test counts what ran from zero."""
    ran.clear()
    yield
    ran.clear()


@feste.task
def note(name: str, *values: Any) -> str:
    """An effect: it writes down its name."""
    ran.append(name)
    return name + "".join(map(str, values))


@feste.task(pure=True)
def shout(text: Any) -> str:
    return str(text).upper()


@feste.task
def fail(*values: Any) -> str:
    raise ValueError("broken")


def nodes_of(*wanted: Any, **settings: Any) -> list[str]:
    """The names of the nodes that would run."""
    graph = FesteGraph.collect(*wanted)[0]
    plan = Optimizer().run(graph, context.settings(strict=True, **settings))
    return sorted(n.op.name for n in plan.graph.nodes.values())


def in_graph(node: Any) -> Fused:
    """The op that the pass makes of a node."""
    graph = FesteGraph.collect(node)[0]
    op = Optimizer().run(graph).graph.nodes[node.key].op
    assert isinstance(op, Fused)
    return op


# --- what is fused ----------------------------------------------------------------------------------


def test_a_chain_is_one_node() -> None:
    """All tasks of a chain become one, with the last one's key; the remark counts them."""
    last = note("c", shout(note("a", 1)))
    graph = FesteGraph.collect(last)[0]
    plan = Optimizer([FuseOptimization()]).run(graph)
    (node,) = plan.graph.nodes.values()
    (remark,) = plan.passes[0].remarks

    assert (node.key, node.op.name, node.draw) == (last.key, "note+shout+note", last._node.draw)
    assert (remark.text, plan.rewrites) == ("fused 3 tasks into 1", 1)
    assert feste.compute(last)[0] == "cA1" and ran == ["a", "c"]
    assert feste.last_report().states == {"done": 1}  # type: ignore[union-attr]


def test_long_names_are_shortened() -> None:
    """A name tells the first steps, the last, and how many there are."""
    value: Any = note("a")
    for _ in range(10):
        value = shout(value)
    op = in_graph(note("z", value))

    assert (op.name, op.kind) == ("note+shout+\N{HORIZONTAL ELLIPSIS}+note (12)", "task")
    assert op.determinism((), {}) is draw.Determinism.EFFECT
    assert in_graph(shout(shout(1))).determinism((), {}) is draw.Determinism.PURE


def test_each_chain_can_be_left_out() -> None:
    """The setting max_rewrites counts chains."""
    chains = [shout(shout(i)) for i in range(3)]
    names = nodes_of(chains, max_rewrites=1, optimize={"cse": False})

    assert names == ["shout", "shout", "shout", "shout", "shout+shout"]


def test_a_fused_node_is_extended() -> None:
    """If the pass runs again on what it has made, the steps are one flat list."""
    first = note("b", note("a"))
    last = note("d", note("c", first))
    graph = FesteGraph.collect(last)[0]
    one = FuseOptimization()
    half = Optimizer([one]).run(FesteGraph.collect(first)[0]).graph.nodes[first.key]
    whole = Optimizer([one]).run(graph.with_nodes([half])).graph
    steps = tasks_of(whole.nodes[last.key])

    assert [step.op.name for step in steps] == ["note"] * 4
    assert feste.compute(last)[0] == "dcba"


def test_a_fused_node_is_extended_by_what_enters_first() -> None:
    """A value that a later step needs besides comes from outside."""
    first = note("b", note("a"))
    last = note("d", note("c", first), first)

    assert nodes_of(last) == ["note+note", "note+note"]
    assert feste.compute(last)[0] == "dcbaba"


def test_eager_calls_and_unoptimized_runs_are_not_fused() -> None:
    """Without the optimizer each task is a node."""
    with context.set(eager=True):
        assert note("b", note("a")) == "ba"
    assert feste.compute(note("b", note("a")), optimize=False)[0] == "ba"
    assert feste.last_report().states == {"done": 2}  # type: ignore[union-attr]


# --- the rules --------------------------------------------------------------------------------------


def test_prompts_and_calls_stay_apart() -> None:
    """A call's inputs and its readiness stay visible."""
    llm = FakeBackend()
    text = Prompt("{{ x }}!")(x=Prompt("Say {{ x }}")(x=shout(note("a"))))
    reply = shout(shout(llm.chat(llm.chat(text))))

    assert nodes_of(reply) == ["chat", "chat", "note+shout", "prompt", "prompt", "shout+shout"]
    assert feste.compute(reply)[0].startswith("FAKE-1")


def test_known_values_are_not_computed_again() -> None:
    """A node that has its value is no step."""
    first = note("a")
    feste.compute(first, keep="all")

    assert feste.compute(note("b", first))[0] == "ba"
    assert ran == ["a", "b"]


def test_async_tasks_stay_apart() -> None:
    """They run on a loop with others."""

    @feste.task
    async def later(x: Any) -> Any:
        return f"{x}!"

    assert feste.compute(note("b", later(later(note("a")))))[0] == "ba!!"
    assert nodes_of(note("b", later(later(note("a"))))) == ["later", "later", "note", "note"]


def test_a_run_goes_on_from_what_was_paid_for() -> None:
    """A task whose nodes were bought in part does not run again, and they are not bought again."""
    llm = FakeBackend()
    broken = [True]

    @feste.task
    def check() -> str:
        if broken[0]:
            raise ValueError
        return ""

    @feste.task
    def ask() -> Any:
        ran.append("ask")
        return [llm.chat("Hi"), check()]

    last = shout(ask())
    with pytest.raises(RunFailed):
        feste.compute(last)
    broken[0] = False
    feste.compute(last)

    assert ran == ["ask"] and len(llm.requests) == 1


def test_tasks_that_return_nodes_stay_visible() -> None:
    """A batch waits for a task that is declared to return nodes."""

    @feste.task(emits=True)
    def more(x: Any) -> Any:
        return note("m", x)

    last = note("b", more(note("a")))

    assert nodes_of(last) == ["more", "note", "note"]
    assert feste.compute(last)[0] == "bma"


def test_tasks_that_run_once_are_noted(tmp_path: Path, restart: Any) -> None:
    """A store notes the start of a once=True task."""

    @feste.task(once=True)
    def mail(text: str) -> str:
        ran.append("mail")
        return text

    for _ in range(2):
        restart()
        assert feste.compute(note("b", mail(shout("a"))), store=tmp_path / "runs.db")[0] == "bA"

    assert ran == ["mail", "b", "b"]


def test_a_value_that_two_need_is_computed_once() -> None:
    """A task with two consumers is no step of either."""
    first = note("a")

    assert feste.compute(note("z", note("b", first), note("c", first)))[0] == "zbaca"
    assert sorted(ran) == ["a", "b", "c", "z"]


def test_a_value_that_one_needs_twice_is_fused() -> None:
    """The same consumer may need a value several times, in any place."""
    first = note("a")
    last = note("b", first, [first, {"k": first}], first)

    assert nodes_of(last) == ["note+note"]
    assert feste.compute(last)[0] == "ba['a', {'k': 'a'}]a"


def test_outputs_are_values() -> None:
    """A value that is asked for is no step in between."""
    first = note("a")
    second = note("b", first)

    assert feste.compute(note("c", second), first) == ("cba", "a")
    assert ran == ["a", "b", "c"]
    assert nodes_of(note("c", second), first) == ["note", "note+note"]


def test_merged_nodes_keep_what_was_paid_for() -> None:
    """A task that stands for another one gives it what it asked models for."""
    llm = FakeBackend()

    @feste.task(pure=True)
    def ask(text: str) -> Any:
        return llm.embed(text)

    one, two = ask("a"), ask("a")
    feste.compute(note("b", one, two))
    feste.compute(one, two)

    assert len(llm.requests) == 1


def test_values_are_held_for_nodes_that_a_task_returns() -> None:
    """While a task may return nodes, a value that one of them may need is no step in between."""
    first = note("a")
    second = note("b", first)

    @feste.task(emits=True)
    def more(x: Any) -> Any:
        return note("m", first)

    assert feste.compute(more(second))[0] == "ma"
    assert ran == ["a", "b", "m"]


def test_a_lost_value_is_not_computed_twice() -> None:
    """A task that returns nodes without saying so cannot use a value that has gone."""
    first = note("a")
    second = note("b", first)

    @feste.task
    def more(x: Any) -> Any:
        return note("m", first)

    with pytest.raises(RunFailed, match=r"declare the task @feste.task\(emits=True\)") as caught:
        feste.compute(more(second))
    assert isinstance(caught.value.errors[0], GraphError) and ran == ["a", "b"]


@pytest.mark.parametrize("optimize", WAYS)
def test_returned_nodes_may_share_a_task(optimize: Any) -> None:
    """What a task returns is not fused: what another one returns later may need any of it."""
    shared = note("s")

    @feste.task(emits=True)
    def one() -> Any:
        return note("a", shared)

    @feste.task(emits=True)
    def two(before: Any) -> Any:
        return note("b", shared)

    assert feste.compute(two(one()), optimize=optimize)[0] == "bs"
    assert ran == ["s", "a", "b"]


def test_tasks_run_where_they_say() -> None:
    """A task of another process is no step of a thread's."""

    @feste.task(executor="process")
    def apart(*pids: int) -> list[int]:
        return [*pids, os.getpid()]

    @feste.task
    def here(pids: list[int]) -> list[int]:
        return [*pids, os.getpid()]

    first, second = feste.compute(here(apart()))[0]
    assert (first == os.getpid(), second == os.getpid()) == (False, True)


def test_tasks_that_need_other_resources_stay_apart() -> None:
    """Steps of one node need the same of the worker that runs them, and equal ones are fused."""

    def needs(**resources: float) -> Any:
        return feste.task(resources=resources)(lambda *values: len(values))

    one, same, more = needs(GPU=1), needs(GPU=1), needs(GPU=2)
    plain = needs()

    for other in (more, plain, needs(TPU=1)):
        assert nodes_of(other(one())) == nodes_of(one(other())) == ["lambda", "lambda"]
    assert nodes_of(same(one())) == ["lambda+lambda"]
    assert in_graph(same(one())).resources == {"GPU": 1}


def test_a_task_waits_for_no_more_than_before() -> None:
    """What a consumer needs besides does not keep a task from running."""
    last = note("b", note("a"), fail())

    with pytest.raises(RunFailed):
        feste.compute(last)
    assert ran == ["a"]
    shared = note("s")
    assert nodes_of(note("c", note("b", shared), shared)) == ["note", "note+note"]


def test_all_values_are_kept() -> None:
    """With keep="all" every node gets its value."""
    first = note("a")
    feste.compute(note("b", first), keep="all")

    assert first._node.value == "a"


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimize", WAYS)
@pytest.mark.parametrize("scheduler", ["local", "process"])
def test_errors_name_the_step(optimize: Any, scheduler: str) -> None:
    """The error has the node and the line of the step; later ones do not run; all are counted."""
    where: Any = {"local": "thread", "process": "process"}[scheduler]

    @feste.task(executor=where)
    def good(x: Any) -> Any:
        return x

    @feste.task(executor=where)
    def bad(x: Any) -> Any:
        raise ValueError("broken")

    broken = bad(good(note("a")))
    last = note("c", good(broken))
    with pytest.raises(RunFailed) as caught:
        feste.compute(last, optimize=optimize)
    (error,), (partial,) = caught.value.errors, caught.value.partial
    states = caught.value.report.states

    assert isinstance(error, NodeError) and isinstance(partial, UpstreamFailed)
    assert (error.node, error.origin) == (broken.key, broken._node.where)
    assert (error.cause_type, error.message) == ("ValueError", "ValueError: broken")
    assert "in bad" in error.traceback and "feste/" not in error.traceback
    assert partial.roots == (error,) and f"{last.key} was not run" in partial.message
    assert broken.key in partial.message and ran == ["a"]
    assert states == {"done": 2, "failed": 1, "skipped": 2}


@pytest.mark.parametrize("optimize", WAYS)
def test_the_last_step_may_raise(optimize: Any) -> None:
    """The report counts the steps before it as done."""
    with pytest.raises(RunFailed) as caught:
        feste.compute(fail(note("b", note("a"))), optimize=optimize)

    assert caught.value.report.states == {"done": 2, "failed": 1}


@pytest.mark.parametrize("optimize", WAYS)
def test_errors_of_feste_keep_their_class(optimize: Any) -> None:
    """A Feste error in a step stays what it is, as SystemExit becomes a NodeError."""

    @feste.task
    def nested(x: Any) -> Any:
        return feste.compute(fail(x))

    @feste.task
    def leave(x: Any) -> Any:
        raise SystemExit(3)

    @feste.task
    def refuse(x: Any) -> Any:
        raise InvalidRequest("mine")

    @feste.task
    def translate(x: Any) -> Any:
        raise InvalidRequest("mine") from KeyError("theirs")

    for task, kind, cause in (
        (nested, RunFailed, NodeError),
        (leave, NodeError, SystemExit),
        (refuse, InvalidRequest, type(None)),
        (translate, InvalidRequest, KeyError),
    ):
        broken = task(shout("a"))
        with pytest.raises(RunFailed) as caught:
            feste.compute(shout(broken), optimize=optimize)
        assert type(caught.value.errors[0]) is kind
        assert type(caught.value.errors[0].__cause__) is cause
        assert caught.value.errors[0].origin == broken._node.where


@pytest.mark.parametrize("optimize", WAYS)
def test_a_step_that_computes_itself(optimize: Any) -> None:
    """The error says so, instead of a run inside a run without end."""
    mine: list[Any] = []

    @feste.task
    def again() -> Any:
        return shout(mine[0]).compute()

    mine.append(again())
    with pytest.raises(RunFailed, match="waits for itself: its own task computes it"):
        feste.compute(note("b", mine[0]), optimize=optimize)


@pytest.mark.parametrize("optimize", WAYS)
def test_a_step_that_computes_itself_behind_another_task(optimize: Any) -> None:
    """It is found also where the scheduler would start it together with the task before it."""
    mine: list[Any] = []

    @feste.task
    async def later() -> str:
        while not ready:
            await asyncio.sleep(0)
        return "l"

    @feste.task
    def soon() -> str:
        ready.append(True)
        return "s"

    @feste.task
    def again(*values: Any) -> Any:
        ran.append("again")
        ready.clear()
        return note("c", mine[0]).compute(optimize=optimize) if len(ran) < 9 else "deep"

    ready: list[bool] = []
    feste.compute([shout(i) for i in range(300)], optimize=False)  # so that it is known to be quick
    mine.append(note("b", again(shout(later()), soon())))
    with pytest.raises(RunFailed, match="waits for itself: its own task computes it"):
        feste.compute(note("d", mine[0]), optimize=optimize)
    assert ran == ["again"]


def test_arguments_are_checked_before_anything_runs() -> None:
    """What cannot be sent to another process is told of the step that has it."""

    @feste.task(executor="process")
    def apart(*values: Any) -> Any:
        return values

    wrong = apart(threading.Lock())
    with pytest.raises(feste.errors.ConfigError) as caught:
        feste.compute(apart(wrong))
    assert caught.value.origin == wrong._node.where


def test_a_stopped_run_starts_no_further_step() -> None:
    """on_error="stop" lets the step under way end, and starts none after it."""
    begun = threading.Event()

    @feste.task
    def slow() -> str:
        run = watched.get()
        begun.set()
        while run is not None and not run.stopping:
            os.sched_yield()
        return "s"

    @feste.task
    def soon() -> None:
        begun.wait()
        raise ValueError

    with pytest.raises(RunFailed) as caught:
        feste.compute(note("b", slow()), soon(), on_error="stop")
    assert ran == []
    assert caught.value.report.states == {"done": 1, "failed": 1, "not_started": 1}


@pytest.mark.parametrize("optimize", WAYS)
def test_nodes_that_come_after_the_stop(optimize: Any) -> None:
    """A step that returns nodes when the run stops ends the steps behind it, too."""

    @feste.task
    def more(x: Any) -> Any:
        return note("m", x)

    seconds = {"fail": 1.0}
    clock = VirtualClock(FakeBackend().answer, task_seconds=lambda t: seconds.get(t.name, 2.0))
    last = shout(shout(more(shout("x"))))
    run = clock.run(last, fail(), optimize=optimize, on_error="stop")
    clock.tell(0.0, ("submit", run))
    clock.drive()

    assert ran == [] and run.count_states()["failed"] == 1
    assert run.count_states()["not_started"] >= 3 - (optimize == WAYS[1])


def test_what_follows_a_halted_node_in_its_chunk_is_not_started() -> None:
    """Tasks that the scheduler started together stop together."""
    ready, begun, holds = threading.Event(), threading.Event(), False

    @feste.task
    async def later() -> str:
        while not ready.is_set():
            await asyncio.sleep(0)
        return "l"

    @feste.task
    def first() -> str:
        ready.set()
        return "f"

    @feste.task
    def held(x: str) -> str:
        run = watched.get()
        begun.set()
        while holds and run is not None and not run.stopping:
            os.sched_yield()
        return x

    @feste.task
    async def stop() -> str:
        while holds and not begun.is_set():
            await asyncio.sleep(0)
        if holds:
            raise ValueError("stop")
        return ""

    def program() -> Any:
        ready.clear()
        begun.clear()
        return note("c", note("b", held(later())), first()), stop()

    for _ in range(20):  # so that these tasks are known to be quick
        feste.compute(program())
    ran.clear()
    holds = True
    with pytest.raises(RunFailed, match="ValueError: stop"):
        feste.compute(program(), on_error="stop")
    assert ran == []


class Stopping:
    stopping = True


def test_a_halted_node_is_no_value_on_a_virtual_clock() -> None:
    """A chain that halts goes on where it was, and what follows it in its chunk waits for it."""
    llm = FakeBackend()
    clock = VirtualClock(llm.answer, request_seconds=lambda r: float(len(str(r.body))))
    token = watched.set(Stopping())
    try:
        for _ in range(2):  # the second time it is known that the tasks are quick
            chain = note("b", note("a", llm.chat("a long text")))
            (value,) = clock.compute(note("c", chain, llm.chat("x")))
            assert re.fullmatch("cba(fake-1.*){2}", value)
    finally:
        watched.reset(token)
    assert ran == ["a", "b", "c"] * 2


# --- nodes that steps return ------------------------------------------------------------------------


def emitting(where: Any, llm: FakeBackend) -> Any:
    """A chain whose second step returns nodes, with what it made."""

    @feste.task(executor=where)
    def good(x: Any) -> Any:
        return x

    @feste.task(executor=where)
    def ask(x: Any) -> Any:
        return {"said": [llm.chat(f"Hi {x}"), llm.chat(f"Hi {x}")], "x": x}

    @feste.task(executor=where)
    def count(said: Any) -> Any:
        return [str(s) for s in said["said"]] + [said["x"]]

    asked = ask(good("a"))
    return asked, good(count(asked))


@pytest.mark.parametrize("where", ["thread", "process", "inline"])
def test_steps_may_return_nodes(where: str) -> None:
    """The steps after it run when the nodes have values; draws and kept values are the same."""
    results = []
    for optimize in WAYS:
        fresh_draws()
        llm = FakeBackend()
        asked, last = emitting(where, llm)
        (value,) = feste.compute(last, optimize=optimize)
        again = feste.compute(last, asked, optimize=optimize)
        kept = (asked._node.value is not feste.node.PENDING, last._node.value)
        results.append((value, again, kept, asked._node.draw))
        assert not feste.last_report().requests  # type: ignore[union-attr]

    assert results[0] == results[1]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_any_step_may_return_nodes(at: int) -> None:
    """The first, one in between, and the last."""
    for optimize in WAYS:

        @feste.task
        def step(x: Any, number: int) -> Any:
            return note(f"n{number}", x) if number == at else f"{x}{number}"

        last = step(step(step("x", 0), 1), 2)
        assert feste.compute(last, optimize=optimize)[0] == ["n0x12", "n1x02", "n2x01"][at]


@pytest.mark.parametrize("optimize", WAYS)
def test_several_steps_may_return_nodes(optimize: Any) -> None:
    """What is left of a fused node may be taken apart again, also behind an error."""

    @feste.task
    def more(x: Any) -> Any:
        return note("m", x)

    assert feste.compute(shout(more(more(more("x")))), optimize=optimize)[0] == "MMMX"
    broken = fail(more("y"))
    with pytest.raises(RunFailed) as caught:
        feste.compute(more(broken), optimize=optimize)
    assert caught.value.errors[0].origin == broken._node.where


def test_a_node_is_taken_apart_once() -> None:
    """What is left of a long chain is what it is without fusion, so its cost does not add up."""

    @feste.task
    def more(x: Any) -> Any:
        return shout(x)

    sizes = []
    for optimize in WAYS:
        value: Any = Prompt("{{ x }}")(x=note("x"))
        for _ in range(40):
            value = more(value)
        clock = VirtualClock(FakeBackend().answer)
        run = clock.run(value, optimize=optimize)
        clock.tell(0.0, ("submit", run))
        clock.drive()
        assert run.results() == ["X"] and sum(run.gone) == len(run.gone) - 1
        program = run.program
        names = [node.op.name for node in program.nodes]
        ranks = [r for r, n in zip(program.rank, names, strict=True) if n == "repack"]
        edges = sum(map(len, program.deps))
        sizes.append((sorted(names), sorted(ranks), edges, run.count_states()))
        assert len(clock.brain.dispatcher.cost) <= 6

    assert sizes[0] == sizes[1]


def test_steps_that_ran_are_not_held_for_what_tasks_return() -> None:
    """Their values are gone, also while another task may return nodes."""

    @feste.task(emits=True)
    def wait() -> str:
        return "w"

    @feste.task
    def start() -> Any:
        return wait()

    first = note("a")

    @feste.task
    def more(x: Any) -> Any:
        return note("m", first)

    seconds = {"wait": 100.0, "start": 0.0}
    clock = VirtualClock(FakeBackend().answer, task_seconds=lambda t: seconds.get(t.name, 10.0))
    started, failed = clock.compute(start(), note("c", more(first)))

    assert started == "w" and ran == ["a"]
    assert isinstance(failed, UpstreamFailed) and isinstance(failed.roots[0], GraphError)


def test_what_is_left_has_ended_for_other_runs_too() -> None:
    """A node that was taken apart is not in flight for ever: another run does not wait for it."""
    broken = [True]

    @feste.task
    def once_broken() -> Any:
        if broken.pop():
            broken.append(False)
            raise ValueError("broken")
        return "a"

    last = shout(once_broken())
    with pytest.raises(RunFailed):
        feste.compute(last)
    assert feste.compute(last) == ("A",)


# --- draws ------------------------------------------------------------------------------------------


def scopes(optimize: Any) -> Any:
    """What calls inside steps draw: computed ones, and the returned ones after these."""
    fresh_draws()
    llm = FakeBackend()
    drawn: list[Any] = []

    @feste.task
    def step(x: Any) -> Any:
        made = [llm.chat("Hi"), llm.chat("Hi")]
        feste.compute(made)
        later = llm.chat("Hi")
        drawn.append((draw.scope(), [m._node.draw for m in made], later))
        return later

    value = feste.compute(step(step(step("x"))), optimize=optimize)[0]
    return str(value), [(scope, made, later._node.draw) for scope, made, later in drawn]


def test_calls_inside_steps_have_their_own_draws() -> None:
    """Each step is a scope; the counts go on in the nodes that it returns."""
    fused, plain = map(scopes, WAYS)

    assert fused == plain
    assert len({scope for scope, _, _ in fused[1]}) == 3
    assert [later.n for _, _, later in fused[1]] == [2, 2, 2]


def test_steps_do_not_see_each_others_context() -> None:
    """A context variable that one step sets is not set in the next."""

    @feste.task
    def step(seen: list[bool]) -> list[bool]:
        before = context.get("keep") == "none"
        context.set(keep="none").__enter__()
        return [*seen, before]

    assert feste.compute(step(step(step([]))))[0] == [False, False, False]


def test_steps_may_change_their_arguments() -> None:
    """Constants are copied for each step, so that a second run has them as they were."""

    @feste.task
    def grow(items: list[int], value: int) -> int:
        items.append(value)
        return len(items)

    last = grow([1, 2], grow([1], 0))

    assert feste.compute(last) == feste.compute(last) == (3,)


# --- Dask -------------------------------------------------------------------------------------------


def planned(node: Any) -> tuple[dict[str, Any], str]:
    graph = FesteGraph.collect(node)[0]
    plan = Optimizer().run(graph)
    assert any(type(n.op) is Fused for n in plan.graph.nodes.values())
    return dict(plan.graph), node.key


def test_dask_runs_fused_nodes() -> None:
    """A plain get gives the same values, also after the graph was pickled."""
    asked, last = emitting("thread", FakeBackend())
    dsk, key = planned(last)
    value = dask.get(dsk, key)
    chain = shout([feste.task(len)(shout("abc") + "def")])
    copied = pickle.loads(pickle.dumps(planned(chain)[0]))

    assert (len(value), value[2]) == (3, "a")
    assert dask.get(copied, chain.key) == "[6]"
    assert dask.compute(chain)[0] == feste.compute(chain, scheduler=dask.get)[0] == "[6]"
    assert feste.compute(asked)[0]["said"] == value[:2]


def test_dask_gets_the_steps_own_exception() -> None:
    """As without fusion, a plain get raises what the function raised."""
    dsk, key = planned(shout(fail(shout("a"))))

    with pytest.raises(ValueError, match="broken"):
        dask.get(dsk, key)


def test_draws_are_the_same_in_dask() -> None:
    """Calls inside steps, computed and returned, draw the same under a plain get."""
    results = []
    for optimize in WAYS:
        fresh_draws()
        llm = FakeBackend()
        made: list[Any] = []

        @feste.task
        def step(x: Any, llm: Any = llm, made: Any = made) -> Any:
            both = [llm.chat("Hi"), llm.chat("Hi")]
            feste.compute(both[0])
            made.extend(both)
            return both[1]

        feste.compute(step(step("x")), scheduler=dask.get, optimize=optimize)
        results.append([m._node.draw for m in made])

    assert results[0] == results[1] and len(set(results[0])) == 4


# --- any program ------------------------------------------------------------------------------------


@feste.task(pure=True)
def join(*values: Any) -> list[Any]:
    values[0].append("changed") if values and isinstance(values[0], list) else None
    return [*map(repr, values)]


@feste.task
def maybe(text: Any, broken: bool) -> Any:
    ran.append(repr(text)[:30])
    if broken:
        raise ValueError("broken")
    return text


LINES = st.lists(
    st.tuples(
        st.sampled_from(["join", "note", "maybe", "fail", "emit", "add"]),
        st.lists(st.integers(0, 3), min_size=1, max_size=3),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=12,
)


@feste.task
def emit(x: Any) -> Any:
    return [note("e", x), 1]


def build(lines: list[Any], wanted: list[int]) -> list[Any]:
    """A program of tasks, whose inputs are mostly the last one's."""
    made: list[Any] = [shout("start")]
    for kind, inputs, constant in lines:
        given = [made[max(0, len(made) - 1 - i)] for i in inputs]
        if kind == "join":
            made.append(join([constant, given[0]], *given))
        elif kind == "note":
            made.append(note(str(constant), *given))
        elif kind == "maybe":
            made.append(maybe(given[0], constant == 0 and len(inputs) == 3))
        elif kind == "fail":
            made.append(fail(*given) if inputs == [0, 0, 0] else shout(given[0]))
        elif kind == "emit":
            made.append(emit(given[0]))
        else:
            made.append(shout(given[0]) + "+")
    return [made[min(i, len(made) - 1)] for i in wanted] + [made[-1]]


def outcome(lines: list[Any], wanted: list[int], optimize: Any) -> Any:
    """Values, errors and effects; the errors without the numbers of the nodes."""
    fresh_draws()
    ran.clear()
    values = feste.compute(build(lines, wanted), on_error="return", optimize=optimize)[0]
    told = [
        (type(v).__name__, re.sub(r"-[0-9a-f]{8}-\d+", "", str(v)), [str(r) for r in v.roots])
        if isinstance(v, UpstreamFailed)
        else (type(v).__name__, str(v))
        for v in values
    ]
    return told, sorted(ran)


@examples(max_examples=80, deadline=None)
@given(LINES, st.lists(st.integers(0, 12), max_size=2))
def test_any_program_does_the_same(lines: list[Any], wanted: list[int]) -> None:
    """Values, errors, places and effects are the same with and without the pass."""
    assert outcome(lines, wanted, {"fuse": True}) == outcome(lines, wanted, {"fuse": False})


def test_a_step_that_a_returned_node_needs_before_it_has_begun() -> None:
    """The chain still waits for a call: it is taken apart, and its step runs once for both."""
    llm, ran = FakeBackend(), list[str]()

    @feste.task
    def clean(text: str) -> str:
        ran.append("clean")
        return text.strip()

    @feste.task
    def up(text: str) -> str:
        return text.upper()

    cleaned = clean(llm.chat("q"))
    first = up(cleaned)

    @feste.task
    def helper() -> Any:
        return up(cleaned)

    clock = VirtualClock(llm.answer)
    values = clock.compute([first, helper()])

    assert values[0] == values[1] == values[0].upper()
    assert ran == ["clean"]
