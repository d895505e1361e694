"""The experiments of docs/examples on real data, held to the bounds that docs/results.md states.

`MEADOW_DATA=... pytest -m evidence -s` prints the figures; minutes, not seconds.
"""

import os
from pathlib import Path

import pytest
import torch

from helpers.runs import run_inline
from meadow.strategies.check import load
from meadow.tasks.data import MISSING
from meadow.tasks.readers.datasets import open_dataset

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

pytestmark = [
    pytest.mark.evidence,
    pytest.mark.skipif("MEADOW_DATA" not in os.environ, reason="set MEADOW_DATA to the folder of real data"),
]


def reached(folder: Path, name: str, *overrides: str) -> dict[str, dict[str, float]]:
    """The metrics on the global test set after the example has run: {target: {metric: number}}."""
    summary = run_inline(load(str(EXAMPLES / f"{name}.toml"), list(overrides)), folder)
    assert summary["status"] == "done"
    metrics: dict[str, dict[str, float]] = summary["metrics"]["global"]
    for target, numbers in metrics.items():
        print(f"\n{name} {' '.join(overrides)} {target}:", ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
    return metrics


def commonest(name: str, target: str) -> float:
    """The accuracy of who always says the commonest class of the example's global test set."""
    y = open_dataset(load(str(EXAMPLES / f"{name}.toml"), []).task).test.y[target]
    return float(torch.bincount(y[y != MISSING]).max() / (y != MISSING).sum())


def test_a_frozen_trunk_of_imagenet_tells_ants_from_bees(tmp_path: Path) -> None:
    for seed in range(3):
        assert reached(tmp_path / str(seed), "hymenoptera", f"run.seed={seed}")["label"]["accuracy"] >= 0.93


def test_sensors_tell_what_subjects_do_that_were_never_seen(tmp_path: Path) -> None:
    for seed in range(3):
        pooled = reached(tmp_path / str(seed), "uci-har", "run.placement=pooled", f"run.seed={seed}")
        assert pooled["y"]["accuracy"] >= 0.92
    assert reached(tmp_path / "federated", "uci-har")["y"]["accuracy"] > 3 * commonest("uci-har", "y")


@pytest.mark.parametrize("name", ["airline-tweets", "reviews", "heart", "shakespeare"])
def test_natural_clients_do_better_than_the_commonest_class(tmp_path: Path, name: str) -> None:
    for target, numbers in reached(tmp_path / name, name).items():
        assert numbers["accuracy"] > commonest(name, target) + 0.05


def test_two_grades_of_a_fundus_are_ranked(tmp_path: Path) -> None:
    """By the area under the ROC curve: the losses are balanced over the classes, which costs accuracy of the commonest."""
    metrics = reached(tmp_path / "idrid", "idrid")
    assert metrics["retinopathy_grade"]["auroc"] > 0.7 and metrics["edema_risk"]["auroc"] > 0.7


def test_a_star_is_counted_and_measured_at_once(tmp_path: Path) -> None:
    metrics = reached(tmp_path / "stars", "stars")
    assert metrics["points"]["accuracy"] > 0.85 and metrics["size"]["r2"] > 0.9
