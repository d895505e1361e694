"""ROC curves, and their mean over classes."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from meadow.experiments.pictures.plots import DASHES, LONGEST, Methods, look, thinned
from meadow.experiments.pictures.style import COLOURS, STYLE, WIDTH, shortened
from meadow.experiments.results import Floats

Roc = tuple[Floats, Floats, float]
"""False positive rates, true positive rates, and the area under the curve."""


def mean_roc(curves: Sequence[Roc]) -> Roc:
    """The mean true positive rate of the curves at each false positive rate, and the mean area."""
    grid = np.unique(np.concatenate([false for false, _, _ in curves]))
    grid = grid[thinned(len(grid))]
    mean = np.mean([np.interp(grid, false, true) for false, true, _ in curves], axis=0)
    return np.append(0.0, grid), np.append(0.0, mean), float(np.mean([area for _, _, area in curves]))


def roc_curves(curves: Mapping[str, Roc], methods: Methods) -> Figure:
    """ROC curves of methods or of classes, with the areas under them; if all are good, also their upper left corner."""
    looks = {
        name: look(name, methods) if name in methods else (COLOURS[f"m{i % 8}"][0], DASHES[i // 8 % 4])
        for i, name in enumerate(curves)
    }
    crowded = min(area for _, _, area in curves.values()) > 0.9
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.3))
        panels = [((0.0, 1.0), (0.0, 1.0), "True against false positive rate")]
        if crowded:
            panels.append(((0.0, 0.2), (0.8, 1.0), "Its upper left corner"))
        side, order = 3.3, sorted(curves, key=lambda name: -curves[name][2])
        for at, (across, up, title) in enumerate(panels):
            axes = figure.add_axes(((0.6 + at * (side + 0.65)) / WIDTH, 0.55 / 4.3, side / WIDTH, side / 4.3))
            axes.plot((0, 1), (0, 1), color=COLOURS["muted"][0], linewidth=0.8)
            for name, (false, true, _) in curves.items():
                axes.plot(false, true, color=looks[name][0], linestyle=looks[name][1], linewidth=1.6)
            axes.set(title=title, xlim=across, ylim=up, xlabel="false positive rate (%)")
            axes.set_ylabel("true positive rate (%)" if at == 0 else "")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5))
                axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}"))
        right = 0.6 + len(panels) * (side + 0.65) - 0.25
        figure.text(right / WIDTH, (0.55 + side) / 4.3, "AUROC (%)", va="top", color=COLOURS["muted"][0], fontsize=9)
        step = min(0.19, (side - 0.3) / len(order))
        for row, name in enumerate(order):
            y = (0.55 + side - 0.32 - row * step) / 4.3
            colour, dash = looks[name]
            line = Line2D((right / WIDTH, (right + 0.28) / WIDTH), (y, y), color=colour, linestyle=dash, linewidth=1.8)
            figure.add_artist(line)
            text = f"{100 * curves[name][2]:.1f}  {shortened(name, LONGEST)}"
            figure.text((right + 0.36) / WIDTH, y, text, va="center", fontsize=min(9.0, 60 * step))
        return figure
