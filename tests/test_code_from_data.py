"""Nothing that is stored, received or configured is ever run, or made into an object that could run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
SOURCES = sorted(PACKAGES.glob("*/src/**/*.py"))

#: What turns data into code or into objects of any class, by module; None is the whole module.
RUNS = {
    "pickle": {"load", "loads", "Unpickler"},
    "_pickle": {"load", "loads", "Unpickler"},
    "cloudpickle": {"load", "loads"},
    "marshal": {"load", "loads"},
    "dill": None,
    "jsonpickle": None,
    "shelve": None,
    "yaml": None,
    "joblib": None,
    "code": None,
    "runpy": None,
    "builtins": {"eval", "exec", "compile", "__import__"},
}
#: The only places where that is done, and why.
KNOWN = {
    # process pool: the private socket pair between a worker and the process that started it
    "feste/scheduler/hands/messages.py": {"pickle.loads"},
    # the contract of backends pickles a backend and an error itself, and reads them again
    "feste/testing/backend_contract.py": {"pickle.loads"},
    # Dask: connections that do not leave the machine, or have TLS
    "feste/scheduler/dask/preparing.py": {"pickle.loads"},
    "feste/scheduler/dask/requests/line.py": {"pickle.loads"},
    "feste/scheduler/dask/requests/pump.py": {"pickle.loads"},
    "feste/scheduler/dask/tasks/large.py": {"pickle.loads"},
    "feste/scheduler/dask/tasks/outcomes.py": {"pickle.loads"},
    "feste/scheduler/dask/tasks/remote.py": {"pickle.loads", "pickle.Unpickler"},
}


def found(source: str) -> Iterator[str]:
    """What a source uses of the above, under whatever name."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
                if RUNS.get(alias.name, ()) is None:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module in RUNS:
            for alias in node.names:
                some = RUNS[node.module]
                if some is None or alias.name in some:
                    yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id, "")
            if node.attr in (RUNS.get(module) or ()):
                yield f"{module}.{node.attr}"
        elif isinstance(node, ast.Name) and node.id in (RUNS["builtins"] or ()):
            yield f"builtins.{node.id}"


def test_only_named_places_make_objects_from_data() -> None:
    """Pickles are read from our own child processes and in Dask, and nothing else of the kind is used."""
    used = {
        str(path).partition("/src/")[2]: names
        for path in SOURCES
        if (names := set(found(path.read_text(encoding="utf-8"))))
    }

    assert len(SOURCES) > 200
    assert used == KNOWN


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "import pickle as p\ndef f():\n    return p.Unpickler",
        "from pickle import loads as fine",
        "import cloudpickle\ncloudpickle.load(1)",
        "def f():\n    import yaml",
        "from marshal import loads",
        "eval('1')",
        "f = exec",
        "compile('1', '', 'eval')",
        "import builtins\nbuiltins.eval('1')",
        "__import__('os')",
    ],
)
def test_the_search_sees_every_form(source: str) -> None:
    """The rule above can fail."""
    assert list(found(source))


WATCHED = """
import json, sys, traceback
import feste
from feste import store
from feste.cli import main
from feste.prompt import Prompt
from feste.testing import FakeBackend

seen, whole = [], []

def watch(event, args):
    if event == "pickle.find_class":
        seen.append([event, str(args)])
    elif event == "marshal.loads":
        # Python reads its own compiled modules so
        callers = [frame.filename for frame in traceback.extract_stack(limit=4)]
        if not any(name.startswith("<frozen importlib") for name in callers):
            seen.append([event, *callers])

@feste.task(once=True)
def once(x):
    return [x]

def program():
    llm = FakeBackend("m-1")
    first = [llm.chat(Prompt("Say {{ what }}")(what=w)) for w in "abc"]
    return [*first, llm.embed("x"), llm.complete("y"), once(1), feste.task(len)(first)]

sys.addaudithook(watch)
for _ in range(2):  # the second run replays
    nodes = program()
    str(feste.explain(nodes))
    whole.append(str(feste.compute(nodes, store="s.db", cache="c.db")[:1]))
    report = feste.last_report()
    for end in (".json", ".txt", ".html", ".svg"):
        report.save("report" + end)
    feste.report.RunReport.from_json(json.loads(open("report.json").read()))
    nodes[0].visualize("graph.svg")
    store.close()
    feste.testing.fresh_draws()
with feste.context.set(eager=True, store="s.db"):
    program()
store.close()
sys.stdout = open("told.txt", "w")
for command in ("list", "show", "verify", "salvage"):
    main(["store", command, "s.db"])
main(["store", "export", "s.db", "--out", "a.jsonl"])
main(["store", "purge", "s.db", "--all", "--yes"])
sys.stdout = sys.__stdout__
counted = len(seen)
import pickle
pickle.loads(pickle.dumps(report))  # the watch works
print(json.dumps([seen[:counted], len(seen) > counted, whole[0] == whole[1]]))
"""


def test_a_whole_local_run_reads_no_pickle(tmp_path: Path) -> None:
    """Runs, replays, reports, pictures, exports and repairs; also no marshalled code but Python's modules."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )

    assert "Traceback" not in done.stderr, done.stderr
    assert json.loads(done.stdout) == [[], True, True]
