"""What the four distributions promise together: one version, disjoint wheels, a core without providers."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

import feste

ROOT = Path(__file__).parents[1] / "packages"
# The folder that is each distribution's own, and its entry points in the group `feste`.
FOLDERS = {
    "feste-core": "feste",
    "feste-backend-openai": "feste/backend/openai",
    "feste-backend-cohere": "feste/backend/cohere",
    "feste-scheduler-dask": "feste/scheduler/dask",
}
ENTRY_POINTS = {
    "feste-core": {},
    "feste-backend-openai": {"openai": "feste.backend.openai._hooks"},
    "feste-backend-cohere": {"cohere": "feste.backend.cohere._hooks"},
    "feste-scheduler-dask": {"dask": "feste.scheduler.dask._hooks"},
}
PROVIDERS = ("openai", "cohere", "distributed", "dask.distributed")

each_package = pytest.mark.parametrize("package", FOLDERS)
each_plugin = pytest.mark.parametrize("package", [name for name in FOLDERS if name != "feste-core"])


class Built(NamedTuple):
    """What was built of one package: the paths inside, and the files by name."""

    wheel: list[str]
    sdist: list[str]
    files: dict[str, bytes]


def build(source: Path, out: Path) -> dict[str, bytes]:
    """Build a wheel and an sdist from a package's folder, with the clock of the release."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1800000000"}
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """A fresh wheel and sdist of every package."""
    found = {}
    for package in FOLDERS:
        out = tmp_path_factory.mktemp(package)
        files = build(ROOT / package, out)
        [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as zipped, tarfile.open(sdist) as tarred:
            inside = [file.name.partition("/")[2] for file in tarred if file.isfile()]
            found[package] = Built(zipped.namelist(), inside, files)
    return found


def project(package: str) -> dict[str, Any]:
    """The ``[project]`` table of a package."""
    with (ROOT / package / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that the source names in an import, at whatever depth, by whatever way."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def test_there_is_one_version() -> None:
    """All packages, as written and as installed, and ``feste.__version__`` agree."""
    versions = {project(package)["version"] for package in FOLDERS}
    versions |= {version(package) for package in FOLDERS}

    assert {feste.__version__} == versions


@each_plugin
def test_plugin_accepts_the_core_beside_it(package: str) -> None:
    """A plugin's bounds on feste-core hold for the core it is released with."""
    requirements = map(Requirement, project(package)["dependencies"])
    [core] = [found for found in requirements if found.name == "feste-core"]

    assert core.specifier.contains(feste.__version__)
    assert not core.specifier.contains("99.0"), "a later minor version may break plugins"


@each_package
def test_entry_points(package: str) -> None:
    """A plugin is found under its short name; core registers itself without an entry point."""
    assert ENTRY_POINTS[package] == project(package).get("entry-points", {}).get("feste", {})


def test_core_brings_the_command() -> None:
    """``pip install feste-core`` gives the ``feste`` command."""
    assert project("feste-core")["scripts"] == {"feste": "feste.cli:main"}


@each_package
def test_wheel_holds_its_own_folder_only(package: str, built: dict[str, Built]) -> None:
    """A wheel has its folder, typed, and its metadata with the licence, and nothing else."""
    folder, paths = FOLDERS[package], built[package].wheel
    metadata = f"{package.replace('-', '_')}-{feste.__version__}.dist-info"
    strangers = [path for path in paths if not path.startswith((f"{folder}/", f"{metadata}/"))]

    assert strangers == []
    assert {f"{folder}/py.typed", f"{metadata}/licenses/LICENSE"} <= set(paths)


@each_package
def test_a_wheel_holds_python_and_metadata_alone(package: str, built: dict[str, Built]) -> None:
    """No tests, no data, nothing that runs by itself when Python starts, such as a ``.pth``."""
    metadata = r"[\w.-]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
    expected = re.compile(rf"feste/([\w/]+\.py|[\w/]*py\.typed)|{metadata}")
    paths = built[package].wheel

    assert [path for path in paths if not expected.fullmatch(path)] == []
    assert [
        path for path in paths if "/tests/" in path or "test_" in PurePosixPath(path).name
    ] == []


@each_package
def test_two_builds_are_one(package: str, built: dict[str, Built], tmp_path: Path) -> None:
    """The bytes are those of the sources: not of the folder, the hour, or the owner's umask."""
    other = tmp_path / "elsewhere"
    shutil.copytree(ROOT / package, other, copy_function=shutil.copyfile)
    shutil.copyfile(ROOT.parent / ".gitignore", other / ".gitignore")
    for path in other.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    again = build(other, tmp_path / "out")

    assert [name for name, data in built[package].files.items() if again[name] != data] == []
    assert again.keys() == built[package].files.keys()


def test_no_file_is_shipped_twice(built: dict[str, Built]) -> None:
    """Removing one package never takes a file of another."""
    paths = [path for found in built.values() for path in found.wheel]

    assert len(set(paths)) == len(paths)


@each_package
def test_sdist_is_complete(package: str, built: dict[str, Built]) -> None:
    """A source distribution builds, and has the code, the licence, the read-me and the tests."""
    paths = built[package].sdist
    expected = ["LICENSE", "README.md", "pyproject.toml", f"src/{FOLDERS[package]}/__init__.py"]

    assert set(expected) <= set(paths)
    assert any(path.startswith("tests/test_") for path in paths)


@each_package
def test_an_sdist_holds_nothing_else(package: str, built: dict[str, Built]) -> None:
    """What lies about in a developer's folder is not published."""
    own = rf"(src/{FOLDERS[package]}|tests)/[\w/]+\.(py|typed|db)|src/{FOLDERS[package]}/py\.typed"
    expected = re.compile(rf"{own}|LICENSE|README\.md|pyproject\.toml|PKG-INFO|\.gitignore")

    assert [path for path in built[package].sdist if not expected.fullmatch(path)] == []


@each_package
def test_bounds_have_reasons(package: str) -> None:
    """Every dependency has an oldest version and, unless its versions are dates, an end, and says why."""
    text = (ROOT / package / "pyproject.toml").read_text(encoding="utf-8")
    bounds = [line.strip() for line in re.findall(r'(?m)^    "[\w\[\]-]+[<>=!~].*$', text)]
    table = project(package)
    lists = [table["dependencies"], *table.get("optional-dependencies", {}).values()]

    assert len(bounds) == sum(map(len, lists))
    assert [line for line in bounds if ">=" not in line or "  # " not in line] == []
    open_ended = [line.split(">=")[0].strip('"') for line in bounds if ",<" not in line]
    assert set(open_ended) <= {"dask", "distributed", "packaging", "pyarrow"}


@each_plugin
def test_plugin_owns_no_parent_folder(package: str) -> None:
    """Nothing stands above a plugin's folder: such a file would shadow core's."""
    source = ROOT / package / "src"
    above = [source / parent for parent in PurePosixPath(FOLDERS[package]).parents]

    assert [path for folder in above for path in folder.glob("*") if path.is_file()] == []


def test_core_imports_no_provider() -> None:
    """Core works with none of the SDKs installed, so it names none, not even inside a function."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "feste-core" / "src").rglob("*.py")
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if f"{name}.".startswith(tuple(f"{provider}." for provider in PROVIDERS))
    ]

    assert found == []


def test_the_search_for_imports_sees_every_form() -> None:
    """The rule above can fail: each way to import a provider is noticed."""
    source = """
import openai.types
def inside():
    from cohere import ClientV2
    from dask import distributed
    importlib.import_module("openai")
    __import__("cohere")
"""
    expected = ["cohere", "cohere.ClientV2", "dask.distributed", "openai", "openai.types"]

    assert expected == sorted(imported(ast.parse(source)))
