"""Feste's own plugins, and the example of one, use what others can use: public names only."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGINS = {
    "packages/feste-backend-openai": "feste.backend.openai",
    "packages/feste-backend-cohere": "feste.backend.cohere",
    "packages/feste-scheduler-dask": "feste.scheduler.dask",
    "examples/feste-squeeze": "feste_squeeze",
}
#: These have a page of their own.
PAGES = {"feste.errors", "feste.hookspecs"}


def public_modules() -> set[str]:
    """The modules of the page of public names."""
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    return PAGES | set(re.findall(r"automodule:: ([\w.]+)", page))


def imported(package: str) -> Iterator[tuple[str, str]]:
    """Each module of core that a plugin imports from, and the name."""
    own = PLUGINS[package]
    for path in (ROOT / package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("feste"):
                module = str(node.module)
                if module != own and not module.startswith(f"{own}."):
                    yield from ((module, alias.name) for alias in node.names)


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_imports_public_names_only(package: str) -> None:
    """If a plugin needs a private name, core lacks a public one."""
    if not (ROOT / "docs/reference/api.md").is_file():
        pytest.skip("the reference is in the repository, and this is no checkout of it")
    public = public_modules()
    own = PLUGINS[package]
    private = [
        f"{module}.{name}"
        for module, name in imported(package)
        if f"{module}.{name}" != own
        and (module not in public or name not in importlib.import_module(module).__all__)
    ]

    assert private == []
