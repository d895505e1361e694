"""A private step of every family of models, whatever of it learns, is the naive loop's over one sample at a time."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small
from torch import Tensor

from client.trainable import freeze, mask
from client.training import train
from config import schema
from config.load import load
from config.schema import Experiment
from privacy.dpsgd import Mechanism, Permit
from privacy.noise import Stream
from strategies.trainable import stage, trained
from tasks.data import Part, Raw
from tasks.evaluation import load_into
from tasks.metrics import losses
from tasks.task import initial_state, open_task

ONE_STEP = ("local.momentum=0", "local.lr=1", "local.steps=1", "local.clip_norm=0")


def made(x: Tensor, tokens: int = 0, images: bool = False, each: bool = False) -> Raw:
    """A data set of these samples with labels of three classes; each: one at every token, missing (-1) behind the end."""
    y = (np.arange(len(x)) * 7 % 5 % 3).astype(np.int64)
    if each:
        return Raw(
            "made", Part(x, {"y": np.where(x.numpy() > 0, x.numpy(), -1)}), None, {"y": f"class {tokens}"}, tokens
        )
    return Raw("made", Part(x, {"y": y}), None, {"y": "class 3"}, tokens, images)


def windows(task: schema.Task) -> Raw:
    return made(torch.from_numpy(np.random.default_rng(1).normal(size=(90, 3, 16)).astype(np.float32)))


def images(task: schema.Task) -> Raw:
    return made(
        torch.from_numpy(np.random.default_rng(2).integers(0, 256, (90, 1, 28, 28)).astype(np.uint8)), images=True
    )


def texts(task: schema.Task) -> Raw:
    return made(_tokens(), tokens=11)


def characters(task: schema.Task) -> Raw:
    return made(_tokens(), tokens=11, each=True)


def _tokens() -> Tensor:
    draw = np.random.default_rng(3)
    x, length = draw.integers(1, 11, (90, 6)), draw.integers(1, 7, (90, 1))
    return torch.from_numpy(np.where(np.arange(6) < length, x, 0).astype(np.int64))


OTHERS = {"cnn1d": "windows", "lenet": "images", "bilstm": "texts", "charlstm": "characters"}
"""Model -> its data. LeNet's norms and the recurrent layers' replacement are privacy.dpsgd's own affair."""


@pytest.mark.parametrize("trainable", ["all", "head", "last:1", "gradual", "lora", "adapters"])
@pytest.mark.parametrize("model", OTHERS)
def test_of_sensors_images_and_texts(trainable: str, model: str) -> None:
    if model in ("bilstm", "charlstm") and trainable in ("last:1", "lora", "adapters"):
        pytest.skip("there is no such part in a recurrent trunk")
    experiment = load("multitask", [
        f"task.dataset=test_dpsgd_families:{OTHERS[model]}", "task.targets=y", f"task.model={model}", "task.hidden=8",
        "partition.clients=2", "partition.law=iid", f"local.trainable={trainable}", "local.lora_rank=2", *ONE_STEP,
    ])  # fmt: skip
    check(experiment, "auto")


@pytest.mark.parametrize("trainable", ["all", "head", "last:1", "gradual", "lora", "adapters", "fisher"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("mode", ["book", "ghost", "hooks"])
def test_of_two_targets_from_a_source(trainable: str, model: str, mode: Any) -> None:
    check(small("multitask", "task.pretrained=source", f"local.trainable={trainable}", f"task.model={model}", *ONE_STEP),
          mode)  # fmt: skip


def check(experiment: Experiment, mode: Any) -> None:
    """To 1e-5: what learns moves by lr / denominator times the sum of clipped gradients, which autograd alone has for one
    sample after another; what does not learn keeps its bits."""
    task = open_task(experiment)
    net, data = task.new_model(), task.client(0).train.take(torch.arange(12))
    load_into(net, initial_state(experiment))
    bare = copy.deepcopy(net)
    allowed = Permit(Mechanism(1.0, 0.0, 0.5, 3.0, 1), Stream(0), Stream(1), mode)
    train(net, data, task, experiment, 1, 0, permit=allowed)
    names = {
        n for n in trained(experiment, net.state_dict(), stage(experiment, 1, 0)) if n in dict(bare.named_parameters())
    }
    kept = mask(bare, experiment, 0)
    learning = freeze(bare, names)
    sums = {name: torch.zeros_like(p) for name, p in learning.items()}
    for i in range(len(data)):
        one = data.take(torch.tensor([i]))
        parts = losses(bare(task.prepare(one.x, training=True)), one.y, task.targets)
        gradient = torch.autograd.grad(sum(parts.values()), list(learning.values()))  # type: ignore[arg-type]
        norm_ = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
        for name, g in zip(learning, gradient, strict=True):
            sums[name] += g * min(1.0, 0.5 / norm_)
    assert names
    for name, parameter in net.named_parameters():
        before = dict(bare.named_parameters())[name]
        move = sums.get(name, torch.zeros_like(before)) / 3
        if kept is not None and name in kept.entries:
            move = torch.where(kept.entries[name], move, 0.0)
        error = float((parameter - (before - move)).detach().abs().max())
        assert error <= (1e-5 if name in names else 0.0), (name, error)
