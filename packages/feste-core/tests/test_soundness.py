"""Optimizing changes nothing but requests: shown on random graphs, and by breaking each of its rules.

What must be equal is worked out from the runs alone, by ``feste.testing.differences``; no rule of the
optimizer is asked. The long form is ``benchmarks/soundness.py``.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, optimization
from feste.backend import Limits, Reply
from feste.errors import PluginError, PluginWarning
from feste.graph import Batch, FesteGraph
from feste.optimization import Level, Optimizer, rules
from feste.prompt import FesteEnvironment, Prompt
from feste.testing import (
    FakeBackend,
    FakeParams,
    differences,
    random_graph,
)
from feste.testing.odd_backend import OddBackend
from feste.testing.soundness import any_optimizer

GRAPHS, PARTS = 2_000, 8
GREEDY = FakeParams(temperature=0)


@feste.task(pure=True)
def same(value: Any) -> Any:
    return value


@feste.task(pure=True)
def in_order(*texts: str) -> Any:
    return sorted(texts)


@feste.task
def effect(value: Any) -> Any:
    return value


@feste.task
def returns_a_call(llm: FakeBackend, text: str) -> Any:
    return llm.complete(text)


ask = Prompt("Say {{ x }}")

# --- random graphs --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(PARTS))
def test_any_passes_in_any_order_change_nothing_but_requests(part: int) -> None:
    """Answers, errors, effects and calls are those of the run without optimizations."""
    for seed in range(part, GRAPHS, PARTS):
        passes, settings = any_optimizer(seed)

        assert differences(partial(random_graph, seed), passes, **settings) == [], seed


# --- each rule is needed --------------------------------------------------------------------------

#: What each rule says when it forbids nothing: a predicate its permissive answer, a key a constant;
#: or a function, where one answer for all nodes would only make a pass fail.
PERMISSIVE: dict[str, Any] = {
    "arguments": 0,
    "exact": 0,
    "expression": 0,
    "inputs": 0,
    "is_call": False,
    "is_draw": True,
    "is_mergeable": True,
    "is_open": True,
    "is_renderable": lambda node: node.op.kind == "prompt",
    "is_visible": False,
    "limits": 0,
    "may_fuse": True,
    "may_share": True,
    "operation": 0,
    "parameters": 0,
    "ready_event": 0,
    "takes_draws": True,
    "takes_lists": True,
    "is_output": False,
    "only_consumer": lambda consumers: consumers[0] if consumers else None,
}

#: Rules whose loss shows in later runs, stores, loops and processes, or in the plan alone: what each
#: says when it forbids nothing, and the test of ``test_fuse_pass.py`` that fails then.
ELSEWHERE = {
    "enters_first": (True, "test_a_fused_node_is_extended_by_what_enters_first"),
    "is_begun": (False, "test_a_run_goes_on_from_what_was_paid_for"),
    "is_held": (False, "test_values_are_held_for_nodes_that_a_task_returns"),
    "is_sync": (True, "test_async_tasks_stay_apart"),
    "is_task": (True, "test_prompts_and_calls_stay_apart"),
    "keeps_values": (False, "test_all_values_are_kept"),
    "may_emit": (False, "test_tasks_that_return_nodes_stay_visible"),
    "run_alike": (True, "test_tasks_run_where_they_say"),
    "runs_once": (False, "test_tasks_that_run_once_are_noted"),
    "stands_for_others": (False, "test_merged_nodes_keep_what_was_paid_for"),
    "waits_for": (True, "test_a_task_waits_for_no_more_than_before"),
}


def answered_before(node: Any, text: str) -> Any:
    """A call with an answer, which is another one than it would get now."""
    node._node.value = Reply(text)
    return node


def _limited() -> Any:
    """Equal clients: one lets two calls share a request, the other any number."""
    narrow = FakeBackend(limits=Limits(concurrency=512, max_items=2))
    wide = FakeBackend(limits=Limits(concurrency=512))
    return [llm.complete(str(i)) for i, llm in enumerate([wide, wide, narrow, narrow])]


def _known() -> Any:
    llm = FakeBackend()
    return [llm.complete("a", GREEDY), answered_before(llm.complete("a", GREEDY), "before")]


def _chain() -> Any:
    one, two = FakeBackend("one"), FakeBackend("two")
    first, second = two.complete(one.complete("a")), one.complete(two.complete("b"))
    return [first, second, one.complete(effect("late")), two.complete("now")]


def _effects() -> Any:
    llm = OddBackend()
    return [llm.publish("a"), llm.publish("a"), llm.publish("b")]


def _parameters() -> Any:
    llm = FakeBackend()
    several = [llm.complete("a", FakeParams(n=3)) for _ in range(2)]
    seeded = [llm.complete(text, FakeParams(seed=1)) for text in "ab"]
    late = [llm.complete(text, same(FakeParams(max_tokens=n))) for text, n in [("a", 1), ("b", 2)]]
    return [several, seeded, late, llm.complete("a", GREEDY), llm.complete("b")]


def _single() -> Any:
    """Calls that no server puts together: chats, and where the user allows one a request."""
    one = OddBackend(draws=1, limits=Limits(concurrency=512, max_items=1))
    chats = [one.chat("a"), one.chat("a"), one.chat("b")]
    return [chats, one.complete("a"), one.complete("a"), one.complete("b")]


def _returned() -> Any:
    return [returns_a_call(FakeBackend(), "a"), ask(x="a")]


def _equal() -> Any:
    one, other = OddBackend(tenant="a"), OddBackend(tenant="b")
    return [llm.embed(text) for llm in (one, one, other) for text in ("a", same("b"), "c")]


def _impure() -> Any:
    """Prompts that count how often they are rendered."""
    environment = FesteEnvironment()
    environment.globals["count"] = itertools.count().__next__
    environment.impure.add("count")
    counted = Prompt("{{ count() }} {{ x }}", environment=environment)
    return in_order(counted(x="a"), counted(x="a"))


EXAMPLES: dict[str, Callable[[], Any]] = {
    "clients with other limits": _limited,
    "an answer from before": _known,
    "two groups that feed each other": _chain,
    "calls with effects": _effects,
    "calls with other parameters": _parameters,
    "calls that take no company": _single,
    "a task that returns a call": _returned,
    "equal calls of two accounts": _equal,
    "prompts that are not pure": _impure,
}
STORED = [*EXAMPLES.values(), *(partial(random_graph, seed) for seed in range(40))]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_sound(name: str) -> None:
    """With all rules in force, the examples that break without one of them are as they must be."""
    assert differences(EXAMPLES[name]) == []


@pytest.mark.parametrize("name", sorted(set(rules.__all__) - ELSEWHERE.keys()))
def test_something_breaks_without_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forbids nothing shows: in a run, or because a bad pass is not refused."""
    assert name in PERMISSIVE, (
        f"the rule {name!r} is new: say in PERMISSIVE what it answers when it forbids nothing, and "
        "add an example to EXAMPLES that is not as it must be then; or name a test in ELSEWHERE"
    )
    if not is_asked(name):
        pytest.xfail(f"no pass asks {name}: use the rule, or remove it")
    answer = PERMISSIVE[name]
    monkeypatch.setattr(rules, name, answer if callable(answer) else lambda *args, **more: answer)
    warnings.simplefilter("ignore", PluginWarning)  # a pass that fails is skipped, and does no harm

    assert any(differences(build, strict=False) for build in STORED) or any(
        not refuses(bad) for bad in BAD
    ), f"nothing needs the rule {name}: it is redundant, or the examples are too weak"


_PATCHED = """
import json, sys, pytest
from feste.optimization import rules
path, options = sys.argv[1], ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"]
found = {}
for name, (answer, test) in json.loads(sys.argv[2]).items():
    rule = getattr(rules, name)
    setattr(rules, name, lambda *args, **more: answer)
    found[name] = int(pytest.main([*options, f"{path}::{test}"]))
    setattr(rules, name, rule)
print(json.dumps(found))
"""


def test_other_tests_break_without_the_other_rules() -> None:
    """Each rule that no example needs has a test elsewhere that fails without it."""
    path = Path(__file__).with_name("test_fuse_pass.py")
    ended = subprocess.run(
        [sys.executable, "-c", _PATCHED, str(path), json.dumps(ELSEWHERE)],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    statuses = json.loads(ended.stdout.splitlines()[-1])

    assert statuses == dict.fromkeys(ELSEWHERE, int(pytest.ExitCode.TESTS_FAILED))


def is_asked(name: str) -> bool:
    """Whether a pass, an invariant or another rule uses a rule."""
    folder = Path(optimization.__file__).parent
    uses = sum(f"rules.{name}(" in path.read_text("utf-8") for path in folder.rglob("*.py"))
    return uses > 0 or (folder / "rules.py").read_text("utf-8").count(f"{name}(") > 1


# --- each invariant refuses a bad pass ------------------------------------------------------------


class Nodes:
    """Nodes by name, for passes that do something wrong with them."""

    def __init__(self) -> None:
        llm, odd = FakeBackend(), OddBackend()
        first, early, used = llm.complete("first"), llm.embed("early"), llm.complete("used")
        self.handles: dict[str, Any] = {
            "draw": llm.complete("a"),
            "equal draw": llm.complete("a"),
            "other draw": llm.complete("b"),
            "greedy": llm.complete("a", GREEDY),
            "equal greedy": llm.complete("a", GREEDY),
            "chat": llm.chat("a"),
            "other chat": llm.chat("b"),
            "published": odd.publish("a"),
            "published too": odd.publish("b"),
            "narrow": FakeBackend(limits=Limits(max_items=2)).complete("c"),
            "short": llm.complete("d", FakeParams(max_tokens=1)),
            "seeded": llm.complete("a", FakeParams(seed=1)),
            "other seeded": llm.complete("b", FakeParams(seed=1)),
            "task": effect("a"),
            "other task": effect("b"),
            "user": effect(used),
            "first": first,
            "after first": llm.complete(first),
            "vector after first": llm.embed(first),
            "early vector": early,
            "after early": llm.complete(same(early)),
        }
        wanted = FesteGraph.collect(self.handles)[0].outputs
        self.handles |= {"used": used, "unneeded": llm.complete("unneeded")}
        self.graph = FesteGraph(FesteGraph.collect(self.handles)[0].nodes, wanted)

    def __getitem__(self, name: str) -> str:
        return self.handles[name].key

    def changed(self, name: str, **parts: Any) -> FesteGraph:
        """The graph with another node in the place of one."""
        return self.graph.with_nodes([self.graph.nodes[self[name]].replace(**parts)])

    def batched(self, *batches: tuple[str, ...], draws: bool = False) -> FesteGraph:
        """The graph with batches."""
        keys = [tuple(self[name] for name in batch) for batch in batches]
        return self.graph.replace(batches=[Batch(k, (k,) if draws else ()) for k in keys])

    def merged(self, cx: Any, name: str, into: str) -> FesteGraph:
        """The graph with one node merged into another, with an account of it."""
        cx.account([self[name]], f"merged into {self[into]}")
        return self.graph.merged({self[name]: self[into]})

    def without(self, name: str) -> FesteGraph:
        """The graph without a node."""
        left = {key: n for key, n in self.graph.nodes.items() if key != self[name]}
        return self.graph.replace(nodes=left)


def _without(nodes: Nodes, cx: Any, name: str) -> FesteGraph:
    cx.account([nodes[name]], "dropped: who needs it?")
    return nodes.without(name)


def _with_less_to_do(nodes: Nodes, cx: Any) -> FesteGraph:
    """Drop a call, and change the task that needs it."""
    user = nodes.graph.nodes[nodes["user"]].replace(args=("nothing",), deps=())
    return _without(nodes, cx, "used").with_nodes([user])


def _with_other_outputs(nodes: Nodes, cx: Any) -> FesteGraph:
    return FesteGraph(nodes.graph.nodes, nodes.graph.outputs[:-1])


def _with_a_call(nodes: Nodes, cx: Any) -> FesteGraph:
    return nodes.graph.with_nodes([FakeBackend().complete("new")._node])


def _with_other_inputs(nodes: Nodes, cx: Any) -> FesteGraph:
    return nodes.changed("after first", deps=(nodes.handles["draw"]._node,))


#: What a bad pass does, its level, how it does it, and what it is told.
BAD: dict[str, tuple[Level, Callable[[Nodes, Any], Any], str]] = {
    "no graph": (
        Level.E1G,
        lambda nodes, cx: nodes.graph.nodes,
        "returned mappingproxy, not a FesteGraph",
    ),
    "other outputs": (Level.E1G, _with_other_outputs, "changed which outputs are wanted"),
    "a call without account": (
        Level.E1G,
        lambda nodes, cx: nodes.without("unneeded"),
        "1 calls are gone without an account",
    ),
    "an output that is not there": (
        Level.E1G,
        lambda nodes, cx: _without(nodes, cx, "draw"),
        "the output complete-",
    ),
    "an input that is not there": (
        Level.E1G,
        lambda nodes, cx: _without(nodes, cx, "used"),
        "which is not in the graph",
    ),
    "a call less": (Level.E1G, _with_less_to_do, "which an output needs"),
    "a merge of SAMPLE": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "equal draw", "draw"),
        "equal SAMPLE calls are not the same",
    ),
    "a merge of EFFECT": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "published too", "published"),
        "which is another call",
    ),
    "a merge of GREEDY at E0": (
        Level.E0,
        lambda nodes, cx: nodes.merged(cx, "equal greedy", "greedy"),
        "a GREEDY call, takes level E1G",
    ),
    "a merge of GREEDY at E1": (
        Level.E1,
        lambda nodes, cx: nodes.merged(cx, "equal greedy", "greedy"),
        "a GREEDY call, takes level E1G",
    ),
    "a merge of different calls": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "greedy", "draw"),
        "which is another call",
    ),
    "a merge into a task": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "greedy", "task"),
        "which is another call",
    ),
    "another argument": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("draw", args=("changed", FakeParams())),
        "it changed complete-",
    ),
    "another model": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("draw", op=FakeBackend("cheap").complete),
        "it changed complete-",
    ),
    "another input": (Level.E1G, _with_other_inputs, "it changed the inputs of complete-"),
    "one call more": (Level.E1G, _with_a_call, "it added complete-"),
    "a batch of tasks": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("task", "other task")),
        "but it is no call",
    ),
    "a batch of effects": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("published", "published too")),
        "but it has an effect",
    ),
    "a batch of two operations": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("draw", "early vector")),
        "in a batch with another operation",
    ),
    "a batch of two limits": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("draw", "narrow")),
        "in a batch with another client's limits",
    ),
    "a batch of seeds": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("seeded", "other seeded")),
        "its seed would hold for all of it",
    ),
    "a batch of two maxima": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("draw", "short")),
        "in a batch with other parameters",
    ),
    "a batch with a call that is not there": (
        Level.E0,
        lambda nodes, cx: nodes.graph.replace(batches=[Batch((nodes["draw"], "nobody"))]),
        "the call nobody of a batch is not in the graph",
    ),
    "a batch of chats": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("chat", "other chat")),
        "its operation takes no lists",
    ),
    "a call in two batches": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("draw", "equal draw"), ("draw", "other draw")),
        "a call is in two batches",
    ),
    "a batch of dependent calls": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("first", "after first")),
        "the graph has a cycle",
    ),
    "batches that need each other": (
        Level.E0,
        lambda nodes, cx: nodes.batched(
            ("first", "after early"), ("early vector", "vector after first")
        ),
        "the graph has a cycle",
    ),
    "answers to two prompts": (
        Level.E1,
        lambda nodes, cx: nodes.batched(("draw", "other draw"), draws=True),
        "are no equal draws",
    ),
    "answers to one GREEDY prompt": (
        Level.E1,
        lambda nodes, cx: nodes.batched(("greedy", "equal greedy"), draws=True),
        "are no equal draws",
    ),
}


class BadPass:
    """A pass that does one of these things."""

    name = "bad"

    def __init__(self, what: str) -> None:
        self.level, self.rewrite, self.told = BAD[what]
        self.nodes = Nodes()

    def apply(self, graph: FesteGraph, cx: Any) -> Any:
        return graph if graph is not self.nodes.graph else self.rewrite(self.nodes, cx)


def refuses(what: str) -> bool:
    """Whether strict mode refuses the bad pass by name, and says why."""
    bad = BadPass(what)
    try:
        Optimizer([bad]).run(bad.nodes.graph, context.settings(strict=True))
    except PluginError as error:
        return "the pass 'bad'" in str(error) and bad.told in str(error)
    return False


@pytest.mark.parametrize("what", BAD)
def test_a_bad_pass_is_refused(what: str) -> None:
    """In strict mode a pass that breaks a rule is an error that names it; else it is skipped."""
    bad = BadPass(what)
    with pytest.warns(PluginWarning, match="'bad' was skipped") as warned:
        plan = Optimizer([bad]).run(bad.nodes.graph, context.settings(strict=False))

    assert refuses(what)
    assert bad.told in str(warned[0].message)
    assert plan.graph is plan.before and not plan.accounted
