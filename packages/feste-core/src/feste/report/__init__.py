"""Reports of runs: text, tables and pictures."""

from feste.report.graph_picture import Box, draw_svg
from feste.report.mermaid import draw_mermaid
from feste.report.remarks import UnknownRequest
from feste.report.run_report import OperationRow, RunReport
from feste.report.timeline import Span, draw_timeline

__all__ = [
    "Box",
    "OperationRow",
    "RunReport",
    "Span",
    "UnknownRequest",
    "draw_mermaid",
    "draw_svg",
    "draw_timeline",
]
