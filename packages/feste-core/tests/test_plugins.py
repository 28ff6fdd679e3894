"""Plugins: found by entry point, checked, listed, switched off; a broken one harms nobody else."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import plugins
from feste.cli import main
from feste.errors import FesteWarning, PluginError, PluginWarning, UnknownName
from feste.plugins import PluginInfo, Registry, resolve

GOOD = """
@feste.hookimpl
def feste_backends():
    return {"good": "feste.testing:FakeBackend"}
"""

Install = Callable[..., str]


def load() -> Registry:
    """A fresh registry, in which nothing is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FesteWarning)
        return Registry()


def load_broken() -> tuple[Registry, list[str]]:
    """A fresh registry, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry()
    return registry, [str(w.message) for w in caught if issubclass(w.category, PluginWarning)]


def info(registry: Registry, name: str) -> PluginInfo:
    """What is known of a plugin."""
    (found,) = [p for p in registry.plugins if p.name == name]
    return found


# --- what is found ----------------------------------------------------------------------------------


def test_own_parts_are_plugins_too() -> None:
    """Feste's own passes, hands and fake come through the same hooks, first in the list."""
    registry = Registry(discover=False)

    assert [p.name for p in registry.plugins] == ["optimization", "scheduler", "testing"]
    assert {p.distribution for p in registry.plugins} == {"feste-core"}
    passes = "cull fold cse resolve fuse sample_fusion batch prefix lint critical_path"
    assert list(registry.optimizations) == passes.split()
    assert list(registry.schedulers) == ["local"]
    assert list(registry.backends) == ["fake"]


def test_a_plugin_needs_nothing_but_an_entry_point(install: Install) -> None:
    """An installed module with one hook is found, with its distribution and version."""
    module = install(version="2.5")
    registry = load()
    found = info(registry, "good")

    assert found == PluginInfo(
        "good", module, "feste-good", "2.5", "loaded", {"backends": ["good"]}
    )
    assert found.origin == "feste-good 2.5"
    assert registry.find("backends", "good").__name__ == "FakeBackend"


def test_a_plugin_offers_of_every_kind(install: Install) -> None:
    """Backends, passes, schedulers, settings, observers: each is listed by name."""
    install(
        "all",
        """
class Pass:
    name = "tidy"
    def apply(self, graph, cx):
        return graph

def get(dsk, keys, **kwargs):
    raise NotImplementedError

@feste.hookimpl
def feste_backends():
    return {"one": feste.testing.FakeBackend, "two": "feste.testing:FakeBackend"}

@feste.hookimpl
def feste_optimizations():
    return [Pass()]

@feste.hookimpl
def feste_schedulers():
    return {"mine": get}

@feste.hookimpl
def feste_settings():
    return {"depth": Setting(3, int, "how deep")}

@feste.hookimpl
def feste_run_started(event):
    pass

@feste.hookimpl
def feste_run_finished():
    pass
""".replace("feste.testing.FakeBackend", "__import__('feste.testing').testing.FakeBackend"),
    )
    registry = load()

    assert info(registry, "all").offers == {
        "backends": ["one", "two"],
        "optimizations": ["tidy"],
        "schedulers": ["mine"],
        "settings": ["depth"],
        "observes": ["run_finished", "run_started"],
    }
    assert registry.settings["depth"].default == 3
    assert registry.optimizations["tidy"].name == "tidy"


def test_an_entry_point_may_name_an_object(install: Install) -> None:
    """``module:object`` works as everywhere: a class or an instance with the hooks."""
    install(
        "object",
        """
class Plugin:
    @feste.hookimpl
    def feste_backends(self):
        return {"of-object": "feste.testing:FakeBackend"}

plugin = Plugin()
""",
        entry="{module}:plugin",
    )

    assert "of-object" in load().backends


def test_one_distribution_may_have_several_plugins(install: Install) -> None:
    """Two entry points are two plugins, switched by their own names."""
    install("one", GOOD.replace('"good"', '"one"'), dist="feste-both")
    install("two", GOOD.replace('"good"', '"two"'), dist="feste-both")
    registry = load()

    assert {"one", "two"} <= set(registry.backends)
    assert info(registry, "one").distribution == info(registry, "two").distribution


def test_the_order_of_installation_does_not_matter(install: Install, tmp_path: Path) -> None:
    """Plugins are loaded by distribution and name, whatever order the disk gives."""
    for name in ("b", "c", "a"):
        install(name, GOOD.replace('"good"', f'"{name}"'))
    found = [p.name for p in load().plugins if p.name in ("a", "b", "c")]

    assert found == ["a", "b", "c"]


def test_the_first_on_the_path_wins(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one distribution that is installed twice, the one that would be imported counts."""
    first = install(folder=tmp_path)
    behind = tmp_path / "behind"
    behind.mkdir()
    install(version="9.9", folder=behind)
    monkeypatch.setattr(sys, "path", [*sys.path, str(behind)])

    assert (info(load(), "good").module, info(load(), "good").version) == (first, "1.0")


def test_a_plugin_without_hooks_is_no_error(install: Install) -> None:
    """It offers nothing, and is listed so."""
    install("empty", "")

    assert (info(load(), "empty").state, info(load(), "empty").offers) == ("loaded", {})


# --- broken ones ------------------------------------------------------------------------------------


def a_pass(states: str) -> str:
    """The source of a plugin with one pass that states something of itself."""
    return (
        f"class P:\n    name = 'p'\n    {states}\n    def apply(self, g, cx): return g\n"
        "@feste.hookimpl\ndef feste_optimizations():\n    return [P()]"
    )


BROKEN: dict[str, tuple[str, str]] = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax": ("def (:", "SyntaxError: "),
    "import": ("import no_such_sdk_anywhere", "No module named 'no_such_sdk_anywhere'"),
    "feste's error": (
        "raise feste.errors.PluginError('of its own')",
        "PluginError: of its own",
    ),
    "unknown hook": (
        "@feste.hookimpl\ndef feste_bakcends():\n    return {}",
        "unknown hook 'feste_bakcends'",
    ),
    "unknown argument": (
        "@feste.hookimpl\ndef feste_run_started(evnt):\n    pass",
        "'evnt'",
    ),
    "hook raises": (
        "@feste.hookimpl\ndef feste_backends():\n    return {'x': 1 / 0}",
        "ZeroDivisionError",
    ),
    "setting of no type": (
        "from feste.context import Setting\n@feste.hookimpl\ndef feste_settings():\n"
        "    return {'depth': Setting(3, (int, str), 'how deep')}",
        "Setting(3, (<class 'int'>, <class 'str'>), 'how deep'): no value can be checked",
    ),
    "setting of the wrong type": (
        "from feste.context import Setting\n@feste.hookimpl\ndef feste_settings():\n"
        "    return {'depth': Setting('3', int, 'how deep')}",
        "Setting('3', int, 'how deep'): the default: expected int, not str",
    ),
    "returns nothing": (
        "@feste.hookimpl\ndef feste_backends():\n    pass",
        "feste_backends() must return a mapping, not None",
    ),
    "returns a list": (
        "@feste.hookimpl\ndef feste_schedulers():\n    return ['mine']",
        "feste_schedulers() must return a mapping, not ['mine']",
    ),
    "returns a generator": (
        "@feste.hookimpl\ndef feste_settings():\n    yield {}",
        "feste_settings() must return a mapping",
    ),
    "name is no text": (
        "@feste.hookimpl\ndef feste_backends():\n    return {1: 'm:C'}",
        "feste_backends() offers 1: 'm:C'",
    ),
    "backend without a class": (
        "@feste.hookimpl\ndef feste_backends():\n    return {'x': 'some.module'}",
        """feste_backends() offers 'x': 'some.module', not a name and a Backend class or "module""",
    ),
    "backend is nothing": (
        "@feste.hookimpl\ndef feste_backends():\n    return {'x': None}",
        "feste_backends() offers 'x': None",
    ),
    "scheduler is a number": (
        "@feste.hookimpl\ndef feste_schedulers():\n    return {'x': 3}",
        "feste_schedulers() offers 'x': 3",
    ),
    "setting is a value": (
        "@feste.hookimpl\ndef feste_settings():\n    return {'depth': 3}",
        "feste_settings() offers 'depth': 3, not a name and a Setting",
    ),
    "pass without apply": (
        "class P:\n    name = 'p'\n@feste.hookimpl\ndef feste_optimizations():\n    return [P()]",
        "not an object with `name` and `apply(graph, cx)`",
    ),
    "pass without a name": (
        "class P:\n    def apply(self, g, cx): return g\n"
        "@feste.hookimpl\ndef feste_optimizations():\n    return [P()]",
        "feste_optimizations() offers None: ",
    ),
    "pass is a class": (
        "class P:\n    name = 'p'\n    def apply(self, g, cx): return g\n"
        "@feste.hookimpl\ndef feste_optimizations():\n    return [P]",
        "feste_optimizations() offers 'p': <class",
    ),
    "two passes of one name": (
        "class P:\n    name = 'p'\n    def apply(self, g, cx): return g\n"
        "@feste.hookimpl\ndef feste_optimizations():\n    return [P(), P()]",
        "two passes 'p'",
    ),
    "pass of no level": (
        a_pass("level = 'E2'"),
        "PluginError: pass 'p': level='E2' is no Level",
    ),
    "pass of no phase": (
        a_pass("phase = 3"),
        "PluginError: pass 'p': phase=3 is no Phase",
    ),
    "pass of another phase": (
        a_pass(
            "from feste.optimization import Level, Phase; level, phase = Level.E2, Phase.SIMPLIFY"
        ),
        "PluginError: pass 'p': level E2 in phase SIMPLIFY",
    ),
    "pass before a number": (
        a_pass("before = 7"),
        "PluginError: pass 'p': before=7 holds no names of passes",
    ),
    "pass after passes": (
        a_pass("after = (len,)"),
        "PluginError: pass 'p': after=(<built-in function len>,) holds no names of passes",
    ),
    "pass that cannot say": (
        a_pass("level = property(lambda self: 1 / 0)"),
        "ZeroDivisionError",
    ),
    "observer is async": (
        "@feste.hookimpl\nasync def feste_run_started(event):\n    pass",
        "feste_run_started is an `async def`: write it as a `def`",
    ),
    "observer yields": (
        "@feste.hookimpl(wrapper=True)\ndef feste_run_finished():\n    return (yield)",
        "feste_run_finished has a `yield`: it would never run",
    ),
    "offer is async": (
        "@feste.hookimpl\nasync def feste_backends():\n    return {}",
        "feste_backends is an `async def`: write it as a `def`",
    ),
    "offer yields and is async": (
        "@feste.hookimpl\nasync def feste_optimizations():\n    yield",
        "feste_optimizations is an `async def`: write it as a `def`",
    ),
    "passes are none": (
        "@feste.hookimpl\ndef feste_optimizations():\n    pass",
        "feste_optimizations() must return a list of passes, not None",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_skipped(name: str, install: Install) -> None:
    """The warning says which plugin of what distribution, why, and what to do; others work."""
    source, why = BROKEN[name]
    module = install("bad", source, dist="broken-dist")
    install("good")
    registry, said = load_broken()
    found = info(registry, "bad")

    assert (found.state, found.distribution, found.offers) == ("broken", "broken-dist", {})
    assert why in found.error
    assert "\n" not in found.error  # `feste plugins` gives it one line
    assert len(said) == 1
    assert said[0].startswith(f"plugin 'bad' of broken-dist 1.0 ({module}) is skipped: ")
    assert why in said[0]
    assert said[0].endswith("or set FESTE_DISABLED_PLUGINS=bad")
    assert "good" in registry.backends
    assert set(registry.optimizations) >= {"cull", "fold", "cse", "batch"}


def test_nothing_of_a_broken_plugin_is_kept(install: Install) -> None:
    """Neither what it offers rightly nor its observers stay behind."""
    install(
        "half",
        """
@feste.hookimpl
def feste_backends():
    return {"half": "feste.testing:FakeBackend"}

@feste.hookimpl
def feste_run_started(event):
    raise AssertionError("never called")

@feste.hookimpl
def feste_settings():
    return {"depth": 3}
""",
    )
    registry, _ = load_broken()

    assert "half" not in registry.backends
    hooks = registry.manager.hook.feste_run_started.get_hookimpls()
    assert [h.plugin_name for h in hooks if "half" in h.plugin_name] == []


def test_a_half_registered_plugin_is_taken_out_again(install: Install) -> None:
    """A hook with wrong arguments does not leave the hooks before it registered."""
    install(
        "half",
        """
@feste.hookimpl
def feste_node_finished(event):
    raise AssertionError("never called")

@feste.hookimpl
def feste_run_started(evnt):
    pass
""",
    )
    registry, _ = load_broken()

    assert registry.manager.hook.feste_node_finished.get_hookimpls() == []


def test_one_module_named_twice_is_loaded_once(install: Install, tmp_path: Path) -> None:
    """The second name for a module is skipped, and does not take the first one down with it."""
    module = install("first")
    install("second", "", entry=module)
    registry, said = load_broken()

    assert (info(registry, "first").state, info(registry, "second").state) == ("loaded", "broken")
    assert "good" in registry.backends
    assert len(said) == 1


def test_damaged_metadata_of_strangers_is_no_obstacle(install: Install, tmp_path: Path) -> None:
    """Distributions without a name, or with entry points that cannot be read, are stepped over."""
    install("nameless", GOOD.replace('"good"', '"nameless"'), metadata=False)
    damaged = tmp_path / "damaged-1.0.dist-info"
    damaged.mkdir()
    (damaged / "METADATA").write_text("Metadata-Version: 2.1\nName: damaged\nVersion: 1.0\n")
    (damaged / "entry_points.txt").write_text("[feste]\nthis is no entry point\n")
    install("good")
    registry, said = load_broken()

    assert {"good", "nameless"} <= set(registry.backends)
    assert info(registry, "nameless").distribution == "(a distribution without a name)"
    assert said == []


# --- switched off -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disabled", "allowed", "loaded"),
    [
        (None, None, {"a", "b", "c"}),
        ("a", None, {"b", "c"}),
        (" a , c ", None, {"b"}),
        ("", None, {"a", "b", "c"}),
        (None, "", set()),
        (None, "b", {"b"}),
        (None, "a,b", {"a", "b"}),
        ("b", "a,b", {"a"}),
    ],
)
def test_plugins_can_be_switched_off(
    disabled: str | None,
    allowed: str | None,
    loaded: set[str],
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FESTE_DISABLED_PLUGINS blocks, FESTE_LOAD_PLUGINS allows (empty: none), by entry-point name."""
    modules = {n: install(n, GOOD.replace('"good"', f'"{n}"'), dist=f"dist-{n}") for n in "abc"}
    for variable, value in (("DISABLED", disabled), ("LOAD", allowed)):
        if value is not None:
            monkeypatch.setenv(f"FESTE_{variable}_PLUGINS", value)
    registry = load()

    assert {n for n in "abc" if n in registry.backends} == loaded
    assert {n for n in "abc" if info(registry, n).state == "loaded"} == loaded
    assert {n for n in "abc" if info(registry, n).state == "disabled"} == set("abc") - loaded
    assert {n for n in "abc" if modules[n] in sys.modules} == loaded
    assert "batch" in registry.optimizations


def test_switching_off_heals(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken plugin that is disabled is not imported, so nothing is said of it."""
    install("bad", "raise RuntimeError('boom')")
    monkeypatch.setenv("FESTE_DISABLED_PLUGINS", "bad")

    assert info(load(), "bad").state == "disabled"


# --- names ------------------------------------------------------------------------------------------

SAME = {
    "backends": '@feste.hookimpl\ndef feste_backends():\n    return {"same": "feste.testing:FakeBackend"}',
    "schedulers": '@feste.hookimpl\ndef feste_schedulers():\n    return {"same": "m:get"}',
    "settings": '@feste.hookimpl\ndef feste_settings():\n    return {"same": Setting(1, int, "x")}',
    "optimizations": (
        "class P:\n    name = 'same'\n    def apply(self, g, cx): return g\n"
        "@feste.hookimpl\ndef feste_optimizations():\n    return [P()]"
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_two_plugins_of_one_name_are_an_error(kind: str, install: Install) -> None:
    """Which one would win must not depend on chance: both distributions are named, and the fix."""
    install("one", SAME[kind], dist="dist-one", version="1.1")
    install("two", SAME[kind], dist="dist-two", version="2.2")
    with pytest.raises(PluginError) as caught:
        load()

    assert str(caught.value) == (
        f"two plugins offer {kind} 'same': dist-one 1.1 and dist-two 2.2. Uninstall one, or set "
        "FESTE_DISABLED_PLUGINS=two"
    )


@pytest.mark.parametrize("kind", SAME)
def test_two_plugins_of_one_distribution_and_one_name(kind: str, install: Install) -> None:
    """The entry points are named: the distribution alone would be named twice."""
    install("one", SAME[kind], dist="dist-one")
    install("two", SAME[kind], dist="dist-one")
    with pytest.raises(PluginError) as caught:
        load()

    assert str(caught.value) == (
        f"two plugins offer {kind} 'same': 'one' and 'two' of dist-one 1.0. Set "
        "FESTE_DISABLED_PLUGINS=two"
    )


def test_a_contradiction_of_plugins_names_their_distributions(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And how to do without one of them; what leaves one out runs, and so does no optimization."""
    source = (
        "class P:\n    name, before = {0!r}, {1!r}\n    def apply(self, g, cx): return g\n"
        "@feste.hookimpl\ndef feste_optimizations():\n    return [P()]"
    )
    install("uno", source.format("first", "second"), dist="dist-one")
    install("due", source.format("second", "first"), dist="dist-two")
    monkeypatch.setattr(plugins, "_registry", plugins.Registry())
    with pytest.raises(PluginError) as caught:
        feste.compute(feste.task(abs)(-1))
    said = str(caught.value)

    assert said.startswith("the order of passes contradicts itself: ")
    assert "first is of dist-one 1.0" in said and "second is of dist-two 1.0" in said
    assert "Set FESTE_DISABLED_PLUGINS=" in said and ": False}" in said
    assert feste.compute(feste.task(abs)(-1), optimize=False) == (1,)
    assert feste.compute(feste.task(abs)(-1), optimize={"first": False}) == (1,)
    with pytest.raises(PluginError, match="dist-two"):
        feste.explain(feste.task(abs)(-1))
    assert main(["plugins", "--check"]) == 1
    assert capsys.readouterr().err == f"feste: {said}\n"


OWN = {
    "backends": SAME["backends"].replace("same", "fake"),
    "schedulers": SAME["schedulers"].replace("same", "local"),
    "settings": SAME["settings"].replace("same", "eager"),
    "optimizations": SAME["optimizations"].replace("same", "batch"),
}


@pytest.mark.parametrize("kind", OWN)
def test_names_of_feste_are_taken(kind: str, install: Install) -> None:
    """A plugin cannot put something else in the place of Feste's own parts."""
    install("thief", OWN[kind], dist="dist-thief")
    with pytest.raises(PluginError, match=rf"{kind} '\w+': feste-core \S+ and dist-thief 1\.0"):
        load()


def test_disabling_one_of_two_heals(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out that the error names works."""
    install("one", SAME["backends"], dist="dist-one")
    install("two", SAME["backends"], dist="dist-two")
    monkeypatch.setenv("FESTE_DISABLED_PLUGINS", "two")

    assert "same" in load().backends


def test_an_unknown_name_tells_what_is_near_and_what_is_off(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error lists near names, the package to install, and plugins that are not loaded."""
    install("off")
    install("bad", "raise RuntimeError")
    monkeypatch.setenv("FESTE_DISABLED_PLUGINS", "off")
    registry, _ = load_broken()
    with pytest.raises(UnknownName) as caught:
        registry.find("backends", "fakes")
    said = str(caught.value)

    assert said.startswith(
        "no backend 'fakes'. Did you mean 'fake'? Is feste-backend-fakes installed?"
    )
    assert re.search(r"Not loaded: .*bad.*off.* \(see `feste plugins`\)", said)


# --- what a name stands for -------------------------------------------------------------------------


def test_resolve() -> None:
    """``module:attribute`` is imported when it is used; anything else is itself."""
    thing = object()

    assert resolve("feste.errors:FesteError").__name__ == "FesteError"
    assert resolve(thing) is thing


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("feste.errors:Nothing", "feste.errors has no 'Nothing'"),
        ("feste.nothing:Thing", "there is no feste.nothing"),
        ("no_such_module_at_all:Thing", "there is no no_such_module_at_all"),
        ("feste.errors", "feste.errors has no ''"),
    ],
)
def test_what_names_nothing_is_the_plugins_fault(target: str, said: str) -> None:
    """The error says what was named and what of it is not there."""
    with pytest.raises(PluginError, match=re.escape(said)) as caught:
        resolve(target)

    assert repr(target) in str(caught.value)


def test_a_missing_sdk_is_told_as_it_is(install: Install) -> None:
    """If the named module is there but its SDK is not, the SDK is what is missing."""
    module = install("sdk", "import no_such_sdk_anywhere", entry="feste.errors")
    with pytest.raises(ModuleNotFoundError, match="no_such_sdk_anywhere"):
        resolve(f"{module}:Client")


# --- one registry in a process ----------------------------------------------------------------------


def test_threads_share_one_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads ask first, plugins are loaded once."""
    monkeypatch.setattr(plugins, "_registry", None)
    barrier = threading.Barrier(6)
    found: list[Registry] = []

    def ask() -> None:
        barrier.wait(10)
        found.append(plugins.registry())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert len(found) == 6
    assert len({id(r) for r in found}) == 1


def test_the_namesake_of_2023_is_told_of(install: Install, tmp_path: Path) -> None:
    """The old distribution ``feste`` owns the same folder: the user is told to uninstall it."""
    old = tmp_path / "feste-0.2.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: feste\nVersion: 0.2.0\n")
    with pytest.warns(FesteWarning, match="feste 0.2.0 and feste-core write into the same folder"):
        Registry()


def test_every_hook_is_documented_with_its_contract() -> None:
    """Each hook of the specification says what it returns or is given."""
    from feste import hookspecs

    hooks: dict[str, Any] = {n: v for n, v in vars(hookspecs).items() if n.startswith("feste_")}

    assert sorted(hooks) == [
        "feste_backends",
        "feste_gate_closed",
        "feste_node_finished",
        "feste_optimizations",
        "feste_request_finished",
        "feste_request_started",
        "feste_run_finished",
        "feste_run_started",
        "feste_schedulers",
        "feste_settings",
    ]
    assert all(re.search(r":(returns|param event):", hook.__doc__) for hook in hooks.values())
