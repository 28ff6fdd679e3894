"""What a plan will do, in words, numbers and pictures, before anything is sent."""

from feste.report.explanation.actual import Actual
from feste.report.explanation.explanation import Explanation, Hop
from feste.report.explanation.passes import PassRow, RemarkRow
from feste.report.explanation.rows import CallRow
from feste.report.explanation.tree import GraphRow

__all__ = ["Actual", "CallRow", "Explanation", "GraphRow", "Hop", "PassRow", "RemarkRow"]
