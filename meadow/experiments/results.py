"""Reading run folders, finished or still being written."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meadow.config import load
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.tasks.metrics import LOWER_IS_BETTER, PRIMARY, SHARES, kind_of

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]

ALONE = "local"
"""The method that the others are held against: each client alone, from scratch."""

_ORDER = (
    "accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc", "exact_match",
    "mae", "rmse", "r2", "pinball", "coverage", "loss",
)  # fmt: skip
"""The order in which metrics stand in a table; coverage before its level."""


@dataclass(frozen=True)
class RunResult:
    """One run folder as read. `summary` is None while the run goes on, `columns` (clients.csv) and `evaluation` empty.

    `rounds` holds the complete lines of rounds.jsonl in order of round. `columns` maps a column of clients.csv to one
    float64 a client, NaN where the cell is empty. Metrics are fractions in 0..1, sizes bytes, times seconds.
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
        """Which fold of a cross-validation it is; 0 if it is none."""
        return self.experiment.evaluate.fold

    @property
    def status(self) -> str:
        """One of "done", "stopped", "failed", or "running" where there is no summary (yet)."""
        return str(self.summary["status"]) if self.summary else "running"

    @property
    def rounds_done(self) -> int:
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def split_sha256(self) -> str:
        return str(self.split.get("sha256") or self.manifest.get("split", {}).get("sha256", ""))

    def forgetting(self, target: str, metric: str) -> Mapping[str, float]:
        """On the source task "before" and "after" (`meadow.server.summary.forgetting`); empty where it was not measured."""
        found: Mapping[str, float] = (self.summary or {}).get("forgetting", {}).get(target, {}).get(metric, {})
        return found

    @cached_property
    def cost(self) -> Mapping[str, float]:
        """seconds, bytes_up and bytes_down of the whole run, or of the rounds so far; steps once it has ended."""
        so_far = {
            key: float(sum(r.get(key) or 0 for r in self.rounds)) for key in ("seconds", "bytes_up", "bytes_down")
        }
        return {**so_far, **(self.summary or {}).get("cost", {})}

    def final(self, place: str, target: str, metric: str) -> Any:
        """A metric at the end, or after the newest evaluated round while the run goes on; None where not measured.

        For place "global" a number, for "clients" the mapping of mean, weighted, std, p10, worst_decile and min.
        """
        at_end = (self.summary or {}).get("metrics", {}).get(place) or {}
        newest: Mapping[str, Any] = next((r[place] for r in reversed(self.rounds) if r.get(place)), {})
        return (at_end or newest).get(target, {}).get(metric)

    def last10(self, place: str, target: str, metric: str) -> float | None:
        """Mean over the last ten evaluated rounds; of the clients' unweighted mean for place "clients"."""
        last = (self.summary or {}).get("metrics", {}).get("last10", {}).get(place) or {}
        value = last.get(target, {}).get(metric)
        return value.get("mean") if isinstance(value, Mapping) else value

    def scores(self, target: str, metric: str, model: str = "used") -> Mapping[int, float]:
        """client -> its final metric; clients without a test sample (NaN) are left out."""
        values = self.columns.get(f"{model}.{target}.{metric}")
        if values is None:
            return {}
        return {int(c): float(v) for c, v in zip(self.columns["client"], values, strict=True) if np.isfinite(v)}

    def curve(self, place: str, target: str, metric: str) -> Curve:
        """(rounds, values), both [n]: the metric of the model *after* each round, for "clients" their unweighted mean.

        A round's client metrics are of the model that it received, so they stand at `clients_round`.
        """
        points: dict[int, float] = {}
        for record in self.rounds:
            value = (record.get(place) or {}).get(target, {}).get(metric)
            if value is not None:
                at = record.get("clients_round", record["round"]) if place == "clients" else record["round"]
                points[int(at)] = float(value["mean"] if place == "clients" else value)
        if self.summary and (value := self.final(place, target, metric)) is not None:
            points[self.rounds_done] = float(value["mean"] if place == "clients" else value)
        ordered = sorted(points)
        return np.array(ordered, dtype=np.float64), np.array([points[r] for r in ordered], dtype=np.float64)

    def spent(self, key: str, rounds: Floats) -> Floats:
        """What was spent up to and including each of `rounds`, [n]: key "seconds", or "bytes", both ways together."""
        parts = ("bytes_up", "bytes_down") if key == "bytes" else (key,)
        steps = [sum(r.get(part) or 0 for part in parts) for r in self.rounds]
        total = np.concatenate([[0.0], np.cumsum(np.array(steps, dtype=np.float64))])
        done = np.array([r["round"] for r in self.rounds], dtype=np.float64)
        return np.asarray(total[np.searchsorted(done, rounds, side="right")], dtype=np.float64)


def find_runs(paths: Iterable[Path]) -> list[RunResult]:
    """All runs under the given folders, each a run or a folder of runs (`compare`, `sweep`, folds), each run once.

    Raises UserError for a folder that is neither, and for a run folder that cannot be read.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(
                f"{path}: there is no such folder. Give run folders, or a folder that compare or sweep made"
            )
        inside = [path] if _is_run(path) else [run for child in sorted(path.iterdir()) for run in _run_or_folds(child)]
        if not inside:
            raise UserError(
                f"{path} is not a run (it has no experiment.toml) and no folder in it is one. "
                "Give run folders, or a folder that compare or sweep made"
            )
        folders.update((folder.resolve(), None) for folder in inside)
    if not folders:
        raise UserError("no run was given: name at least one run folder")
    return [read_run(folder) for folder in folders]


def read_run(path: Path) -> RunResult:
    """Read one run folder; files that a running run has not written yet count as empty.

    Raises UserError where a file is missing that every run has, or is damaged.
    """
    if not _is_run(path):
        raise UserError(f"{path} is not a run folder: it has no experiment.toml")
    # The summary is written last, so it is read first: where it is there, the other files are too.
    summary = _read_json(path / "summary.json")
    rounds = read_rounds(path / "rounds.jsonl")
    if summary and rounds and rounds[-1]["round"] > summary.get("rounds", 0):
        summary = None  # It is of before a resume, and the run has gone on since.
    return RunResult(
        folder=path,
        experiment=load.load(path / "experiment.toml"),
        manifest=_read_json(path / "manifest.json") or {},
        split=_read_json(path / "split.json") or {},
        rounds=rounds,
        columns=_read_columns(path / "clients.csv") if summary else {},
        summary=summary,
        evaluation=(_read_json(path / "evaluation.json") or {}) if summary else {},
    )


def read_rounds(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The rounds in order, without a torn last line; a round that stands twice (after a resume) counts as written last.

    Raises UserError for a damaged line that is not the last.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    while lines and not lines[-1].strip():
        lines.pop()
    records: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[int(record["round"])] = record
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not a round in JSON; the file is damaged") from None
    return tuple(records[r] for r in sorted(records))


def by_method(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Method -> its runs, one a seed and fold, in this order; methods in order of appearance.

    A method is called after `run.name`. Runs of one name with different settings are different methods, and what
    differs joins the name; so does the folder where even that leaves two runs of one seed.
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
    """The runs of a method that its figures are made of: those that ended as they should, or, while none has, all.

    A seed that has only begun, or has failed half-way, would drag the others down.
    """
    return [run for run in runs if run.status in ("done", "stopped")] or runs


def targets_of(runs: Iterable[RunResult]) -> list[str]:
    """Every target that any of the runs learned, in the order of the experiments."""
    return list(dict.fromkeys(t for run in runs for t in run.experiment.task.targets if t in run.experiment.learned))


def primary_metric(runs: Iterable[RunResult], target: str) -> str:
    """The metric that decides for a target: that of its kind (`meadow.tasks.metrics.PRIMARY`)."""
    names = metrics_of(runs, target)
    primary = PRIMARY[kind_of(names)]
    return primary if primary in names or not names else names[0]


def metrics_of(runs: Iterable[RunResult], target: str) -> list[str]:
    """Every metric of a target that any of the runs has measured, in the order of a table."""
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
    """Whether a metric is a fraction in 0..1, which is shown in percent."""
    return metric in SHARES or metric.startswith("coverage_")


def _is_run(path: Path) -> bool:
    return (path / "experiment.toml").is_file()


def _run_or_folds(path: Path) -> list[Path]:
    return [path] if _is_run(path) else sorted(fold for fold in path.glob("fold-*") if _is_run(fold))


def settings_of(run: RunResult) -> dict[str, Any]:
    """The settings that make two runs different methods: all but the seed, the fold and how the run is launched."""
    flat = dict(load.flatten(load.to_tree(run.experiment)))
    same = ("run.seed", "evaluate.fold")
    return {key: value for key, value in flat.items() if key not in same and not key.startswith("engine.")}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def _read_columns(path: Path) -> dict[str, Floats]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {key: np.array([float(row[key] or "nan") for row in rows]) for key in (rows[0] if rows else {})}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
