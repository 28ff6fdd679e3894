"""``import feste`` costs next to nothing: what is heavy is imported when it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

#: Imported on first use only.
HEAVY = """
asyncio dask distributed jinja2 langcodes cloudpickle pluggy openai cohere aiohttp httpx pydantic
genai_prices httpx2 numpy pandas sqlite3 ssl concurrent.futures multiprocessing importlib.metadata
""".split()


def fresh(code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import json, sys\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_feste_imports_nothing_heavy() -> None:
    """No plugin, no SDK, no event loop, no Dask, no templates, none of Feste's own rooms."""
    code = f"""
before = set(sys.modules)
import feste
new = set(sys.modules) - before
print(json.dumps([
    sorted(n for n in {HEAVY!r} if n in new), sorted(n for n in new if n.startswith("feste"))
]))
"""
    assert fresh(code) == [[], ["feste"]]


def test_import_feste_stays_under_100_ms_of_cpu() -> None:
    """The best of five measures of processor time: load on the machine only makes one longer."""
    code = """
import time
begun = time.process_time()
import feste
print(json.dumps(time.process_time() - begun))
"""
    assert min(fresh(code) for _ in range(5)) < 0.1


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("from feste import context; context.get('eager')", "pluggy asyncio dask jinja2"),
        ("import feste; feste.task(abs)(1) + 2", "pluggy asyncio dask jinja2"),
        ("from feste.prompt import Prompt", "pluggy asyncio dask jinja2"),
        (
            "from feste.graph import FesteGraph; import feste; FesteGraph.collect(feste.task(abs)(1))",
            "asyncio dask jinja2",
        ),
        ("from feste.testing import FakeBackend; FakeBackend().chat('a')", "dask jinja2 aiohttp"),
        ("import feste; feste.task(abs)(-1).compute()", "dask jinja2 aiohttp openai cohere"),
    ],
)
def test_parts_import_only_what_they_need(code: str, absent: str) -> None:
    """Settings need no plugins, nodes no loop, a run of Python neither Dask nor templates."""
    found = fresh(f"{code}\nprint(json.dumps([n for n in {absent.split()!r} if n in sys.modules]))")

    assert found == []


def test_the_front_door_is_complete() -> None:
    """Every public name is there, once, and listed; an unknown one is an AttributeError."""
    code = """
import feste
missing = [name for name in feste.__all__ if getattr(feste, name, None) is None]
try:
    feste.nothing
except AttributeError as error:
    said = str(error)
print(json.dumps([missing, said, set(feste.__all__) <= set(dir(feste)), sorted(feste.__all__) == feste.__all__]))
"""
    assert fresh(code) == [[], "module 'feste' has no attribute 'nothing'", True, True]
