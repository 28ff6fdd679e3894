"""Run a computation in four steps: collect, optimize, schedule, hand back.

:mod:`~feste._compute.front` names the steps in order and :mod:`~feste._compute.steps` implements
them; eager calls and nodes run by Dask use the same ones. All other code that starts a run calls
this package.
"""

from feste._compute.completed import as_completed
from feste._compute.eager import run_eager
from feste._compute.front import acompute, acompute_one, compute, explain
from feste._compute.mapping import map
from feste._compute.results import last_report
from feste._compute.streaming import stream
from feste._compute.through_dask import (
    lowered,
    optimize_lowered,
    persisted,
    run_lowered,
    run_lowered_batch,
)
from feste.report.drawing import draw, visualize

__all__ = [
    "acompute",
    "acompute_one",
    "as_completed",
    "compute",
    "draw",
    "explain",
    "last_report",
    "lowered",
    "map",
    "optimize_lowered",
    "persisted",
    "run_eager",
    "run_lowered",
    "run_lowered_batch",
    "stream",
    "visualize",
]
