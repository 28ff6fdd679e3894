"""The documents say what the code does: hooks, settings, errors, names, and the packages of how-tos."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any, get_args

import pytest

import feste
from feste import context, errors, events, hookspecs
from feste.backend import error_for_status
from feste.graph import FesteGraph
from feste.hookspecs import hookspec
from feste.optimization import Optimizer, invariants
from feste.optimization.base import level_of, phase_of


def find_root() -> Path | None:
    """The root of the repository, or None where these tests stand without it."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "docs" / "index.md").is_file():
            return folder
    return None


ROOT = find_root()
HOOKS = [name for name in vars(hookspecs) if name.startswith("feste_")]
PACKAGES = ["add-a-backend", "add-a-scheduler"]


def document(name: str) -> str:
    if ROOT is None:
        pytest.skip("the documents are in the repository, and this is no checkout of it")
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell; back quotes are taken off."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


# --- hooks ------------------------------------------------------------------------------------------


def test_all_hookspecs_are_known_here() -> None:
    """A hook is a function of the module that carries pluggy's mark; no other name begins so."""
    marked = [n for n, f in vars(hookspecs).items() if hasattr(f, f"{hookspec.project_name}_spec")]

    assert marked == HOOKS


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_is_a_heading_with_its_arguments(name: str) -> None:
    """A heading of the page of hooks is the hook's name with its arguments."""
    arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)

    headings = re.findall(r"^#+ `?(feste_\w+\(.*?\))`?$", document("reference/hooks"), re.MULTILINE)

    assert f"{name}({arguments})" in headings


def test_no_heading_names_a_hook_that_there_is_not() -> None:
    """A hook that was renamed or removed leaves no heading behind."""
    headings = re.findall(r"^#+ `?(feste_\w+)", document("reference/hooks"), re.MULTILINE)

    assert sorted(headings) == sorted(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_is_used_in_a_test(name: str) -> None:
    """Some test file implements or calls the hook."""
    document("reference/hooks")  # skips outside of the repository
    assert ROOT is not None
    files = [*ROOT.glob("packages/*/tests/*.py"), *ROOT.glob("tests/**/*.py")]
    others = [file for file in files if file.name != Path(__file__).name]

    assert any(name in file.read_text(encoding="utf-8") for file in others)


# --- settings and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", context.SETTINGS)
def test_each_setting_is_in_the_table_with_its_default(name: str) -> None:
    """The second cell of a setting's row is its default; another is its environment variable."""
    says(settings()[0].get(name, []), name, context.SETTINGS[name])


def test_no_row_names_a_setting_that_there_is_not() -> None:
    """A setting that was renamed or removed leaves no row behind."""
    assert settings()[0].keys() == context.SETTINGS.keys()


def test_the_settings_of_the_dask_plugin_are_there() -> None:
    """They have a table of their own, checked likewise."""
    declared = pytest.importorskip("feste.scheduler.dask._hooks").feste_settings()
    found = settings()[1]

    assert found.keys() == declared.keys()
    for name, setting in declared.items():
        says(found[name], name, setting)


def settings() -> list[dict[str, list[str]]]:
    """The rows of Feste's own settings, and of those of its plugin for Dask."""
    own, _, dask = document("reference/settings").partition("## Settings of `feste-scheduler-dask`")
    return [rows(own), rows(dask)]


def says(cells: list[str], name: str, setting: context.Setting) -> None:
    """Check a row of settings."""
    assert cells, f"settings.md has no row for {name}"
    assert cells[0] == f"`{setting.default!r}`"
    assert f"`FESTE_{name.upper()}`" in cells


def test_the_passes_are_listed_as_they_run() -> None:
    """The page of settings has each of Feste's passes, with phase and level, in running order."""
    own = [p for p in Optimizer().passes if type(p).__module__.startswith("feste.")]
    wanted = [(phase_of(p).name, p.name, level_of(p).name) for p in own]
    table = re.findall(
        r"^\| ([A-Z]+) \| `(\w+)` \| (\w+) \|", document("reference/settings"), re.MULTILINE
    )

    assert [row for row in table if row[1] in {p.name for p in own}] == wanted


CLASSES = [name for name in errors.__all__ if inspect.isclass(getattr(errors, name))]


@pytest.mark.parametrize("name", CLASSES)
def test_each_error_is_on_the_page_of_errors(name: str) -> None:
    """Each class has a row or a heading that says what to do about it."""
    page = document("reference/errors")
    headings = re.findall(r"^#+ `(\w+)`$", page, re.MULTILINE)

    assert name in rows(page) or name in headings


def test_no_row_names_an_error_that_there_is_not() -> None:
    """A class that was renamed or removed leaves no row behind."""
    page = document("reference/errors")

    assert rows(page).keys() | set(re.findall(r"^#+ `(\w+)`$", page, re.MULTILINE)) <= set(CLASSES)


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in feste.__all__ if not n.startswith("__")])
def test_each_name_of_the_front_door_has_an_example(name: str) -> None:
    """What ``import feste`` offers is a module, or says in its docstring how it is used."""
    value = getattr(feste, name)
    if isinstance(value, ModuleType):
        assert value.__doc__
    elif name == "hookimpl":  # an object of pluggy's, shown in the module of hooks
        assert "@feste.hookimpl" in (hookspecs.__doc__ or "")
    else:
        assert ">>> " in (inspect.getdoc(value) or "")


# --- what a pass may not do -------------------------------------------------------------------------


def raised(source: str) -> set[str]:
    """The messages of all ``GraphError`` that a source raises, with dots for what is filled in."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    messages = [
        c.args[0] for c in calls if isinstance(c.func, ast.Name) and c.func.id == "GraphError"
    ]
    parts = [m.values if isinstance(m, ast.JoinedStr) else [m] for m in messages]
    return {"".join(p.value if isinstance(p, ast.Constant) else "…" for p in one) for one in parts}


def test_the_guide_of_passes_names_all_that_is_checked() -> None:
    """Its table holds the errors of a broken rule as they are raised, and no others."""
    section = document("howto/add-an-optimization").split("## What is checked")[1].split("\n## ")[0]
    sources = [invariants, FesteGraph.check, FesteGraph.order]
    wanted = set[str]().union(*(raised(dedent(inspect.getsource(one))) for one in sources))

    assert rows(section).keys() == wanted


# --- the packages that how-tos build ----------------------------------------------------------------


def files_of(page: str) -> dict[str, str]:
    """The files of a page: a path in back quotes begins the paragraph before each of their blocks."""
    found = re.findall(
        r"^`([\w./-]+)`(?:(?!\n\n).)*:\n\n```(?:toml|py)\n(.*?)^```$",
        page,
        re.MULTILINE | re.DOTALL,
    )
    return dict(found)


def installed(folder: Path, page: str) -> Path:
    """Write the files of a page, with the metadata that an installation would make of them."""
    files = files_of(page)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    source = folder / "src" if (folder / "src").is_dir() else folder
    info = source / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    points = [f"{name} = {value}\n" for name, value in project["entry-points"]["feste"].items()]
    (info / "entry_points.txt").write_text("".join(["[feste]\n", *points]), encoding="utf-8")
    return source


def run(folder: Path, source: Path, *command: str) -> str:
    path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PACKAGES)
def test_the_package_of_a_how_to_is_found_and_passes_its_own_tests(
    page: str, tmp_path: Path
) -> None:
    """Whoever copies the files of the page has a plugin that works."""
    text = document(f"howto/{page}")
    source = installed(tmp_path, text)
    name = tomllib.loads(files_of(text)["pyproject.toml"])["project"]["name"]

    listed = run(tmp_path, source, "feste", "plugins", "--check")
    tested = run(tmp_path, source, "pytest", "-q", "-p", "no:cacheprovider", "tests")

    assert f"loaded    {name} 0.1.0" in listed
    assert " passed" in tested


@pytest.mark.parametrize("page", PACKAGES)
def test_each_block_of_a_how_to_is_a_file_or_runs_by_itself(page: str) -> None:
    """Blocks fenced as ``py`` are files, named before them; those fenced as ``python`` run as they are."""
    text = document(f"howto/{page}")

    assert text.count("\n```py\n") == sum(path.endswith(".py") for path in files_of(text))


# --- the picture of the read-me ---------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    return sorted(re.findall(r"<text[^>]*>([^<]+)</text>", svg))


def test_the_picture_of_the_read_me_is_that_of_its_program() -> None:
    """Whoever changes the program draws its graph anew: report.visualize("docs/_static/graph.svg")."""
    pytest.importorskip("feste.backend.openai")
    document("index")  # skips outside of the repository
    assert ROOT is not None
    read_me = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "_static" / "graph.svg").read_text(encoding="utf-8")
    program = read_me.split("```python\n")[1].split("print(")[0]
    names: dict[str, Any] = {}

    exec(compile(program, "README.md", "exec"), names)

    assert texts(picture) == texts(names["report"].visualize()) != []


def test_the_plan_of_the_guide_is_that_of_its_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes what ``explain`` prints, or the passes, copies the text anew."""
    monkeypatch.setenv("COLUMNS", "100")
    page = document("howto/read-a-plan")
    program = page.split("```python\n")[1].split("```")[0]
    shown = page.split("```text\n")[1].split("```")[0]

    exec(compile(program, "job.py", "exec"), {})

    assert capsys.readouterr().out == shown


# --- names that change ------------------------------------------------------------------------------


def test_each_cause_of_a_wait_is_explained() -> None:
    """The table of causes has each of them, in the order of the data."""
    page = document("howto/observe-runs").partition("### What it waited for")[2]
    causes = list(rows(page.partition("###")[0]))

    assert causes == list(events.CAUSES)


def test_each_state_of_a_node_is_explained() -> None:
    """The page of reports and the hook's entry name every state, and none that there is not."""
    states = get_args(events.State)
    table = re.findall(r"^\| `(\w+)` \|", document("howto/observe-runs"), re.MULTILINE)
    entry = document("reference/hooks").split("### `feste_node_finished(event)`")[1].split("###")[0]

    assert [row for row in table if row in states] == list(states)
    assert sorted(re.findall(r'`"(\w+)"`', entry)) == sorted(states)


def test_the_table_of_statuses_is_that_of_the_code() -> None:
    """Each status of the table becomes the error that stands beside it."""
    page = document("howto/handle-failures")
    found = re.findall(r"^\| ([^|]*\d{3}[^|]*) \| `(\w+)`", page, re.MULTILINE)
    for statuses, name in found:
        for status in map(int, re.findall(r"\d{3}", statuses)):
            said = "billing details" if name == "QuotaExhausted" else ""
            headers = {"retry-after": "1"} if name == "RateLimited" else {}
            error = error_for_status(status, said, headers=headers)

            assert type(error).__name__ == name, status

    assert len(found) > 5


def test_no_page_bounds_a_reasoning_model_by_max_tokens() -> None:
    """Reasoning models refuse ``max_tokens``: a page that asks one has ``max_completion_tokens``."""
    document("index")
    assert ROOT is not None
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")]
    for page in pages:
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            assert "gpt-5" not in block or "max_tokens" not in block, page
