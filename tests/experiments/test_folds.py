"""Cross-validation: what the folds are, what their summary says, and that it can be resumed, reported and compared."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import small
from meadow.config.load import parse_override
from meadow.config.schema import Experiment
from meadow.experiments.api import Summary, run, run_many
from meadow.experiments.compare import Job, methods_jobs
from meadow.experiments.folds import fold_runs, write_folds
from meadow.experiments.plan import plan
from meadow.experiments.ranking import ranking
from meadow.experiments.report.write import contents
from meadow.experiments.results import find_runs
from meadow.experiments.tables import Cell
from meadow.runtime.errors import UserError
from meadow.simulation.launch import engine
from meadow.strategies.check import load
from meadow.tasks.task import open_task

QUICK = ("run.rounds=2", "partition.clients=4", "task.source_samples=200", "task.source_epochs=1", "engine.name=inline")
METRICS = ("clients", "digit", "accuracy", "mean")


def folded(preset: str = "fedavg", *more: str) -> Experiment:
    return load(preset, [*QUICK, "evaluate.folds=3", *more])


def leaf(tree: dict[str, Any], *path: str) -> float:
    for key in path:
        tree = tree[key]
    return float(tree)  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("folds") / "out"
    return out, run_many([Job(folded(), out)])[0]


def test_every_sample_of_every_client_is_in_one_fold_s_test_part() -> None:
    clients = []
    for experiment, _ in fold_runs(folded(), Path("x")):
        split = open_task(experiment).split
        clients.append([(set(c.train) | set(c.validation) | set(c.test), set(c.test)) for c in split.clients])
        for own in split.clients:
            assert set(own.train).isdisjoint(own.test) and set(own.validation).isdisjoint(own.test)
    for folds in zip(*clients, strict=True):  # of one client, what it holds and its test part in each fold
        held = folds[0][0]
        assert all(samples == held for samples, _ in folds)
        assert sum(len(test) for _, test in folds) == len(held) and set().union(*(test for _, test in folds)) == held
        sizes = [len(test) for _, test in folds]
        assert max(sizes) - min(sizes) <= 1


def test_folds_differ_in_their_fold_alone() -> None:
    runs = fold_runs(folded(), Path("x"))
    assert [folder for _, folder in runs] == [Path(f"x/fold-{k}") for k in (1, 2, 3)]
    assert [e.evaluate.fold for e, _ in runs] == [1, 2, 3]
    assert all(
        e == load("fedavg", [*QUICK, "evaluate.folds=3", f"evaluate.fold={k}"]) for k, (e, _) in enumerate(runs, 1)
    )
    one = folded("fedavg", "evaluate.fold=2")
    assert fold_runs(one, Path("x")) == [(one, Path("x"))]


def test_the_summary_is_the_mean_and_deviation_of_the_folds(done: tuple[Path, Summary]) -> None:
    out, summary = done
    parts = [read(out / f"fold-{k}") for k in (1, 2, 3)]
    whole = read(out)
    assert {p.name for p in out.iterdir()} == {"fold-1", "fold-2", "fold-3", "summary.json"}
    assert (whole["folds"], whole["status"], whole["reason"], whole["rounds"]) == (3, "done", "", 2)
    for path in (METRICS, ("global", "digit", "f1"), ("last10", "clients", "digit", "loss", "p10")):
        values = [leaf(part["metrics"], *path) for part in parts]
        assert leaf(whole["metrics"], *path) == pytest.approx(np.mean(values))
        assert leaf(whole["metrics_std"], *path) == pytest.approx(np.std(values, ddof=1))
    for key in ("seconds", "bytes_up", "bytes_down", "steps"):
        assert whole["cost"][key] == pytest.approx(sum(part["cost"][key] for part in parts))
    assert whole["cost"]["peak_rss_mb"] == max(part["cost"]["peak_rss_mb"] for part in parts)
    lines = "".join(f"{k}:{part['model_sha256']}\n" for k, part in enumerate(parts, 1))
    assert whole["model_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    # The returned summary is the file.
    assert summary.folder == out
    assert {k: getattr(summary, k) for k in Summary.__dataclass_fields__ if k != "folder"} == whole


def test_one_fold_by_itself_is_the_same_run(done: tuple[Path, Summary], tmp_path: Path) -> None:
    out, _ = done
    tree = {"run": {"name": "fedavg", "rounds": 2}, "partition": {"clients": 4}, "task": {"learn": "first"}}
    fold: dict[str, Any] = {"evaluate.folds": 3, "evaluate.fold": 2}
    alone = run(tree, out=tmp_path / "one", engine={"name": "inline"}, **fold)
    assert (alone.model_sha256, alone.metrics) == (
        read(out / "fold-2")["model_sha256"],
        read(out / "fold-2")["metrics"],
    )
    assert (alone.folds, alone.metrics_std) == (0, {})


def test_a_plan_counts_every_fold(done: tuple[Path, Summary]) -> None:
    planned, cost = plan(folded()), done[1].cost
    assert (planned["runs"], planned["rounds"]) == (3, 6)
    assert {k: planned[k] for k in ("steps", "bytes_up", "bytes_down")} == {
        k: cost[k] for k in ("steps", "bytes_up", "bytes_down")
    }
    assert plan(small("fedavg"))["runs"] == 1


def test_resumed_it_goes_on_and_ends_alike(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(folded(), out)
    first = run_many([job])[0]
    untouched = (out / "fold-1" / "rounds.jsonl").stat().st_mtime_ns
    for gone in ("summary.json", "fold-2/summary.json"):
        (out / gone).unlink()
    shutil.rmtree(out / "fold-3")
    again = run_many([job], resume=True)[0]
    assert (again.metrics, again.metrics_std, again.model_sha256) == (
        first.metrics,
        first.metrics_std,
        first.model_sha256,
    )
    assert (out / "fold-1" / "rounds.jsonl").stat().st_mtime_ns == untouched
    with pytest.raises(UserError, match=r"evaluate\.folds = 4"):
        run_many([Job(folded("fedavg", "evaluate.folds=4"), out)], resume=True)
    with pytest.raises(UserError, match="--resume"):
        run_many([job])


def test_where_folds_may_not_be_made(done: tuple[Path, Summary], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, reason in ((done[0] / "fold-1", "holds a single run"), (tmp_path / "file", "is a file")):
        for resume in (False, True):
            with pytest.raises(UserError, match=reason):
                run_many([Job(folded(), folder)], resume=resume)
    with engine("inline") as launch, pytest.raises(UserError, match=r"evaluate\.fold = 1 to 3"):
        launch(folded(), tmp_path / "x")
    assert not (tmp_path / "x" / "rounds.jsonl").exists()


def part(status: str, accuracy: float, epsilon: float | None = None, **metrics: float) -> dict[str, Any]:
    """A fold's summary with what `write_folds` reads."""
    return {
        "status": status, "reason": "" if status == "done" else "no quorum", "rounds": 5 if status == "done" else 2,
        "model_sha256": "a", "personal_sha256": "b", "split_sha256": "c",
        "metrics": {"global": {"digit": {"accuracy": accuracy, **metrics}}},
        "clients": {"total": 4, "never_sampled": 1}, "cost": {"seconds": 1.5, "peak_rss_mb": 2.0},
        "privacy": {"unit": "none" if epsilon is None else "client", "delta": epsilon and 1e-5, "accountant": "pld",
                    "epsilon": {"max": epsilon, "median": epsilon}, "releases": []},
    }  # fmt: skip


def test_the_summary_of_folds_by_hand(tmp_path: Path) -> None:
    found = write_folds(tmp_path, folded(), [part("done", 0.5, r2=0.3), part("stopped", 0.1), part("done", 0.7)])
    assert (found["status"], found["reason"], found["rounds"]) == ("stopped", "fold 2: no quorum", 2)
    # Of the folds that are done: mean of 0.5 and 0.7, deviation 0.2 / sqrt(2); r2 was measured in one fold alone.
    assert found["metrics"]["global"]["digit"] == pytest.approx({"accuracy": 0.6, "r2": 0.3})
    assert found["metrics_std"]["global"]["digit"]["accuracy"] == pytest.approx(0.2 / 2**0.5)
    assert found["metrics_std"]["global"]["digit"]["r2"] is None
    assert found["cost"] == {"seconds": 4.5, "peak_rss_mb": 2.0} and found["clients"]["never_sampled"] == 1
    assert found["privacy"]["epsilon"] == {"max": None, "median": None} and found["privacy"]["delta"] is None
    assert read(tmp_path) == found
    private = write_folds(tmp_path, folded(), [part("done", 0.5, 2.0), part("done", 0.5, 3.0)])["privacy"]
    assert private["epsilon"] == {"max": 5.0, "median": 5.0} and private["delta"] == pytest.approx(2e-5)


def test_the_report_shows_the_folds_mean_and_deviation(done: tuple[Path, Summary]) -> None:
    out, summary = done
    (row,) = ranking(find_runs([out]))
    assert (row["method"], row["seeds"], row["folds"], row["counted"]) == ("fedavg", 1, 3, 3)
    assert row["client_mean"] == pytest.approx(leaf(summary.metrics, *METRICS))
    assert row["client_mean_seed_std"] == pytest.approx(leaf(summary.metrics_std, *METRICS))
    page = contents(find_runs([out]))
    assert page["title"] == "fedavg, seed 0, 3 folds"
    assert [run["name"] for run in page["runs"]] == [f"fedavg, seed 0, fold {k}" for k in (1, 2, 3)]
    (part,) = page["targets"]
    mean, deviation = (100 * leaf(tree, *METRICS) for tree in (summary.metrics, summary.metrics_std))
    assert part["ranking"].rows[0][1] == Cell(f"{mean:.1f}", f"± {deviation:.1f}")


def test_a_comparison_pairs_the_folds(tmp_path: Path) -> None:
    jobs = methods_jobs({}, ["local", "fedper"], dict(map(parse_override, [*QUICK, "evaluate.folds=2"])), 1, tmp_path)
    summaries = run_many(jobs)
    assert [s.folder.name for s in summaries] == ["local-seed0", "fedper-seed0"]
    assert all((s.folder / f"fold-{k}" / "clients.csv").exists() for s in summaries for k in (1, 2))
    runs = find_runs([tmp_path])
    assert len(runs) == 4
    rows = {row["method"]: row for row in ranking(runs)}
    assert rows["fedper"]["lost_of"] == 2 * 4 and rows["fedper"]["gain_low"] is None
    gain = leaf(summaries[1].metrics, *METRICS) - leaf(summaries[0].metrics, *METRICS)
    assert rows["fedper"]["gain"] == pytest.approx(gain)


def test_the_command_runs_the_folds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meadow", "run", "fedavg", *QUICK, "evaluate.folds=2", "--out", "o", "--json"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == read(tmp_path / "o") and json.loads(ran.stdout)["folds"] == 2
    assert (tmp_path / "o" / "report.html").exists()
