"""The ``feste`` command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import feste
from feste import plugins
from feste.cli import main


@pytest.fixture
def own_parts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry without whatever else is installed here."""
    monkeypatch.setattr(plugins, "_registry", plugins.Registry(discover=False))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """``feste --version`` is the version of the package."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"feste {feste.__version__}\n"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without one, or with an unknown one, the usage is shown and the exit code is 2."""
    for arguments in ([], ["plugin"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "usage: feste" in capsys.readouterr().err


def test_plugins_as_a_table(own_parts_only: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Each plugin with state, distribution and version; below it what it registers."""
    code = main(["plugins", "--check"])
    version = feste.__version__

    assert code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"optimization   loaded    feste-core {version}",
        "               optimizations: cull, fold, cse, resolve, fuse, sample_fusion, batch, prefix, lint, critical_path",
        f"scheduler      loaded    feste-core {version}",
        "               schedulers: local",
        f"testing        loaded    feste-core {version}",
        "               backends: fake",
    ]


def test_plugins_as_json(own_parts_only: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The same for programs."""
    code = main(["plugins", "--check", "--json"])
    rows = json.loads(capsys.readouterr().out)

    assert code == 0
    assert rows[1] == {
        "name": "scheduler",
        "module": "feste.scheduler._hooks",
        "distribution": "feste-core",
        "version": feste.__version__,
        "state": "loaded",
        "offers": {"schedulers": ["local"]},
        "error": "",
        "file": "",
    }


def test_the_command_imports_no_sdk_nor_machinery() -> None:
    """Importing plugins reads their light modules only: no SDK, no Dask, no templates."""
    code = """
import contextlib, io, sys
from feste.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["plugins", "--check"])
heavy = "openai cohere distributed dask jinja2 langcodes aiohttp httpx pydantic numpy"
print([name for name in heavy.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_command_is_installed_where_feste_is() -> None:
    """``feste`` and ``python -m feste`` are the same program."""
    script = shutil.which("feste", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("feste runs from its sources here")
    env = {**os.environ, "FESTE_LOAD_PLUGINS": ""}
    runs = [
        subprocess.run([*command, "plugins"], env=env, capture_output=True, text=True)
        for command in ([script], [sys.executable, "-m", "feste"])
    ]

    assert runs[0].returncode == runs[1].returncode == 0
    assert runs[0].stdout == runs[1].stdout
