"""Seeds that once found something are run for ever, so the tests that they are for are there."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.chaos.regressions import REGRESSIONS


def test_each_seed_is_for_a_scenario_that_is_there() -> None:
    """A scenario that was renamed takes its seeds along, else they would be forgotten without a word."""
    paths = Path(__file__).parent.glob("test_*.py")
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    seeded = {f.name for f in functions if any(a.arg == "seed" for a in f.args.args)}

    assert len(seeded) > 20
    assert REGRESSIONS.keys() <= seeded
    assert all(REGRESSIONS.values())
