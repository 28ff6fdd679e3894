"""Register the optimizations of feste-core through the same hook that plugins use."""

from __future__ import annotations

from feste.hookspecs import hookimpl
from feste.optimization.base import Optimization
from feste.optimization.batch import BatchOptimization
from feste.optimization.cse import CommonSubexpressionOptimization
from feste.optimization.cull import CullOptimization
from feste.optimization.fold import FoldOptimization


@hookimpl
def feste_optimizations() -> list[Optimization]:
    """Return Feste's own optimizations."""
    return [
        CullOptimization(),
        FoldOptimization(),
        CommonSubexpressionOptimization(),
        BatchOptimization(),
    ]
