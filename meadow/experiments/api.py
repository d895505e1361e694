"""Running experiments from Python: `run` is `meadow run`, `run_many` is what compare and sweep are made of."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meadow.client.loop.anchors import teacher
from meadow.config.load import apply, flatten, read_tree
from meadow.config.schema import Experiment
from meadow.experiments.folds import check_folds_folder, fold_runs, in_folds, write_folds
from meadow.server.cohorts import read_schedule
from meadow.server.folder import check_folder
from meadow.server.protection import protection
from meadow.simulation.launch import engine
from meadow.strategies import check
from meadow.strategies.check import resolve
from meadow.strategies.roles import roles_of
from meadow.tasks.readers.domains import source_samples
from meadow.tasks.task import initial_state, open_task, settle

Watch = Callable[[Path, Experiment], AbstractContextManager[object]]


@dataclass(frozen=True)
class Summary:
    """`summary.json` as attributes, and the run's folder. Metrics are fractions in 0..1, sizes bytes, times seconds.

    Of a cross-validation (`evaluate.folds`) `metrics` is the mean over the `folds` and `metrics_std` their standard
    deviation, in the same shape (`meadow.experiments.folds.write_folds`); else these are 0 and empty.
    """

    folder: Path
    name: str
    status: str
    reason: str
    rounds: int
    model_sha256: str
    personal_sha256: str
    split_sha256: str
    metrics: dict[str, Any]
    clients: dict[str, int]
    cost: dict[str, float]
    privacy: dict[str, Any]
    folds: int = 0
    metrics_std: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run to do, or a cross-validation's runs: an experiment and its folder."""

    experiment: Experiment
    folder: Path


def run(
    experiment: str | Path | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    resume: bool = False,
    **overrides: Any,
) -> Summary:
    """Run one experiment: a preset's name, a TOML file or a mapping; the same as `meadow run`.

    `overrides` are dotted keys, `run("fedavg", **{"run.rounds": 3})`, or sections, `run("fedavg", run={"rounds": 3})`.
    `out` is the run folder (default `runs/NAME-TIME`). Raises UserError if the input is wrong. A run that ends early
    returns its summary with status "stopped" and the reason.
    """
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        flat |= dict(flatten({key: value})) if isinstance(value, Mapping) else {key: value}
    resolved = resolve(apply(read_tree(experiment), flat.items()))
    folder = Path(out) if out else default_folder(resolved.run.name)
    return run_many([Job(resolved, folder)], resume)[0]


def run_many(jobs: Sequence[Job], resume: bool = False, watch: Watch | None = None) -> list[Summary]:
    """Run jobs one after another on one engine, that of the first; each is checked before any begins.

    A job with `evaluate.folds` is a run for each fold, in its folder, and one summary. `watch` gives a context in which
    each run takes place (the progress display). A run that fails by a fault of Meadow's raises; one that ends early
    (status "stopped") does not keep the next from running, unless the user stopped it.
    """
    jobs = [replace(job, experiment=settle(job.experiment)) for job in jobs]
    for job in jobs:
        check(job.experiment)
        if in_folds(job.experiment):
            check_folds_folder(job.folder, resume)
        for experiment, folder in fold_runs(job.experiment, job.folder):
            check_folder(folder, experiment, resume)
            check_run(experiment)
        initial_state(job.experiment)
    plan = jobs[0].experiment.engine
    summaries = []
    with engine(plan.name, plan.workers, plan.threads, plan.address) as launch:
        for job in jobs:
            found: list[dict[str, Any]] = []
            if in_folds(job.experiment):  # what an earlier summary says is no longer so
                (job.folder / "summary.json").unlink(missing_ok=True)
            for experiment, folder in fold_runs(job.experiment, job.folder):
                with watch(folder, experiment) if watch else nullcontext():
                    found.append(launch(experiment, folder, resume))
                if by_user := found[-1]["reason"] == "stopped by the user":
                    break
            whole = write_folds(job.folder, job.experiment, found) if in_folds(job.experiment) else found[0]
            known = Summary.__dataclass_fields__.keys() - {"folder"}
            summaries.append(Summary(job.folder, **{k: v for k, v in whole.items() if k in known}))
            if by_user:
                break
    return summaries


def check_run(experiment: Experiment) -> None:
    """Raise UserError for what only the data, the model and the files that an experiment names can tell."""
    task = open_task(experiment)
    model = task.new_model()
    protection(experiment, task, roles_of(experiment, model))
    read_schedule(experiment)
    teacher(model, task, experiment)
    if experiment.adapt.method != "none":
        source_samples(experiment, None)


def default_folder(name: str) -> Path:
    """`runs/NAME-TIME`, with a number behind it if that is taken."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, n = stem, 2
    while folder.exists():
        folder, n = stem.with_name(f"{stem.name}-{n}"), n + 1
    return folder


def exit_status(summaries: Sequence[Summary]) -> int:
    """0: all done; 3: some ended early for a stated reason; 1: some failed by a fault of ours."""
    worst = {s.status for s in summaries}
    return 1 if "failed" in worst else 3 if "stopped" in worst else 0
