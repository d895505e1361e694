"""Local training under DP-SGD: without noise and with a clip that cuts nothing it is training on the full batch."""

from typing import Any

import numpy as np
import pytest
from torch import nn

from helpers.rounding import in_double, same_function, stepped
from helpers.runs import small
from meadow.client.loop.training import Training, train
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.noise import Stream
from meadow.runtime.errors import UserError
from meadow.strategies.check import load
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

SETTINGS: dict[str, tuple[str, ...]] = {
    "head": ("local.trainable=head",),
    "last": ("local.trainable=last:1",),
    "gradual": ("local.trainable=gradual",),
    "lora": ("local.trainable=lora", "local.lora_rank=2"),
    "lora of a cnn": ("local.trainable=lora", "local.lora_rank=2", "task.model=cnn"),
    "adapters": ("local.trainable=adapters", "local.adapter_size=2", "local.adapter_place=parallel"),
    "adapters of a cnn": ("local.trainable=adapters", "local.adapter_size=2", "task.model=cnn"),
    "fisher": ("local.trainable=fisher",),
    "adam": ("local.optimizer=adamw", "local.clip_norm=0.1"),
    "smoothing": ("local.label_smoothing=0.3",),
    "pulls": ("anchor.l2=0.3", "anchor.ewc=2"),
    "teacher": ("anchor.kl=0.5", "anchor.distill=0.3"),
    "received": ("anchor.kl=0.5", "anchor.to=received"),
    "cross-stitch": ("task.trunks=cross-stitch",),
    "all at once": ("local.trainable=lora", "local.lora_rank=2", "anchor.kl=0.5", "local.nesterov=true"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_without_noise_a_private_step_is_a_full_batch(name: str) -> None:
    experiment = small(
        "federated-finetune", *SETTINGS[name], "task.learn=all", "task.hidden=8", "local.batch_size=0", "local.epochs=2",
        "strategy.share=trainable",
    )  # fmt: skip
    task = open_task(experiment)
    adam = name == "adam"  # divides by the gradient's own size: the smaller that is, the more its rounding shows
    data = in_double(task.client(0).train) if adam else task.client(0).train
    states = []
    for private in (False, True):
        model: nn.Module = task.new_model()
        load_into(model, initial_state(experiment))
        model = model.double() if adam else model
        permit = None
        if private:
            mechanism = Mechanism(1.0, 0.0, 1e6, len(data), 2)
            permit = Permit(mechanism, Stream(0), Stream(0))
        assert train(model, Training(data, 2, 0, experiment.local, permit=permit), task, experiment).steps == 2
        states.append(state_of(model))
    start = initial_state(experiment)
    assert any(not np.array_equal(states[0][n], start[n]) for n in start)
    if not adam:
        stepped(states[1], states[0], {}, np.float32)
        return
    for array in start:
        same_function(states[0][array], states[1][array])


@pytest.mark.parametrize("balance", ["uncertainty", "dwa", "gradnorm", "pcgrad"])
def test_weights_that_private_samples_decide_are_refused(balance: str) -> None:
    overrides: list[Any] = ["privacy.unit=example", "privacy.sample_rate=0.1", "privacy.epsilon=8", "local.steps=3"]
    with pytest.raises(UserError, match=r"local.balance = "):
        load("federated-multitask", [*overrides, f"local.balance={balance}"])
    load("federated-multitask", [*overrides, f"local.balance={balance}", "privacy.unit=client"])
