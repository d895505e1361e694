"""The table and the figure of a split: how many samples of each label each client has."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.console import Group
from rich.table import Table
from rich.text import Text

from meadow.config.schema import Experiment
from meadow.experiments.pictures.style import COLOURS, SHADES, STYLE, WIDTH
from meadow.experiments.results import Floats
from meadow.server.session import split_table
from meadow.tasks.data import Target
from meadow.tasks.splits.partitioners import Ints
from meadow.tasks.task import Task

MOST_BUBBLES = 80
"""Labels are drawn as bubbles for up to this many clients, else as shades."""

MOST_CLIENTS = 1000
"""The largest number of clients in the figure, about a pixel for each."""

MOST_ROWS = 40
"""The table has a row for each of up to this many clients, else a row for each tenth by size."""

MOST_LABELS = 20
"""The table has a column for each of up to this many labels, else one column with each client's number of labels."""


def facts(experiment: Experiment, task: Task) -> dict[str, Any]:
    """The split, in the format of split.json."""
    split = task.split
    return {"law": split.law, "tries": split.tries, "sha256": split.sha256, **split_table(experiment, task)}


def label_names(target: Target) -> list[str]:
    """The names of a target's strata (`meadow.tasks.splits.partition.strata`)."""
    if target.kind in ("value", "quantiles"):
        return [*(f"tenth {i}" for i in range(1, 11)), "missing"]
    return [*(target.names or map(str, range(target.size))), "missing"]


def table(split: Mapping[str, Any], names: Sequence[str]) -> Group:
    """A split.json as a table for the terminal; `names`: the labels' names.

    A row for each client; with more than MOST_ROWS clients rows for the smallest, the means of tenths by size, the largest.
    """
    sizes, labels = np.array(split["sizes"]), np.array(split["labels"])
    clients = len(sizes)
    tries = f"{split['tries']} {'try' if split['tries'] == 1 else 'tries'}"
    lines = [
        f"law {split['law']}, {tries}: {clients:,} clients with {sizes.sum():,} samples",
        f"hash {split['sha256']}",
    ]
    if "left_out" in split:
        few = split["left_out"]
        lines.append(f"left out: {few['clients']:,} of the data's own clients, with {few['samples']:,} samples")
    holders = split.get("holds", {})
    many, wide = clients > MOST_ROWS, labels.shape[1] > MOST_LABELS
    if many:
        lines += [f"target {target}: held by {len(who):,} clients" for target, who in holders.items()]
    columns = ["samples", "train", "validation", "test", *(["labels"] if wide else names[: labels.shape[1]])]
    of_label = (labels > 0).sum(axis=1, keepdims=True) if wide else labels
    values = np.column_stack([sizes.sum(axis=1), sizes, of_label])
    made = Table(box=None, header_style="dim", caption=_caption(split, many, wide), caption_justify="left")
    made.add_column("clients" if many else "client")
    for column in columns:
        made.add_column(column, justify="right")
    if holders and not many:
        made.add_column("holds")
    if many:
        for row, group in _tenths(sizes.sum(axis=1)):
            mean = values[group].mean(axis=0)
            made.add_row(row, *(f"{v:,.0f}" if len(group) == 1 else f"{v:,.1f}" for v in mean))
    else:
        for client in range(clients):
            name = f"{client} {split['names'][client]}" if "names" in split else str(client)
            mine = [target for target, who in holders.items() if client in who]
            made.add_row(Text(name), *(f"{v:,}" for v in values[client]), *([", ".join(mine)] if holders else []))
    return Group(*(Text(line) for line in lines), made)


def picture(split: Mapping[str, object]) -> Figure:
    """The figure of a split: samples of each client by part and, below, by label (see `picture_caption`).

    `split` is a run's split.json: `labels` [clients x classes] may be missing, `sizes` is [clients x 3]. At most
    MOST_CLIENTS clients are shown, evenly spaced.
    """
    sizes = np.array(split["sizes"], dtype=np.float64)
    labels = np.array(split.get("labels") or np.zeros((len(sizes), 0)), dtype=np.float64)
    number = np.arange(len(sizes))
    if len(sizes) > MOST_CLIENTS:
        number = np.arange(MOST_CLIENTS) * len(sizes) // MOST_CLIENTS
        sizes, labels = sizes[number], labels[number]
    clients, classes = labels.shape
    with matplotlib.rc_context(STYLE):
        tall = min(6.0, 0.27 * max(classes, 1)) if classes else 0.0
        height = 2.25 + tall
        figure = Figure(figsize=(WIDTH, height))
        left, wide = 0.75 / WIDTH, 1 - 2.2 / WIDTH
        bars = figure.add_axes((left, (0.6 + tall) / height, wide, 1.25 / height))
        _draw_sizes(bars, sizes)
        total = len(split["sizes"])  # type: ignore[arg-type]
        shown = "" if clients == total else f": {clients:,} of {total:,}, evenly spaced"
        bars.set_title(f"Samples of each client{shown}")
        bars.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        bars.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{number[int(x)]}" if 0 <= x < clients and x == int(x) else "")
        )
        if not classes:
            bars.set_xlabel("client")
            return figure
        bars.tick_params(axis="x", length=0, labelbottom=False)
        grid = figure.add_axes((left, 0.5 / height, wide, tall / height))
        _draw_labels(grid, labels, 72 * wide * WIDTH / clients)
        grid.set(xlabel="client", ylabel=str(split.get("target") or "label"))
        grid.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        grid.xaxis.set_major_formatter(bars.xaxis.get_major_formatter())
        return figure


def _draw_sizes(axes: Axes, sizes: Floats) -> None:
    """A bar for each client: training, validation and test samples one above the other, with a key beside them."""
    clients = len(sizes)
    blue, at, below = COLOURS["m0"][0], np.arange(clients), np.zeros(clients)
    edges = np.arange(clients + 1) - 0.5

    def draw(top: Floats, colour: str, alpha: float) -> None:
        if clients <= MOST_BUBBLES:
            axes.bar(at, top - below, 0.66, bottom=below, color=colour, alpha=alpha, linewidth=0)
        else:  # a single shape: thousands of bars would make the page large
            axes.stairs(top, edges, baseline=below, fill=True, color=colour, alpha=alpha, linewidth=0)

    draw(sizes.sum(axis=1), COLOURS["paper"][0], 1.0)  # hides the grid behind the tints
    key: dict[str, Any] = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
    for i, (name, alpha) in enumerate((("training", 1.0), ("validation", 0.5), ("test", 0.25))):
        draw(below + sizes[:, i], blue, alpha)
        below = below + sizes[:, i]
        place = (1.015, 0.2 + 0.22 * i)
        axes.plot(*place, "s", transform=axes.transAxes, color=blue, alpha=alpha, ms=7, clip_on=False, mew=0)
        axes.annotate(name, place, (9, 0), "axes fraction", **key)
    axes.set(xlim=(-0.7, clients - 0.3), ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(visible=False, axis="x")


def _draw_labels(axes: Axes, labels: Floats, room: float) -> None:
    """Samples of each label and client, as bubbles or shades; `room`: a client's width in points."""
    clients, classes = labels.shape
    few = clients <= MOST_BUBBLES
    if few:
        client, label = np.nonzero(labels)
        across = min(17.3, room * 0.95)  # the largest bubble just fits its cell
        area = labels[client, label] / labels.max() * across**2
        axes.scatter(client, label, s=area, color=COLOURS["m0"][0], alpha=0.8, linewidths=0)
    else:
        axes.imshow(labels.T, aspect="auto", cmap=SHADES, interpolation="nearest", vmin=0)
    axes.set(xlim=(-0.7, clients - 0.3), ylim=(classes - 0.4, -0.6))
    axes.set_yticks(range(classes) if classes <= 20 else range(0, classes, 10))
    axes.tick_params(length=0)
    axes.grid(visible=False, axis="x" if few else "both")


def picture_caption(split: Mapping[str, Any]) -> str:
    """How to read the labels in the figure; "" if it has none."""
    if not split.get("labels"):
        return ""
    if len(split["sizes"]) <= MOST_BUBBLES:
        return "The area of a bubble is the number of samples with that label."
    return "The darker the blue, the more samples with that label the client has."


def _tenths(sizes: Ints) -> list[tuple[str, npt.NDArray[np.intp]]]:
    """(row's name, its clients) for the smallest client, the tenths by size, and the largest client."""
    order = np.argsort(sizes, kind="stable")
    rows = [(f"tenth {i + 1} ({len(group):,})", group) for i, group in enumerate(np.array_split(order, 10))]
    return [(f"smallest: {order[0]}", order[:1]), *rows, (f"largest: {order[-1]}", order[-1:])]


def _caption(split: Mapping[str, Any], many: bool, wide: bool) -> str:
    what = f"how many labels of {split['target']} a client has" if wide else f"samples by {split['target']}"
    return f"{what}; means over clients, in tenths by size" if many else what
