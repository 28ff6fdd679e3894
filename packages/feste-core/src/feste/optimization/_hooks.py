"""Register the optimizations of feste-core through the same hook that plugins use."""

from __future__ import annotations

from feste.hookspecs import hookimpl
from feste.optimization.base import Optimization
from feste.optimization.passes.batch import BatchOptimization
from feste.optimization.passes.critical_path import CriticalPathOptimization
from feste.optimization.passes.cse import CommonSubexpressionOptimization
from feste.optimization.passes.cull import CullOptimization
from feste.optimization.passes.fold import FoldOptimization
from feste.optimization.passes.fuse import FuseOptimization
from feste.optimization.passes.lint import LintOptimization
from feste.optimization.passes.prefix import PrefixOptimization
from feste.optimization.passes.resolve import ResolveOptimization
from feste.optimization.passes.sample_fusion import SampleFusionOptimization


@hookimpl
def feste_optimizations() -> list[Optimization]:
    """Return Feste's own optimizations."""
    return [
        CullOptimization(),
        FoldOptimization(),
        CommonSubexpressionOptimization(),
        ResolveOptimization(),
        FuseOptimization(),
        SampleFusionOptimization(),
        BatchOptimization(),
        PrefixOptimization(),
        LintOptimization(),
        CriticalPathOptimization(),
    ]
