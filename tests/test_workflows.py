"""The workflows are pinned, ask for little, and let nothing from outside near a release."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
PATHS = sorted(FOLDER.glob("*.y*ml"))

each_workflow = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def workflow(path: Path) -> dict[str, Any]:
    """A workflow as a table; YAML 1.1 takes its key ``on`` for True."""
    table: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    table["on"] = table.pop(True)
    return table


def steps(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every step of every job."""
    for job in table["jobs"].values():
        yield from job["steps"]


def release() -> dict[str, Any]:
    """The workflow that publishes."""
    return workflow(FOLDER / "release.yml")


def may_write(rights: dict[str, str]) -> set[str]:
    """The rights that are more than to read."""
    return {name for name, right in rights.items() if right != "read"}


def test_there_are_workflows() -> None:
    """The rules below look at something."""
    assert {path.name for path in PATHS} == {"chaos.yml", "ci.yml", "release.yml"}


@each_workflow
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """A tag can be moved; the version stands in a comment, which Dependabot keeps up."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    pinned = re.compile(r" *- uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")

    assert [line for line in lines if not pinned.fullmatch(line)] == []
    assert len(lines) == sum("uses" in step for step in steps(workflow(path)))


@each_workflow
def test_rights_are_given_job_by_job(path: Path) -> None:
    """A workflow has no rights, each job names its own, and only jobs of a release may write."""
    table = workflow(path)
    writing = {name for name, job in table["jobs"].items() if may_write(job["permissions"])}

    assert table["permissions"] == {}
    assert writing == ({"publish", "notes"} if path.stem == "release" else set())


@each_workflow
def test_nothing_of_a_fork_runs_with_rights(path: Path) -> None:
    """No trigger runs a fork's code with our rights, and no checkout leaves a token behind."""
    table = workflow(path)
    checkouts = [step for step in steps(table) if "actions/checkout@" in step.get("uses", "")]

    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(table["on"])
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@each_workflow
def test_commands_take_no_text_from_expressions(path: Path) -> None:
    """What a title or a branch is called is never pasted into a script."""
    assert [step["run"] for step in steps(workflow(path)) if "${{" in step.get("run", "")] == []


@each_workflow
def test_every_session_exists(path: Path) -> None:
    """What a workflow asks nox for is in the noxfile."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    table = workflow(path)
    asked = {
        name for step in steps(table) for name in re.findall(r"nox -s (\w+)", step.get("run", ""))
    }
    for job in table["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        asked.update(matrix.get("session", ()), (m["session"] for m in matrix.get("include", ())))

    assert asked <= sessions


def test_the_systems_and_pythons_are_those_of_the_packages() -> None:
    """What the classifiers name is tested, and nothing else is claimed."""
    text = (ROOT / "packages" / "feste-core" / "pyproject.toml").read_text(encoding="utf-8")
    classifiers = " ".join(tomllib.loads(text)["project"]["classifiers"])
    matrix = workflow(FOLDER / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]

    assert matrix["python"] == re.findall(r"Python :: (\d\.\d+)", classifiers)
    assert [name[:5] for name in matrix["os"]] == ["ubunt", "macos"]


def test_a_release_begins_with_a_tag_only() -> None:
    """No branch, pull request, schedule or hand starts it."""
    assert release()["on"] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}


def test_a_release_restores_no_cache() -> None:
    """A cache that other workflows fill could bring something into what is published."""
    text = (FOLDER / "release.yml").read_text(encoding="utf-8")
    lines = [line.partition("#")[0] for line in text.splitlines()]

    assert [line for line in lines if "cache" in line] == []


def test_only_one_job_has_an_identity_and_it_runs_nothing_of_ours() -> None:
    """It waits for the protected environment, and has no checkout and no command."""
    jobs = release()["jobs"]
    publish = jobs["publish"]
    known = [name for name, job in jobs.items() if "id-token" in job["permissions"]]

    assert known == ["publish"]
    assert publish["environment"] == {"name": "pypi"}
    assert [step for step in publish["steps"] if "run" in step] == []
    assert not any("actions/checkout@" in step["uses"] for step in publish["steps"])


def test_what_is_published_was_built_once_and_tested() -> None:
    """One job builds; tests and audit get its files and come before they are published."""
    jobs = release()["jobs"]
    building = [name for name, job in jobs.items() if "nox -s dist" in str(job)]
    users = {name for name, job in jobs.items() if "'NOX_WHEELHOUSE': 'dist'" in str(job)}

    assert building == ["build"]
    assert users == {"test", "audit"}
    assert {"build", "test", "audit"} == set(jobs["compare"]["needs"])
    assert "needs.build.outputs.sums" in str(jobs["compare"])
    assert jobs["publish"]["needs"] == "compare"
    assert {"tests", "chaos"} <= set(jobs["test"]["strategy"]["matrix"]["session"])
    assert "nox -s audit -- --strict" in str(jobs["audit"])


def test_what_builds_is_pinned_by_hash() -> None:
    """A release is built by versions that were looked at, and pip refuses any other file."""
    lines = (
        (ROOT / "tools" / "build.txt").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    )
    pinned = re.compile(r"[\w.-]+==[\w.]+( +--hash=sha256:[0-9a-f]{64})+")
    installs = [step["run"] for step in steps(release()) if "pip install" in step.get("run", "")]

    assert [line for line in lines if line[0] not in " #" and not pinned.fullmatch(line)] == []
    assert {"build", "hatchling", "nox"} <= {line.partition("==")[0] for line in lines}
    assert set(installs) == {"python -m pip install --require-hashes --requirement tools/build.txt"}
