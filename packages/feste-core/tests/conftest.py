"""What several test files share: distributions of other people, made for one test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feste.plugins import Registry


class Site:
    """A folder outside the repository, in which throw-away distributions are installed.

    :param folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, source: str, *, point: str = "", module: str = "") -> None:
        """Install version 1.0 of a distribution with one module and one entry point.

        :param name: the distribution's name.
        :param source: the module's text.
        :param point: the name of the entry point; the distribution's by default.
        :param module: what the entry point names; a module called like the distribution by default.
        """
        file = name.replace("-", "_")
        info = self.folder / f"{file}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        entry = f"[feste]\n{point or name} = {module or file}\n"
        (info / "entry_points.txt").write_text(entry)
        (self.folder / f"{file}.py").write_text(source)

    def start(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a new interpreter that finds these distributions.

        :param arguments: of the interpreter.
        :param environment: variables to add.
        """
        path = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)

    def run(self, code: str, **environment: str) -> Any:
        """Run code in such an interpreter, where a warning is an error; return the JSON it prints.

        :param code: the code; ``json`` is imported.
        :param environment: variables to add.
        """
        done = self.start("-W", "error", "-c", f"import json\n{code}", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def registry(self) -> Registry:
        """Look for plugins here, in this process, as a new one would."""
        return Registry()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder for distributions; what was imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
