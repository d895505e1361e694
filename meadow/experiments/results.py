"""Read run folders, finished or still being written."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meadow.arrays.files import DamagedFile
from meadow.config import load
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.limits import read_file
from meadow.server import recorded
from meadow.server.folder import read_lines, read_record
from meadow.server.recorded import Form, read_recorded
from meadow.tasks.metrics import LOWER_IS_BETTER, PRIMARY, SHARES, kind_of

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]

ALONE = "local"
"""The reference method: each client trains alone, from scratch."""

_ORDER = (
    "accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc", "exact_match",
    "mae", "rmse", "r2", "pinball", "coverage", "loss",
)  # fmt: skip
"""The order of metrics in a table; coverage stands for all its levels."""


@dataclass(frozen=True)
class RunResult:
    """The contents of a run folder. While the run continues, `summary` is None and `columns` and `evaluation` are empty.

    `rounds` has the complete lines of rounds.jsonl in order of round. `columns` maps a column of clients.csv to one
    float64 for each client, NaN if the cell is empty. Metrics are fractions in 0..1, sizes bytes, times seconds.
    """

    folder: Path
    experiment: Experiment
    manifest: Mapping[str, Any]
    split: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    columns: Mapping[str, Floats]
    summary: Mapping[str, Any] | None
    evaluation: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return self.experiment.run.seed

    @property
    def fold(self) -> int:
        """The fold of a cross-validation, from 1; 0 for any other run."""
        return self.experiment.evaluate.fold

    @property
    def status(self) -> str:
        """One of "done", "stopped", "failed", or "running" if there is no summary (yet)."""
        return str(self.summary["status"]) if self.summary else "running"

    @property
    def rounds_done(self) -> int:
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def split_sha256(self) -> str:
        return str(self.split.get("sha256") or self.manifest.get("split", {}).get("sha256", ""))

    def forgetting(self, target: str, metric: str) -> Mapping[str, float]:
        """The metric on the source task "before" and "after" (`meadow.server.summary.forgetting`); empty if not measured."""
        found: Mapping[str, float] = (self.summary or {}).get("forgetting", {}).get(target, {}).get(metric, {})
        return found

    @cached_property
    def cost(self) -> Mapping[str, float]:
        """seconds, bytes_up and bytes_down of the run so far; all costs of summary.json once it has ended."""
        so_far = {
            key: float(sum(r.get(key) or 0 for r in self.rounds)) for key in ("seconds", "bytes_up", "bytes_down")
        }
        return {**so_far, **(self.summary or {}).get("cost", {})}

    def final(self, place: str, target: str, metric: str) -> Any:
        """A metric at the end, or of the newest evaluated round while the run continues; None if not measured.

        For "global" and "train" a number, else a mapping with mean, weighted, std, p10, worst_decile and min.
        """
        at_end = _scores((self.summary or {}).get("metrics", {}), place)
        newest: Mapping[str, Any] = next((s for r in reversed(self.rounds) if (s := _scores(r, place))), {})
        return (at_end or newest).get(target, {}).get(metric)

    def last10(self, place: str, target: str, metric: str) -> float | None:
        """The mean over the last ten evaluated rounds; for place "clients" that of the clients' unweighted mean."""
        last = (self.summary or {}).get("metrics", {}).get("last10", {}).get(place) or {}
        value = last.get(target, {}).get(metric)
        return value.get("mean") if isinstance(value, Mapping) else value

    def scores(self, target: str, metric: str, model: str = "used") -> Mapping[int, float]:
        """client -> its final metric, without clients that have no test sample (NaN)."""
        values = self.columns.get(f"{model}.{target}.{metric}")
        if values is None:
            return {}
        return {int(c): float(v) for c, v in zip(self.columns["client"], values, strict=True) if np.isfinite(v)}

    def curve(self, place: str, target: str, metric: str) -> Curve:
        """(rounds, values), both [n]: the metric of the model *after* each round; over clients their unweighted mean.

        place: "clients" and "global", on test parts; "validation", of the clients; "train", only the loss while it trained.
        In a round, clients evaluate the model that they received: `clients_round` says after which round it was made.
        """
        points: dict[int, float] = {}
        for record in self.rounds:
            value = _scores(record, place).get(target, {}).get(metric)
            if value is not None:
                of_received = place in ("clients", "validation")
                at = record.get("clients_round", record["round"]) if of_received else record["round"]
                points[int(at)] = float(value["mean"] if of_received else value)
        if self.summary and (value := _scores(self.summary["metrics"], place).get(target, {}).get(metric)) is not None:
            at = self.summary.get("selected", {}).get("kept_round", self.rounds_done)
            points[at] = float(value["mean"] if isinstance(value, Mapping) else value)
        ordered = sorted(points)
        return np.array(ordered, dtype=np.float64), np.array([points[r] for r in ordered], dtype=np.float64)

    def spent(self, key: str, rounds: Floats) -> Floats:
        """The cost up to and including each of `rounds`, [n]; key: "seconds", or "bytes" (up and down together)."""
        parts = ("bytes_up", "bytes_down") if key == "bytes" else (key,)
        steps = [sum(r.get(part) or 0 for part in parts) for r in self.rounds]
        total = np.concatenate([[0.0], np.cumsum(np.array(steps, dtype=np.float64))])
        done = np.array([r["round"] for r in self.rounds], dtype=np.float64)
        return np.asarray(total[np.searchsorted(done, rounds, side="right")], dtype=np.float64)


def _scores(record: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The scores in a record or in a summary's metrics, by target; of validation parts those of the clients."""
    found = record.get(place) or {}
    return found.get("clients", {}) if place == "validation" else found


def find_runs(paths: Iterable[Path]) -> list[RunResult]:
    """All runs in the given folders, each once. A folder may be a run or contain runs (`compare`, `sweep`, folds).

    Raises UserError for a folder that is neither, and for a run folder that cannot be read.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: this folder does not exist; name a run, or a folder made by compare or sweep")
        inside = [path] if _is_run(path) else [run for child in sorted(path.iterdir()) for run in _run_or_folds(child)]
        if not inside:
            raise UserError(
                f"{path}: neither this folder nor a folder in it has an experiment.toml, so there is no run; "
                "name a run, or a folder made by compare or sweep"
            )
        folders.update((folder.resolve(), None) for folder in inside)
    if not folders:
        raise UserError("no run was given: name at least one run folder")
    return [read_run(folder) for folder in folders]


def read_run(path: Path) -> RunResult:
    """Read one run folder. Files that the run has not written yet count as empty.

    Raises UserError if experiment.toml is missing, or if a file is damaged.
    """
    if not _is_run(path):
        raise UserError(f"{path} has no experiment.toml, so it is not a run: name a folder that `meadow run` made")
    # The summary is written last and read first: if it exists, so do the other files.
    summary = _read_json(path / "summary.json", recorded.Summary)
    rounds = read_rounds(path / "rounds.jsonl")
    if summary and rounds and rounds[-1]["round"] > summary.get("rounds", 0):
        summary = None  # It was written before a resume, and the run has continued since.
    return RunResult(
        folder=path,
        experiment=load.load(path / "experiment.toml"),
        manifest=_read_json(path / "manifest.json", recorded.Manifest) or {},
        split=_read_json(path / "split.json", recorded.Split) or {},
        rounds=rounds,
        columns=_read_columns(path / "clients.csv") if summary else {},
        summary=summary,
        evaluation=(_read_json(path / "evaluation.json", recorded.Evaluation) or {}) if summary else {},
    )


def read_rounds(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The rounds in order, without an incomplete last line; of a round written twice (after a resume) the later record.

    Raises UserError for a damaged line that is not the last.
    """
    lines = [line.strip() for line in read_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    records: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if (record := read_record(line)) is not None:
            records[record["round"]] = record
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a round in JSON; the file is damaged")
    return tuple(records[r] for r in sorted(records))


def by_method(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Method -> its runs, one for each seed and fold, in this order; methods in order of appearance.

    A method's name is `run.name`. Runs with the same name but different settings are different methods: the settings that
    differ are added to the name, and the folder too if there are still two runs of one seed and fold.
    """
    named: dict[str, list[RunResult]] = {}
    for run in runs:
        named.setdefault(run.experiment.run.name, []).append(run)
    methods: dict[str, list[RunResult]] = {}
    for name, group in named.items():
        flat = [settings_of(run) for run in group]
        varied = [key for key in flat[0] if any(settings[key] != flat[0][key] for settings in flat)]
        for run, settings in zip(group, flat, strict=True):
            marks = ", ".join(f"{key.partition('.')[2]}={settings[key]}" for key in varied)
            label = f"{name} ({marks})" if marks else name
            if any((other.seed, other.fold) == (run.seed, run.fold) for other in methods.get(label, [])):
                label += f" [{run.folder.parent.name}/{run.folder.name}]"
            methods.setdefault(label, []).append(run)
    return {label: sorted(group, key=lambda run: (run.seed, run.fold)) for label, group in methods.items()}


def counted(runs: Sequence[RunResult]) -> Sequence[RunResult]:
    """The runs of a method that count in its figures: the done and stopped ones, or all if there are none.

    A run that has only begun, or failed half-way, would bias the means.
    """
    return [run for run in runs if run.status in ("done", "stopped")] or runs


def targets_of(runs: Iterable[RunResult]) -> list[str]:
    """Every target that any run learned, in the order of the experiments."""
    return list(dict.fromkeys(t for run in runs for t in run.experiment.task.targets if t in run.experiment.learned))


def primary_metric(runs: Iterable[RunResult], target: str) -> str:
    """The metric that ranks a target: that of its kind (`meadow.tasks.metrics.PRIMARY`)."""
    names = metrics_of(runs, target)
    primary = PRIMARY[kind_of(names)]
    return primary if primary in names or not names else names[0]


def metrics_of(runs: Iterable[RunResult], target: str) -> list[str]:
    """Every metric of a target that any run has, in the order of a table."""
    names: set[str] = set()
    for run in runs:
        start = f"used.{target}."
        names.update(column.removeprefix(start) for column in run.columns if column.startswith(start))
        for place in ("global", "clients"):
            names.update(*((r.get(place) or {}).get(target, {}) for r in run.rounds[-1:]))
            names.update((run.summary or {}).get("metrics", {}).get(place, {}).get(target, {}))
    stems = {name: "coverage" if name.startswith("coverage_") else name for name in names}
    places = {name: _ORDER.index(stem) if stem in _ORDER else len(_ORDER) for name, stem in stems.items()}
    return sorted(names, key=lambda name: (places[name], name))


def higher_is_better(metric: str) -> bool:
    return metric not in LOWER_IS_BETTER


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction in 0..1, shown in percent."""
    return metric in SHARES or metric.startswith("coverage_")


def _is_run(path: Path) -> bool:
    return (path / "experiment.toml").is_file()


def _run_or_folds(path: Path) -> list[Path]:
    return [path] if _is_run(path) else sorted(fold for fold in path.glob("fold-*") if _is_run(fold))


def settings_of(run: RunResult) -> dict[str, Any]:
    """The settings that distinguish methods: all but the seed, the fold and those of [engine]."""
    flat = dict(load.flatten(load.to_tree(run.experiment)))
    same = ("run.seed", "evaluate.fold")
    return {key: value for key, value in flat.items() if key not in same and not key.startswith("engine.")}


def _read_json(path: Path, form: type[Form]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return read_recorded(path, form)
    except DamagedFile as error:
        raise UserError(f"{error}: the file is damaged") from None


def _read_columns(path: Path) -> dict[str, Floats]:
    if not path.exists():
        return {}
    try:
        rows = list(csv.DictReader(io.StringIO(read_file(path).decode(), newline=""), strict=True))
        found = {key: np.array([float(row[key] or "nan") for row in rows]) for key in (rows[0] if rows else {})}
        if rows and not np.isfinite(found["client"]).all():
            raise ValueError("a row without a client")
        return found
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
