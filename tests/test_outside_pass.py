"""Passes of a distribution of its own: built, installed, found, explained, switched, checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "feste-squeeze"

CARELESS = '''
"""A pass that drops a call and keeps silent about it."""

import feste
from feste_squeeze.passes import Squeeze


class Careless(Squeeze):
    name = "careless"

    def apply(self, graph, cx):
        lost = graph.calls()[0].key
        nodes = {key: node for key, node in graph.nodes.items() if key != lost}
        return super().apply(graph.replace(nodes=nodes), cx)


@feste.hookimpl
def feste_optimizations():
    return [Careless()]
'''

USE = """
import json, warnings
import feste
from feste.testing import FakeBackend

def ask(**settings):
    llm = FakeBackend()
    calls = [llm.chat(f"{i}" + " " * 40) for i in range(4)]
    told = dict(raised="", warned=[], sent=[], explained="")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            plan = feste.explain(calls, **settings)
            told["explained"] = " ".join(str(plan).split())
            told["passes"] = [report.name for report in plan.plan.passes]
            feste.compute(calls, **settings)
        except feste.errors.PluginError as error:
            told["raised"] = str(error)
    told["warned"] = [str(w.message) for w in caught if w.category is feste.errors.PluginWarning]
    told["sent"] = sorted(len(r.body["messages"][0]["content"]) for r in llm.requests)
    return told

print(json.dumps([
    ask(),
    ask(optimize={"squeeze": True}),
    ask(optimize={"blanks": False}),
    ask(optimize={"squeeze": True}, max_rewrites=1),
    ask(optimize={"careless": True}),
    ask(optimize={"careless": True}, strict=True),
]))
"""
#: What is sent of the four prompts: as written, and squeezed.
WRITTEN, SQUEEZED = [41] * 4, [1] * 4


def python(folder: Path, *arguments: str, cwd: Path | None = None) -> str:
    """Run a new interpreter that finds what is installed in the folder; return what it printed."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of the example installed, and the tests of its source beside it."""
    if not EXAMPLE.is_dir():
        pytest.skip("the example is in the repository, and this is no checkout of it")
    pytest.importorskip("hatchling")
    built, site = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, built / "source")
    python(built, "-m", "hatchling", "build", "-t", "wheel", "-d", "..", cwd=built / "source")
    [wheel] = built.glob("*.whl")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    python(built, "-m", "pip", "install", "-q", *options, "--target", str(site), str(wheel))
    shutil.move(built / "source" / "tests", site / "tests")
    info = site / "feste_careless-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: feste-careless\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[feste]\ncareless = feste_careless\n")
    (site / "feste_careless.py").write_text(CARELESS)
    return site


@pytest.fixture(scope="module")
def asked(site: Path) -> Any:
    """What a program was told that ran its calls with six kinds of settings."""
    return json.loads(python(site, "-c", USE))


def test_its_own_tests_pass(site: Path) -> None:
    """On the installed wheel, with what an author has: pytest, hypothesis, and ``feste.testing``."""
    told = python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")

    assert re.search(r"^\d+ passed", told, re.MULTILINE)


def test_the_command_lists_it(site: Path) -> None:
    """Distribution, version, and what it offers."""
    rows = {
        row["name"]: row
        for row in json.loads(python(site, "-m", "feste", "plugins", "--check", "--json"))
    }
    row = rows["squeeze"]

    assert (row["distribution"], row["version"], row["state"]) == (
        "feste-squeeze",
        "0.1.0",
        "loaded",
    )
    assert row["offers"] == {"optimizations": ["squeeze", "blanks"], "settings": ["squeeze_worth"]}


def test_it_is_ordered_among_the_others(asked: Any) -> None:
    """``after`` holds across distributions: by its name it would be the first of its phase."""
    passes = asked[0]["passes"]

    assert passes.index("blanks") > passes.index("sample_fusion") < passes.index("batch")
    assert asked[1]["passes"].index("squeeze") < passes.index("blanks")


def test_explain_shows_its_remarks(asked: Any) -> None:
    """The one that is named says what it did, the other one advises to name it."""
    advice = "spare white space: optimize={'squeeze': True} leaves it out"

    assert advice in asked[0]["explained"]
    assert "squeezed the prompts of 4 calls" in asked[1]["explained"]
    assert advice not in asked[1]["explained"]


def test_it_can_be_switched_off(asked: Any) -> None:
    """A pass that is off neither runs nor appears."""
    assert "blanks" not in asked[2]["passes"]
    assert "white space" not in asked[2]["explained"]


def test_the_one_that_changes_answers_runs_only_where_it_is_named(asked: Any) -> None:
    """E2: by default each prompt is sent as it was written."""
    assert "squeeze" not in asked[0]["passes"]
    assert [asked[0]["sent"], asked[1]["sent"]] == [WRITTEN, SQUEEZED]


def test_it_is_cut_off_after_some_rewrites(asked: Any) -> None:
    """``max_rewrites`` lets one prompt be squeezed."""
    assert asked[3]["sent"] == SQUEEZED[:1] + WRITTEN[1:]


def test_a_pass_that_loses_a_call_is_skipped_by_name(asked: Any) -> None:
    """The run goes on with the graph before it."""
    told = asked[4]

    assert told["sent"] == WRITTEN
    assert len(told["warned"]) == 2  # explain and compute
    assert "the optimization pass 'careless' was skipped" in told["warned"][0]
    assert "1 calls are gone without an account" in told["explained"]


def test_a_pass_that_loses_a_call_is_refused_in_strict_mode(asked: Any) -> None:
    """The error names the pass, and nothing is sent."""
    told = asked[5]

    assert told["raised"].startswith("the pass 'careless' broke the rules: 1 calls are gone")
    assert told["sent"] == []


def test_the_guide_shows_the_example_as_it_is() -> None:
    """Each file that the guide shows, or part of one, stands in the example word for word."""
    page = ROOT / "docs" / "howto" / "add-an-optimization.md"
    if not page.is_file():
        pytest.skip("the documents are in the repository, and this is no checkout of it")
    shown = re.findall(r"```(?:py|toml)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    files = [*EXAMPLE.rglob("*.py"), EXAMPLE / "pyproject.toml"]
    texts = [file.read_text(encoding="utf-8") for file in files]

    assert shown
    for block in shown:
        assert any(block.strip() in text for text in texts), block
