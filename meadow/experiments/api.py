"""Running experiments from Python: `run`, `compare`, `sweep` and `plan`, which the commands of these names call."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meadow.client.loop.anchors import teacher
from meadow.config.load import apply, flatten, read_tree
from meadow.config.schema import Experiment
from meadow.experiments.compare import METHODS, Job, methods_jobs, sweep_jobs, values_of
from meadow.experiments.folds import check_empty, check_folds_folder, fold_runs, in_folds, write_folds
from meadow.experiments.plan import plan as costs_of
from meadow.privacy.plan import budgets
from meadow.runtime.errors import RunStopped, UserError
from meadow.server.cohorts import read_schedule
from meadow.server.folder import RunFolder, check_folder, is_done
from meadow.server.listeners import open_listeners
from meadow.server.privacy import protection
from meadow.server.run import BY_USER
from meadow.server.selection import stop_metric
from meadow.server.states import forget_states
from meadow.simulation.launch import engine
from meadow.strategies import check
from meadow.strategies.check import resolve
from meadow.strategies.roles import roles_of
from meadow.strategies.stages import stages_of
from meadow.tasks.readers.domains import source_samples
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task, settle

Watch = Callable[[Path, Experiment], AbstractContextManager[object]]


@dataclass(frozen=True)
class Summary:
    """`summary.json` as attributes, and the run's folder. Metrics are fractions in 0..1, sizes bytes, times seconds.

    For a cross-validation (`evaluate.folds`), `metrics` is the mean over the `folds` and `metrics_std` the standard
    deviation, with the same keys (`meadow.experiments.folds.write_folds`). For a single run they are 0 and empty.
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
    engine: dict[str, Any] = field(default_factory=dict)


def run(
    experiment: str | Path | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    resume: bool = False,
    without_state: Sequence[int] = (),
    watch: Watch | None = None,
    **overrides: Any,
) -> Summary:
    """Run one experiment, like `meadow run`: a preset's name, a TOML file or a mapping.

    >>> small = {"engine": {"name": "inline"}, "partition": {"clients": 4}}
    >>> summary = run("fedavg", run={"rounds": 2}, **small)
    >>> summary.status, summary.rounds
    ('done', 2)
    >>> sorted(summary.metrics["global"])
    ['digit']

    overrides: sections, as above, or dotted keys, `**{"run.rounds": 2}`. out: the run folder, by default
    `runs/NAME-TIME`; it also gets `report.html`. resume: continue the run in `out` from its last checkpoint.
    without_state: clients whose states are lost and which start again from nothing, if resumed; the summary names them.
    Raises UserError if the input is wrong. A run that ends early returns its summary with status "stopped" and the reason.
    """
    resolved = _resolved(experiment, overrides)
    folder = _folder(out, resume, resolved.run.name)
    if without_state:
        if not resume:
            raise UserError(f"--without-state {without_state[0]}: a new run has no states; add --resume, or omit it")
        check_folder(folder, resolved, resume)
        forget_states(folder, without_state, resolved.partition.clients)
    return _run_and_report([Job(resolved, folder)], folder, resume, watch)[0]


def compare(
    experiment: str | Path | Mapping[str, Any] | None = None,
    *,
    methods: Sequence[str] = METHODS,
    seeds: int = 3,
    out: Path | str | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    **overrides: Any,
) -> list[Summary]:
    """Run several methods on the same data, splits and seeds, like `meadow compare`.

    >>> small = {"engine": {"name": "inline"}, "partition": {"clients": 4}}
    >>> summaries = compare(methods=["local", "fedavg"], seeds=1, run={"rounds": 2}, **small)
    >>> [(summary.name, summary.status) for summary in summaries]
    [('local', 'done'), ('fedavg', 'done')]
    >>> summaries[0].split_sha256 == summaries[1].split_sha256
    True

    experiment: the settings that the methods share, as in `run`. methods: presets; their values replace those of
    `experiment`, and overrides replace both. Returns the summaries in order of seed, then method. The folder, by default
    `runs/compare-TIME`, gets a folder for each run and one report of all. Raises UserError if the input is wrong.
    """
    folder = _folder(out, resume, "compare")
    base = {} if experiment is None else read_tree(experiment)
    return _run_and_report(methods_jobs(base, methods, _flat(overrides), seeds, folder), folder, resume, watch)


def sweep(
    experiment: str | Path | Mapping[str, Any],
    *,
    seeds: int = 1,
    out: Path | str | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    **overrides: Any,
) -> list[Summary]:
    """Run an experiment for every combination of the settings that have several values, like `meadow sweep`.

    >>> small = {"engine": {"name": "inline"}, "partition": {"clients": 4}}
    >>> summaries = sweep("fedavg", local={"lr": [0.01, 0.1]}, run={"rounds": 2}, **small)
    >>> [summary.name for summary in summaries]
    ['lr-0.01', 'lr-0.1']

    overrides: as in `run`, but a list means several values, and so does a text like the command's, "0.01,0.1". For a
    setting that is itself a list (`task.targets`), write a list of lists. The rest is as in `compare`; the default folder
    is `runs/sweep-TIME`. Raises UserError if the input is wrong, or if no setting has several values.
    """
    folder = _folder(out, resume, "sweep")
    axes = {key: values_of(key, value) for key, value in _flat(overrides).items()}
    return _run_and_report(sweep_jobs(read_tree(experiment), axes, seeds, folder), folder, resume, watch)


def plan(experiment: str | Path | Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Compute what a run would cost, before it runs, like `meadow plan`.

    >>> costs = plan("fedavg", run={"rounds": 2}, partition={"clients": 4})
    >>> costs["rounds"], costs["cohort"], costs["bytes_up"] == costs["bytes_down"]
    (2, 4, True)

    `meadow.experiments.plan.plan` documents the keys. Raises UserError as `run` would.
    """
    return costs_of(_resolved(experiment, overrides))


def _resolved(experiment: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> Experiment:
    return resolve(apply(read_tree(experiment), _flat(overrides).items()))


def _flat(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides by dotted key; the input may mix dotted keys and sections."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        flat |= dict(flatten({key: value})) if isinstance(value, Mapping) else {key: value}
    return flat


def _folder(out: Path | str | None, resume: bool, name: str) -> Path:
    """The folder to write. Raises UserError if `out` cannot be used."""
    if out is None:
        if resume:
            raise UserError("--resume needs --out DIR: write the folder of the run to continue")
        return default_folder(name)
    folder = Path(out)
    check_empty(folder, resume)
    return folder.resolve() if ".." in folder.parts else folder  # x/../y is y, whether or not there is an x


def _run_and_report(jobs: Sequence[Job], folder: Path, resume: bool, watch: Watch | None) -> list[Summary]:
    before = [is_done(job.folder) for job in jobs]
    summaries = run_many(jobs, resume, watch)
    if all(before) and (folder / "report.html").exists():
        return summaries
    from meadow.experiments.report import write_report  # imports matplotlib, which would delay the start of the run

    # A run that stopped because its folder cannot be written has said so.
    with suppress(RunStopped) if exit_status(summaries) else nullcontext():
        write_report([folder], folder / "report.html")
    return summaries


def run_many(jobs: Sequence[Job], resume: bool = False, watch: Watch | None = None) -> list[Summary]:
    """Run jobs one after another on the engine of the first job. All jobs are checked before the first one starts.

    A job with `evaluate.folds` runs once for each fold and gives one summary. `watch` returns a context manager that
    surrounds each run (the progress display). A run that fails because of a bug raises. After a run that ends early
    (status "stopped") the next one still starts, unless the user stopped it. Resumed jobs that are all done start nothing.
    """
    jobs = [replace(job, experiment=settle(job.experiment)) for job in jobs]
    for job in jobs:
        check(job.experiment)
        if in_folds(job.experiment):
            check_folds_folder(job.folder, resume)
        for experiment, folder in fold_runs(job.experiment, job.folder):
            check_folder(folder, experiment, resume)
    if all(is_done(job.folder) for job in jobs):
        return [_summary(job.folder, RunFolder(job.folder).summary() or {}) for job in jobs]
    for job in jobs:
        for experiment, _ in fold_runs(job.experiment, job.folder):
            check_run(experiment)
        initial_state(job.experiment)
    plan = jobs[0].experiment.engine
    summaries = []
    with engine(plan.name, plan.workers, plan.threads, plan.address) as launch:
        for job in jobs:
            found: list[dict[str, Any]] = []
            if in_folds(job.experiment):  # an earlier summary is now out of date
                (job.folder / "summary.json").unlink(missing_ok=True)
            for experiment, folder in fold_runs(job.experiment, job.folder):
                with watch(folder, experiment) if watch else nullcontext():
                    found.append(launch(experiment, folder, resume))
                if by_user := found[-1]["reason"] == BY_USER:
                    break
            whole = write_folds(job.folder, job.experiment, found) if in_folds(job.experiment) else found[0]
            summaries.append(_summary(job.folder, whole))
            if by_user:
                break
    return summaries


def _summary(folder: Path, found: Mapping[str, Any]) -> Summary:
    return Summary(folder, **{k: v for k, v in found.items() if k in Summary.__dataclass_fields__.keys() - {"folder"}})


def check_run(experiment: Experiment) -> None:
    """Check what depends on the data, the model and the files that an experiment names. Raises UserError."""
    task = open_task(experiment)
    model = task.new_model()
    roles = roles_of(experiment, model)
    protection(experiment, task, roles)
    budgets(experiment, experiment.partition.clients)
    stages_of(experiment, roles)
    read_schedule(experiment)
    stop_metric(experiment, task, roles)
    open_listeners(experiment.run.listeners)
    teacher(model, task, experiment)
    if experiment.adapt.method != "none":
        source_samples(experiment, None)
    if experiment.engine.trainer != "auto":
        costs_of(experiment)  # asks every trainer whether it can train this experiment


def default_folder(name: str) -> Path:
    """`runs/NAME-TIME`, with a number appended if that folder exists."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, n = stem, 2
    while folder.exists():
        folder, n = stem.with_name(f"{stem.name}-{n}"), n + 1
    return folder


def exit_status(summaries: Sequence[Summary]) -> int:
    """The command's exit status. 0: all done; 3: some ended early for a stated reason; 1: some failed because of a bug."""
    worst = {s.status for s in summaries}
    return 1 if "failed" in worst else 3 if "stopped" in worst else 0
