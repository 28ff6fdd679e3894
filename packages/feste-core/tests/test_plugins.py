"""Plugins are found, checked, listed and switched off; a broken one costs only itself."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

import feste
from feste import plugins
from feste.errors import ConfigError, PluginError, PluginWarning, UnknownName
from feste.plugins import PluginInfo, resolve

GOOD = """
import feste

@feste.hookimpl
def feste_backends():
    return {NAME: "MODULE:Echo"}

class Echo(feste.backend.Backend):
    pass
"""


def offering(name: str, module: str = "good") -> str:
    """The source of a plugin that offers a backend."""
    return GOOD.replace("NAME", repr(name)).replace("MODULE", module)


def hook(name: str, value: str) -> str:
    """The source of a plugin with one hook that returns the value of an expression."""
    return f"import feste\n\n@feste.hookimpl\ndef {name}():\n    return {value}\n"


def row(registry: plugins.Registry, name: str) -> PluginInfo:
    """What the registry knows of the plugin of an entry point."""
    (found,) = [info for info in registry.plugins if info.name == name]
    return found


# --- what is there ----------------------------------------------------------------------------------


def test_own_parts_are_plugins_too() -> None:
    """Without any other distribution the passes, the local scheduler and the fake backend are there."""
    registry = plugins.Registry(discover=False)

    assert [(p.name, p.distribution, p.version, p.state, p.offers) for p in registry.plugins] == [
        (
            "optimization",
            "feste-core",
            feste.__version__,
            "loaded",
            {"optimizations": ["cull", "fold", "cse", "batch"]},
        ),
        ("scheduler", "feste-core", feste.__version__, "loaded", {"schedulers": ["local"]}),
        ("testing", "feste-core", feste.__version__, "loaded", {"backends": ["fake"]}),
    ]


def test_a_row_tells_all_of_a_plugin(site: Any) -> None:
    """A row holds the entry point, its module, the distribution, its version, and what it registers."""
    source = (
        offering("echo", "feste_echo")
        + """
@feste.hookimpl
def feste_schedulers():
    return {"slow": "feste_echo:run", "slower": "feste_echo:run"}

@feste.hookimpl
def feste_optimizations():
    return [Pass()]

@feste.hookimpl
def feste_settings():
    return {"echo_volume": feste.context.Setting(5, int, "how loud")}

@feste.hookimpl
def feste_run_started(event):
    pass

@feste.hookimpl
def feste_run_finished():
    pass

class Pass:
    name = "echoes"
    def apply(self, graph, cx):
        return graph
"""
    )
    site.add("feste-echo", source, point="echo")

    assert row(site.registry(), "echo") == PluginInfo(
        name="echo",
        module="feste_echo",
        distribution="feste-echo",
        version="1.0",
        state="loaded",
        offers={
            "backends": ["echo"],
            "optimizations": ["echoes"],
            "schedulers": ["slow", "slower"],
            "settings": ["echo_volume"],
            "observes": ["run_finished", "run_started"],
        },
        error="",
    )


def test_an_entry_point_may_name_an_object(site: Any) -> None:
    """Not only a module can hold hooks: an object of a module can, too."""
    source = """
import feste

class Hooks:
    @feste.hookimpl
    def feste_schedulers(self):
        return {"mine": "good:Hooks"}

hooks = Hooks()
"""
    site.add("good", source, module="good:hooks")

    assert row(site.registry(), "good").offers == {"schedulers": ["mine"]}


def test_order_of_installation_changes_nothing(site: Any) -> None:
    """Plugins are loaded by the names of their distributions and entry points."""
    for name in ("zebra", "ape", "lion"):
        site.add(name, offering(name, name))

    names = [p.name for p in site.registry().plugins if p.name in ("zebra", "ape", "lion")]

    assert names == ["ape", "lion", "zebra"]


def test_the_first_of_a_distribution_on_the_path_wins(site: Any, tmp_path: Any) -> None:
    """A distribution that lies on the path twice is one plugin, as it is one module."""
    site.add("good", offering("good"))
    (tmp_path / "later").mkdir()
    type(site)(tmp_path / "later").add("good", offering("other"))
    sys.path.append(str(tmp_path / "later"))
    try:
        registry = site.registry()
    finally:
        sys.path.remove(str(tmp_path / "later"))

    assert row(registry, "good").offers == {"backends": ["good"]}


# --- a broken one -----------------------------------------------------------------------------------

BROKEN = {
    "raises": ("raise RuntimeError('no good')", "RuntimeError: no good"),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "misses a module": (
        "import not_there_at_all",
        "ModuleNotFoundError: No module named 'not_there_at_all'",
    ),
    "is no Python": ("def x(:", "SyntaxError: invalid syntax"),
    "misspells a hook": (hook("feste_backend", "{}"), "unknown hook 'feste_backend'"),
    "takes what the hook has not": (
        "import feste\n\n@feste.hookimpl\ndef feste_backends(config):\n    return {}\n",
        "Argument(s) {'config'}",
    ),
    "raises in a hook": (hook("feste_backends", "1 / 0"), "ZeroDivisionError: division by zero"),
    "offers a list of backends": (
        hook("feste_backends", "['echo']"),
        "TypeError: feste_backends() must return a mapping, not ['echo']",
    ),
    "offers nothing": (
        hook("feste_schedulers", "None"),
        "TypeError: feste_schedulers() must return a mapping, not None",
    ),
    "offers a number": (
        hook("feste_backends", "{'echo': 3}"),
        "TypeError: feste_backends() offers 'echo': 3, not a name and a Backend class",
    ),
    "names no attribute": (
        hook("feste_schedulers", "{'mine': 'broken'}"),
        "TypeError: feste_schedulers() offers 'mine': 'broken', not a name and a scheduler",
    ),
    "has no names": (hook("feste_backends", "{1: 'a:b'}"), "feste_backends() offers 1: 'a:b'"),
    "offers the class of a pass": (
        hook("feste_optimizations", "[type('P', (), {'name': 'p', 'apply': print})]"),
        "not an object with `name` and `apply(graph, cx)`",
    ),
    "offers a pass without a name": (
        hook("feste_optimizations", "[type('P', (), {'apply': print})()]"),
        "not an object with `name` and `apply(graph, cx)`",
    ),
    "offers a pass that does nothing": (
        hook("feste_optimizations", "[type('P', (), {'name': 'p'})()]"),
        "not an object with `name` and `apply(graph, cx)`",
    ),
    "offers one pass": (
        hook("feste_optimizations", "type('P', (), {'name': 'p', 'apply': print})()"),
        "TypeError: feste_optimizations() must return a list of passes, not <",
    ),
    "offers two passes of one name": (
        hook("feste_optimizations", "[type('P', (), {'name': 'p', 'apply': print})()] * 2"),
        "TypeError: feste_optimizations() offers two passes 'p'",
    ),
    "offers a bare default": (
        hook("feste_settings", "{'volume': 3}"),
        "TypeError: feste_settings() offers 'volume': 3, not a name and a Setting",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_named_and_skipped(kind: str, site: Any) -> None:
    """The warning names the plugin, its distribution and the reason; the others work."""
    source, reason = BROKEN[kind]
    site.add("broken", source)
    site.add("good", offering("good"))
    said = rf"plugin 'broken' of broken 1\.0 \(broken\) is skipped: .*{re.escape(reason)}"
    with pytest.warns(PluginWarning, match=said) as told:
        registry = site.registry()

    assert len(told) == 1
    assert row(registry, "broken").state == "broken"
    assert reason in row(registry, "broken").error
    assert row(registry, "broken").offers == {}
    assert row(registry, "good").state == "loaded"
    assert registry.find("backends", "good").__name__ == "Echo"


def test_nothing_of_a_broken_plugin_is_kept(site: Any) -> None:
    """If one offer of a plugin is wrong, its right ones and its observers are not taken either."""
    source = (
        offering("half", "broken")
        + """
@feste.hookimpl
def feste_run_started(event):
    pass

@feste.hookimpl
def feste_settings():
    return {"volume": 3}
"""
    )
    site.add("broken", source)
    with pytest.warns(PluginWarning):
        registry = site.registry()

    assert "half" not in registry.backends
    assert registry.manager.hook.feste_run_started.get_hookimpls() == []


def test_broken_metadata_costs_only_its_own(site: Any, tmp_path: Any) -> None:
    """A distribution whose files are damaged hides no other."""
    site.add("good", offering("good"))
    for name, text in {"a": b"\xff\xfe", "b": b"[feste\nx"}.items():
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "entry_points.txt").write_bytes(text)

    assert row(site.registry(), "good").state == "loaded"


# --- switched off -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "loaded"),
    [
        ({}, ["one", "three", "two"]),
        ({"FESTE_DISABLED_PLUGINS": "one,three"}, ["two"]),
        ({"FESTE_DISABLED_PLUGINS": " one , two,"}, ["three"]),
        ({"FESTE_DISABLED_PLUGINS": ""}, ["one", "three", "two"]),
        ({"FESTE_LOAD_PLUGINS": ""}, []),
        ({"FESTE_LOAD_PLUGINS": "two, one"}, ["one", "two"]),
        ({"FESTE_LOAD_PLUGINS": "nobody"}, []),
        ({"FESTE_LOAD_PLUGINS": "one,two", "FESTE_DISABLED_PLUGINS": "one"}, ["two"]),
    ],
)
def test_variables_switch_plugins_off(
    variables: dict[str, str], loaded: list[str], site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One variable blocks those it names, the other loads no others; empty means none at all."""
    names = ("one", "two", "three")
    for name in names:
        site.add(f"feste-{name}", offering(name, f"feste_{name}"), point=name)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    registry = site.registry()
    states = {info.name: info.state for info in registry.plugins if info.name in names}

    assert sorted(n for n, state in states.items() if state == "loaded") == loaded
    assert {state for n, state in states.items() if n not in loaded} <= {"disabled"}
    assert states.keys() == set(names)
    assert sorted(set(names) & registry.backends.keys()) == loaded


def test_a_plugin_that_is_off_is_not_imported(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switching a plugin off keeps its code from running; so a broken one gives no warning."""
    site.add("broken", "raise RuntimeError('run')")
    monkeypatch.setenv("FESTE_DISABLED_PLUGINS", "broken")

    assert row(site.registry(), "broken").state == "disabled"


def test_own_parts_cannot_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes, local scheduler and fake backend are there whatever the variables say."""
    monkeypatch.setenv("FESTE_LOAD_PLUGINS", "")
    monkeypatch.setenv("FESTE_DISABLED_PLUGINS", "optimization,scheduler,testing")
    registry = plugins.Registry()

    assert [p.name for p in registry.plugins if p.state == "loaded"] == [
        "optimization",
        "scheduler",
        "testing",
    ]


# --- one name twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("backends", "{'same': 'a:b'}"),
        ("schedulers", "{'same': 'a:b'}"),
        ("settings", "{'same': feste.context.Setting(1, int, 'x')}"),
        ("optimizations", "[type('P', (), {'name': 'same', 'apply': print})()]"),
    ],
)
def test_one_name_of_two_distributions_is_an_error(
    kind: str, value: str, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names both distributions, and what to do; doing it helps."""
    site.add("first", hook(f"feste_{kind}", value))
    site.add("second", hook(f"feste_{kind}", value))
    said = (
        f"two plugins offer {kind} 'same': first 1.0 and second 1.0. Uninstall one, or set "
        "FESTE_DISABLED_PLUGINS=second"
    )
    with pytest.raises(PluginError, match=f"^{re.escape(said)}$"):
        site.registry()
    monkeypatch.setenv("FESTE_DISABLED_PLUGINS", "second")

    assert row(site.registry(), "first").offers == {kind: ["same"]}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("backends", "fake", "{'fake': 'a:b'}"),
        ("schedulers", "local", "{'local': 'a:b'}"),
        ("settings", "eager", "{'eager': feste.context.Setting(1, int, 'x')}"),
        ("optimizations", "batch", "[type('P', (), {'name': 'batch', 'apply': print})()]"),
    ],
)
def test_own_names_are_taken(kind: str, name: str, value: str, site: Any) -> None:
    """A plugin cannot put something of its own in the place of a part of Feste."""
    site.add("thief", hook(f"feste_{kind}", value))
    said = f"two plugins offer {kind} '{name}': feste-core {feste.__version__} and thief 1.0"
    with pytest.raises(PluginError, match=re.escape(said)):
        site.registry()


# --- looking up -------------------------------------------------------------------------------------


def test_an_unknown_backend_is_told_with_the_nearest() -> None:
    """A misspelt name suggests the right one and the package that may be missing."""
    with pytest.raises(UnknownName) as caught:
        feste.backend.create("fak")

    said = str(caught.value)
    assert said.startswith("no backend 'fak'. Did you mean 'fake'? Is feste-backend-fak installed?")


def test_an_unknown_scheduler_is_told_with_the_nearest() -> None:
    """A misspelt scheduler is an error before anything runs."""
    ran: list[int] = []
    with pytest.raises(UnknownName, match=r"no scheduler 'locl'\. Did you mean 'local'\?"):
        feste.compute(feste.task(ran.append)(1), scheduler="locl")

    assert ran == []


def test_a_name_of_a_plugin_that_is_off_is_told_so(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks for what is not loaded learns of it, and where to look."""
    site.add("good", offering("good"))
    monkeypatch.setenv("FESTE_LOAD_PLUGINS", "")
    with pytest.raises(UnknownName, match=r"Not loaded: .*good.* \(see `feste plugins`\)"):
        site.registry().find("backends", "good")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("good:Eco", "a plugin names 'good:Eco', but good has no 'Eco'"),
        ("goood:Echo", "a plugin names 'goood:Echo', but there is no goood"),
        ("good.inner:Echo", "a plugin names 'good.inner:Echo', but there is no good.inner"),
    ],
)
def test_a_name_of_nothing_is_an_error(target: str, said: str, site: Any) -> None:
    """``"module:attribute"`` is looked up on first use, and one that names nothing says what is not there."""
    site.add("good", hook("feste_backends", f"{{'good': {target!r}}}"))
    registry = site.registry()
    with pytest.raises(PluginError, match=f"^{re.escape(said)}$"):
        registry.find("backends", "good")


def test_what_a_named_module_misses_is_its_own_error(site: Any, tmp_path: Any) -> None:
    """If the module is there and its SDK is not, the error names the SDK."""
    site.add("good", hook("feste_backends", "{'good': 'good_client:Echo'}"))
    (tmp_path / "good_client.py").write_text("import sdk_of_nobody\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'sdk_of_nobody'"):
        site.registry().find("backends", "good")


def test_resolve_leaves_objects_alone() -> None:
    """What is no text is what it is."""
    assert resolve(print) is print
    assert resolve("feste.errors:PluginError") is PluginError
    assert issubclass(UnknownName, ConfigError)
