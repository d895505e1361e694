"""`import meadow`: what it offers, what it costs, and that a run's models come back as they were scored."""

import csv
import doctest
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import meadow
from helpers.runs import run_inline, small
from meadow.config.load import to_tree
from meadow.config.schema import Experiment
from meadow.experiments.compare import values_of
from meadow.runtime.identity import ROOT
from meadow.tasks.evaluation import evaluate
from meadow.tasks.task import open_task

HEAVY = ("flwr", "matplotlib", "numpy", "pydantic", "ray", "torch", "typer")


def test_importing_it_imports_nothing_heavy() -> None:
    code = f"import sys, meadow; dir(meadow); print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there() -> None:
    assert {name for name in meadow.__all__ if getattr(meadow, name, None) is None} == set()
    assert set(meadow.__all__) <= set(dir(meadow))
    with pytest.raises(AttributeError):
        meadow.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["meadow", "meadow.experiments.api", "meadow.experiments.models"])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(import_module(name))
    assert found.failed == 0 and found.attempted > 1


@pytest.mark.parametrize(
    ("key", "given", "values"),
    [
        ("local.lr", 0.1, [0.1]),
        ("local.lr", [0.1, 0.3], [0.1, 0.3]),
        ("local.lr", "0.1,0.3", [0.1, 0.3]),
        ("strategy.share", "all,body", ["all", "body"]),
        ("task.targets", ["digit", "slant"], [["digit", "slant"]]),
        ("task.targets", [["digit"], ["digit", "slant"]], [["digit"], ["digit", "slant"]]),
        ("task.targets", "digit,slant", ["digit", "slant"]),
        ("task.targets", '["digit", "slant"]', [["digit", "slant"]]),
    ],
)
def test_what_a_sweep_takes_for_several_values(key: str, given: object, values: list[object]) -> None:
    assert values_of(key, given) == values


def scores(folder: Path, client: int) -> dict[str, float]:
    """A client's row in clients.csv, of the model that it uses: target/metric -> value."""
    with (folder / "clients.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["client"] == str(client))
    start = "used."
    return {k.removeprefix(start).replace(".", "/"): float(v) for k, v in row.items() if k.startswith(start) and v}


def played(folder: Path, preset: str, *overrides: str) -> Experiment:
    experiment = small(preset, *overrides)
    run_inline(experiment, folder)
    return experiment


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("fedper", ["cohort.fraction=0.5"]),  # personal layers; some clients never took part
        ("ditto", []),  # a model of its own beside the shared one
        ("apfl", []),  # a mixture of two
        ("perfedavg", []),  # a step on its own data
        ("fedrod", []),
        ("transfer", []),  # a frozen trunk
        ("local", []),
        ("fedavg", ["cohort.dropout=0.4", "cohort.attempts=9", "cohort.quorum=5"]),  # void attempts
        ("fedper", ["cohort.dropout=0.4", "cohort.attempts=9", "cohort.quorum=5"]),
    ],
)
def test_each_clients_model_scores_as_in_the_table(preset: str, overrides: list[str], tmp_path: Path) -> None:
    experiment = played(tmp_path / "run", preset, *overrides)
    task = open_task(experiment)
    for client in range(experiment.partition.clients):
        model = meadow.load(tmp_path / "run", client)
        assert not model.training
        found = evaluate(model, task.client(client).test, task, thorough=True)
        expected = scores(tmp_path / "run", client)
        assert found.keys() >= expected.keys() and expected
        np.testing.assert_allclose(
            [found[k] for k in expected], list(expected.values()), rtol=1e-5, err_msg=str(client)
        )


@pytest.mark.parametrize("preset", ["fedavg", "scaffold", "federated-transfer"])
def test_the_shared_model_scores_as_in_the_summary(preset: str, tmp_path: Path) -> None:
    experiment = small(preset)
    summary = run_inline(experiment, tmp_path / "run")
    task = open_task(experiment)
    found = evaluate(meadow.load(tmp_path / "run"), task.dataset.test, task, thorough=True)
    expected = {f"{t}/{m}": v for t, metrics in summary["metrics"]["global"].items() for m, v in metrics.items()}
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-5)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    experiment = played(run, "fedper")
    with pytest.raises(meadow.UserError):
        meadow.load(tmp_path)  # a folder of runs
    with pytest.raises(meadow.UserError):
        meadow.load(run)  # no shared head
    with pytest.raises(meadow.UserError):
        meadow.load(run, experiment.partition.clients)
    played(tmp_path / "ditto", "ditto")
    for folder in (run, tmp_path / "ditto"):
        (folder / "state").rename(tmp_path / f"state-of-{folder.name}")  # as if it had stayed on the nodes
    with pytest.raises(meadow.UserError):
        meadow.load(tmp_path / "ditto", 0)
    with pytest.raises(meadow.UserError):
        meadow.load(run, 0)
    newest = max((run / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(meadow.UserError):
        meadow.load(run, 0)


def test_a_mapping_is_as_good_as_a_file(tmp_path: Path) -> None:
    tree = to_tree(small("fedavg", "engine.name=inline", "run.rounds=1"))
    summary = meadow.run(tree, out=tmp_path / "run")
    assert (summary.status, summary.rounds, (tmp_path / "run" / "report.html").exists()) == ("done", 1, True)
    assert meadow.plan(tree)["steps"] == summary.cost["steps"]


@pytest.mark.slow
def test_the_readmes_lines_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=600)
