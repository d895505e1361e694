"""What a client's data is made into: labels that it does not hold are missing, and its inputs may be shifted by noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.refusals import refused
from helpers.runs import run_inline, small
from meadow.config.schema import Partition
from meadow.config.schema import Task as Settings
from meadow.runtime.errors import UserError
from meadow.tasks.data import MISSING, Data, Target, make_dataset
from meadow.tasks.splits.holds import held
from meadow.tasks.splits.partition import make_split
from meadow.tasks.task import Task, open_task

TARGETS = ("digit", "slant", "ink")
CLIENTS = 5


def task(x: torch.Tensor, noise: float, fold: int = 0) -> Task:
    """A task of 5 clients with the given inputs, one class target, and noise of this variance on the last client's."""
    data = Data(x, {"digit": torch.arange(len(x)) % 2})
    target = Target("digit", "class", 2)
    dataset = make_dataset("test", data, data.take(torch.arange(2)), (target,))
    partition = Partition(law="feature-shift", clients=CLIENTS, noise=noise or 1.0)
    split = make_split(partition, data.y["digit"].numpy(), 3, folds=3 if fold else 0, fold=fold)
    settings = Settings(targets=("digit",))
    return Task(dataset, split, (target,), (1.0,), settings, 3, held((), ("digit",), CLIENTS, 3), noise)


def shift(made: Task, client: int) -> torch.Tensor:
    """What was added to each sample of the pool that the client has; NaN elsewhere."""
    result = torch.full_like(made.dataset.train.x, torch.nan, dtype=torch.float32)
    own, data = made.split.clients[client], made.client(client)
    for index, part in ((own.train, data.train), (own.validation, data.validation), (own.test, data.test)):
        result[index] = part.x.float() - made.dataset.train.x[index].float()
    return result


def test_the_noise_of_client_i_has_mean_0_and_variance_i_of_n() -> None:
    """Client k of 5 has noise of variance 2 (k + 1)/5: 20,000 numbers each, five standard errors, Gaussian by its
    share within one standard deviation (0.6827)."""
    made = task(torch.zeros(500, 200), 2.0)
    found = [shift(made, client) for client in range(CLIENTS)]
    for client, values in enumerate(found):
        noise, variance = values[~values.isnan()].double(), 2.0 * (client + 1) / CLIENTS
        assert len(noise) == 20_000
        assert abs(float(noise.mean())) < 5 * np.sqrt(variance / 20_000)
        assert abs(float(noise.var()) / variance - 1) < 5 * np.sqrt(2 / 20_000)
        assert abs(float((noise.abs() < variance**0.5).double().mean()) - 0.6827) < 5 * np.sqrt(0.68 * 0.32 / 20_000)
    assert not torch.equal(*(values[~values.isnan()] / (k + 1) ** 0.5 for k, values in enumerate(found[:2])))


def test_a_samples_noise_is_a_function_of_the_seed_and_not_of_the_fold() -> None:
    x = torch.arange(300.0).reshape(100, 3)
    whole, folds = task(x, 1.0), [task(x, 1.0, fold) for fold in (1, 2, 3)]
    for client in range(CLIENTS):
        assert all(torch.equal(shift(whole, client).nan_to_num(), shift(f, client).nan_to_num()) for f in folds)


def test_noise_on_stored_images_is_in_units_of_255_rounded_and_clipped() -> None:
    """The same noise as on floats (the same seed), on grey, black and white images."""
    levels = torch.tensor([128, 0, 255], dtype=torch.uint8).repeat(100)[:, None, None, None].expand(300, 1, 4, 5)
    stored, floats = task(levels.contiguous(), 0.04), task(torch.zeros(300, 1, 4, 5), 0.04)
    for client in range(CLIENTS):
        own, noise = stored.split.clients[client], floats.client(client).train.x
        exact = (levels[own.train] + 255 * noise).numpy()
        assert stored.client(client).train.x.dtype == torch.uint8
        assert np.array_equal(stored.client(client).train.x.numpy(), np.clip(np.rint(exact), 0, 255))
    assert (exact < 0).any() and (exact > 255).any()


def test_the_fold_of_the_experiment_is_each_clients_test_part() -> None:
    split = open_task(small("fedavg", "evaluate.folds=4", "evaluate.fold=3")).split
    whole = open_task(small("fedavg")).split
    assert np.array_equal(split.sizes.sum(axis=1), whole.sizes.sum(axis=1)) and split.sha256 != whole.sha256
    assert np.all(np.abs(split.sizes[:, 2] - whole.sizes.sum(axis=1) / 4) < 1)


def test_tokens_cannot_be_shifted() -> None:
    words = ("task.dataset=helpers.objects:tokens", "task.targets=digit", "task.kinds=class")
    experiment = small("fedavg", "partition.law=feature-shift", *words)
    with pytest.raises(UserError, match="feature-shift"):
        open_task(experiment)


def test_holds_by_name_and_ranges() -> None:
    table = held(("slant 1-2 4", "ink 0-3", "ink 3"), TARGETS, CLIENTS, 0)
    assert table[:, 0].all()
    assert np.flatnonzero(table[:, 1]).tolist() == [1, 2, 4]
    assert np.flatnonzero(table[:, 2]).tolist() == [0, 1, 2, 3]
    assert held((), TARGETS, CLIENTS, 0).all()


@pytest.mark.parametrize(("each", "clients"), [(1, 5), (2, 7), (3, 4), (1, 3)])
def test_holds_of_k_each_gives_every_target_as_many_clients_to_within_one(each: int, clients: int) -> None:
    tables = [held((str(each),), TARGETS, clients, seed) for seed in range(20)]
    for table in tables:
        assert (table.sum(axis=1) == each).all()
        assert table.sum(axis=0).max() - table.sum(axis=0).min() <= 1
    assert np.array_equal(tables[3], held((str(each),), TARGETS, clients, 3))
    assert each == len(TARGETS) or len({table.tobytes() for table in tables}) > 1


@pytest.mark.parametrize(
    ("holds", "named"),
    [
        (("0",), "from 1 to 3"),
        (("4",), "from 1 to 3"),
        (("digt 0-2",), "did you mean digit"),
        (("digit",), "digit 0-4"),
        (("digit 0-5",), "clients 0 to 4"),
        (("digit 3-1",), "1-3"),
        (("digit a-b",), "a-b"),
        (("digit 0-3", "slant 1", "ink 2"), "client 4 would have no target"),
    ],
)
def test_impossible_holds_say_what_to_write(holds: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        held(holds, TARGETS, CLIENTS, 0)
    assert f"partition.holds = {list(holds)}" in str(error.value)
    with refused("partition.holds", 2):
        held(("1",), TARGETS, 2, 0)


def test_labels_that_a_client_does_not_hold_are_missing_in_all_parts(tmp_path: Path) -> None:
    experiment = small("fedavg", "partition.holds=digit 0-4,slant 3-7")
    opened = open_task(experiment)
    for client in range(8):
        own, data = opened.split.clients[client], opened.client(client)
        for index, part in ((own.train, data.train), (own.validation, data.validation), (own.test, data.test)):
            stored: Any = opened.dataset.train.take(torch.from_numpy(index)).y
            digit, slant = part.y["digit"], part.y["slant"]
            assert digit.dtype == stored["digit"].dtype and slant.dtype == stored["slant"].dtype
            assert torch.equal(digit, stored["digit"]) if client <= 4 else bool((digit == MISSING).all())
            assert torch.equal(slant, stored["slant"]) if client >= 3 else bool(slant.isnan().all())
    run_inline(small("fedavg", "partition.holds=digit 0-4,slant 3-7", "run.rounds=1"), tmp_path)
    table = json.loads((tmp_path / "split.json").read_text())
    assert table["holds"] == {"digit": [0, 1, 2, 3, 4], "slant": [3, 4, 5, 6, 7]}
    plain = open_task(small("fedavg"))
    assert plain.split.sha256 == opened.split.sha256  # who holds which target is not part of who has which sample


def test_split_json_of_a_natural_split_names_clients_and_who_is_left_out(tmp_path: Path) -> None:
    owners = ("task.dataset=helpers.objects:owners", "task.targets=digit", "task.kinds=class")
    run_inline(small("fedavg", *owners, "partition.law=natural", "run.rounds=1", "partition.clients=2"), tmp_path)
    table = json.loads((tmp_path / "split.json").read_text())
    assert table["names"] == ["a", "c"] and table["left_out"] == {"clients": 1, "samples": 4}
    assert [sum(sizes) for sizes in table["sizes"]] == [40, 36]
