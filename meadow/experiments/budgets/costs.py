"""The cost of a privacy budget, paired with the same run without protection: in total, by client, by group of clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from meadow.config.algorithms import ALGORITHMS
from meadow.experiments.pairs import t_interval
from meadow.experiments.results import Floats, RunResult, counted, higher_is_better, settings_of
from meadow.strategies import algorithm

UNITS = {
    "example": "One example of a client",
    "client": "A whole client",
    "local": "A whole client, also from the server",
}
"""`privacy.unit` -> what a budget protects."""

PLACES = {"global": "shared model, global test set", "clients": "mean over the clients"}
"""Where a model is evaluated -> its name in a figure's title."""

GROUPS: dict[str, tuple[str, str]] = {
    "size": ("smallest quarter", "largest quarter"),
    "rare labels": ("most rare labels", "fewest rare labels"),
    "unlike labels": ("labels most unlike all", "labels most like all"),
}
"""Kind -> the group that is expected to pay more, and the other."""

DIFFERENCE = "difference"
"""In place of a group's name: the cost of the first group of a kind minus that of the second."""

UNEVEN = 1.2
"""Groups by size need at least this ratio between the samples of large and small clients."""
RARE = 0.5
"""A label is rare if its share of all samples is below this fraction of an even share."""
UNLIKE = 0.02
"""Groups by labels need at least this difference in mean divergence, in nats."""

Group = tuple[str, str]
"""(kind, group's name) as in GROUPS."""


@dataclass(frozen=True)
class Cost:
    """A cost, one value for each seed; positive is worse than without protection. `interval` as in `t_interval`."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        return t_interval(self.values)


@dataclass(frozen=True)
class Costs:
    """The costs of one budget in one metric; None or empty if unknown.

    utility: by place, for the mean over the clients and for the shared model. worst: for the mean of the worst tenth of
    the clients. clients: (run without protection, client -> cost) for each seed and fold with the same split in both.
    groups: (kind, group's name or DIFFERENCE) -> the mean over the group's clients; only kinds with groups in every seed.
    """

    utility: Mapping[str, Cost | None]
    worst: Cost | None
    clients: Sequence[tuple[RunResult, Mapping[int, float]]]
    groups: Mapping[Group, Cost]


@dataclass(frozen=True, eq=False)
class Line:
    """A method at several budgets: epsilon -> its runs, and `bare`, the same method's runs without protection."""

    label: str
    unit: str
    budgets: Mapping[float, Sequence[RunResult]]
    bare: Sequence[RunResult]
    _found: dict[tuple[str, str], Mapping[float, Costs]] = field(default_factory=dict, repr=False)

    def costs(self, target: str, metric: str) -> Mapping[float, Costs]:
        """Epsilon -> its costs in a metric of a target; computed once."""
        if (target, metric) not in self._found:
            self._found[target, metric] = {
                epsilon: _costs(self._pairs(epsilon), target, metric) for epsilon in self.budgets
            }
        return self._found[target, metric]

    def place(self, target: str, metric: str) -> str:
        """Where the line is evaluated: on the clients, or on the global test set if the clients do not report metrics."""
        shown = all(any(r.final("clients", target, metric) for r in group) for group in self.budgets.values())
        return "clients" if shown else "global"

    @cached_property
    def _open(self) -> Mapping[tuple[int, int], RunResult]:
        return {(run.seed, run.fold): run for run in counted(self.bare)}

    def _pairs(self, epsilon: float) -> list[tuple[RunResult, RunResult]]:
        """(run at this budget, run without protection) for each seed and fold that both have with the same split."""
        pairs = [(run, self._open.get((run.seed, run.fold))) for run in counted(self.budgets[epsilon])]
        return [(run, other) for run, other in pairs if other and other.split_sha256 == run.split_sha256]


def lines_of(runs: Sequence[RunResult]) -> list[Line]:
    """The lines with at least two budgets, or one budget and runs without protection. All clients have the same budget.

    Runs are on one line if they differ only in seed, fold, name, engine and `privacy.epsilon`; runs without protection may
    also differ in [privacy].
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


def kinds_of(lines: Sequence[Line], target: str, metric: str) -> list[str]:
    """The kinds of groups (of GROUPS) for which any line has costs."""
    known = {kind for line in lines for costs in line.costs(target, metric).values() for kind, _ in costs.groups}
    return [kind for kind in GROUPS if kind in known]


def reached(runs: Sequence[RunResult], place: str, target: str, metric: str, key: str = "mean") -> list[float]:
    """Each seed's final metric, the mean over its folds; for the clients their `key` ("mean", "worst_decile")."""
    by_seed: dict[int, list[float]] = {}
    for run in counted(runs):
        if (value := _end(run, place, target, metric, key)) is not None:
            by_seed.setdefault(run.seed, []).append(value)
    return list(_over_seeds(by_seed))


def groups_of(split: Mapping[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Kind (of GROUPS) -> two quarters of the clients, from a run's split.json; without kinds whose quarters are too alike.

    size: by training samples (see UNEVEN). rare labels: by the share of samples with a rare label (see RARE). unlike
    labels, only if no label is rare: by the Kullback-Leibler divergence of the client's labels from all labels, in nats.
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


def _costs(pairs: Sequence[tuple[RunResult, RunResult]], target: str, metric: str) -> Costs:
    """The costs of a budget, from its pairs (run, run without protection)."""
    sign = 1.0 if higher_is_better(metric) else -1.0

    def utility(place: str, key: str = "mean") -> Cost | None:
        by_seed: dict[int, list[float]] = {}
        for run, other in pairs:
            after, before = (_end(one, place, target, metric, key) for one in (run, other))
            if before is not None and after is not None:
                by_seed.setdefault(run.seed, []).append(sign * (before - after))
        return Cost(_over_seeds(by_seed)) if by_seed else None

    clients = []
    for run, other in pairs:
        before, after = other.scores(target, metric), run.scores(target, metric)
        if found := {c: sign * (before[c] - after[c]) for c in before if c in after}:
            clients.append((other, found))
    places = {place: utility(place) for place in PLACES}
    return Costs(places, utility("clients", "worst_decile"), clients, _group_costs(clients))


def _group_costs(clients: Sequence[tuple[RunResult, Mapping[int, float]]]) -> dict[Group, Cost]:
    by_seed: dict[Group, dict[int, list[float]]] = {}
    for run, costs in clients:
        for kind, quarters in groups_of(run.split).items():
            first, second = ([costs[c] for c in own if c in costs] for own in quarters)
            if first and second:
                means = float(np.mean(first)), float(np.mean(second))
                for name, value in zip((*GROUPS[kind], DIFFERENCE), (*means, means[0] - means[1]), strict=True):
                    by_seed.setdefault((kind, name), {}).setdefault(run.seed, []).append(value)
    seeds = {run.seed for run, _ in clients}
    return {group: Cost(_over_seeds(found)) for group, found in by_seed.items() if found.keys() == seeds}


def _over_seeds(by_seed: Mapping[int, Sequence[float]]) -> tuple[float, ...]:
    """Each seed's mean over its folds, in order of seed."""
    return tuple(float(np.mean(values)) for _, values in sorted(by_seed.items()))


def _end(run: RunResult, place: str, target: str, metric: str, key: str) -> float | None:
    value = run.final(place, target, metric)
    value = value.get(key) if place == "clients" and value else value
    return None if value is None else float(value)


def _labels(settings: Sequence[Mapping[str, Any]], runs: Sequence[RunResult]) -> list[str]:
    """A label for each line: its method, and the settings in which it differs from the other lines of its unit."""
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
    """The algorithm's title if it has one, else its settings."""
    titles = algorithm(name).titles if name in ALGORITHMS else {}
    return titles.get(share, name if share == "all" else f"{name}, share = {share}")


def _quarters(score: Floats) -> tuple[list[int], list[int]]:
    """The quarter of the clients with the highest score, and that with the lowest; ties in order of client."""
    order, size = np.argsort(-score, kind="stable"), max(1, round(len(score) / 4))
    return sorted(order[:size].tolist()), sorted(order[-size:].tolist())


def _once(runs: Sequence[RunResult]) -> list[RunResult]:
    """Each run once: a repeat with the same settings, seed and fold adds nothing."""
    found: dict[str, RunResult] = {}
    for run in runs:
        settings = {key: value for key, value in settings_of(run).items() if key != "run.name"}
        found.setdefault(f"{run.seed} {run.fold} {settings}", run)
    return list(found.values())


def _without_privacy(settings: Mapping[str, Any]) -> str:
    return str({key: value for key, value in settings.items() if not key.startswith("privacy.")})
