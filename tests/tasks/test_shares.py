"""Shares: each machine gets its own clients' samples and no others, and opens the same task from them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.strategies.check import load
from meadow.tasks.data import Data
from meadow.tasks.splits.shares import hosted, read_share, use_share, write_shares
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

EXPERIMENT = load({"partition": {"clients": 7, "holds": "1"}, "task": {"source_samples": 200, "source_epochs": 1}})


def same(one: Data, two: Data) -> bool:
    pairs = [(one.x, two.x), *((one.y[n], two.y[n]) for n in one.y)]
    return one.y.keys() == two.y.keys() and all(
        np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point()) for a, b in pairs
    )


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shares(EXPERIMENT, 3, tmp_path_factory.mktemp("shares"), "share")


def test_every_client_is_on_one_node_and_its_samples_are_those_of_the_whole(shares: list[Path]) -> None:
    whole, seen = open_task(EXPERIMENT), list[Any]()
    for index, folder in enumerate(shares[1:]):
        task = read_share(folder, EXPERIMENT)
        own = hosted(index, 3, 7)
        seen += own
        for client in own:
            for part in ("train", "validation", "test"):
                assert same(getattr(task.client(client), part), getattr(whole.client(client), part))
        assert (task.dataset.sha256, task.split.sha256) == (whole.dataset.sha256, whole.split.sha256)
        others = [c for c in range(7) if c not in own]
        assert task.split.sizes[others].sum() == 0 and len(task.dataset.test) == 0 == len(task.dataset.train)
        assert {p.name for p in folder.glob("*.safetensors")} == {f"client-{c}.safetensors" for c in own}
        for name, tensor in whole.new_model().state_dict().items():
            assert torch.equal(task.new_model().state_dict()[name], tensor)
    assert seen == list(range(7))


def test_the_coordinator_has_the_test_set_and_the_sizes_and_no_client(shares: list[Path]) -> None:
    whole, task = open_task(EXPERIMENT), read_share(shares[0], EXPERIMENT)
    assert same(task.dataset.test, whole.dataset.test)
    assert np.array_equal(task.split.sizes, whole.split.sizes)
    assert np.array_equal(task.label_counts(), whole.label_counts())
    assert [p.name for p in shares[0].glob("*.safetensors")] == ["test.safetensors"]


def test_a_process_with_a_share_opens_its_task_from_there(shares: list[Path]) -> None:
    before = initial_state(EXPERIMENT)
    use_share(str(shares[2]))
    try:
        assert open_task(EXPERIMENT).dataset.train.x.shape == (0, 1, 8, 8)
        assert all(np.array_equal(before[n], a) for n, a in initial_state(EXPERIMENT).items())
    finally:
        use_share("")
    assert len(open_task(EXPERIMENT).dataset.train.x) > 0


@pytest.mark.parametrize("app", ["client", "server"])
def test_the_apps_of_a_deployment_take_the_share_of_their_machine(shares: list[Path], app: str) -> None:
    tell = f"import meadow.{app}.app; from meadow.tasks.task import _openers; print(_openers[0].args[0])"
    environment = os.environ | {"MEADOW_SHARE": str(shares[1])}
    done = subprocess.run([sys.executable, "-c", tell], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(shares[1])


def other(change: str) -> Experiment:
    return load(EXPERIMENT.model_dump(mode="json"), [change])


@pytest.mark.parametrize("change", ["run.seed=3", "partition.alpha=1.0", "task.targets=digit", "evaluate.folds=3"])
def test_a_share_of_another_experiment_is_refused(shares: list[Path], change: str) -> None:
    with pytest.raises(UserError, match=f"{change.partition('=')[0]}.*meadow deal"):
        read_share(shares[1], other(change))


def test_a_setting_that_decides_no_data_may_differ(shares: list[Path]) -> None:
    assert len(read_share(shares[1], other("local.lr=0.5")).client(0).train) > 0


def test_a_missing_and_a_damaged_share_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="meadow deal"):
        read_share(tmp_path / "none", EXPERIMENT)
    folder = write_shares(EXPERIMENT, 1, tmp_path)[1]
    file = folder / "client-3.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="client-3"):
        read_share(folder, EXPERIMENT)


def test_pooled_data_is_on_the_first_node(tmp_path: Path) -> None:
    folders = write_shares(other("run.placement=pooled"), 2, tmp_path)
    assert json.loads((folders[1] / "share.json").read_text())["clients"] == list(range(7))


@pytest.mark.parametrize("nodes", [0, 8])
def test_more_nodes_than_clients_are_refused(tmp_path: Path, nodes: int) -> None:
    with pytest.raises(UserError, match="--nodes"):
        write_shares(EXPERIMENT, nodes, tmp_path)
