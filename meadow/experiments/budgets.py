"""Privacy against utility: what each budget costs against no protection at all, and which of the clients pay for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meadow.config.algorithms import ALGORITHMS
from meadow.experiments.pictures import style
from meadow.experiments.pictures.plots import box, jitter, label_ends, value_axis
from meadow.experiments.pictures.style import COLOURS, STYLE, WIDTH
from meadow.experiments.ranking import mean_of, number, unit
from meadow.experiments.results import (
    Floats,
    RunResult,
    counted,
    higher_is_better,
    is_share,
    primary_metric,
    settings_of,
    t_interval,
    targets_of,
)
from meadow.experiments.words import metric_name
from meadow.privacy.plan import claim
from meadow.strategies import algorithm

UNITS = {
    "example": "One example of a client",
    "client": "A whole client",
    "local": "A whole client, also from the server",
}
"""What a budget protects, by `privacy.unit`."""

PLACES = {"global": "shared model, global test set", "clients": "mean over the clients"}

UNEVEN = 1.2
"""Large clients have so many times the samples of small ones, or their sizes are not told apart."""
RARE = 0.5
"""A label is rare if it has less than this of an even share of all samples."""
UNLIKE = 0.02
"""Nats by which the labels of some clients must differ more from everyone's than those of others, to be told apart."""


@dataclass(frozen=True)
class Line:
    """One way to train at several budgets: epsilon -> its runs, and `bare`, those of the same without protection."""

    label: str
    unit: str
    budgets: Mapping[float, Sequence[RunResult]]
    bare: Sequence[RunResult]


@dataclass(frozen=True)
class Cost:
    """What something costs, one value a seed, positive: worse than without protection. `interval` as of `t_interval`."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        return t_interval(self.values)


def lines_of(runs: Sequence[RunResult]) -> list[Line]:
    """The lines that have two budgets, or one and the same without protection; each client's budget the same.

    Runs are on one line if all their settings but the seed, the fold, the name, the engine and `privacy.epsilon` are alike.
    Those without protection have all settings but [privacy] alike.
    """
    found: dict[str, dict[float, list[RunResult]]] = {}
    bare: dict[str, list[RunResult]] = {}
    of: dict[str, dict[str, Any]] = {}
    for run in _once(runs):
        privacy = run.experiment.privacy
        settings = {key: value for key, value in settings_of(run).items() if key not in ("run.name", "privacy.epsilon")}
        if privacy.unit == "none":
            bare.setdefault(_without_privacy(settings), []).append(run)
        elif privacy.epsilon and not privacy.budgets:
            of[str(settings)] = settings
            found.setdefault(str(settings), {}).setdefault(privacy.epsilon, []).append(run)
    kept = [k for k, budgets in found.items() if len(budgets) > 1 or _without_privacy(of[k]) in bare]
    labels = _labels([of[k] for k in kept], [next(iter(found[k].values()))[0] for k in kept])
    return [
        Line(label, str(of[k]["privacy.unit"]), dict(sorted(found[k].items())), bare.get(_without_privacy(of[k]), []))
        for k, label in zip(kept, labels, strict=True)
    ]


def section(runs: Sequence[RunResult]) -> str:
    """The report's part on budgets, as HTML; "" where there is no line. Each target has its pictures and its table."""
    lines = lines_of(runs)
    if not lines:
        return ""
    text = ["<h2>What privacy costs</h2>"]
    for target in targets_of(runs):
        metric = primary_metric(runs, target)
        seeds = len({run.seed for line in lines for group in line.budgets.values() for run in group})
        text += [
            f"<h3>{escape(metric_name(metric)).capitalize()} of {escape(target)}</h3>",
            f'<p class="note">{escape(_about(lines, seeds))}</p>',
            _figure(
                utility(lines, target, metric), f"{target}-budgets", f"Utility of {target} against the privacy budget",
                "Epsilon is of the unit that stands above each picture: those of different units do not compare. Broken "
                "line: the same without protection."
                + (" Bars: 95% t-intervals over the seeds." if seeds > 2 else ""),
            ),
        ]  # fmt: skip
        paying = [line for line in lines if _has_pairs(line, target, metric)]
        if paying:
            text.append(
                _figure(who_pays(paying, target, metric), f"{target}-payers", f"Who pays for the privacy of {target}",
                        _who_caption(paying, target, metric))
            )  # fmt: skip
        text.append(table(lines, target, metric))
    return "\n".join(text)


def answer(runs: Sequence[RunResult]) -> list[str]:
    """What the smallest and the largest budget of each line cost, in sentences, for the first target; [] if unknown."""
    target = targets_of(runs)[0]
    metric = primary_metric(runs, target)
    of = f"{unit(metric, target).strip()} of {metric_name(metric)}".removeprefix(" of ")
    said: list[str] = []
    brackets = False
    for line in lines_of(runs):
        costs = {e: cost for e in line.budgets if (cost := utility_cost(line, e, target, metric))}
        if not costs:
            continue
        ends = list(dict.fromkeys((min(costs), max(costs))))
        first, *rest = (f"{_with_interval(costs[e], metric, signed=False)} at epsilon = {e:g}" for e in ends)
        amount, _, at = first.partition(" at ")
        said.append(f"{UNITS[line.unit]}, {line.label}: {amount} {of if not said else ''} at {at}".replace("  ", " "))
        said[-1] += "".join(f", {text}" for text in rest) + "."
        brackets |= any(cost.interval for cost in costs.values())
    if not said:
        return []
    note = ["In brackets: 95% intervals over the seeds, paired."] if brackets else []
    note.append(f"Epsilon: {terms(lines_of(runs))}.")
    return [f"What protection costs {_where(runs, target, metric)}.", *said, *note]


def terms(lines: Sequence[Line]) -> str:
    """What an epsilon of these lines means nothing without, beside the unit: delta, adjacency and accountant."""
    claims = [claim(run.experiment, 0.0) for line in lines for runs in line.budgets.values() for run in runs]
    return "; or ".join(dict.fromkeys(f"delta = {c.delta:g}; {c.adjacency}; {c.accountant}" for c in claims))


# ---- what is measured ----


def place_of(line: Line, target: str, metric: str) -> str:
    """Where a line is measured: on the clients, or, where their metrics do not leave them, on the global test set."""
    shown = all(any(r.final("clients", target, metric) for r in group) for group in line.budgets.values())
    return "clients" if shown else "global"


def reached(runs: Sequence[RunResult], place: str, target: str, metric: str, key: str = "mean") -> list[float]:
    """The metric at the end of each seed, the mean over its folds; of the clients their `key` ("mean", "worst_decile")."""
    by_seed: dict[int, list[float]] = {}
    for run in counted(runs):
        if (value := _end(run, place, target, metric, key)) is not None:
            by_seed.setdefault(run.seed, []).append(value)
    return [float(np.mean(values)) for _, values in sorted(by_seed.items())]


def utility_cost(
    line: Line, epsilon: float, target: str, metric: str, place: str = "", key: str = "mean"
) -> Cost | None:
    """What a budget costs in a metric (see `reached`), over the seeds that have it without protection too; None for none."""
    place = place or place_of(line, target, metric)
    sign = 1.0 if higher_is_better(metric) else -1.0
    by_seed: dict[int, list[float]] = {}
    for run, other in _pairs(line, epsilon):
        after, before = (_end(one, place, target, metric, key) for one in (run, other))
        if before is not None and after is not None:
            by_seed.setdefault(run.seed, []).append(sign * (before - after))
    return Cost(tuple(float(np.mean(values)) for _, values in sorted(by_seed.items()))) if by_seed else None


def client_costs(line: Line, epsilon: float, target: str, metric: str) -> list[tuple[RunResult, dict[int, float]]]:
    """(run without protection, client -> what the budget costs it), for each seed and fold with the same split in both."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    found = []
    for run, other in _pairs(line, epsilon):
        before, after = other.scores(target, metric), run.scores(target, metric)
        if costs := {c: sign * (before[c] - after[c]) for c in before if c in after}:
            found.append((other, costs))
    return found


def _pairs(line: Line, epsilon: float) -> list[tuple[RunResult, RunResult]]:
    """(run at this budget, run without protection) of each seed and fold that both have, on the same split."""
    open_ = {(run.seed, run.fold): run for run in counted(line.bare)}
    pairs = [(run, open_.get((run.seed, run.fold))) for run in counted(line.budgets[epsilon])]
    return [(run, other) for run, other in pairs if other and other.split_sha256 == run.split_sha256]


def _end(run: RunResult, place: str, target: str, metric: str, key: str) -> float | None:
    value = run.final(place, target, metric)
    value = value.get(key) if place == "clients" and value else value
    return None if value is None else float(value)


Group = tuple[str, str]
"""What tells two groups of clients apart, and which of the two."""

GROUPS: dict[str, tuple[str, str]] = {
    "size": ("smallest quarter", "largest quarter"),
    "rare labels": ("most rare labels", "fewest rare labels"),
    "unlike labels": ("labels most unlike all", "labels most like all"),
}
"""Kind -> the group that may be thought to pay more, and the other."""

MARKS = "\N{BLACK CIRCLE}\N{BLACK SQUARE}"
TITLES = {"size": "Small and large clients", "rare labels": "Rare labels", "unlike labels": "Unlike labels"}


def groups_of(split: Mapping[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Kind (of GROUPS) -> two quarters of the clients, by a run's split.json; kinds that tell nobody apart are left out.

    size: by training samples, at least UNEVEN times as many in the one as in the other. rare labels: by the share of
    samples whose label has less than RARE of an even share of all samples; if no label is rare, unlike labels: by the
    Kullback-Leibler divergence of the client's labels from everyone's, in nats.
    """
    found: dict[str, tuple[list[int], list[int]]] = {}
    sizes = np.array(split.get("sizes") or [], dtype=np.float64)
    if len(sizes) >= 4:
        small, large = _quarters(-sizes[:, 0])
        if sizes[large, 0].mean() >= UNEVEN * sizes[small, 0].mean():
            found["size"] = small, large
    labels = np.array(split.get("labels") or np.zeros((0, 0)), dtype=np.float64)
    labels = labels[:, labels.sum(axis=0) > 0] if labels.size else labels
    if len(labels) >= 4 and labels.shape[1] > 1 and labels.sum(axis=1).all():
        share = labels / labels.sum(axis=1, keepdims=True)
        total = labels.sum(axis=0) / labels.sum()
        rare = total < RARE / len(total)
        with np.errstate(divide="ignore", invalid="ignore"):
            unlike = np.where(share > 0, share * np.log(share / total), 0.0).sum(axis=1)
        score, apart, kind = (share[:, rare].sum(axis=1), 0.0, "rare labels") if rare.any() else (
            unlike, UNLIKE, "unlike labels")  # fmt: skip
        most, fewest = _quarters(score)
        if score[most].mean() - score[fewest].mean() > apart:
            found[kind] = most, fewest
    return found


def group_costs(line: Line, epsilon: float, target: str, metric: str) -> dict[Group, Cost]:
    """(kind, group's name of GROUPS) -> what the budget costs its clients, the mean over them for each seed.

    Only kinds that every seed's split tells apart. (kind, "difference"): what the first group of the kind pays more.
    """
    by_seed: dict[Group, dict[int, list[float]]] = {}
    pairs = client_costs(line, epsilon, target, metric)
    for run, costs in pairs:
        for kind, quarters in groups_of(run.split).items():
            first, second = ([costs[c] for c in clients if c in costs] for clients in quarters)
            if first and second:
                means = float(np.mean(first)), float(np.mean(second))
                for name, value in zip((*GROUPS[kind], "difference"), (*means, means[0] - means[1]), strict=True):
                    by_seed.setdefault((kind, name), {}).setdefault(run.seed, []).append(value)
    seeds = {run.seed for run, _ in pairs}
    return {
        group: Cost(tuple(float(np.mean(values)) for _, values in sorted(found.items())))
        for group, found in by_seed.items()
        if found.keys() == seeds
    }


# ---- pictures ----


def utility(lines: Sequence[Line], target: str, metric: str) -> Figure:
    """The metric against epsilon, a row of panels for each unit: the shared model's, and the clients' mean."""
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
        for at, (axes, ends) in enumerate(drawn):  # when all are drawn, whose common axis is known
            value_axis(axes, target, metric, "y")
            axes.set_ylabel(axes.get_ylabel() if at % len(places) == 0 else "")
            label_ends(axes, ends)
        return figure


def who_pays(lines: Sequence[Line], target: str, metric: str) -> Figure:
    """What each budget costs the clients: a row for each line, of each client, and of groups of them side by side."""
    kinds = [
        kind for kind in GROUPS if any(kind == k for line in lines for k, _ in _groups_of_line(line, target, metric))
    ]
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
            figure.axes[row * across].set_ylabel(f"{metric_name(metric)} lost{_in_units(metric, target)}")
        return figure


def _draw_utility(
    axes: Axes, lines: Sequence[Line], place: str, target: str, metric: str, colours: Mapping[str, str]
) -> list[tuple[str, float, float, str]]:
    """Draw one panel; the names for its right edge."""
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
    """A dot for each client and run, orange where it loses; bar: their mean; diamond: of the worst tenth of clients."""
    at = _ticks(axes, list(line.budgets))
    for epsilon, x in at.items():
        dots = [
            (x + 0.9 * jitter(client, run.seed, run.fold), scale * cost, cost > 0)
            for run, costs in client_costs(line, epsilon, target, metric)
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
        if tail := utility_cost(line, epsilon, target, metric, "clients", "worst_decile"):
            axes.plot(x, scale * tail.mean, "d", color=ink, markersize=5.5)


def _draw_groups(axes: Axes, line: Line, kind: str, target: str, metric: str, scale: float) -> None:
    """Two groups of clients side by side at each budget, with intervals over the seeds."""
    at = _ticks(axes, list(line.budgets))
    for which, name in enumerate(GROUPS[kind]):
        colour = COLOURS["m1" if which == 0 else "m0"][0]
        found = {e: cost for e in at if (cost := group_costs(line, e, target, metric).get((kind, name)))}
        x = np.array([at[e] + (which - 0.5) * 0.2 for e in found])
        axes.plot(x, [scale * cost.mean for cost in found.values()], "os"[which], color=colour, markersize=4.5)
        _bars(axes, x, [[scale * v for v in cost.values] for cost in found.values()], colour)
        text = f"{MARKS[which]} {name}"
        axes.annotate(text, (which * 0.5, 1.0), (0, 6), "axes fraction", "offset points", color=colour, fontsize=9)
    axes.set_title(f"{TITLES[kind]}\n", linespacing=1.35)


def _ticks(axes: Axes, budgets: Sequence[float], bare: bool = False) -> dict[float, float]:
    """Epsilon -> its place on the axis, evenly by its logarithm; infinity stands for no protection, at the right."""
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


def _figure(figure: Figure, name: str, about: str, caption: str) -> str:
    svg = style.to_svg(figure, name, escape(about))
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


# ---- words and tables ----


def table(lines: Sequence[Line], target: str, metric: str) -> str:
    """What each budget gives and costs, as an HTML table: in all, for the worst tenth, and for the groups of clients."""
    kinds = [k for k in GROUPS if any(k == kind for line in lines for kind, _ in _groups_of_line(line, target, metric))]
    columns = [("", ""), ("", "epsilon"), ("shared model", "global test"), ("shared model", "lost")]
    columns += [("clients", "mean"), ("clients", "lost"), ("clients", "who lose"), ("clients", "worst tenth, lost")]
    for kind in kinds:
        columns += [(kind, f"{name}, lost") for name in GROUPS[kind]] + [(kind, "difference")]
    body: list[list[str]] = []
    aside: list[bool] = []
    for line in lines:
        for epsilon in [None, *line.budgets] if line.bare else line.budgets:
            body.append(_table_row(line, epsilon, kinds, target, metric))
            aside.append(epsilon is None)
    full = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in body)]
    spans: dict[str, int] = {}
    for i in full:
        spans[columns[i][0]] = spans.get(columns[i][0], 0) + 1
    head = "<tr>" + "".join(f'<th class="group" colspan="{n}"><span>{escape(g)}</span></th>' if g else
                            f'<th colspan="{n}"></th>' for g, n in spans.items()) + "</tr><tr>"  # fmt: skip
    head += "".join(f'<th class="{"wrap" if i > 1 else ""}">{escape(columns[i][1])}</th>' for i in full) + "</tr>"
    rows = "".join(
        f"<tr{' class=aside' if grey else ''}>" + "".join(f"<td>{row[i]}</td>" for i in full) + "</tr>"
        for row, grey in zip(body, aside, strict=True)
    )
    paired = any("[" in cell for row in body for cell in row[2:])
    said = ["lost: against the same seeds, splits and clients without protection, positive is worse."]
    said += ["In brackets: the 95% paired t-interval over the seeds."] if paired else []
    said = [f"Epsilon: {terms(lines)}.", *(said if any(line.bare for line in lines) else [])]
    note = f'<p class="note">{escape(" ".join(said))}</p>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>{note}'


def _table_row(line: Line, epsilon: float | None, kinds: Sequence[str], target: str, metric: str) -> list[str]:
    runs = line.bare if epsilon is None else line.budgets[epsilon]
    row = [escape(f"{UNITS[line.unit]}, {line.label}"), "none" if epsilon is None else f"{epsilon:g}"]
    for place in PLACES:
        row.append(number(mean_of(reached(runs, place, target, metric)), metric))
        row.append("" if epsilon is None else _cell(utility_cost(line, epsilon, target, metric, place), metric))
    if epsilon is None:
        return [*row, "", "", *[""] * 3 * len(kinds)]
    pairs = [cost for _, costs in client_costs(line, epsilon, target, metric) for cost in costs.values()]
    row.append(f"{sum(cost > 0 for cost in pairs)} <small>of {len(pairs)}</small>" if pairs else "")
    row.append(_cell(utility_cost(line, epsilon, target, metric, "clients", "worst_decile"), metric))
    costs = group_costs(line, epsilon, target, metric)
    return row + [_cell(costs.get((k, name)), metric) for k in kinds for name in (*GROUPS[k], "difference")]


def _cell(cost: Cost | None, metric: str) -> str:
    if cost is None:
        return ""
    text, _, interval = _with_interval(cost, metric, signed=True).partition(" ")
    return f"{text} <small>{interval}</small>" if interval else text


def _with_interval(cost: Cost, metric: str, signed: bool) -> str:
    """A cost with its interval in brackets, where there is one: "4.2 [3.4, 5.0]"."""
    text = number(cost.mean, metric, signed)
    if not cost.interval:
        return text
    low, high = (number(end, metric, signed) for end in cost.interval)
    return f"{text} [{low}, {high}]"


def _where(runs: Sequence[RunResult], target: str, metric: str) -> str:
    places = {place_of(line, target, metric) for line in lines_of(runs)}
    return {"clients": "the clients on their own test samples", "global": "the shared model on the global test set"}[
        min(places)
    ]


def _about(lines: Sequence[Line], seeds: int) -> str:
    said = f"Each budget over {seeds} seeds." if seeds > 1 else "One seed: three or more would give intervals."
    if not all(line.bare for line in lines):
        said += (
            " Without the same run under privacy.unit = none (privacy.epsilon=1,2,none in a sweep) costs are not known."
        )
    return said


def _who_caption(lines: Sequence[Line], target: str, metric: str) -> str:
    kinds = {kind for line in lines for kind, _ in _groups_of_line(line, target, metric)}
    said = [
        "Each client: a dot for each client and run, orange where it does worse than without protection. Bar: the mean. "
        "Diamond: how much lower the worst tenth of the clients are, whoever they are."
    ]
    if "size" in kinds:
        said.append("Quarters by number of training samples.")
    if "rare labels" in kinds:
        said.append("Rare labels have less than half of an even share of all samples.")
    if "unlike labels" in kinds:
        said.append("No label is rare; unlike: by the divergence of a client's labels from everyone's.")
    return " ".join([*said, f"Epsilon: {terms(lines)}."])


def _labels(settings: Sequence[Mapping[str, Any]], runs: Sequence[RunResult]) -> list[str]:
    """What tells the lines of one unit apart: the settings in which they differ."""
    labels = []
    for mine, run in zip(settings, runs, strict=True):
        others = [other for other in settings if other["privacy.unit"] == mine["privacy.unit"]]
        differ = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
        known = {"strategy.name", "strategy.share"}
        named = [f"{key.partition('.')[2]} = {mine[key]}" for key in differ if key not in known]
        of = _method(str(mine["strategy.name"]), run.experiment.share)
        labels.append(", ".join([of, *named[:3]]))
    return labels


def _method(name: str, share: str) -> str:
    """By the title that the algorithm has, else as the settings."""
    titles = algorithm(name).titles if name in ALGORITHMS else {}
    return titles.get(share, name if share == "all" else f"{name}, share = {share}")


def _groups_of_line(line: Line, target: str, metric: str) -> list[Group]:
    return [group for epsilon in line.budgets for group in group_costs(line, epsilon, target, metric)]


def _has_pairs(line: Line, target: str, metric: str) -> bool:
    return any(client_costs(line, epsilon, target, metric) for epsilon in line.budgets)


def _quarters(score: Floats) -> tuple[list[int], list[int]]:
    """The quarter of the clients with the highest score, and that with the lowest; ties by the clients' numbers."""
    order, size = np.argsort(-score, kind="stable"), max(1, round(len(score) / 4))
    return sorted(order[:size].tolist()), sorted(order[-size:].tolist())


def _colours(lines: Sequence[Line]) -> dict[str, str]:
    return {label: COLOURS[f"m{i % 8}"][0] for i, label in enumerate(dict.fromkeys(line.label for line in lines))}


def _once(runs: Sequence[RunResult]) -> list[RunResult]:
    """Each run once: a repeat with the same settings, seed and fold adds nothing."""
    found: dict[str, RunResult] = {}
    for run in runs:
        settings = {key: value for key, value in settings_of(run).items() if key != "run.name"}
        found.setdefault(f"{run.seed} {run.fold} {settings}", run)
    return list(found.values())


def _in_units(metric: str, target: str) -> str:
    """The unit of a difference, for an axis: " (points)", " (rad)" or ""."""
    found = "points" if is_share(metric) else unit(metric, target).strip()
    return f" ({found})" if found else ""


def _without_privacy(settings: Mapping[str, Any]) -> str:
    return str({key: value for key, value in settings.items() if not key.startswith("privacy.")})
