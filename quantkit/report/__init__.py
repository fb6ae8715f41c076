"""Reports of evaluations: tables for the terminal, and a self-contained HTML page with plots."""

from quantkit.report.page import render_html, write_html
from quantkit.report.serving import trace_rows, write_trace_html
from quantkit.report.tables import comparison_table, continuation_rows, coverage_table, distance_rows, instruction_rows

__all__ = [
    "comparison_table", "continuation_rows", "coverage_table", "distance_rows", "instruction_rows",
    "render_html", "trace_rows", "write_html", "write_trace_html",
]  # fmt: skip
