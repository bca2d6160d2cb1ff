"""What a run did and found, as self-contained pages made from the files of its folder alone."""

from supernet.report.comparison import comparison_table, write_comparison
from supernet.report.pages import write_pareto, write_validation
from supernet.report.report import write_report

__all__ = [
    "comparison_table",
    "write_comparison",
    "write_pareto",
    "write_report",
    "write_validation",
]
