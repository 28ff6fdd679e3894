"""A distribution outside the repository, with nothing but an entry point, is part of Feste."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

SOURCE = '''
"""A third party's plugin: all that it knows of Feste is the front door."""

import threading
from collections.abc import Sequence

import feste
from feste.backend import Backend, Limits, operation
from feste.context import Setting

SEEN = []


class Parrot(Backend):
    """A backend of one method, and its batched form."""

    def __init__(self, voice: str = "", limits: Limits = Limits(concurrency=2)) -> None:
        self.voice, self.limits = voice, limits

    @operation
    async def say(self, text: str) -> str:
        return f"{text}!{self.voice}"

    @say.batch(max_items=96)
    async def say_many(self, texts: Sequence[str]) -> Sequence[str]:
        SEEN.append(("batch", len(texts)))
        return [f"{t}!{self.voice}" for t in texts]


class Count:
    """A pass with a name and an apply."""

    name = "count"

    def apply(self, graph, cx):
        cx.advice(f"{len(graph.calls())} calls were counted by a third party")
        return graph


def get(dsk, keys, **kwargs):
    """A scheduler: a plain Dask get function."""
    import dask

    SEEN.append(("get", len(dsk)))
    return dask.get(dsk, keys, **kwargs)


@feste.hookimpl
def feste_backends():
    return {"parrot": f"{__name__}:Parrot"}


@feste.hookimpl
def feste_optimizations():
    return [Count()]


@feste.hookimpl
def feste_schedulers():
    return {"simple": get, "named": f"{__name__}:get"}


@feste.hookimpl
def feste_settings():
    return {"volume": Setting(1, int, "how loud the parrot is")}


def _hear(event):
    fields = event.to_json()
    SEEN.append((fields["event"], threading.current_thread().name, fields))


@feste.hookimpl
def feste_run_started(event):
    _hear(event)


@feste.hookimpl
def feste_node_finished(event):
    _hear(event)


@feste.hookimpl
def feste_request_finished(event):
    _hear(event)


@feste.hookimpl
def feste_run_finished(event):
    _hear(event)
'''

USE = """
import json, sys, warnings
import feste
from feste import context
from feste.backend import create

out = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    parrot = create("parrot", voice="?")
out["warnings"] = [str(w.message) for w in caught if issubclass(w.category, feste.errors.PluginWarning)]
out["imported by name only"] = type(parrot).__module__
import feste_parrot
SEEN = feste_parrot.SEEN

def program():
    return [parrot.say(str(i)) for i in range(200)]

with context.set(volume=3):
    nodes = program()
    out["explain"] = str(feste.explain(nodes))
    out["values"] = feste.compute(nodes)[0]
    out["volume"] = context.get("volume")
out["batches"] = sorted(s[1] for s in SEEN if s[0] == "batch")
heard = [s for s in SEEN if len(s) == 3]
SEEN.clear()
out["heard"] = [s[0] for s in heard]
out["threads"] = sorted({s[1] for s in heard})
out["first"], out["last"] = heard[0][2], heard[-1][2]
out["requests"] = [s[2] for s in heard if s[0] == "request_finished"]
out["nodes"] = [s[2]["state"] for s in heard if s[0] == "node_finished"]
out["runs"] = sorted({s[2]["run"] for s in heard})
for name in ("simple", "named", feste_parrot.get):
    out[f"by {name if isinstance(name, str) else 'function'}"] = [
        feste.compute(program(), scheduler=name)[0] == out["values"],
        [s[0] for s in SEEN if s[0] == "get"],
    ]
    SEEN.clear()
json.dump(out, sys.stdout)
"""


def install(folder: Path, name: str, source: str, *, entry: str = "") -> None:
    """Write a distribution as an installer would leave it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[feste]\n{entry or name} = {name}\n")
    (folder / f"{name}.py").write_text(source)


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter that finds what is installed in the folder."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def run(folder: Path, code: str, **environment: str) -> Any:
    done = python(folder, "-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin with everything, and two that are broken."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "feste_parrot", SOURCE, entry="parrot")
    install(folder, "feste_crashing", "raise RuntimeError('no luck')", entry="crashing")
    install(folder, "feste_garbled", "def (:", entry="garbled")
    return folder


@pytest.fixture(scope="module")
def used(folder: Path) -> Any:
    """What a program saw that used all of the plugin."""
    return run(folder, USE)


def test_the_broken_ones_are_named_and_skipped(used: Any) -> None:
    """Each gets one warning with distribution, reason and remedy; the good one works beside them."""
    assert len(used["warnings"]) == 2
    crashing, garbled = used["warnings"]
    assert crashing == (
        "plugin 'crashing' of feste_crashing 1.0 (feste_crashing) is skipped: RuntimeError: no luck."
        " Repair or uninstall it, or set FESTE_DISABLED_PLUGINS=crashing"
    )
    assert garbled.startswith(
        "plugin 'garbled' of feste_garbled 1.0 (feste_garbled) is skipped: Syn"
    )


def test_its_backend_answers(used: Any) -> None:
    """One operation method: 200 calls written one by one go as three requests of the batched form."""
    assert used["imported by name only"] == "feste_parrot"
    assert used["values"] == [f"{i}!?" for i in range(200)]
    assert used["batches"] == [52, 52, 96]


def test_its_pass_runs(used: Any) -> None:
    """A pass of only name and apply is listed by explain, with its remark."""
    assert "  count" in used["explain"]
    assert "200 calls were counted by a third party (count)" in used["explain"]


def test_its_setting_is_a_setting(used: Any) -> None:
    """It can be set like Feste's own."""
    assert used["volume"] == 3


@pytest.mark.parametrize("how", ["simple", "named", "function"])
def test_its_scheduler_runs_graphs(used: Any, how: str) -> None:
    """A plain get function, by name, by ``module:attribute``, or given itself, gives the values."""
    assert used[f"by {how}"] == [True, ["get"]]


def test_its_observers_hear_everything_in_order(used: Any) -> None:
    """All four hooks, from one thread: the start first, each node and request, the end last."""
    assert used["heard"][0] == "run_started"
    assert used["heard"][-1] == "run_finished"
    assert sorted(set(used["heard"])) == [
        "node_finished",
        "request_finished",
        "run_finished",
        "run_started",
    ]
    assert used["heard"].count("node_finished") == 200
    assert used["heard"].count("request_finished") == 3
    assert len(used["threads"]) == 1
    assert len(used["runs"]) == 1


def test_events_hold_what_they_promise(used: Any) -> None:
    """Counts, states, sizes: plain data with the schema's version."""
    assert (used["first"]["nodes"], used["first"]["calls"], used["first"]["schema"]) == (
        200,
        200,
        1,
    )
    assert used["last"]["states"] == {"done": 200}
    assert (used["last"]["requests"], used["last"]["cancelled"]) == (3, False)
    assert used["nodes"] == ["done"] * 200
    assert sorted(r["items"] for r in used["requests"]) == [52, 52, 96]
    assert {(r["backend"], r["operation"], r["attempt"]) for r in used["requests"]} == {
        ("parrot", "say", 1)
    }
    assert all(0 <= r["ready"] <= r["sent"] <= r["at"] for r in used["requests"])


def test_feste_plugins_lists_them(folder: Path) -> None:
    """``python -m feste plugins`` shows distribution, version, what each registers, what is broken."""
    text = python(folder, "-m", "feste", "plugins", "--check")
    data = python(folder, "-m", "feste", "plugins", "--check", "--json")
    rows = {row["name"]: row for row in json.loads(data.stdout)}

    assert (text.returncode, data.returncode) == (1, 1)
    assert (text.stderr, data.stderr) == ("", "")
    assert rows["parrot"]["offers"] == {
        "backends": ["parrot"],
        "optimizations": ["count"],
        "schedulers": ["simple", "named"],
        "settings": ["volume"],
        "observes": ["node_finished", "request_finished", "run_finished", "run_started"],
    }
    assert (rows["parrot"]["distribution"], rows["parrot"]["version"]) == ("feste_parrot", "1.0")
    assert rows["crashing"]["state"] == rows["garbled"]["state"] == "broken"
    for word in ("feste_parrot 1.0", "backends: parrot", "broken", "RuntimeError: no luck"):
        assert word in text.stdout


@pytest.mark.parametrize(
    ("environment", "states"),
    [
        ({"FESTE_DISABLED_PLUGINS": "crashing,garbled"}, ["disabled", "disabled", "loaded"]),
        ({"FESTE_LOAD_PLUGINS": "parrot"}, ["disabled", "disabled", "loaded"]),
        ({"FESTE_LOAD_PLUGINS": ""}, ["disabled"] * 3),
    ],
)
def test_switches_of_the_environment(
    folder: Path, environment: dict[str, str], states: list[str]
) -> None:
    """Plugins are blocked or allowed by name; the command then says that all is well."""
    done = python(
        folder, "-W", "error", "-m", "feste", "plugins", "--check", "--json", **environment
    )
    rows = {row["name"]: row["state"] for row in json.loads(done.stdout)}

    assert (done.returncode, done.stderr) == (0, "")
    assert [rows[n] for n in ("crashing", "garbled", "parrot")] == states


def test_two_of_one_name_are_told_by_the_command(folder: Path, tmp_path: Path) -> None:
    """The command names both distributions and ends in an error, without a traceback."""
    install(tmp_path, "feste_other_parrot", SOURCE, entry="other")
    path = os.pathsep.join([str(tmp_path), str(folder)])
    switches = {"FESTE_LOAD_PLUGINS": "parrot,other"}
    done = python(Path(path), "-m", "feste", "plugins", "--check", **switches)

    assert (done.returncode, done.stdout) == (1, "")
    assert "feste_other_parrot 1.0 and feste_parrot 1.0" in done.stderr
    assert "Traceback" not in done.stderr


OBSERVER = """
import feste

@feste.hookimpl
def feste_node_finished(event):
    raise RuntimeError("deaf")

@feste.hookimpl
def feste_run_finished(event):
    raise RuntimeError("deaf")
"""


def test_an_observer_that_raises_is_named_and_ignored(folder: Path, tmp_path: Path) -> None:
    """An observer never changes a run; the others go on hearing."""
    install(tmp_path, "feste_deaf", OBSERVER, entry="deaf")
    code = """
import json, warnings
import feste, feste_parrot
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    value = feste.compute([feste.task(abs)(-i) for i in range(3)])[0]
said = [str(w.message) for w in caught]
print(json.dumps([value, said, [s[0] for s in feste_parrot.SEEN]]))
"""
    path = Path(os.pathsep.join([str(tmp_path), str(folder)]))
    value, said, heard = run(path, code, FESTE_LOAD_PLUGINS="parrot,deaf")

    assert value == [0, 1, 2]
    assert len(said) == 1
    assert "feste_deaf 1.0:deaf raised RuntimeError: deaf" in said[0]
    assert heard == ["run_started", *["node_finished"] * 3, "run_finished"]


SMALL = """
import feste
import feste.optimization
from feste.backend import Backend, operation
from feste.context import Setting

asked = []

class Loud(Backend):
    @operation
    def say(self, text: str) -> str:
        return text.upper()

class Louder:
    name, level = "louder", feste.optimization.Level.E2
    def apply(self, graph, cx):
        quiet = [n for n in graph.nodes.values() if n.op.name == "tell" and n.args == ("hi",)]
        return graph.with_nodes(n.replace(args=("HI",)) for n in quiet) if quiet else graph

def get(dsk, keys):
    from dask.local import get_sync
    asked.append(list(keys))
    return get_sync(dsk, keys)

@feste.hookimpl
def feste_backends():
    return {"loud": Loud}

@feste.hookimpl
def feste_optimizations():
    return [Louder()]

@feste.hookimpl
def feste_schedulers():
    return {"feste_small": get}

@feste.hookimpl
def feste_settings():
    return {"small_depth": Setting(5, int, "how deep"), "small_tone": Setting(None, str | None, "")}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin whose parts are the least that Feste takes."""
    folder = tmp_path_factory.mktemp("small")
    install(folder, "feste_small", SMALL)
    return folder


def test_one_sync_method_is_a_backend(small: Path) -> None:
    """A class with one plain method answers alike, lazy, eager, and run by another scheduler."""
    code = """
import json, feste
loud = feste.backend.create("loud")
answers = [loud.say(loud.say("a")).compute(), loud.say("a").compute(scheduler="feste_small")]
with feste.context.set(eager=True):
    answers.append(loud.say("a"))
print(json.dumps(answers))
"""
    assert run(small, code) == ["A", "A", "A"]


def test_its_pass_changes_the_plan(small: Path) -> None:
    """The graph that a pass returns is the graph that is run; where it is not named, it is not."""
    code = """
import json, feste
tell = feste.task(pure=True)(lambda text: text)
tell.name = "tell"
print(json.dumps([tell("hi").compute(optimize={"louder": True}), tell("hi").compute()]))
"""
    assert run(small, code) == ["HI", "hi"]


def test_its_scheduler_is_known_by_scheme_and_by_object(small: Path) -> None:
    """A URL is looked up by its scheme, an object by the top-level module of its class."""
    code = """
import json, feste, feste_small
class Client: pass
Client.__module__ = "feste_small.client"
node = lambda: feste.task(abs)(-2)
values = [node().compute(scheduler=s) for s in ("feste_small://there:1", Client())]
print(json.dumps([values, [len(keys) for keys in feste_small.asked]]))
"""
    assert run(small, code) == [[2, 2], [1, 1]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("feste_small", [2, 1]),
        ("feste_smal", ["no scheduler 'feste_smal'. Did you mean 'feste_small'", 0]),
    ],
)
def test_its_scheduler_is_named_in_the_environment(
    small: Path, name: str, expected: list[Any]
) -> None:
    """FESTE_SCHEDULER may name it; a misspelt name is told, with the nearest, before anything runs."""
    code = """
import json, feste, feste_small
try:
    told = feste.task(abs)(-2).compute()
except feste.errors.UnknownName as error:
    told = str(error).split("?")[0]
print(json.dumps([told, len(feste_small.asked)]))
"""
    assert run(small, code, FESTE_SCHEDULER=name) == expected


def test_its_settings_have_variables(small: Path) -> None:
    """FESTE_<NAME> is the default of a plugin's setting; a task sees the value of its run."""
    code = """
import json, feste
from feste import context
seen = [context.get("small_depth"), context.get("small_tone")]
read = feste.task(lambda: context.get("small_depth"))
with context.set(small_depth=8):
    seen.append(read().compute())
try:
    context.set(small_depth="deep")
except feste.errors.ConfigError as error:
    seen.append(str(error))
print(json.dumps(seen))
"""
    rest = [8, "setting small_depth='deep': expected int, not str"]

    assert run(small, code) == [5, None, *rest]
    variables = {"FESTE_SMALL_DEPTH": "6", "FESTE_SMALL_TONE": "high"}
    assert run(small, code, **variables) == [6, "high", *rest]


PYPROJECT = """
[build-system]
requires = ["{requires}"]
build-backend = "{backend}"

[project]
name = "feste-parrot"
version = "3.1"

[project.entry-points.feste]
parrot = "feste_parrot"
"""


def _builder() -> tuple[str, str] | None:
    """A build backend that is here: nothing is fetched."""
    for name, backend in (
        ("hatchling", "hatchling.build"),
        ("setuptools", "setuptools.build_meta"),
    ):
        try:
            if int(version(name).split(".")[0]) >= (1 if name == "hatchling" else 64):
                return name, backend
        except PackageNotFoundError:
            continue
    return None


@pytest.mark.skipif(_builder() is None, reason="no build backend is installed")
def test_a_plugin_that_was_really_installed(tmp_path: Path) -> None:
    """Built and installed by pip from its own pyproject, it is found like any other."""
    pytest.importorskip("pip")
    found = _builder()
    assert found is not None
    project, target = tmp_path / "project", tmp_path / "target"
    (project / "feste_parrot").mkdir(parents=True)
    (project / "feste_parrot" / "__init__.py").write_text(SOURCE)
    (project / "pyproject.toml").write_text(PYPROJECT.format(requires=found[0], backend=found[1]))
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-index", "--no-build-isolation", "--no-deps", "--target", str(target)]
    done = python(tmp_path, *command, *options, str(project))
    assert done.returncode == 0, done.stderr
    rows = json.loads(python(target, "-m", "feste", "plugins", "--check", "--json").stdout)
    (row,) = [r for r in rows if r["name"] == "parrot"]
    code = """
import json
from feste.backend import create
print(json.dumps(create("parrot").say("Hello").compute()))
"""

    assert (row["distribution"], row["version"], row["state"]) == ("feste-parrot", "3.1", "loaded")
    assert run(target, code) == "Hello!"
