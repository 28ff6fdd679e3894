"""Optimization: passes that rewrite the graph; each states a guarantee and explains itself."""

from feste.optimization import rules
from feste.optimization.analysis.sketches import HOLE, Sketch, Sketches
from feste.optimization.base import Level, Optimization, PassContext, Phase, Remark
from feste.optimization.optimizer import Optimizer, PassReport, Plan
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

__all__ = [
    "HOLE",
    "BatchOptimization",
    "CommonSubexpressionOptimization",
    "CriticalPathOptimization",
    "CullOptimization",
    "FoldOptimization",
    "FuseOptimization",
    "Level",
    "LintOptimization",
    "Optimization",
    "Optimizer",
    "PassContext",
    "PassReport",
    "Phase",
    "Plan",
    "PrefixOptimization",
    "Remark",
    "ResolveOptimization",
    "SampleFusionOptimization",
    "Sketch",
    "Sketches",
    "rules",
]
