"""The report of runs as one HTML file that opens offline."""

from meadow.experiments.report.write import write_report

__all__ = ["write_report"]
