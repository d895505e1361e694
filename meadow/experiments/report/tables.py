"""The report's tables, as plain values."""

from collections.abc import Sequence
from typing import Any

from meadow.experiments import words
from meadow.experiments.ranking import Methods, Row, cell, flagged, is_aside, mean_of, number
from meadow.experiments.results import RunResult, counted, is_share, metrics_of, settings_of
from meadow.experiments.tables import Cell, Column, Table
from meadow.experiments.words import metric_name

OWN, SHARED, ONE_RUN = "clients' own test samples", "shared model", "one run"

RANKING: dict[str, Column] = {
    "client_mean": Column("mean", OWN),
    "client_weighted": Column("weighted", OWN),
    "client_worst_decile": Column("worst tenth", OWN),
    "client_std": Column("std", OWN),
    "last10_clients": Column("last 10", OWN),
    "finetuned": Column("fine-tuned", OWN),
    "global": Column("global test", SHARED),
    "last10_global": Column("last 10", SHARED),
    "source_before": Column("before", "source task"),
    "source_after": Column("after", "source task"),
    "gain": Column("gain", "against alone"),
    "lost": Column("lost", "against alone"),
    "bytes_up": Column("up", ONE_RUN),
    "bytes_down": Column("down", ONE_RUN),
    "bytes_saved": Column("saved", ONE_RUN),
    "trained_parameters": Column("trained", ONE_RUN),
    "seconds": Column("time", ONE_RUN),
}
"""Key of the ranking's rows -> its column."""

NOTES = {
    "gain": "gain: mean difference from local on the same clients, positive is better. "
    "lost: clients (counted once in each run) that do worse than under local.",
    "bytes_saved": "saved: bytes not sent, compared with sharing the whole model with the same clients.",
    "trained_parameters": "trained: trainable parameters.",
    "gain_low": "In brackets: the 95% paired t-interval over the seeds.",
}
"""Key of the ranking's rows -> its explanation below the table, if any row has a value."""


def ranking_of(part: Sequence[Row]) -> Table:
    """The ranking's rows of one target, without empty columns."""
    known = {key for row in part for key, value in row.items() if value is not None}
    keys = [key for key in RANKING if key in known]
    rows = [[Cell(flagged(row)), *(cell(row, part, key) for key in keys)] for row in part]
    aside = frozenset(i for i, row in enumerate(part) if is_aside(row, part))
    note = ["std: over the clients. last 10: mean of the last ten evaluated rounds."]
    note += [text for key, text in NOTES.items() if key in known]
    columns = [Column("method", left=True), *(RANKING[key] for key in keys)]
    return Table(f"{part[0]['target']}-ranking", columns, rows, aside, " ".join(note))


def metrics_table(learners: Methods, target: str, part: Sequence[Row]) -> Table | None:
    """Every metric of a target: the clients' mean and the shared model's value; None if there is none."""
    runs = {row["method"]: counted(learners[row["method"]]) for row in part}
    names = metrics_of([run for group in runs.values() for run in group], target)
    places = {"clients": "clients' mean", "global": "shared model on the global test set"}

    def value(group: Sequence[RunResult], place: str, name: str) -> float | None:
        found = [run.final(place, target, name) for run in group]
        return mean_of([v["mean"] if place == "clients" and v else v for v in found])

    columns = [Column("method", left=True)]
    columns += [Column(metric_name(name), about, wrap=True) for about in places.values() for name in names]
    rows = [
        [Cell(method), *(Cell(number(value(group, place, name), name)) for place in places for name in names)]
        for method, group in runs.items()
    ]
    unit = words.unit_of(target, "rmse")
    in_unit = [metric_name(name) for name in names if unit and words.unit_of(target, name) == unit]
    note = ["Fractions are in percent"] if any(is_share(name) for name in names) else []
    note += [f"{', '.join(in_unit)} in {unit}"] if in_unit else []
    table = Table(f"{target}-metrics", columns, rows, note=". ".join([*note, ""]).strip()).full()
    return table if len(table.columns) > 1 else None


def splits_table(runs: Sequence[RunResult]) -> Table:
    """The split of each seed and fold; `runs` has one run of each."""
    columns = [
        Column("seed", left=True),
        Column("law", left=True),
        Column("tries"),
        Column("samples a client"),
        Column("SHA-256 of the split", left=True, code=True),
    ]
    rows = []
    for run in runs:
        totals = [sum(sizes) for sizes in run.split["sizes"]]
        seed = f"{run.seed}{f', fold {run.fold}' if run.fold else ''}"
        texts = (seed, str(run.split.get("law", "")), str(run.split.get("tries", "")))
        rows.append([*map(Cell, texts), Cell(f"{min(totals)} to {max(totals)}"), Cell(run.split_sha256)])
    return Table("splits", columns, rows)


def settings_table(methods: Methods) -> Table | None:
    """The settings in which the methods differ; None if they do not."""
    flat = {name: settings_of(group[0]) for name, group in methods.items()}
    for name, group in methods.items():
        flat[name]["strategy.share"] = group[0].experiment.share  # what is really shared: nothing if each trains alone
    differ = (key for key in next(iter(flat.values())) if len({str(settings[key]) for settings in flat.values()}) > 1)
    keys = [key for key in differ if key != "run.name"]
    if not keys:
        return None
    columns = [Column("method", left=True), *(Column(key, left=True) for key in keys)]
    rows = [[Cell(name), *(Cell(_setting(settings[key])) for key in keys)] for name, settings in flat.items()]
    return Table("methods", columns, rows)


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) or "(none)"
