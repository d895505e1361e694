"""The pictures that compare methods and show what a model confuses, drawn by matplotlib without its global state."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from meadow.experiments.pictures.style import COLOURS, STYLE, WIDTH
from meadow.experiments.results import ALONE, Curve, Floats, Paired, RunResult, counted, higher_is_better, is_share
from meadow.experiments.words import bytes_text, metric_label, seconds_text

Methods = Mapping[str, Sequence[RunResult]]

MOST_POINTS = 300
"""Points of one curve; longer runs are thinned so that the page stays small."""

Dash = Literal["-", "--", "-.", ":"] | tuple[float, Sequence[float]]
_DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":")

_LONGEST = 23
"""Characters of a method's name that a picture shows."""


def learning_curves(methods: Methods, target: str, metric: str) -> Figure:
    """The clients' mean and the global test metric by round: the mean over the runs, a band of one standard deviation."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9))
        panels = {"clients": "Mean over the clients' own test samples", "global": "Shared model on the global test set"}
        shown = [p for p in panels if any(_mean_curve(runs, p, target, metric) for runs in methods.values())]
        for at, place in enumerate(shown or ["clients"]):
            axes = figure.add_axes(box(figure, at, max(1, len(shown)), right=_label_room(methods)))
            labels = []
            for name, runs in methods.items():
                if found := _mean_curve(runs, place, target, metric):
                    rounds, mean, spread = found
                    colour, dash = _look(name, methods)
                    axes.plot(rounds, mean, color=colour, linestyle=dash, linewidth=1.8)
                    if spread is not None:
                        axes.fill_between(rounds, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
                    axes.plot(rounds[-1:], mean[-1:], "o", color=colour, markersize=3.5, clip_on=False)
                    labels.append((name, float(rounds[-1]), float(mean[-1]), colour))
            axes.set(title=panels[place], xlabel="round")
            axes.set_xlim(0, max((x for _, x, _, _ in labels), default=1.0) or 1.0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            value_axis(axes, target, metric, "y")
            label_ends(axes, labels)
        return figure


def client_dots(methods: Methods, target: str, metric: str, paired: Mapping[str, Paired]) -> Figure:
    """A dot for each client and run by method, with the mean and the worst tenth; `paired` says who lost to alone."""
    rows = {name: [r for r in runs if r.scores(target, metric)] for name, runs in methods.items()}
    rows = {name: runs for name, runs in rows.items() if runs}
    with matplotlib.rc_context(STYLE):
        height = 0.95 + 0.47 * max(1, len(rows))
        figure = Figure(figsize=(WIDTH, height))
        left = 0.35 + 0.078 * max(map(len, rows), default=10)
        axes = figure.add_axes((left / WIDTH, 0.55 / height, 1 - (left + 1.45) / WIDTH, 1 - 0.95 / height))
        pairs = [(run, run.scores(target, metric)) for runs in rows.values() for run in runs]
        many = sum(len(scores) for _, scores in pairs) > 3000
        for row, (name, runs) in enumerate(rows.items()):
            versus = paired.get(name)
            for lost in (False, True):
                dots = [
                    (value, row + jitter(client, run.seed, run.fold))
                    for run in runs
                    for client, value in run.scores(target, metric).items()
                    if (versus is not None and client in versus.losers.get((run.seed, run.fold), ())) == lost
                ]
                if dots:
                    colour = COLOURS["loser" if lost else "dot"][0]
                    x, y = np.array(dots).T
                    axes.scatter(x, y, s=5 if many else 17, color=colour, alpha=0.75, linewidths=0, rasterized=many)
            for key, marker, size in (("mean", "|", 19.0), ("worst_decile", "d", 5.5)):
                over = [run.final("clients", target, metric) or {} for run in counted(runs)]
                if known := [v[key] for v in over if v.get(key) is not None]:
                    edge = 1.8 if marker == "|" else 0.0
                    axes.plot(np.mean(known), row, marker, color=COLOURS["ink"][0], markersize=size, mew=edge)
            if versus is not None:
                colour = COLOURS["loser" if versus.lost else "muted"][0]
                note, at = f"{versus.lost} of {versus.clients} lost", ("axes fraction", "data")
                axes.annotate(note, (1, row), (10, 0), at, "offset points", va="center", color=colour)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"][0], pad=8)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        value_axis(axes, target, metric, "x")
        return figure


def cost_curves(methods: Methods, target: str, metric: str) -> Figure:
    """The clients' mean (or the global metric) against bytes and against seconds, both cumulated over the rounds.

    Methods that send nothing have no place on a logarithmic axis: they stand in a strip of their own, at their end.
    """
    place = "clients" if any(_mean_curve(r, "clients", target, metric) for r in methods.values()) else "global"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9))
        bottom, height = 0.55 / 3.9, 1 - 0.95 / 3.9
        anything = any(run.cost["bytes_up"] + run.cost["bytes_down"] for runs in methods.values() for run in runs)
        room = _label_room(methods)
        # From left to right: value axis, methods at 0 B and their names, bytes and names, seconds and names.
        each = (WIDTH - 0.6 - 0.35 - 3 * room - 0.45) / 2 if anything else WIDTH - 0.6 - room
        timed = figure.add_axes(((WIDTH - room - each) / WIDTH, bottom, each / WIDTH, height))
        free = figure.add_axes((0.6 / WIDTH, bottom, 0.35 / WIDTH, height), sharey=timed, visible=anything)
        sent = figure.add_axes(((0.95 + room) / WIDTH, bottom, each / WIDTH, height), sharey=timed, visible=anything)
        panels = (sent, timed) if anything else (timed,)
        labels: dict[Axes, list[tuple[str, float, float, str]]] = {axes: [] for axes in (free, *panels)}
        for name, runs in methods.items():
            if not (found := _mean_curve(runs, place, target, metric)):
                continue
            rounds, mean, _ = found
            colour, dash = _look(name, methods)
            for axes in panels:
                spent = np.mean(
                    [run.spent("bytes" if axes is sent else "seconds", rounds) for run in counted(runs)], axis=0
                )
                if axes is sent and not spent.any():
                    free.plot([0], mean[-1:], "o", color=colour, markersize=5)
                    labels[free].append((name, 0.0, float(mean[-1]), colour))
                    continue
                real = spent > 0  # the value before the first round has cost nothing, and a logarithm has no zero
                if real.any():
                    axes.plot(spent[real], mean[real], color=colour, linestyle=dash, linewidth=1.8)
                    axes.plot(spent[real][-1:], mean[real][-1:], "o", color=colour, markersize=3.5)
                    labels[axes].append((name, float(spent[-1]), float(mean[-1]), colour))
        for axes, form in ((sent, bytes_text), (timed, seconds_text)):
            if labels.get(axes):
                axes.set_xscale("log")
                low, high = axes.get_xlim()
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _, form=form: form(x)))
        strip = bool(labels[free])
        free.set_visible(strip)
        first = free if strip else sent if anything else timed
        value_axis(first, target, metric, "y")
        (free if strip else sent).set_title("Against bytes, both ways together")
        free.set(xlim=(-1, 1), xticks=[0], xticklabels=["0 B"])
        free.grid(visible=False, axis="x")
        sent.tick_params(axis="y", labelleft=not strip)
        timed.set_title("Against seconds")
        for axes, ends in labels.items():
            label_ends(axes, ends)
        return figure


Confusion = Mapping[str, Any]
"""The `classes` and the `confusion` counts of a target, as in evaluation.json."""

MOST_NUMBERS = 12
"""With more classes a confusion matrix shows colours alone."""


def confusion_matrices(panels: Mapping[str, Confusion]) -> Figure:
    """A heat map for each titled confusion matrix: each row, a true class, as shares of its samples; counts inside."""
    classes = list(next(iter(panels.values()))["classes"])
    size, across = len(classes), min(len(panels), 3 if len(panels) <= 6 else 5)
    with matplotlib.rc_context(STYLE):
        names = [name if len(name) <= 12 else f"{name[:11]}…" for name in classes]
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
            axes.set_title(title if len(title) <= 13 * side else f"{title[: int(13 * side) - 1]}…", pad=6.0)
            every = max(1, -(-size // 25))
            ticks = range(0, size, every)
            axes.set_xticks(ticks, names[::every] if lowest else [], rotation=90 if turned else 0)
            axes.set_yticks(ticks, names[::every] if column == 0 else [])
            axes.set_xlabel("predicted" if lowest else "")
            axes.set_ylabel("truth" if column == 0 else "")
        return figure


def _heat(axes: Axes, counts: Floats, side: float) -> None:
    """One matrix, `side` inches wide: blue by the share of the row, and the counts that are not zero."""
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
        ramp = LinearSegmentedColormap.from_list("ramp", [(0, 0.41, 0.67, 0), (0, 0.41, 0.67, 1)])
        axes.imshow(shares, aspect="auto", cmap=ramp, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)


Roc = tuple[Floats, Floats, float]
"""False positive rates, true positive rates, and the area under the curve."""


def mean_roc(curves: Sequence[Roc]) -> Roc:
    """The curve whose true positive rate is the mean of the curves' at each false positive rate, and the mean area."""
    grid = np.unique(np.concatenate([false for false, _, _ in curves]))
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, min(len(grid), MOST_POINTS)).round().astype(int))]
    mean = np.mean([np.interp(grid, false, true) for false, true, _ in curves], axis=0)
    return np.append(0.0, grid), np.append(0.0, mean), float(np.mean([area for _, _, area in curves]))


def roc_curves(curves: Mapping[str, Roc], methods: Methods) -> Figure:
    """ROC curves of methods, or of classes, with the areas under them; beside them the corner where good ones crowd."""
    looks = {
        name: _look(name, methods) if name in methods else (COLOURS[f"m{i % 8}"][0], _DASHES[i // 8 % 4])
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
            shown = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
            text = f"{100 * curves[name][2]:.1f}  {shown}"
            figure.text((right + 0.36) / WIDTH, y, text, va="center", fontsize=min(9.0, 60 * step))
        return figure


def _mean_curve(
    runs: Sequence[RunResult], place: str, target: str, metric: str
) -> tuple[Floats, Floats, Floats | None] | None:
    """Rounds, mean over seeds and standard deviation (None for one seed), over the rounds that all the runs have."""
    curves: list[Curve] = [c for run in counted(runs) if len((c := run.curve(place, target, metric))[0])]
    if not curves:
        return None
    common = sorted(set.intersection(*(set(rounds.tolist()) for rounds, _ in curves)))
    if not common:
        return None
    keep = np.unique(np.linspace(0, len(common) - 1, min(len(common), MOST_POINTS)).round().astype(int))
    rounds = np.array(common)[keep]
    values = np.stack([found[np.searchsorted(at, rounds)] for at, found in curves])
    return rounds, values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None


def _look(name: str, methods: Methods) -> tuple[str, Dash]:
    """Colour and line of a method: grey and broken for the two references, else the palette in order."""
    if name == ALONE:
        return COLOURS["ink"][0], (0, (4, 2))
    others = [m for m, runs in methods.items() if m != ALONE and runs[0].experiment.run.placement != "pooled"]
    if name not in others:
        return COLOURS["muted"][0], (0, (1.2, 1.6))
    at = others.index(name)
    return COLOURS[f"m{at % 8}"][0], _DASHES[at // 8 % 4]


def jitter(client: int, seed: int, fold: int) -> float:
    """A place within a row, -0.28..0.28: the golden ratio's multiples keep neighbours apart, always the same way."""
    return ((client * 0.6180339887 + seed * 0.3247179572 + fold * 0.2207440846) % 1 - 0.5) * 0.56


def box(figure: Figure, at: int, of: int, right: float) -> tuple[float, float, float, float]:
    """Place of panel `at` of `of`, in fractions of the figure; `right` inches stay free beside each for its labels."""
    wide, tall = figure.get_size_inches()
    each = float(wide) / of
    return (at * each + 0.6) / wide, 0.55 / tall, (each - 0.6 - right) / wide, 1 - 0.95 / tall


def _label_room(methods: Methods) -> float:
    """Inches that the longest of the methods' names needs beside an axis, at 9 points."""
    return 0.25 + 0.07 * max((min(len(name), _LONGEST) for name in methods), default=0)


def value_axis(axes: Axes, target: str, metric: str, which: str) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    if is_share(metric):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}"))
        low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
        (axes.set_ylim if which == "y" else axes.set_xlim)(max(low, -0.02), min(high, 1.02))
    better = "higher" if higher_is_better(metric) else "lower"
    axis.set_label_text(f"{metric_label(target, metric)}, {better} is better")


def label_ends(axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each (name, x, y, colour) right of the axes at its height, moved apart where names would overlap."""
    if not labels:
        return
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    tall = axes.get_position().height * (figure.get_figheight() if figure else 1.0)
    gap = 0.165 / tall  # a line of text, as a fraction of the axes' height
    order = sorted(range(len(labels)), key=lambda i: labels[i][2])
    wanted = np.array([(labels[i][2] - low) / (high - low) for i in order])
    places = spread_apart(wanted, gap)
    places -= max(0.0, float(places[-1]) - 1.0)  # names that would stand above the picture's edge go down together
    for i, place in zip(order, places, strict=True):
        name, _, y, colour = labels[i]
        axes.annotate(
            name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…",
            (1, (y - low) / (high - low)), (1.0 + 0.14 / _inches_wide(axes), place), "axes fraction", "axes fraction",
            va="center", color=colour, fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 0, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spread_apart(wanted: Floats, gap: float) -> Floats:
    """Places as near to the ascending `wanted` as least squares allows, each at least `gap` above the one before.

    Pool adjacent violators: with z_i = wanted_i - i * gap the places minus i * gap must not descend.
    """
    blocks: list[list[float]] = []
    for value in wanted - gap * np.arange(len(wanted)):
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    level = np.concatenate([np.full(int(n), value) for value, n in blocks]) if blocks else np.zeros(0)
    return np.asarray(level + gap * np.arange(len(wanted)), dtype=np.float64)


def _inches_wide(axes: Axes) -> float:
    return axes.get_position().width * WIDTH
