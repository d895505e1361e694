"""The costs of budgets in sentences and as a table."""

from collections.abc import Sequence

from meadow.experiments.budgets.costs import DIFFERENCE, GROUPS, PLACES, UNITS, Cost, Line, kinds_of, lines_of, reached
from meadow.experiments.ranking import mean_of, number, unit
from meadow.experiments.results import RunResult, is_share, primary_metric, targets_of
from meadow.experiments.tables import Cell, Column, Table
from meadow.experiments.words import metric_name
from meadow.privacy.plan import claim


def answer(runs: Sequence[RunResult]) -> list[str]:
    """The costs of each line's smallest and largest budget in sentences, for the first target; [] if unknown."""
    target = targets_of(runs)[0]
    metric = primary_metric(runs, target)
    of = f"{unit(metric, target).strip()} of {metric_name(metric)}".removeprefix(" of ")
    lines, said, brackets, places = lines_of(runs), list[str](), False, set[str]()
    for line in lines:
        place = line.place(target, metric)
        places.add(place)
        known = {e: cost for e, costs in line.costs(target, metric).items() if (cost := costs.utility[place])}
        if not known:
            continue
        ends = list(dict.fromkeys((min(known), max(known))))
        first, *rest = (f"{_with_interval(known[e], metric)} at epsilon = {e:g}" for e in ends)
        amount, _, at = first.partition(" at ")
        said.append(f"{UNITS[line.unit]}, {line.label}: {amount} {of if not said else ''} at {at}".replace("  ", " "))
        said[-1] += "".join(f", {text}" for text in rest) + "."
        brackets |= any(cost.interval for cost in known.values())
    if not said:
        return []
    note = ["In brackets: 95% intervals over the seeds, paired."] if brackets else []
    note.append(f"Epsilon: {terms(lines)}.")
    where = {"clients": "the clients on their own test samples", "global": "the shared model on the global test set"}
    return [f"What protection costs {where[min(places)]}.", *said, *note]


def terms(lines: Sequence[Line]) -> str:
    """The terms of these lines' epsilons besides the unit: delta, adjacency and accountant."""
    claims = [claim(run.experiment, 0.0) for line in lines for runs in line.budgets.values() for run in runs]
    return "; or ".join(dict.fromkeys(f"delta = {c.delta:g}; {c.adjacency}; {c.accountant}" for c in claims))


def about(lines: Sequence[Line]) -> str:
    """The number of seeds, and how to get the costs if they are unknown."""
    seeds = _seeds(lines)
    text = f"Each budget has {seeds} seeds." if seeds > 1 else "One seed; with three or more there are intervals."
    if not all(line.bare for line in lines):
        text += " The cost needs the same run without privacy: write privacy.epsilon=1,2,none in a sweep."
    return text


def utility_caption(lines: Sequence[Line]) -> str:
    return (
        "Epsilon refers to the unit in each panel's title; do not compare different units. Broken line: the same method "
        "without protection." + (" Bars: 95% t-intervals over the seeds." if _seeds(lines) > 2 else "")
    )


def _seeds(lines: Sequence[Line]) -> int:
    return len({run.seed for line in lines for group in line.budgets.values() for run in group})


def payers_caption(lines: Sequence[Line], target: str, metric: str) -> str:
    kinds = kinds_of(lines, target, metric)
    notes = {
        "size": "Size: quarters by number of training samples.",
        "rare labels": "Rare labels have less than half of an even share of all samples.",
        "unlike labels": "Unlike labels: quarters by the divergence of a client's labels from all labels; no label is rare.",
    }
    return " ".join(
        [
            "A dot for each client and run, orange if it does worse than without protection. Bar: the mean. Diamond: the "
            "loss in the mean of the worst tenth, which may be other clients in each run.",
            *(notes[kind] for kind in kinds),
            f"Epsilon: {terms(lines)}.",
        ]
    )


def table(lines: Sequence[Line], target: str, metric: str) -> Table:
    """Each budget's metrics and costs: in total, for the worst tenth, and for the groups of clients."""
    kinds = kinds_of(lines, target, metric)
    columns = [Column(""), Column("epsilon"), Column("global test", "shared model"), Column("lost", "shared model")]
    columns += [Column(name, "clients") for name in ("mean", "lost", "who lose", "worst tenth, lost")]
    for kind in kinds:
        columns += [Column(name, kind) for name in (*(f"{group}, lost" for group in GROUPS[kind]), DIFFERENCE)]
    columns = [Column(c.name, c.group, wrap=i > 1) for i, c in enumerate(columns)]
    points = [(line, e) for line in lines for e in ([None, *line.budgets] if line.bare else line.budgets)]
    rows = [_row(line, epsilon, kinds, target, metric) for line, epsilon in points]
    note = [f"Epsilon: {terms(lines)}."]
    if any(line.bare for line in lines):
        note.append("lost: compared with the same seeds, splits and clients without protection; positive is worse.")
        if any(cell.small.startswith("[") for row in rows for cell in row):
            note.append("In brackets: the 95% paired t-interval over the seeds.")
    aside = frozenset(i for i, (_, epsilon) in enumerate(points) if epsilon is None)
    return Table(f"{target}-budgets-table", columns, rows, aside, " ".join(note)).full(always=2)


def _row(line: Line, epsilon: float | None, kinds: Sequence[str], target: str, metric: str) -> list[Cell]:
    runs = line.bare if epsilon is None else line.budgets[epsilon]
    costs = None if epsilon is None else line.costs(target, metric)[epsilon]
    row = [Cell(f"{UNITS[line.unit]}, {line.label}"), Cell("none" if epsilon is None else f"{epsilon:g}")]
    for place in PLACES:
        row.append(Cell(number(mean_of(reached(runs, place, target, metric)), metric)))
        row.append(_cell(costs.utility[place] if costs else None, metric))
    pairs = [cost for _, own in costs.clients for cost in own.values()] if costs else []
    row.append(Cell(f"{sum(cost > 0 for cost in pairs)}", f"of {len(pairs)}") if pairs else Cell())
    row.append(_cell(costs.worst if costs else None, metric))
    groups = costs.groups if costs else {}
    return row + [_cell(groups.get((k, name)), metric) for k in kinds for name in (*GROUPS[k], DIFFERENCE)]


def _cell(cost: Cost | None, metric: str) -> Cell:
    if cost is None:
        return Cell()
    return Cell(number(cost.mean, metric, signed=True), _interval(cost, metric, signed=True))


def _interval(cost: Cost, metric: str, signed: bool = False) -> str:
    if not cost.interval:
        return ""
    low, high = (number(end, metric, signed) for end in cost.interval)
    return f"[{low}, {high}]"


def _with_interval(cost: Cost, metric: str) -> str:
    """A cost, with its interval in brackets if there is one: "4.2 [3.4, 5.0]"."""
    return f"{number(cost.mean, metric)} {_interval(cost, metric)}".rstrip()


def unit_of_loss(metric: str, target: str) -> str:
    """The unit of a difference, for an axis: " (points)", " (rad)" or ""."""
    found = "points" if is_share(metric) else unit(metric, target).strip()
    return f" ({found})" if found else ""
