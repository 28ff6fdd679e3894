"""Optimization: passes that rewrite the graph; each states a guarantee and explains itself."""

from feste.optimization.base import Level, Optimization, PassContext, Phase, Remark
from feste.optimization.batch import BatchOptimization
from feste.optimization.cse import CommonSubexpressionOptimization
from feste.optimization.cull import CullOptimization
from feste.optimization.explanation import Explanation
from feste.optimization.fold import FoldOptimization
from feste.optimization.optimizer import Optimizer, PassReport, Plan

__all__ = [
    "BatchOptimization",
    "CommonSubexpressionOptimization",
    "CullOptimization",
    "Explanation",
    "FoldOptimization",
    "Level",
    "Optimization",
    "Optimizer",
    "PassContext",
    "PassReport",
    "Phase",
    "Plan",
    "Remark",
]
