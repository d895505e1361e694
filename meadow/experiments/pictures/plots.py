"""The figures that compare methods, drawn with matplotlib without its global state."""

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from meadow.experiments.pairs import Paired
from meadow.experiments.pictures.style import COLOURS, STYLE, WIDTH, shortened
from meadow.experiments.results import ALONE, Curve, Floats, RunResult, counted, higher_is_better, is_share
from meadow.experiments.words import bytes_text, metric_label, seconds_text

Methods = Mapping[str, Sequence[RunResult]]

MOST_POINTS = 300
"""The largest number of points of a curve; longer curves are thinned to keep the page small."""

Dash = Literal["-", "--", "-.", ":"] | tuple[float, Sequence[float]]
DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":")

LONGEST = 23
"""The largest number of characters of a method's name in a figure."""


TEST = {"clients": "Mean over the clients' own test samples", "global": "Shared model on the global test set"}
LOSSES = {"train": "While training", "validation": "Mean over the clients' validation samples"}
"""Panels of `learning_curves`: the place of `RunResult.curve`, and the title."""


def learning_curves(
    methods: Methods, target: str, metric: str, panels: Mapping[str, str] = TEST, one_scale: bool = False
) -> Figure:
    """A metric by round, a panel for each place: the mean over the runs, a band of one standard deviation."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9))
        shown = [p for p in panels if any(_mean_curve(runs, p, target, metric) for runs in methods.values())]
        drawn = []
        for at, place in enumerate(shown or ["clients"]):
            share = figure.axes[0] if one_scale and at else None
            axes = figure.add_axes(box(figure, at, max(1, len(shown)), right=_label_room(methods)), sharey=share)
            labels = []
            for name, runs in methods.items():
                if found := _mean_curve(runs, place, target, metric):
                    rounds, mean, spread = found
                    colour, dash = look(name, methods)
                    axes.plot(rounds, mean, color=colour, linestyle=dash, linewidth=1.8)
                    if spread is not None:
                        axes.fill_between(rounds, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
                    axes.plot(rounds[-1:], mean[-1:], "o", color=colour, markersize=3.5, clip_on=False)
                    labels.append((name, float(rounds[-1]), float(mean[-1]), colour))
            axes.set(title=panels[place], xlabel="round")
            axes.set_xlim(0, max((x for _, x, _, _ in labels), default=1.0) or 1.0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            value_axis(axes, target, metric, "y")
            drawn.append((axes, labels))
        for axes, labels in drawn:  # once the scale is final
            label_ends(axes, labels)
        return figure


def client_dots(methods: Methods, target: str, metric: str, paired: Mapping[str, Paired]) -> Figure:
    """A dot for each client and run by method, with the mean and the worst tenth; `paired` has the comparison with local."""
    rows = {name: [r for r in runs if r.scores(target, metric)] for name, runs in methods.items()}
    rows = {name: runs for name, runs in rows.items() if runs}
    with matplotlib.rc_context(STYLE):
        height = 0.95 + 0.47 * max(1, len(rows))
        figure = Figure(figsize=(WIDTH, height))
        names = [shortened(name, 60) for name in rows]
        left = 0.35 + 0.078 * max(map(len, names), default=10)
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
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"][0], pad=8)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        value_axis(axes, target, metric, "x")
        return figure


def cost_curves(methods: Methods, target: str, metric: str) -> Figure:
    """The clients' mean (or the global metric) against bytes and against seconds, both cumulated over the rounds.

    Methods that send nothing do not fit on a logarithmic axis: a strip of its own shows their final values.
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
            colour, dash = look(name, methods)
            for axes in panels:
                spent = np.mean(
                    [run.spent("bytes" if axes is sent else "seconds", rounds) for run in counted(runs)], axis=0
                )
                if axes is sent and not spent.any():
                    free.plot([0], mean[-1:], "o", color=colour, markersize=5)
                    labels[free].append((name, 0.0, float(mean[-1]), colour))
                    continue
                real = spent > 0  # a logarithmic axis has no zero, the cost before the first round
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


def _mean_curve(
    runs: Sequence[RunResult], place: str, target: str, metric: str
) -> tuple[Floats, Floats, Floats | None] | None:
    """Rounds that all runs have, mean over the runs and standard deviation (None for one run)."""
    curves: list[Curve] = [c for run in counted(runs) if len((c := run.curve(place, target, metric))[0])]
    if not curves:
        return None
    common = sorted(set.intersection(*(set(rounds.tolist()) for rounds, _ in curves)))
    if not common:
        return None
    rounds = np.array(common)[thinned(len(common))]
    values = np.stack([found[np.searchsorted(at, rounds)] for at, found in curves])
    return rounds, values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None


def thinned(count: int) -> npt.NDArray[np.int64]:
    """The indices of at most MOST_POINTS of `count` points, evenly by rank."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(np.int64))


def look(name: str, methods: Methods) -> tuple[str, Dash]:
    """Colour and line style of a method: grey and broken for the two references, else the palette in order."""
    if name == ALONE:
        return COLOURS["ink"][0], (0, (4, 2))
    others = [m for m, runs in methods.items() if m != ALONE and runs[0].experiment.run.placement != "pooled"]
    if name not in others:
        return COLOURS["muted"][0], (0, (1.2, 1.6))
    at = others.index(name)
    return COLOURS[f"m{at % 8}"][0], DASHES[at // 8 % 4]


def jitter(client: int, seed: int, fold: int) -> float:
    """A deterministic offset within a row, -0.28..0.28; multiples of the golden ratio keep neighbours apart."""
    return ((client * 0.6180339887 + seed * 0.3247179572 + fold * 0.2207440846) % 1 - 0.5) * 0.56


def box(figure: Figure, at: int, of: int, right: float) -> tuple[float, float, float, float]:
    """The position of panel `at` of `of`, in fractions of the figure; `right` inches next to each stay free for labels."""
    wide, tall = figure.get_size_inches()
    each = float(wide) / of
    return (at * each + 0.6) / wide, 0.55 / tall, (each - 0.6 - right) / wide, 1 - 0.95 / tall


def _label_room(methods: Methods) -> float:
    """Width in inches of the longest method's name at 9 points."""
    return 0.25 + 0.07 * max((min(len(name), LONGEST) for name in methods), default=0)


def value_axis(axes: Axes, target: str, metric: str, which: str) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    if is_share(metric):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}"))
        low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
        (axes.set_ylim if which == "y" else axes.set_xlim)(max(low, -0.02), min(high, 1.02))
    better = "higher" if higher_is_better(metric) else "lower"
    axis.set_label_text(f"{metric_label(target, metric)}, {better} is better")


def label_ends(axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each (name, x, y, colour) to the right of the axes at height y; names that would overlap are moved apart."""
    if not labels:
        return
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    tall = axes.get_position().height * (figure.get_figheight() if figure else 1.0)
    gap = 0.165 / tall  # a line of text, as a fraction of the axes' height
    right = 1.0 + 0.14 / (axes.get_position().width * WIDTH)
    order = sorted(range(len(labels)), key=lambda i: labels[i][2])
    wanted = np.array([(labels[i][2] - low) / (high - low) for i in order])
    places = spread_apart(wanted, gap)
    places -= max(0.0, float(places[-1]) - 1.0)  # if the highest name is above the figure's edge, all move down
    for i, place in zip(order, places, strict=True):
        name, _, y, colour = labels[i]
        axes.annotate(
            shortened(name, LONGEST),
            (1, (y - low) / (high - low)), (right, place), "axes fraction", "axes fraction",
            va="center", color=colour, fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 0, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spread_apart(wanted: Floats, gap: float) -> Floats:
    """The places nearest to the ascending `wanted` by least squares, each at least `gap` above the one before.

    Pool adjacent violators on wanted_i - i * gap, which must not descend.
    """
    blocks: list[list[float]] = []
    for value in wanted - gap * np.arange(len(wanted)):
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    level = np.concatenate([np.full(int(n), value) for value, n in blocks]) if blocks else np.zeros(0)
    return np.asarray(level + gap * np.arange(len(wanted)), dtype=np.float64)
