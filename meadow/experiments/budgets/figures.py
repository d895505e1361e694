"""The figures of budgets: the metric against epsilon, and the loss of each client and each group of clients."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meadow.experiments.budgets.costs import GROUPS, PLACES, UNITS, Line, kinds_of, reached
from meadow.experiments.budgets.sentences import terms, unit_of_loss
from meadow.experiments.pairs import t_interval
from meadow.experiments.pictures.plots import box, jitter, label_ends, value_axis
from meadow.experiments.pictures.style import COLOURS, STYLE, WIDTH
from meadow.experiments.results import Floats, is_share
from meadow.experiments.words import metric_name

MARKS = "\N{BLACK CIRCLE}\N{BLACK SQUARE}"
TITLES = {"size": "Small and large clients", "rare labels": "Rare labels", "unlike labels": "Unlike labels"}


def utility(lines: Sequence[Line], target: str, metric: str) -> Figure:
    """The metric against epsilon: a row of panels for each unit, with the shared model and with the clients' mean."""
    units = list(dict.fromkeys(line.unit for line in lines))
    colours = _colours(lines)
    places = [p for p in PLACES if any(reached(g, p, target, metric) for x in lines for g in x.budgets.values())]
    places = places or ["global"]
    tall = 3.3
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, tall * len(units)))
        room = 0.3 + 0.07 * max((len(label) for label in colours), default=0)
        shared: Axes | None = None
        drawn: list[tuple[Axes, list[tuple[str, float, float, str]]]] = []
        for row, what in enumerate(units):
            for at, place in enumerate(places):
                left, _, wide, _ = box(figure, at, len(places), right=room)
                bottom, high = 0.55 / tall, 1 - 0.95 / tall
                place_ = (left, (len(units) - 1 - row + bottom) / len(units), wide, high / len(units))
                axes = figure.add_axes(place_, sharey=shared)
                shared = shared or axes
                mine = [line for line in lines if line.unit == what]
                ends = _draw_utility(axes, mine, place, target, metric, colours)
                axes.set_title(f"{UNITS[what]}: {PLACES[place]}")
                drawn.append((axes, ends))
                axes.set_xlabel(f"epsilon ({terms(mine)})")
        for at, (axes, ends) in enumerate(drawn):  # only now is the range of the common axis known
            value_axis(axes, target, metric, "y")
            axes.set_ylabel(axes.get_ylabel() if at % len(places) == 0 else "")
            label_ends(axes, ends)
        return figure


def who_pays(lines: Sequence[Line], target: str, metric: str) -> Figure:
    """The cost of each budget: a row for each line, with a panel of all clients and one for each kind of groups."""
    kinds = kinds_of(lines, target, metric)
    across, tall = 1 + len(kinds), 2.55
    scale = 100.0 if is_share(metric) else 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, tall * len(lines)))
        for row, line in enumerate(lines):
            shared: Axes | None = None
            for column in range(across):
                each = (WIDTH - 0.65) / across
                place = (
                    (0.65 + column * each) / WIDTH,
                    (len(lines) - 1 - row + 0.5 / tall) / len(lines),
                    (each - 0.45) / WIDTH,
                    (1 - 1.02 / tall) / len(lines),
                )
                axes = figure.add_axes(place, sharey=shared if column > 1 else None)
                shared = axes if column == 1 else shared
                if column == 0:
                    _draw_clients(axes, line, target, metric, scale)
                    axes.set_title(f"{UNITS[line.unit]}\n{line.label}: each client", linespacing=1.35)
                else:
                    _draw_groups(axes, line, kinds[column - 1], target, metric, scale)
                axes.axhline(0, color=COLOURS["muted"][0], linewidth=0.9, linestyle=(0, (4, 2)))
                axes.set_xlabel("epsilon")
            figure.axes[row * across].set_ylabel(f"{metric_name(metric)} lost{unit_of_loss(metric, target)}")
        return figure


def _draw_utility(
    axes: Axes, lines: Sequence[Line], place: str, target: str, metric: str, colours: Mapping[str, str]
) -> list[tuple[str, float, float, str]]:
    """Draw one panel, and return the labels for its right edge."""
    at = _ticks(axes, [e for line in lines for e in line.budgets], bare=any(line.bare for line in lines))
    ends = []
    for number_, line in enumerate(lines):
        colour, aside = colours[line.label], 0.09 * (number_ - (len(lines) - 1) / 2)
        found = {e: values for e, g in line.budgets.items() if (values := reached(g, place, target, metric))}
        if not found:
            continue
        x = np.array([at[e] + aside for e in found])
        means = np.array([np.mean(values) for values in found.values()])
        axes.plot(x, means, color=colour, linewidth=1.8)
        axes.plot(x, means, "o", color=colour, markersize=4.5)
        _bars(axes, x, list(found.values()), colour)
        if bare := reached(line.bare, place, target, metric):
            level = float(np.mean(bare))
            axes.axhline(level, color=colour, linewidth=1.1, linestyle=(0, (4, 2)), alpha=0.8)
            axes.plot([at[np.inf] + aside], [level], "D", color=colour, markersize=4.5)
            _bars(axes, np.array([at[np.inf] + aside]), [bare], colour)
            ends.append((line.label, float(at[np.inf]), level, colour))
        else:
            ends.append((line.label, float(x[-1]), float(means[-1]), colour))
    return ends


def _draw_clients(axes: Axes, line: Line, target: str, metric: str, scale: float) -> None:
    """A dot for each client and run, orange if it loses; bar: the mean; diamond: the worst tenth of the clients."""
    at = _ticks(axes, list(line.budgets))
    for epsilon, x in at.items():
        dots = [
            (x + 0.9 * jitter(client, run.seed, run.fold), scale * cost, cost > 0)
            for run, costs in line.costs(target, metric)[epsilon].clients
            for client, cost in costs.items()
        ]
        for lost in (False, True):
            if chosen := [(a, b) for a, b, worse in dots if worse == lost]:
                colour = COLOURS["loser" if lost else "dot"][0]
                x_, y_ = np.array(chosen).T
                axes.scatter(x_, y_, s=7, color=colour, alpha=0.55, linewidths=0, rasterized=len(dots) > 900)
        ink = COLOURS["ink"][0]
        if dots:
            axes.plot(x, np.mean([b for _, b, _ in dots]), "_", color=ink, markersize=17.0, mew=1.8)
        if tail := line.costs(target, metric)[epsilon].worst:
            axes.plot(x, scale * tail.mean, "d", color=ink, markersize=5.5)


def _draw_groups(axes: Axes, line: Line, kind: str, target: str, metric: str, scale: float) -> None:
    """Two groups of clients side by side at each budget, with intervals over the seeds."""
    at = _ticks(axes, list(line.budgets))
    for which, name in enumerate(GROUPS[kind]):
        colour = COLOURS["m1" if which == 0 else "m0"][0]
        costs = line.costs(target, metric)
        found = {e: cost for e in at if (cost := costs[e].groups.get((kind, name)))}
        x = np.array([at[e] + (which - 0.5) * 0.2 for e in found])
        axes.plot(x, [scale * cost.mean for cost in found.values()], "os"[which], color=colour, markersize=4.5)
        _bars(axes, x, [[scale * v for v in cost.values] for cost in found.values()], colour)
        text = f"{MARKS[which]} {name}"
        axes.annotate(text, (which * 0.5, 1.0), (0, 6), "axes fraction", "offset points", color=colour, fontsize=9)
    axes.set_title(f"{TITLES[kind]}\n", linespacing=1.35)


def _ticks(axes: Axes, budgets: Sequence[float], bare: bool = False) -> dict[float, float]:
    """Epsilon -> its place on a logarithmic axis; infinity, at the right, means no protection."""
    distinct = sorted(set(budgets))
    logs = np.log2(distinct)
    step = float(np.diff(logs).min()) if len(logs) > 1 else 1.0
    at = dict(zip(distinct, ((logs - logs[0]) / step).tolist(), strict=True))
    if bare:
        at[np.inf] = max(at.values()) + 1.0
    axes.set_xticks(list(at.values()), [f"{e:g}" if np.isfinite(e) else "none" for e in at])
    axes.set_xlim(-0.5, max(at.values()) + 0.5)
    axes.grid(visible=False, axis="x")
    return at


def _bars(axes: Axes, x: Floats, values: Sequence[Sequence[float]], colour: str) -> None:
    for place, seeds in zip(x, values, strict=True):
        if interval := t_interval(seeds):
            axes.plot([place, place], interval, color=colour, linewidth=1.4, alpha=0.75)


def _colours(lines: Sequence[Line]) -> dict[str, str]:
    return {label: COLOURS[f"m{i % 8}"][0] for i, label in enumerate(dict.fromkeys(line.label for line in lines))}
