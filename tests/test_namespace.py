"""One tree from four packages: ``feste`` is a regular package of core that is open to plugins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import feste

# Words of the public interface that must always be the function, whatever was imported before.
FUNCTIONS = ["task", "map", "stream", "explain", "compute"]

IMPORT_ALL_THEN_LOOK = """
import importlib, sys, types
for name in {modules!r}:
    importlib.import_module(name)
for name in {modules!r}:
    package = sys.modules[name]
    for word in getattr(package, "__all__", ()):
        hidden = f"{{name}}.{{word}}" in sys.modules
        if hidden and not isinstance(getattr(package, word), types.ModuleType):
            print(f"{{name}}.{{word}} is both a module and something else")
"""


def modules() -> list[str]:
    """Every module of feste that is installed, plugins included, public or not."""
    found = set()
    for root in map(Path, feste.__path__):
        for path in root.rglob("*.py"):
            parts = ("feste", *path.relative_to(root).with_suffix("").parts)
            found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(found - {"feste.__main__"})


def fresh(code: str, *paths: Path) -> str:
    """Run code in a new interpreter, where a warning is an error, and return what it prints."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", modules())
def test_module_imports_alone(module: str) -> None:
    """No module needs another to be imported first, and none warns."""
    assert fresh(f"import {module}") == ""


@pytest.mark.parametrize("kind", ["backend", "scheduler"])
def test_package_is_open_to_folders_elsewhere(kind: str, tmp_path: Path) -> None:
    """A plugin's folder is found wherever it is on the path, with no ``__init__.py`` above it."""
    plugin = tmp_path / "feste" / kind / "demo"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("WORD = 'here'\n", encoding="utf-8")
    code = f"import feste, feste.{kind}.demo as demo; print(demo.WORD, callable(feste.compute))"

    assert fresh(code, tmp_path) == "here True\n"


def test_core_stays_the_one_regular_package(tmp_path: Path) -> None:
    """A folder ``feste`` that comes first on the path opens the package, it does not replace it."""
    (tmp_path / "feste").mkdir()
    code = "import feste; print(feste.__file__ is not None)"

    assert fresh(code, tmp_path) == "True\n"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_has_no_module_of_its_name(name: str) -> None:
    """An import can never put a module in the place of the function."""
    assert f"feste.{name}" not in modules()
    assert name not in feste.__all__ or callable(getattr(feste, name))


def test_no_public_name_is_hidden_by_a_module() -> None:
    """With everything imported, each public name is still what its package means by it."""
    assert fresh(IMPORT_ALL_THEN_LOOK.format(modules=modules())) == ""
