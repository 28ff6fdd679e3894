"""Distributions outside the repository add to Feste with nothing but an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BACKEND = """
import feste
from feste.backend import Backend, operation

class Echo(Backend):
    @operation
    async def complete(self, prompt: str) -> str:
        return prompt.upper()

@feste.hookimpl
def feste_backends():
    return {"echo": Echo}
"""

PASS = """
import feste

class Watching:
    name = "watching"
    def apply(self, graph, cx):
        cx.applied(f"saw {len(graph.nodes)} nodes")
        return graph

@feste.hookimpl
def feste_optimizations():
    return [Watching()]
"""

SCHEDULER = """
import feste

asked = []

def get(dsk, keys):
    from dask.local import get_sync
    asked.append(list(keys))
    return get_sync(dsk, keys)

@feste.hookimpl
def feste_schedulers():
    return {"counted": "feste_counted:get", "feste_counted": get}
"""

SETTING = """
import feste
from feste.context import Setting

@feste.hookimpl
def feste_settings():
    return {
        "echo_volume": Setting(5, int, "how loud the echo is"),
        "echo_tone": Setting(None, str | None, "how high the echo is"),
    }
"""

OBSERVER = """
import threading
import feste

heard, threads = [], set()

def hear(event):
    heard.append(event)
    threads.add(threading.current_thread())

@feste.hookimpl
def feste_run_started(event):
    hear(event)

@feste.hookimpl
def feste_node_finished(event):
    hear(event)

@feste.hookimpl
def feste_request_finished(event):
    hear(event)

@feste.hookimpl
def feste_run_finished(event):
    hear(event)
"""


def test_a_backend_is_one_method(site: Any) -> None:
    """A class with one ``@operation`` method, offered by an entry point, is a whole backend."""
    site.add("feste-echo", BACKEND, point="echo")
    code = """
import feste
llm = feste.backend.create("echo")
first = llm.complete("hello")
answers = feste.compute(llm.complete(first), [first])
with feste.context.set(eager=True):
    eager = llm.complete("hello")
print(json.dumps([answers, eager, feste.explain(llm.complete("x")).requests, llm.endpoint]))
"""
    assert site.run(code) == [["HELLO", ["HELLO"]], "HELLO", 1, "plugin:echo"]


def test_a_backend_takes_its_configuration(site: Any) -> None:
    """What ``create`` is given goes to the class; a class named as text is imported when it is used."""
    source = """
import feste

@feste.hookimpl
def feste_backends():
    return {"loud": "loud_client:Loud"}
"""
    client = """
from feste.backend import Backend, operation

class Loud(Backend):
    def __init__(self, end="!", *, times=1):
        self.mark = end * times

    @operation
    def say(self, text: str) -> str:
        return text + self.mark
"""
    site.add("feste-loud", source)
    (site.folder / "loud_client.py").write_text(client)
    code = """
import sys
import feste
seen = [feste.backend.create("fake").plugin, "loud_client" in sys.modules]
seen.append(feste.backend.create("loud", times=3).say("hey").compute())
try:
    feste.backend.create("lod")
except feste.errors.UnknownName as error:
    seen.append(str(error).split("?")[0])
print(json.dumps(seen))
"""
    expected = ["fake", False, "hey!!!", "no backend 'lod'. Did you mean 'loud'"]

    assert site.run(code) == expected


def test_a_pass_is_a_name_and_apply(site: Any) -> None:
    """A pass with nothing else runs as an exact one, shows its remarks, and can be switched off."""
    site.add("feste-watching", PASS)
    code = """
import feste
node = feste.task(abs)(-2)
def rows(**settings):
    passes = feste.explain(node, **settings).to_json()["passes"]
    return [[p["level"], p["phase"], [r["text"] for r in p["remarks"]]]
            for p in passes if p["name"] == "watching"]
print(json.dumps([rows(), rows(optimize={"watching": False}), node.compute()]))
"""
    assert site.run(code) == [[["E0", "SIMPLIFY", ["saw 1 nodes"]]], [], 2]


def test_a_pass_changes_the_plan(site: Any) -> None:
    """The graph that a pass returns is the graph that is run."""
    source = """
import feste

class Louder:
    name = "louder"
    def apply(self, graph, cx):
        quiet = [n for n in graph.nodes.values() if n.op.name == "say" and n.args == ("hi",)]
        return graph.with_nodes(n.replace(args=("HI",)) for n in quiet) if quiet else graph

@feste.hookimpl
def feste_optimizations():
    return [Louder()]
"""
    site.add("feste-louder", source)
    code = """
import feste
@feste.task(pure=True)
def say(text):
    return text
print(json.dumps([say("hi").compute(), say("hi").compute(optimize=False)]))
"""
    assert site.run(code) == ["HI", "hi"]


def test_a_scheduler_is_a_get_function(site: Any) -> None:
    """A plain ``get`` runs graphs: named, as a URL's scheme, or by the module of an object."""
    site.add("feste-counted", SCHEDULER)
    code = """
import feste, feste_counted
from feste.testing import FakeBackend

class Client:
    pass
Client.__module__ = "feste_counted.client"

llm = FakeBackend()
add = feste.task(lambda a, b: a + b)
def program():
    return [add(llm.chat("a", seeded), "!"), llm.complete("b", seeded)]
from feste.testing.fake_backend import FakeParams
seeded = FakeParams(seed=1)
local = feste.compute(program())
same = [feste.compute(program(), scheduler=s) == local
        for s in ("counted", "counted://there", Client(), feste_counted.get)]
with feste.context.set(scheduler="counted"):
    same.append(feste.compute(program()) == local)
note = feste.explain(program(), scheduler="counted").note
print(json.dumps([same, [len(keys) for keys in feste_counted.asked], note]))
"""
    note = "this scheduler is a plain get function: nothing is batched while it runs"

    assert site.run(code) == [[True] * 5, [2] * 5, note]


def test_a_scheduler_by_the_environment(site: Any) -> None:
    """FESTE_SCHEDULER names a scheduler of a plugin; a misspelt one is told before anything runs."""
    site.add("feste-counted", SCHEDULER)
    code = """
import feste, feste_counted
try:
    answer = feste.task(abs)(-2).compute()
except feste.errors.UnknownName as error:
    answer = str(error).split("?")[0]
print(json.dumps([answer, len(feste_counted.asked)]))
"""
    assert site.run(code, FESTE_SCHEDULER="counted") == [2, 1]
    assert site.run(code, FESTE_SCHEDULER="cuonted") == [
        "no scheduler 'cuonted'. Did you mean 'counted'",
        0,
    ]


def test_a_setting_is_like_those_of_feste(site: Any) -> None:
    """A declared setting has default, variable, ``set``, block and keyword, in that order; and a check."""
    site.add("feste-echo", SETTING)
    code = """
import feste
from feste import context
seen = [context.get("echo_volume"), context.get("echo_tone")]
context.set(echo_volume=7)
seen.append(context.get("echo_volume"))
with context.set(echo_volume=8):
    seen += [context.get("echo_volume"), context.settings(echo_volume=9).echo_volume]
    seen.append(feste.task(lambda: context.get("echo_volume"))().compute())
for wrong in ({"echo_volume": "loud"}, {"echo_volum": 1}):
    try:
        context.set(**wrong)
    except feste.errors.ConfigError as error:
        seen.append(str(error))
print(json.dumps(seen))
"""
    values = [7, 8, 9, 8]
    said = [
        "setting echo_volume='loud': expected int, not str",
        "no setting 'echo_volum'. Did you mean 'echo_volume'?",
    ]

    assert site.run(code) == [5, None, *values, *said]
    variables = {"FESTE_ECHO_VOLUME": "6", "FESTE_ECHO_TONE": "high"}
    assert site.run(code, **variables) == [6, "high", *values, *said]


def test_observers_hear_a_run_in_order(site: Any) -> None:
    """All four hooks are called in the order of what happened, on one thread that is not the user's."""
    site.add("feste-observer", OBSERVER)
    code = """
import threading
import feste, feste_observer
from feste.errors import InvalidRequest
from feste.testing import FakeBackend

llm = FakeBackend("m-1", fail={"poison": InvalidRequest("no")})
def boom(text):
    raise ValueError(text)
good = feste.task(str.upper)(llm.chat("hello"))
bad = feste.task(str.upper)(feste.task(boom)("why"))
good.compute()
feste.compute(bad, on_error="return")
feste.compute(llm.chat("poison"), on_error="return")
told = [[e.name, getattr(e, "op", None), getattr(e, "state", None)] for e in feste_observer.heard]
requests = [[e.backend, e.operation, e.model, e.items, e.attempt, e.error]
            for e in feste_observer.heard if e.name == "request_finished"]
runs = list(dict.fromkeys(e.run for e in feste_observer.heard))
ends = [e.states for e in feste_observer.heard if e.name == "run_finished"]
starts = [[e.nodes, e.calls] for e in feste_observer.heard if e.name == "run_started"]
(thread,) = feste_observer.threads
aside = [t is not thread for t in (threading.main_thread(), threading.current_thread())]
times = [[e.at for e in feste_observer.heard if e.run == run] for run in runs]
plain = json.loads(json.dumps(feste_observer.heard[0].to_json()))
print(json.dumps([told, requests, len(runs), starts, ends, aside, thread.name,
                  all(t == sorted(t) for t in times), sorted(plain)]))
"""
    told, requests, runs, starts, ends, aside, thread, in_order, plain = site.run(code)

    assert told == [
        ["run_started", None, None],
        ["request_finished", None, None],
        ["node_finished", "chat", "done"],
        ["node_finished", "upper", "done"],
        ["run_finished", None, None],
        ["run_started", None, None],
        ["node_finished", "boom", "failed"],
        ["node_finished", "upper", "skipped"],
        ["run_finished", None, None],
        ["run_started", None, None],
        ["request_finished", None, None],
        ["node_finished", "chat", "failed"],
        ["run_finished", None, None],
    ]
    assert requests == [
        ["fake", "chat", "m-1", 1, 1, ""],
        ["fake", "chat", "m-1", 1, 1, "InvalidRequest"],
    ]
    assert (runs, starts) == (3, [[2, 1], [2, 0], [1, 1]])
    assert ends == [{"done": 2}, {"failed": 1, "skipped": 1}, {"failed": 1}]
    assert (aside, thread, in_order) == ([True, True], "feste-observers", True)
    assert plain == ["at", "calls", "event", "nodes", "run", "schema", "started"]


def test_an_observer_that_raises_is_named_and_ignored(site: Any) -> None:
    """It changes no run, hears no more, and disturbs no other observer."""
    site.add("feste-observer", OBSERVER)
    source = """
import feste

heard = []

@feste.hookimpl
def feste_run_started(event):
    heard.append(event)
    raise RuntimeError("ill")

@feste.hookimpl
def feste_node_finished(event):
    heard.append(event)
"""
    site.add("feste-ill", source)
    code = """
import warnings
import feste, feste_ill, feste_observer
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    answers = [feste.task(abs)(n).compute() for n in (-1, -2)]
print(json.dumps([answers, [str(w.message) for w in told], len(feste_ill.heard),
                  [e.name for e in feste_observer.heard]]))
"""
    answers, warned, heard, others = site.run(code)
    (said,) = warned

    assert (answers, heard) == ([1, 2], 1)
    assert said == (
        "the observer feste-ill 1.0:feste-ill raised RuntimeError: ill; it will hear no more"
    )
    assert others == ["run_started", "node_finished", "run_finished"] * 2


def test_a_broken_plugin_leaves_the_others(site: Any) -> None:
    """A program with broken plugins is told of each of them, once, and works."""
    site.add("feste-echo", BACKEND, point="echo")
    site.add("feste-watching", PASS)
    site.add("feste-syntax", "def x(:", point="syntax")
    site.add("feste-raising", "raise RuntimeError('no')", point="raising")
    typo = "import feste\n\n@feste.hookimpl\ndef feste_backend():\n    return {}\n"
    site.add("feste-typo", typo, point="typo")
    code = """
import warnings
import feste
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    answer = feste.backend.create("echo").complete("hello").compute()
    feste.backend.create("echo").complete("again").compute()
said = [[w.category.__name__, str(w.message).split(" is skipped")[0]] for w in told]
print(json.dumps([answer, said]))
"""
    broken = ["raising", "syntax", "typo"]
    answer, said = site.run(code)

    assert answer == "HELLO"
    assert said == [
        ["PluginWarning", f"plugin {name!r} of feste-{name} 1.0 (feste_{name})"] for name in broken
    ]
    assert site.run(code, FESTE_DISABLED_PLUGINS="raising,syntax,typo") == ["HELLO", []]


def test_two_backends_of_one_name_stop_before_anything_runs(site: Any) -> None:
    """Which of two plugins is meant cannot be guessed: the error names both and sends nothing."""
    site.add("feste-echo", BACKEND, point="echo")
    site.add("other-echo", BACKEND, point="echo2")
    code = """
import feste
seen = []
for _ in range(2):
    try:
        feste.backend.create("echo")
    except feste.errors.PluginError as error:
        seen.append(str(error))
print(json.dumps(seen))
"""
    said = (
        "two plugins offer backends 'echo': feste-echo 1.0 and other-echo 1.0. Uninstall one, or "
        "set FESTE_DISABLED_PLUGINS=echo2"
    )
    assert site.run(code) == [said, said]


# --- really installed -------------------------------------------------------------------------------

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "feste-everything"
version = "2.3"
dependencies = ["feste-core"]

[project.entry-points.feste]
everything = "feste_everything"
"""

EVERYTHING = """
import feste
from feste.backend import Backend, operation

class Echo(Backend):
    @operation
    async def complete(self, prompt: str) -> str:
        return prompt.upper()

class Idle:
    name = "idle"
    def apply(self, graph, cx):
        return graph

def get(dsk, keys):
    from dask.local import get_sync
    return get_sync(dsk, keys)

@feste.hookimpl
def feste_backends():
    return {"everything": Echo}

@feste.hookimpl
def feste_optimizations():
    return [Idle()]

@feste.hookimpl
def feste_schedulers():
    return {"everywhere": get}
"""


def test_a_package_of_somebody_else_is_installed(site: Any, tmp_path: Path) -> None:
    """What pip makes of a project with one entry point is a backend, a pass and a scheduler."""
    pytest.importorskip("hatchling")
    pytest.importorskip("pip")
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "feste_everything.py").write_text(EVERYTHING)
    target = tmp_path / "installed"
    options = "--quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index"
    command = [sys.executable, "-m", "pip", "install", *options.split(), "--target", str(target)]
    done = subprocess.run(
        [*command, str(project)],
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    code = """
import feste
from feste.plugins import registry
llm = feste.backend.create("everything")
(row,) = [p for p in registry().plugins if p.name == "everything"]
answer = llm.complete("hello").compute(scheduler="everywhere")
print(json.dumps([answer, row.distribution, row.version, row.offers]))
"""
    offers = {
        "backends": ["everything"],
        "optimizations": ["idle"],
        "schedulers": ["everywhere"],
    }

    found = type(site)(target).run(code)

    assert found == ["HELLO", "feste-everything", "2.3", offers]
