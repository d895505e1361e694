"""Cross-validation: one experiment as K runs, each with another fold as every client's test split, and their summary."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meadow.arrays.files import write_json
from meadow.config.load import apply, resolve, to_tree
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.server.evaluation import mean_tree, reduce_trees
from meadow.strategies.wire.trainings import Trainings

_WORST = ("failed", "stopped", "done")


def in_folds(experiment: Experiment) -> bool:
    """Whether the experiment is a cross-validation: `evaluate.folds` without `evaluate.fold`."""
    return experiment.evaluate.folds > 0 and experiment.evaluate.fold == 0


def fold_runs(experiment: Experiment, folder: Path) -> list[tuple[Experiment, Path]]:
    """The runs of an experiment: folds 1 to K in folder/fold-1 to folder/fold-K, or one run if it is not `in_folds`."""
    if not in_folds(experiment):
        return [(experiment, folder)]
    folds = range(1, experiment.evaluate.folds + 1)
    return [(resolve(apply(to_tree(experiment), [("evaluate.fold", k)])), folder / f"fold-{k}") for k in folds]


def check_folds_folder(folder: Path, resume: bool) -> None:
    """Raise UserError if the folds' folders may not be made in `folder`; each of them has its own check."""
    if (folder / "experiment.toml").exists():
        raise UserError(f"--out {folder}: it holds a single run, and evaluate.folds makes several; name another folder")
    check_empty(folder, resume)


def check_empty(folder: Path, resume: bool) -> None:
    """Raise UserError if runs may not be written to this folder: it is in a file, or has files and is not resumed; or if it
    is to be resumed and does not exist."""
    try:
        above = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        if not above.exists():
            raise UserError(f"--out {folder}: {above} is a link to nothing, or to itself; write the name of a folder")
        if not above.is_dir():
            raise UserError(f"--out {folder}: {above} is a file; write the name of a folder")
        full = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; write the name of another folder") from None
    if resume and not folder.exists():
        raise UserError(f"--resume --out {folder}: this folder does not exist; omit --resume to start a run in it")
    if not resume and full:
        raise UserError(
            f"--out {folder}: this folder is not empty; add --resume to continue its runs, or name another folder"
        )


def write_folds(folder: Path, experiment: Experiment, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write and return `summary.json` for the folds' summaries `found`, in order; fewer than K if the user stopped.

    metrics: the mean over the finished folds (over all, if none has finished). metrics_std: their standard deviation, with
    the same keys (n - 1 in the denominator; None if fewer than two folds have the metric). folds: K. status: the worst of
    the folds. reason: which folds ended early and why. rounds, clients: the minimum and the maximum over the folds. cost:
    sums, but maxima of peak_rss_mb and trained_parameters. Hashes: SHA-256 over lines "fold:hash". privacy: sums of epsilon
    and delta (basic composition, Dwork and Roth 2014, theorem 3.16), because each client's data is in all runs. engine: the
    settings, and sums of the trainings by trainer and of the reasons.
    """
    folds = experiment.evaluate.folds
    counted = [one["metrics"] for one in found if one["status"] == "done"] or [one["metrics"] for one in found]
    ended_early = [(k, one) for k, one in enumerate(found, start=1) if one["status"] != "done"]
    costs = [one["cost"] for one in found]
    summary = {
        "name": experiment.run.name,
        "status": min((one["status"] for one in found), key=_WORST.index),
        "reason": "; ".join(f"fold {k}: {one['reason']}" for k, one in ended_early),
        "rounds": min(one["rounds"] for one in found),
        **{key: _hash(found, key) for key in ("model_sha256", "personal_sha256", "split_sha256")},
        "folds": folds,
        "metrics": mean_tree(counted),
        "metrics_std": reduce_trees(counted, _deviation),
        "clients": reduce_trees([one["clients"] for one in found], max),
        "cost": reduce_trees(costs, sum)
        | {key: max(cost[key] for cost in costs) for key in ("peak_rss_mb", "trained_parameters") if key in costs[0]},
        "privacy": _composed([one["privacy"] for one in found]),
        "engine": _engine([one.get("engine", {}) for one in found]),
    }
    write_json(folder / "summary.json", summary)
    return summary


def _engine(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How all folds were trained: the settings of the first, and who trained in all of them."""
    return {**parts[0], **Trainings.total(parts).as_json()}


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _hash(found: Sequence[Mapping[str, Any]], key: str) -> str:
    lines = "".join(f"{k}:{one[key]}\n" for k, one in enumerate(found, start=1))
    return hashlib.sha256(lines.encode()).hexdigest()


def _composed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The privacy loss of all folds together: epsilon and delta are summed, the rest is that of the first."""
    epsilon = {key: _total([part["epsilon"][key] for part in parts]) for key in parts[0]["epsilon"]}
    return {**parts[0], "epsilon": epsilon, "delta": _total([part["delta"] for part in parts])}


def _total(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)
