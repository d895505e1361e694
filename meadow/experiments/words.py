"""Metrics, sizes and times as text, for the terminal, the report and its figures."""

from meadow.experiments.results import is_share

UNITS = {"slant": "rad"}
"""Unit of a value target; other targets have none."""

NAMES = {
    "balanced_accuracy": "balanced accuracy", "f1": "F1", "auroc": "AUROC", "exact_match": "exact match",
    "mae": "MAE", "rmse": "RMSE", "r2": "R\N{SUPERSCRIPT TWO}", "pinball": "pinball loss",
}  # fmt: skip
"""Metric -> its display name, if that is not the metric's own."""


def metric_name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("coverage_", "coverage at "))


def unit_of(target: str, metric: str) -> str:
    """ "%", or the target's unit if the metric has it, else ""."""
    return "%" if is_share(metric) else UNITS.get(target, "") if metric in ("mae", "rmse", "pinball") else ""


def metric_label(target: str, metric: str) -> str:
    """A metric's name with its unit, for an axis or a table's heading."""
    unit = unit_of(target, metric)
    return f"{metric_name(metric)} ({unit})" if unit else metric_name(metric)


def bytes_text(count: float) -> str:
    """A size as text, in powers of 1000: "0 B", "320 kB", "4.2 MB"."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """A time as text: "0.3 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
