"""Confusion matrices as heat maps."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meadow.experiments.pictures.style import COLOURS, SHADES, STYLE, WIDTH, shortened
from meadow.experiments.results import Floats

Confusion = Mapping[str, Any]
"""The `classes` and the `confusion` counts of a target, as in evaluation.json."""

MOST_NUMBERS = 12
"""With more classes a confusion matrix shows only colours."""


def confusion_matrices(panels: Mapping[str, Confusion]) -> Figure:
    """A heat map for each titled confusion matrix: each row, a true class, as shares of its samples; counts inside."""
    classes = list(next(iter(panels.values()))["classes"])
    size, across = len(classes), min(len(panels), 3 if len(panels) <= 6 else 5)
    with matplotlib.rc_context(STYLE):
        names = [shortened(name, 12) for name in classes]
        longest = max(map(len, names))
        left = 0.42 + 0.075 * longest  # inches for the names of the rows, and below for those of the columns if turned
        turned = longest * 0.085 > (WIDTH / across - left - 0.3) / size
        below = 0.42 + (0.07 * longest if turned else 0.1)
        side = min((WIDTH - left) / across - 0.3, 1.2 + 0.42 * size, 4.6)
        down = -(-len(panels) // across)
        high = 0.42 + side
        height = down * high + below + 0.1
        figure = Figure(figsize=(WIDTH, height))
        for at, (title, panel) in enumerate(panels.items()):
            row, column = divmod(at, across)
            lowest = at + across >= len(panels)
            place = (left + column * (side + 0.3), height - (row + 1) * high)
            axes = figure.add_axes((place[0] / WIDTH, place[1] / height, side / WIDTH, side / height))
            _heat(axes, np.array(panel["confusion"], dtype=np.float64), side)
            axes.set_title(shortened(title, int(13 * side)), pad=6.0)
            every = max(1, -(-size // 25))
            ticks = range(0, size, every)
            axes.set_xticks(ticks, names[::every] if lowest else [], rotation=90 if turned else 0)
            axes.set_yticks(ticks, names[::every] if column == 0 else [])
            axes.set_xlabel("predicted" if lowest else "")
            axes.set_ylabel("truth" if column == 0 else "")
        return figure


def _heat(axes: Axes, counts: Floats, side: float) -> None:
    """One matrix, `side` inches wide: blue by the share of the row, with the non-zero counts."""
    size = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if size <= MOST_NUMBERS:
        font = min(9.5, 72 * side / size * 0.62 / max(2, len(f"{counts.max():.0f}")) / 0.6)
        for row, column in np.argwhere(counts > 0):
            share = float(shares[row, column])
            axes.fill_between((column - 0.5, column + 0.5), row - 0.5, row + 0.5, color=COLOURS["m0"][0],
                              alpha=max(share, 0.04), linewidth=0)  # fmt: skip
            colour = COLOURS["paper" if share > 0.55 else "ink"][0]
            text = f"{counts[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center_baseline", fontsize=font, color=colour)
    else:
        axes.imshow(shares, aspect="auto", cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
