"""What is told of plugins before they are imported, and that they are imported for use alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import feste
from feste.cli import main
from feste.errors import PluginError, PluginWarning
from feste.plugins import Registry, resolve

Install = Callable[..., str]

NOTES = """
from pathlib import Path
with Path(__file__).with_suffix(".imported").open("a") as note:
    note.write("x")

@feste.hookimpl
def feste_backends():
    return {"noting": "feste.testing:FakeBackend", "other": "feste.testing:FakeBackend"}

@feste.hookimpl
def feste_settings():
    return {"depth": Setting(3, int, "how deep")}

@feste.hookimpl
def feste_run_finished(event):
    pass

@feste.hookimpl
def feste_optimizations():
    return []
"""


def load() -> tuple[Registry, list[str]]:
    """A fresh registry, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry()
    return registry, [str(w.message) for w in caught if issubclass(w.category, PluginWarning)]


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main(["plugins", *options])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("environment", "times"),
    [
        ({}, [0, 0, 0, 1, 1, 1]),
        ({"FESTE_DISABLED_PLUGINS": "noting"}, [0] * 6),
        ({"FESTE_LOAD_PLUGINS": ""}, [0] * 6),
    ],
)
def test_a_plugin_is_imported_for_its_use_alone(
    environment: dict[str, str], times: list[int], install: Install, tmp_path: Path
) -> None:
    """Neither importing Feste nor listing runs its code, nor anything if it is disabled; use does once."""
    module = install("noting", NOTES)
    code = f"""
import contextlib, io, json, pathlib, sys
sys.path.insert(0, {str(tmp_path)!r})
note, times = pathlib.Path({str(tmp_path / module)!r} + ".imported"), []
def count():
    times.append(len(note.read_text()) if note.exists() else 0)

import feste, feste.backend, feste.prompt, feste.testing
node = feste.task(abs)(1)
count()
from feste.cli import main
for option in ([], ["--json"]):
    with contextlib.redirect_stdout(io.StringIO()):
        main(["plugins", *option])
    count()
node.compute()
count()
for name in ("noting", "other"):
    with contextlib.suppress(feste.errors.UnknownName):
        feste.backend.create(name)
count()
with contextlib.redirect_stdout(io.StringIO()):
    main(["plugins", "--check"])
count()
print(json.dumps(times))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stderr == ""
    assert json.loads(done.stdout) == times


def test_the_list_tells_what_is_offered_without_importing(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Distribution, version, file and the names that stand in the source; what is made later, by ``--check``."""
    module = install("noting", NOTES, version="2.5")
    code, out, err = listed(capsys)
    lines = out.splitlines()
    at = lines.index("noting         enabled   feste-noting 2.5")

    assert (code, err) == (0, "")
    assert lines[at + 1 : at + 6] == [
        "               backends: noting, other",
        "               settings: depth",
        "               observes: run_finished",
        "               optimizations: see --check",
        f"               {tmp_path / module}.py",
    ]
    assert module not in sys.modules


def test_own_plugins_are_listed_as_they_load(capsys: pytest.CaptureFixture[str]) -> None:
    """For the plugins of this project, the list without imports has every name that imports give."""
    seen, known = (
        {row["name"]: row["offers"] for row in json.loads(listed(capsys, "--json", *option)[1])}
        for option in ([], ["--check"])
    )

    assert seen == known


@pytest.mark.parametrize(
    "source",
    ["def (:", "\0", "x = '" + "(" * 5000, "raise RuntimeError", "-" * 100_000 + "1", '"\\d"'],
)
def test_a_source_that_cannot_be_read_is_listed(
    source: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in the file, the plugin has its row."""
    install("odd", source)
    code, out, err = listed(capsys)

    assert (code, err) == (0, "")
    assert "odd            enabled   feste-odd 1.0" in out


# --- made for another version -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "requires",
    [
        "feste-core>=99,<100",
        "feste_core<0.0.1",
        "Feste.Core ==99.*",
        "feste-core~=99.0; os_name != ''",
    ],
)
def test_a_plugin_for_another_version_is_not_imported(
    requires: str, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its metadata require of feste-core is compared with what runs; both are named."""
    module = install("late", NOTES, requires=requires)
    registry, told = load()
    (info,) = [p for p in registry.plugins if p.name == "late"]
    code, out, _ = listed(capsys)

    assert info.state == "broken"
    assert "noting" not in registry.backends
    assert not (tmp_path / f"{module}.imported").exists()
    assert len(told) == 1
    assert told[0].startswith(
        f"plugin 'late' of feste-late 1.0 ({module}) is skipped: it was made for"
    )
    assert told[0].count(f"and this is {feste.__version__}. ") == 1
    assert code == 1
    assert "late           broken    feste-late 1.0" in out
    assert info.error in out


@pytest.mark.parametrize(
    "requires",
    [
        "",
        "feste-core",
        f"feste-core>={feste.__version__},<99",
        "feste-core>=99; extra == 'later'",
        "feste-core>=99; python_version < '3'",
        "feste-core-tools>=99",
        "feste-core >= what?",
        "£",
    ],
)
def test_other_requirements_keep_no_plugin_out(requires: str, install: Install) -> None:
    """None, a fitting one, one of an extra or another system, and what is no requirement."""
    install("noting", NOTES, requires=requires)
    registry, told = load()

    assert "noting" in registry.backends
    assert told == []


# --- names that do nothing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FESTE_DISABLED_PLUGINS", "goood", "names 'goood', but no plugin has that name"),
        ("FESTE_DISABLED_PLUGINS", "good, goood", "Did you mean 'good'?"),
        ("FESTE_DISABLED_PLUGINS", "*", r"Known: .*good.*FESTE_LOAD_PLUGINS= without a name"),
        ("FESTE_DISABLED_PLUGINS", "feste-good", "'feste-good', but no plugin"),
        ("FESTE_LOAD_PLUGINS", "good,\x1b[2Jx", r"names '\\x1b\[2Jx'"),
        ("FESTE_STROE", "runs.db", "FESTE_STROE is not read by Feste. Did you mean 'FESTE_STORE'?"),
        ("FESTE_DISABLE_PLUGINS", "good", "Did you mean 'FESTE_DISABLED_PLUGINS'?"),
        ("FESTE_DEPHT", "1", "Did you mean 'FESTE_DEPTH'?"),
    ],
)
def test_a_name_that_does_nothing_is_told(
    variable: str,
    value: str,
    said: str,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who wants to block a plugin, or to set something, learns that nothing was blocked or set."""
    install("good", NOTES)
    monkeypatch.setenv(variable, value)
    _, told = load()
    _, _, err = listed(capsys)

    assert len(told) == 1
    assert re.search(said, told[0])
    assert err == f"feste: {told[0]}\n"


@pytest.mark.parametrize("name", ["FESTE_DEPTH", "FESTE_KEEP", "FESTE_MY_KEY", "MY_FESTE_STROE"])
def test_other_variables_are_no_ones_business(
    name: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings, keys that have names of their own, and what is far from every name, are left alone."""
    install("good", NOTES)
    monkeypatch.setenv(name, "paid")

    assert load()[1] == []


# --- plugins that crash -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "class Odd(BaseException): pass\nraise Odd('boom')",
        "class Odd(BaseException): pass\n@feste.hookimpl\ndef feste_backends():\n    raise Odd('boom')",
        "raise GeneratorExit('boom')",
        "import asyncio\nraise asyncio.CancelledError('boom')",
        "@feste.hookimpl\ndef feste_settings():\n    raise SystemExit('boom')",
    ],
)
def test_a_plugin_may_raise_what_it_likes(source: str, install: Install) -> None:
    """An error beside ``Exception`` is the plugin's, too; the program goes on without it."""
    install("bad", source)
    registry, told = load()

    assert [p.state for p in registry.plugins if p.name == "bad"] == ["broken"]
    assert len(told) == 1
    assert told[0].startswith("plugin 'bad' of feste-bad 1.0")
    assert "boom" in told[0]


def test_ctrl_c_is_no_fault_of_a_plugin(install: Install) -> None:
    """Whoever interrupts while plugins load is heard."""
    install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry()


def test_a_backend_whose_import_exits_is_named(install: Install) -> None:
    """``sys.exit`` in the module of a class does not end the program without a word."""
    module = install("exits", "raise SystemExit(3)")
    with pytest.raises(PluginError, match=rf"a plugin names '{module}:C'.*SystemExit: 3"):
        resolve(f"{module}:C")


def test_an_error_of_an_import_names_the_plugin(install: Install) -> None:
    """The error stays what it is; a note tells whose it is."""
    module = install("sdk", "raise RuntimeError('no licence')", entry="feste.errors")
    offer = f'@feste.hookimpl\ndef feste_backends():\n    return {{"sdk": "{module}:C"}}'
    install("lazy", offer)
    registry, _ = load()
    with pytest.raises(RuntimeError, match="no licence") as caught:
        registry.find("backends", "sdk")

    assert caught.value.__notes__ == [f"{module}:C is the backend 'sdk' of feste-lazy 1.0"]
