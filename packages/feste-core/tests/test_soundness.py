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
from feste.delayed import FesteDelayed
from feste.errors import PluginError, PluginWarning
from feste.fused import Fused, Step, fuse
from feste.graph import Batch, FesteGraph, Group, Prefix
from feste.node import PENDING
from feste.optimization import (
    CommonSubexpressionOptimization,
    FoldOptimization,
    Level,
    Optimizer,
    rules,
)
from feste.prompt import FesteEnvironment, Prompt
from feste.prompt.operation import PromptOp
from feste.prompt.segments import Evaluator
from feste.testing import (
    FakeBackend,
    FakeParams,
    differences,
    random_graph,
)
from feste.testing.odd_backend import OddBackend, VoicedParams
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
in_part = Prompt("{{ x | upper }}: {{ y }}")

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
    "may_repeat": True,
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


def _counted() -> Prompt:
    """A prompt that counts how often it is rendered."""
    environment = FesteEnvironment()
    environment.globals["count"] = itertools.count().__next__
    environment.impure.add("count")
    return Prompt("{{ count() }} {{ x }}", environment=environment)


def _impure() -> Any:
    counted = _counted()
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
        counted, middle, shared = _counted(), effect(first), effect("shared")
        base, vector, about = effect("base"), llm.embed("0"), in_part(x="a", y=first)
        late = [ask(x=same("late")) for _ in range(2)]
        ran, merged = answered_before(effect("ran"), "before"), ask(x="a")
        self.handles: dict[str, Any] = {
            "draw": llm.complete("a"),
            "equal draw": llm.complete("a"),
            "other draw": llm.complete("b"),
            "greedy": llm.complete("a", GREEDY),
            "equal greedy": llm.complete("a", GREEDY),
            "chat": llm.chat("a"),
            "other chat": llm.chat("b"),
            "said": odd.say("a", VoicedParams(temperature=0)),
            "said loud": odd.say("a", VoicedParams(temperature=0, voice="loud")),
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
            "equal task": effect("a"),
            "asked": llm.embed(ask(x="a")),
            "asked alike": llm.embed(Prompt("Say {{ y }}")(y="a")),
            "late": llm.embed(late[0]),
            "equal late": llm.embed(late[1]),
            "counted": in_order(counted(x="a"), counted(x="a")),
            "known": answered_before(llm.complete("k", GREEDY), "before"),
            "unknown": llm.complete("k", GREEDY),
            "last": same(middle),
            "one": same(shared),
            "two": in_order(shared),
            "after ran": same(ran),
            "top": same(base),
            "equal top": same(base),
            "listed": in_order(ask(x="a")),
            "listed alike": in_order(Prompt("Say {{ y }}")(y="a")),
            "cheap": FakeBackend("cheap").complete("a", GREEDY),
            "known vector": answered_before(llm.embed("1"), "vector"),
            "equal known vector": answered_before(llm.embed("2"), "vector"),
            "after vector": same(vector),
            "about first": llm.embed(about),
        }
        equal = ("greedy", "equal greedy")
        self.handles |= {f"after {name}": same(self.handles[name]) for name in equal}
        for name in ("known vector", "equal known vector"):
            self.handles[name]._node.value = [0.5]
        wanted = FesteGraph.collect(self.handles)[0].outputs
        self.handles |= {
            "used": used,
            "unneeded": llm.complete("unneeded"),
            "unneeded task": effect("unneeded"),
            "prompt": FesteDelayed(self.handles["asked"]._node.deps[0]),
            "impure": FesteDelayed(self.handles["counted"]._node.deps[0]),
            "equal impure": FesteDelayed(self.handles["counted"]._node.deps[1]),
            "middle": middle,
            "shared": shared,
            "base": base,
            "vector": vector,
            "about": about,
            "ran": ran,
            "merged": merged,
            "late prompt": late[0],
            "equal late prompt": late[1],
            "pure": FesteDelayed(late[0]._node.deps[0]),
        }
        graph = FesteGraph(FesteGraph.collect(self.handles)[0].nodes, wanted)
        self.graph = graph.merged({merged.key: self["prompt"]})

    def __getitem__(self, name: str) -> str:
        return self.handles[name].key

    def changed(self, name: str, **parts: Any) -> FesteGraph:
        """The graph with another node in the place of one."""
        return self.graph.with_nodes([self.graph.nodes[self[name]].replace(**parts)])

    def batched(self, *batches: tuple[str, ...], draws: bool = False) -> FesteGraph:
        """The graph with batches."""
        keys = [tuple(self[name] for name in batch) for batch in batches]
        return self.graph.replace(batches=[Batch(k, (k,) if draws else ()) for k in keys])

    def grouped(self, *names: str, levels: Any = None) -> FesteGraph:
        """The graph with a group."""
        keys = tuple(self[name] for name in names)
        return self.graph.replace(groups=[Group(keys, levels or (1,) * len(keys))])

    def merged(self, cx: Any, name: str, into: str) -> FesteGraph:
        """The graph with one node merged into another, with an account of it."""
        cx.account([self[name]], f"merged into {self[into]}")
        return self.graph.merged({self[name]: self[into]})

    def redrawn(self, name: str, like: str) -> FesteGraph:
        """The graph where one node is the draw of another."""
        node = self.graph.nodes[self[name]].replace()
        node.draw = self.graph.nodes[self[like]].draw
        return self.graph.with_nodes([node])

    def fused(self, *names: str, drop: bool = True) -> FesteGraph:
        """The graph with some tasks as steps of the last of them."""
        chain = [self.graph.nodes[self[name]] for name in names]
        gone = {node.key for node in chain[:-1] if drop}
        left = {key: node for key, node in self.graph.nodes.items() if key not in gone}
        return self.graph.replace(nodes=left).with_nodes([fuse(chain, self.graph.resolve)])

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


def _without_an_effect(nodes: Nodes, cx: Any) -> FesteGraph:
    """Give a task a value, and drop the one with an effect that it needs."""
    left = {k: n for k, n in nodes.changed("last", value=1).nodes.items() if k != nodes["middle"]}
    return nodes.graph.replace(nodes=left)


def _fused(nodes: Nodes, task: str = "", places: Any = None, **parts: Any) -> FesteGraph:
    """The graph with two tasks fused, but into something else than they were."""
    graph = nodes.fused("middle", "last")
    made: Any = graph.nodes[nodes["last"]]
    first, *others = made.op.steps
    node = nodes.graph.nodes[nodes[task]] if task else first.node
    first = Step(node, first.sources if places is None else places)
    return graph.with_nodes([made.replace(op=Fused((first, *others)), **parts)])


def _fused_into_two(nodes: Nodes, cx: Any) -> FesteGraph:
    one, other = (nodes.fused("shared", name).nodes for name in ("one", "two"))
    return nodes.graph.replace(nodes={**one, nodes["two"]: other[nodes["two"]]})


def _rendered_in_part(nodes: Nodes, name: str) -> FesteGraph:
    node: Any = nodes.graph.nodes[nodes[name]]
    op = Evaluator().partial(node.op, dict(node.kwargs), frozenset())
    return nodes.changed(name, op=op, kwargs={})


def _unmerged(nodes: Nodes, cx: Any) -> FesteGraph:
    """Put another prompt in the place of one that was merged."""
    key = nodes["merged"]
    node = nodes.handles["merged"]._node.replace(value="another")
    aliases = {k: kept for k, kept in nodes.graph.aliases.items() if k != key}
    return nodes.graph.replace(nodes={**nodes.graph.nodes, key: node}, aliases=aliases)


def _merged_again(nodes: Nodes, cx: Any) -> FesteGraph:
    other = ask(x="other")._node
    graph = nodes.graph.with_nodes([other])
    return graph.replace(aliases={**graph.aliases, nodes["merged"]: other.key})


def _with_less_known(nodes: Nodes, cx: Any) -> FesteGraph:
    node = nodes.graph.nodes[nodes["known"]].replace()
    node.value = PENDING
    return nodes.graph.with_nodes([node])


def _fused_elsewhere(nodes: Nodes, cx: Any) -> FesteGraph:
    """Put a fused node in the place of another."""
    made = nodes.fused("middle", "last").nodes[nodes["last"]].replace()
    other = nodes.graph.nodes[nodes["other task"]]
    made._key, made.draw = other.key, other.draw
    return nodes.graph.with_nodes([made])


def _without_a_vector(nodes: Nodes, cx: Any) -> FesteGraph:
    cx.account([nodes["vector"]], "dropped: who needs it?")
    left = nodes.changed("after vector", value=1).nodes
    return nodes.graph.replace(nodes={k: n for k, n in left.items() if k != nodes["vector"]})


def _about(nodes: Nodes, known: str = "a", **parts: Any) -> FesteGraph:
    """The graph with one prompt rendered in part, or with another op."""
    node: Any = nodes.graph.nodes[nodes["about"]]
    op = Evaluator().partial(node.op, {"x": known}, frozenset("y"))
    return nodes.changed("about", **{"op": op, "kwargs": {"y": node.kwargs["y"]}, **parts})


def _op_like(nodes: Nodes, roles: tuple[str, ...] = (), language: str = "en") -> FesteGraph:
    node: Any = nodes.graph.nodes[nodes["about"]]
    return _about(nodes, op=PromptOp(node.op.templates, roles, language), kwargs=node.kwargs)


def _with_a_task(nodes: Nodes, cx: Any) -> FesteGraph:
    return nodes.graph.with_nodes([effect("new")._node])


def _into_another_prompt(nodes: Nodes, cx: Any) -> FesteGraph:
    """Merge a prompt into a new one with another text."""
    other = ask(x="other")._node
    prompt = nodes.graph.nodes[nodes["prompt"]]
    return nodes.graph.with_nodes([other]).merged({prompt.key: other.key})


def _drawn(nodes: Nodes, members: tuple[str, ...], *draws: tuple[str, ...]) -> FesteGraph:
    """The graph with a batch of some members, and some sets of equal draws."""
    keys = [tuple(nodes[name] for name in part) for part in (members, *draws)]
    return nodes.graph.replace(batches=[Batch(keys[0], tuple(keys[1:]))])


#: What a bad pass does, its level, how it does it, and what it is told.
BAD: dict[str, tuple[Level, Callable[[Nodes, Any], Any], str]] = {
    "no graph": (
        Level.E1G,
        lambda nodes, cx: nodes.graph.nodes,
        "returned a mappingproxy, not a FesteGraph",
    ),
    "other outputs": (Level.E1G, _with_other_outputs, "changed which outputs are wanted"),
    "draws of level E0": (
        Level.E0,
        lambda nodes, cx: nodes.batched(("draw", "equal draw"), draws=True),
        "that takes level E1",
    ),
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
        "equal SAMPLE nodes are not the same",
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
    "a merge of calls that are read differently": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "said loud", "said"),
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
    "an invented answer": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("draw", value=Reply("invented")),
        "it set the value of complete-",
    ),
    "an invented vector": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("early vector", value=[0.0]),
        "it set the value of embed-",
    ),
    "an effect that is a constant": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("task", value="a"),
        "it set the value of effect-",
    ),
    "another answer": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("known", value=Reply("another")),
        "it changed the value of complete-",
    ),
    "an answer less": (Level.E1G, _with_less_known, "it changed the value of complete-"),
    "a merge of an answer": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "known", "unknown"),
        "which is another call",
    ),
    "another draw": (
        Level.E1G,
        lambda nodes, cx: nodes.redrawn("equal draw", "draw"),
        "it gave complete-",
    ),
    "other limits": (
        Level.E1G,
        lambda nodes, cx: nodes.changed(
            "draw", op=FakeBackend(limits=Limits(max_items=2)).complete
        ),
        "it changed complete-",
    ),
    "another number": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("greedy", args=("a", FakeParams(temperature=0.0))),
        "it changed complete-",
    ),
    "an input more": (
        Level.E1G,
        lambda nodes, cx: nodes.changed(
            "after first", deps=tuple(nodes.handles[n]._node for n in ("first", "draw"))
        ),
        "it changed the inputs of complete-",
    ),
    "a merge with another model": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "cheap", "greedy"),
        "which is another call",
    ),
    "a merge after two GREEDY calls": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "after equal greedy", "after greedy"),
        "which is another task",
    ),
    "a merge of what is still there": (
        Level.E1G,
        lambda nodes, cx: nodes.graph.replace(
            aliases={**nodes.graph.aliases, nodes["equal draw"]: nodes["draw"]}
        ),
        "equal SAMPLE nodes are not the same",
    ),
    "a vector less": (Level.E1G, _without_a_vector, "it dropped embed-"),
    "a vector more": (
        Level.E1G,
        lambda nodes, cx: nodes.graph.with_nodes([FakeBackend().embed("new")._node]),
        "it added embed-",
    ),
    "another constant of a prompt": (
        Level.E1G,
        lambda nodes, cx: _about(nodes, "b"),
        "it changed the text of prompt-",
    ),
    "another input of a prompt": (
        Level.E1G,
        lambda nodes, cx: _about(nodes, deps=(nodes.handles["draw"]._node,)),
        "it changed the text of prompt-",
    ),
    "another role": (
        Level.E1G,
        lambda nodes, cx: _op_like(nodes, roles=("user",)),
        "it changed the text of prompt-",
    ),
    "another language": (
        Level.E1G,
        lambda nodes, cx: _op_like(nodes, language="th"),
        "it changed the text of prompt-",
    ),
    "a fused task in the place of another": (
        Level.E1G,
        _fused_elsewhere,
        "from other tasks than ran in a row",
    ),
    "another text": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("prompt", value="Say b"),
        "it changed the text of prompt-",
    ),
    "another variable": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("prompt", kwargs={"x": "b"}),
        "it changed the text of prompt-",
    ),
    "another template": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("prompt", op=Prompt("Sing {{ x }}")._op),
        "it changed the text of prompt-",
    ),
    "an impure prompt rendered": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("impure", value="0 a"),
        "it changed the text of prompt-",
    ),
    "an impure prompt rendered in part": (
        Level.E1G,
        lambda nodes, cx: _rendered_in_part(nodes, "impure"),
        "it changed the text of prompt-",
    ),
    "a merge of impure prompts": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "equal impure", "impure"),
        "equal SAMPLE nodes are not the same",
    ),
    "a merge into another prompt": (
        Level.E1G,
        _into_another_prompt,
        "which is another prompt",
    ),
    "another argument of a task": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("task", args=("changed",)),
        "it changed effect-",
    ),
    "another input of a task": (
        Level.E1G,
        lambda nodes, cx: nodes.changed("user", deps=(nodes.handles["first"]._node,)),
        "it changed the inputs of effect-",
    ),
    "a merge of tasks with effects": (
        Level.E1G,
        lambda nodes, cx: nodes.merged(cx, "equal task", "task"),
        "equal EFFECT nodes are not the same",
    ),
    "one effect less": (Level.E1G, _without_an_effect, "it dropped effect-"),
    "one effect more": (Level.E1G, _with_a_task, "it added effect-"),
    "an effect that nobody needs, fused": (
        Level.E1G,
        lambda nodes, cx: nodes.fused("unneeded task", "last"),
        "from other tasks than ran in a row",
    ),
    "a fused task with another step": (
        Level.E1G,
        lambda nodes, cx: _fused(nodes, task="user"),
        "from other tasks than ran in a row",
    ),
    "a fused task with other places": (
        Level.E1G,
        lambda nodes, cx: _fused(nodes, places=(1,)),
        "from other tasks than ran in a row",
    ),
    "a fused task with other arguments": (
        Level.E1G,
        lambda nodes, cx: _fused(nodes, args=("a",)),
        "from other tasks than ran in a row",
    ),
    "a fused task with other inputs": (
        Level.E1G,
        lambda nodes, cx: _fused(nodes, deps=(nodes.handles["draw"]._node,)),
        "from other tasks than ran in a row",
    ),
    "a call in a fused task": (
        Level.E1G,
        lambda nodes, cx: cx.account([nodes["used"]], "fused") or nodes.fused("used", "user"),
        "from other tasks than ran in a row",
    ),
    "a step of two fused tasks": (Level.E1G, _fused_into_two, "once more"),
    "a step that ran before": (
        Level.E1G,
        lambda nodes, cx: nodes.fused("ran", "after ran"),
        "once more",
    ),
    "a merged node that is back": (Level.E1G, _unmerged, "into another node than before"),
    "another merge": (Level.E1G, _merged_again, "into another node than before"),
    "a step that still runs by itself": (
        Level.E1G,
        lambda nodes, cx: nodes.fused("middle", "last", drop=False),
        "once more",
    ),
    "a prefix of tasks": (
        Level.E0,
        lambda nodes, cx: nodes.graph.replace(
            prefixes=[Prefix((nodes["task"], nodes["other task"]), "", 5)]
        ),
        "is in a prefix, but it is no call",
    ),
    **{
        f"a group of {what}": (
            Level.E0,
            lambda nodes, cx, names=names: nodes.grouped(*names),
            f"is in a group{told}",
        )
        for what, names, told in (
            ("tasks", ("task", "other task"), ", but it is no call"),
            ("effects", ("published", "published too"), ", but it has an effect"),
            ("two operations", ("draw", "early vector"), " with another operation"),
            ("two limits", ("draw", "narrow"), " with another client's limits"),
            ("seeds", ("seeded", "other seeded"), ", but its seed would hold for all of it"),
            ("two maxima", ("draw", "short"), " with other parameters"),
            ("chats", ("chat", "other chat"), ", but its operation takes no lists"),
        )
    },
    **{
        f"a group with levels {levels}": (
            Level.E0,
            lambda nodes, cx, levels=levels: nodes.grouped("draw", "other draw", levels=levels),
            f"has the levels {levels}: each of its 2 members has one, a whole number from 1",
        )
        for levels in [(1,), (1, 2, 1), (1, 0), (-1, 1), (1, True), ("1", "1"), "12"]
    },
    "a group of nothing": (
        Level.E0,
        lambda nodes, cx: nodes.graph.replace(groups=[Group((), ())]),
        "a group has no calls",
    ),
    "a prefix of nothing": (
        Level.E0,
        lambda nodes, cx: nodes.graph.replace(prefixes=[Prefix((), "", 5)]),
        "a prefix has no calls",
    ),
    "a batch of nothing": (
        Level.E0,
        lambda nodes, cx: nodes.graph.replace(batches=[Batch(())]),
        "a batch has no calls",
    ),
    "answers to a prompt that is elsewhere": (
        Level.E1,
        lambda nodes, cx: _drawn(nodes, ("draw",), ("draw", "equal draw")),
        "are not separate sets of two or more of its members",
    ),
    "an answer in two sets": (
        Level.E1,
        lambda nodes, cx: _drawn(nodes, ("draw", "equal draw"), *[("draw", "equal draw")] * 2),
        "are not separate sets of two or more of its members",
    ),
    "one answer to a prompt": (
        Level.E1,
        lambda nodes, cx: _drawn(nodes, ("draw", "equal draw"), ("draw",)),
        "are not separate sets of two or more of its members",
    ),
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
    """A pass that does one of these things, which is bad unless it is among the legal ones."""

    name = "bad"

    def __init__(self, what: str, known: Any = BAD) -> None:
        self.level, self.rewrite, *told = known[what]
        self.told = "".join(told)
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


# --- and lets through what is legal ---------------------------------------------------------------


def _folded_and_merged(nodes: Nodes, cx: Any) -> FesteGraph:
    """Render prompts of two templates to one text, and merge what needs them."""
    folded = FoldOptimization().apply(nodes.graph, cx)
    return CommonSubexpressionOptimization().apply(folded, cx)


def _culled_too(nodes: Nodes, cx: Any) -> FesteGraph:
    cx.account([nodes["unneeded"]], "dropped: no output needs it")
    return _folded_and_merged(nodes, cx).cull()


def _through_a_new_prompt(nodes: Nodes, cx: Any) -> FesteGraph:
    """Let a new prompt stand for two with equal inputs, and one of their calls for the other."""
    new = nodes.graph.nodes[nodes["late prompt"]].replace()
    new._key = "new"
    prompts = dict.fromkeys([nodes["late prompt"], nodes["equal late prompt"]], new.key)
    graph = nodes.graph.with_nodes([new]).merged(prompts)
    return graph.merged({nodes["equal late"]: nodes["late"]})


def _inlined(nodes: Nodes, cx: Any) -> FesteGraph:
    node = nodes.graph.nodes[nodes["asked"]]
    return nodes.changed("asked", args=("Say a", *node.args[1:]), deps=())


def _merged_and_fused(nodes: Nodes, cx: Any) -> FesteGraph:
    fused = nodes.fused("base", "top")
    return fused.merged({nodes["equal top"]: nodes["top"]})


LEGAL: dict[str, tuple[Level, Callable[[Nodes, Any], FesteGraph]]] = {
    "merges after rendering": (Level.E1G, _folded_and_merged),
    "merges after rendering, without the prompts": (Level.E1G, _culled_too),
    "a merge through a new prompt": (Level.E1, _through_a_new_prompt),
    "a text in the place of its prompt": (Level.E0, _inlined),
    "a prompt rendered": (Level.E0, lambda nodes, cx: nodes.changed("prompt", value="Say a")),
    "a prompt rendered in part": (Level.E0, lambda nodes, cx: _rendered_in_part(nodes, "prompt")),
    "another prompt with the same op": (Level.E0, lambda nodes, cx: _op_like(nodes)),
    "a prompt rendered as far as it is known": (Level.E0, lambda nodes, cx: _about(nodes)),
    "a merge of equal answers": (
        Level.E0,
        lambda nodes, cx: nodes.merged(cx, "equal known vector", "known vector"),
    ),
    "a merge into a fused task": (Level.E0, _merged_and_fused),
    "a PURE task computed": (Level.E0, lambda nodes, cx: nodes.changed("pure", value="b")),
    "a PURE task computed, and the prompt rendered": (
        Level.E0,
        lambda nodes, cx: nodes.changed("pure", value="b").with_nodes(
            [nodes.graph.nodes[nodes["late prompt"]].replace(value="Say b")]
        ),
    ),
    "a chain fused": (Level.E0, lambda nodes, cx: nodes.fused("middle", "last")),
    "answers to one prompt": (
        Level.E1,
        lambda nodes, cx: nodes.batched(("draw", "equal draw"), draws=True),
    ),
    "a group of calls of which one needs the other": (
        Level.E0,
        lambda nodes, cx: nodes.grouped("first", "after first", levels=(1, 2)),
    ),
}


@pytest.mark.parametrize("what", LEGAL)
def test_a_good_pass_is_let_through(what: str) -> None:
    """What is legal at a pass's level is taken in strict mode."""
    good = BadPass(what, LEGAL)
    plan = Optimizer([good]).run(good.nodes.graph, context.settings(strict=True))

    assert plan.graph is not plan.before
