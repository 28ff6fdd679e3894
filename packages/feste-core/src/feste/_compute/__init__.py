"""From what the user holds to what the user gets: collect, optimize, schedule, hand back.

:mod:`~feste._compute.front` names the four steps in order, :mod:`~feste._compute.steps` takes them;
an eager call and a node that Dask runs go the same way. Whatever below starts a run, a node's own
methods or an eager call, calls back into this package and no other.
"""

from feste._compute.eager import run_eager
from feste._compute.front import acompute, acompute_one, compute, explain
from feste._compute.steps import last_report
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
    "compute",
    "draw",
    "explain",
    "last_report",
    "lowered",
    "optimize_lowered",
    "persisted",
    "run_eager",
    "run_lowered",
    "run_lowered_batch",
    "visualize",
]
