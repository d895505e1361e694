"""Models, and the state that training starts from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from helpers.refusals import refused
from meadow.config.schema import Experiment
from meadow.config.schema import Task as Settings
from meadow.runtime.errors import UserError
from meadow.strategies.check import load
from meadow.tasks.data import Inputs, Target
from meadow.tasks.models.multihead import build
from meadow.tasks.source import source_state
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

DIGIT, SLANT = Target("digit", "class", 10), Target("slant", "value", 1, scale=0.25)
BOTH = (DIGIT, SLANT)
IMAGE = Inputs((1, 8, 8))


def experiment(**task: Any) -> Experiment:
    return load({"task": {"source_samples": 200, "source_epochs": 1, **task}})


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 9, 5)])
def test_a_trunk_and_a_head_for_each_target(model: str, shape: tuple[int, ...]) -> None:
    net = build(Settings(model=model, hidden=12), BOTH, Inputs(shape))
    outputs = net(torch.ones(5, *shape))
    assert outputs["digit"].shape == (5, 10) and outputs["slant"].shape == (5,)
    names = list(net.state_dict())
    heads = ["heads.digit.weight", "heads.digit.bias", "heads.slant.weight", "heads.slant.bias"]
    assert names[-4:] == heads and all(name.startswith("trunk.") for name in names[:-4])
    assert not list(net.buffers())
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert not norms and sum(isinstance(m, nn.GroupNorm) for m in net.modules()) == (2 if model == "cnn" else 0)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_features_are_bounded_so_that_a_value_head_is_stable(model: str) -> None:
    """|h|^2 <= 8 whatever the trunk's weights, so the squared error's curvature in a head is at most 2 (8 + 1)."""
    net = build(Settings(model=model), (SLANT,), IMAGE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(30)
        features = net.get_submodule("trunk")(torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    with_bias = torch.cat([features, torch.ones(64, 1)], dim=1).double()
    assert (features**2).sum(1).max() <= 8 * (1 + 1e-5)
    assert 2 * torch.linalg.eigvalsh(with_bias.T @ with_bias / 64).max() <= 18 * (1 + 1e-5)


def test_another_target_changes_neither_the_trunk_s_start_nor_torch_s_generator() -> None:
    before = torch.random.get_rng_state()
    one, two = (build(Settings(), targets, IMAGE, seed=3).state_dict() for targets in ((DIGIT,), (SLANT, DIGIT)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build(Settings(), (DIGIT,), IMAGE, seed=4).state_dict()
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_a_cnn_refuses_what_is_no_image() -> None:
    with pytest.raises(UserError, match=r'task.model = "cnn"'):
        build(Settings(model="cnn"), BOTH, Inputs((64,)))


def test_the_start_is_a_function_of_the_seed() -> None:
    first, again = initial_state(experiment()), initial_state(experiment())
    assert list(first) == list(open_task(experiment()).new_model().state_dict())
    assert all(a.dtype == np.float32 and a.tobytes() == again[name].tobytes() for name, a in first.items())
    assert all(a is not again[name] and not np.shares_memory(a, again[name]) for name, a in first.items())


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_pretrained_start_has_the_source_s_trunk_and_fresh_heads(model: str) -> None:
    pretrained = experiment(model=model, pretrained="source")
    state, source, random = initial_state(pretrained), source_state(pretrained), initial_state(experiment(model=model))
    for name, array in state.items():
        same_as = source if name.startswith("trunk.") else random
        assert np.array_equal(array, same_as[name])
        assert not np.array_equal(source[name], random[name])
    state["trunk." + next(iter(state)).removeprefix("trunk.")][:] = 0  # a caller's change stays the caller's
    assert np.array_equal(initial_state(pretrained)["heads.digit.bias"], random["heads.digit.bias"])
    assert all(np.array_equal(a, source[name]) for name, a in initial_state(pretrained).items() if "trunk." in name)


def test_the_source_is_the_same_for_every_partition_and_differs_by_seed() -> None:
    one = load({"task": {"source_samples": 200, "source_epochs": 1}, "partition": {"clients": 3}})
    assert source_state(one) is source_state(experiment())
    other = load({"run": {"seed": 1}, "task": {"source_samples": 200, "source_epochs": 1}})
    assert not np.array_equal(source_state(one)["heads.digit.bias"], source_state(other)["heads.digit.bias"])


def test_a_pretrained_file_gives_the_trunk_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "model.safetensors"
    random = initial_state(experiment())
    save_file({name: a + 1 for name, a in random.items()} | {"other": np.zeros(1)}, place)
    state = initial_state(experiment(pretrained=str(place)))
    for name, array in state.items():
        assert np.array_equal(array, random[name] + (1 if name.startswith("trunk.") else 0))


def test_a_pretrained_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "model.safetensors"
    trunk = {name: a for name, a in initial_state(experiment()).items() if name.startswith("trunk.")}
    wrong = "trunk.linear2.weight"
    broken = {
        "has shape": trunk | {wrong: np.zeros((3, 3), dtype=np.float32)},
        "has no array": {name: a for name, a in trunk.items() if name != wrong},
        "which the trunk does not have": trunk | {"trunk.linear2.weight.more": np.zeros(1, dtype=np.float32)},
        "finite": trunk | {wrong: np.full_like(trunk[wrong], np.nan)},
    }
    for reason, arrays in broken.items():
        save_file(arrays, place)
        with pytest.raises(UserError, match=reason) as error:
            initial_state(experiment(pretrained=str(place)))
        assert wrong in str(error.value)
    place.write_bytes(b"not a model")
    with refused("task.pretrained", place):
        initial_state(experiment(pretrained=str(place)))
    with refused("task.pretrained", "missing.safetensors"):
        initial_state(experiment(pretrained=str(tmp_path / "missing.safetensors")))


def test_a_task_deals_the_pool_and_learns_what_it_is_told() -> None:
    both = open_task(experiment())
    slant = open_task(experiment(learn="slant", target_weights=[0.5]))
    assert [t.name for t in both.targets] == ["digit", "slant"] and both.weights == (1.0, 1.0)
    assert [t.name for t in slant.targets] == ["slant"] and slant.weights == (0.5,)
    assert both.split.sha256 == slant.split.sha256  # the split follows task.targets, not what is learned
    assert open_task(experiment()) is both
    own = both.client(3)
    assert torch.equal(own.test.x, both.dataset.train.x[torch.from_numpy(both.split.clients[3].test)])
    assert len(both.pool()) == sum(len(client.train) for client in both.split.clients)
    assert torch.equal(both.pool().x[: len(both.client(0).train)], both.client(0).train.x)
    with pytest.raises(IndexError, match="client 20"):
        both.client(20)


def test_an_unknown_target_is_named_with_those_there_are() -> None:
    wrong = experiment(targets=["digit", "colour"])
    for use in (open_task, initial_state):
        with refused("colour", "digit, slant"):
            use(wrong)
