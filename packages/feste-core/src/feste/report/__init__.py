"""Explanations of plans and reports of runs: text, tables and pictures."""

from feste.optimization.analysis.ranges import Range
from feste.report.explanation import Actual, CallRow, Explanation, GraphRow, Hop, PassRow, RemarkRow
from feste.report.graph_picture import Box, draw_svg
from feste.report.mermaid import draw_mermaid
from feste.report.operations import OperationRow
from feste.report.remarks import UnknownRequest
from feste.report.run_report import Closing, RunReport
from feste.report.timeline import Span, draw_timeline
from feste.report.workers import WorkerRow

__all__ = [
    "Actual",
    "Box",
    "CallRow",
    "Closing",
    "Explanation",
    "GraphRow",
    "Hop",
    "OperationRow",
    "PassRow",
    "Range",
    "RemarkRow",
    "RunReport",
    "Span",
    "UnknownRequest",
    "WorkerRow",
    "draw_mermaid",
    "draw_svg",
    "draw_timeline",
]
