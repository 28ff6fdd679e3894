"""The audit of what we ship can fail: each of its questions finds what is planted."""

import json
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = {"cyclonedx-bom", "detect-secrets", "pip-licenses", "pip_audit", "zizmor"}
if missing := TOOLS - {found.name for found in distributions()}:
    reason = f"without {', '.join(sorted(missing))}; `nox -s audit` runs these tests"
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit() -> Iterator[ModuleType]:
    """The module of the audit, which is in no package."""
    sys.path.insert(0, str(ROOT / "tools"))
    import audit

    yield audit
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with three packages: one free, one under the GPL, one that
    does not say.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    place = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    licences = {"free": "License-Expression: MIT\n", "bound": "License-Expression: GPL-3.0-only\n"}
    for name in ("free", "bound", "silent"):
        info = Path(place) / f"{name}-1.0.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licences.get(name, '')}"
        (info / "METADATA").write_text(text, encoding="utf-8")
    return home / "bin" / "python"


def repository(folder: Path, **files: str) -> Path:
    """A git repository that tracks these files."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@contextmanager
def feed(*flawed: str) -> Iterator[str]:
    """A list of vulnerabilities on this machine, which has one for each of these packages."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            span = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}
            place = {"package": {"name": name, "ecosystem": "PyPI"}, "ranges": [span]}
            flaw = {"id": "PYSEC-2026-1", "details": "planted", "affected": [place]}
            times = {"published": "2026-01-01T00:00:00Z", "modified": "2026-01-01T00:00:00Z"}
            body = json.dumps({"vulns": [flaw | times]} if name in flawed else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def test_a_licence_that_is_not_on_the_list_is_found(
    audit: ModuleType, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package under the GPL, and one that names no licence, are findings; all are printed."""
    found = audit.licences(python)

    assert sorted(found) == ["bound 1.0: licence 'GPL-3.0-only'", "silent 1.0: licence 'UNKNOWN'"]
    assert "free 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("MIT", True),
        ("MPL-2.0 AND MIT", True),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", True),
        ("Apache Software License; MIT License", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT; GNU General Public License v3 (GPLv3)", False),
        ("MIT OR LGPL-3.0-only", False),  # somebody has to look at it
        ("", False),
    ],
)
def test_every_licence_that_is_named_must_be_allowed(
    audit: ModuleType, licence: str, allowed: bool
) -> None:
    """One of several that is not on the list is enough."""
    assert audit.is_allowed(licence) is allowed


def test_the_bill_of_materials_lists_what_is_installed(
    audit: ModuleType, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is CycloneDX, and has each package; one that it lacks, and only that, is a finding."""
    into, packages = tmp_path / "parts.json", audit.installed(python)
    monkeypatch.setattr(audit, "installed", lambda _: packages | {"more 2.0": "MIT"})
    found = audit.bill_of_materials(python, into)

    assert found == ["more 2.0 is not in the bill of materials"]
    assert json.loads(into.read_text())["bomFormat"] == "CycloneDX"


def test_a_planted_key_is_found(audit: ModuleType, tmp_path: Path) -> None:
    """Keys, by form or by the name before them, are found by line; made-up and allowed ones pass."""
    letters = "".join(chr(ord("a") + n % 26) for n in range(0, 260, 7))  # none stands in this file
    key, token = f"{letters[:30]}42", f"ghp_{letters[:34]}7A"
    openai = f"sk-{letters[:18]}4BT3BlbkFJ{letters[5:23]}9X"
    folder = repository(
        tmp_path,
        config=f"nothing = 1\napi_key = '{key}'\n",
        token=f"push('{token}')\n",
        client=f"ask('{openai}')\n",
        pem=f"text = '-----BEGIN RSA {'PRIVATE'} KEY-----'\n",
        made_up=f"api_key = 'sk-canary-{key}'\n",
        allowed=f"api_key = '{key}'  # pragma: allowlist secret\n",
    )
    (folder / "untracked.py").write_text(f"api_key = '{key}'\n", encoding="utf-8")
    found = {line.partition(" ")[0] for line in audit.secrets(folder)}

    assert found == {"config.py:2:", "token.py:1:", "client.py:1:", "pem.py:1:"}


def test_an_unsafe_workflow_is_found(audit: ModuleType, tmp_path: Path) -> None:
    """A workflow that a fork can start, with an action that is not pinned, is a finding."""
    place = tmp_path / ".github" / "workflows"
    place.mkdir(parents=True)
    text = (
        "on: pull_request_target\njobs: {a: {runs-on: x, steps: [{uses: actions/checkout@v6}]}}\n"
    )
    (place / "bad.yml").write_text(text, encoding="utf-8")

    assert audit.workflows(tmp_path) == ["zizmor has findings in .github"]


def test_a_known_vulnerability_is_found(audit: ModuleType, python: Path) -> None:
    """It is a finding with its identifier, strict or not."""
    with feed("bound") as url:
        found = audit.vulnerabilities(python, strict=False, url=url)

    assert found == ["bound 1.0: PYSEC-2026-1, mended in ['1.1']"]


def test_a_list_that_cannot_be_reached_is_said_and_when_strict_a_finding(
    audit: ModuleType, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network the audit says what it left out; a release needs an answer."""
    with feed() as url:
        pass  # nobody listens there any more

    assert audit.vulnerabilities(python, strict=False, url=url) == []
    assert "NOT ASKED ABOUT all packages" in capsys.readouterr().out
    [finding] = audit.vulnerabilities(python, strict=True, url=url)
    assert finding.startswith("not asked about all packages")
