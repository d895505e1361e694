"""The source task of transfer learning: its data, and the model trained on it."""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from meadow.config import schema
from meadow.config.schema import Experiment
from meadow.runtime.seeds import derive, one_thread, torch_generator
from meadow.tasks.data import Data, Inputs, Target
from meadow.tasks.evaluation import load_into
from meadow.tasks.losses import loss
from meadow.tasks.models.multihead import build
from meadow.tasks.readers.digits import printed_digits
from meadow.tasks.task import open_task


def source_model(experiment: Experiment) -> nn.Module:
    """A new model with the weights of `source_state`."""
    model = open_task(experiment).plain_model()
    load_into(model, source_state(experiment))
    return model


def source_state(experiment: Experiment) -> dict[str, npt.NDArray[np.float32]]:
    """The complete state of the source model, with its heads, float32, in state_dict order; cached, do not modify.

    The model of the experiment, trained on `task.source_samples` samples of `task.source` for `task.source_epochs` epochs,
    on the learned targets with their weights. Its data, initial weights and sample order come from derive(run.seed,
    "source"), so it is the same for every partition.
    """
    task = experiment.task
    weights = task.target_weights or (1.0,) * len(experiment.learned)
    # Only what a source model depends on, so that runs that differ in other settings share it.
    key = schema.Task(
        learn="all",
        pretrained="",
        targets=experiment.learned,
        model=task.model,
        hidden=task.hidden,
        norm=task.norm,
        gated=task.gated,
        source=task.source,
        source_samples=task.source_samples,
        source_epochs=task.source_epochs,
        target_weights=weights,
    )
    targets = open_task(experiment).targets
    with one_thread():  # the first caller trains it, before or after an engine sets its threads
        return _source_state(derive(experiment.run.seed, "source"), key, targets)


@dataclass(frozen=True)
class SourceData:
    """The source task's samples: those that the source model is trained on, and a test set made the same way."""

    train: Data
    test: Data


def source_data(experiment: Experiment) -> SourceData:
    """The source data of an experiment: the training data of `source_state`, and 1,000 test samples."""
    return _source_data(derive(experiment.run.seed, "source"), experiment.task.source_samples)


@functools.lru_cache(maxsize=2)
def _source_data(seed: int, samples: int) -> SourceData:
    return SourceData(
        printed_digits(samples, derive(seed, "data")), printed_digits(SOURCE_TEST, derive(seed, "data", "test"))
    )


SOURCE_TEST = 1000
SOURCE_BATCH = 64
SOURCE_LR = 2e-3
SOURCE_WEIGHT_DECAY = 1e-2


@functools.lru_cache(maxsize=8)
def _source_state(seed: int, task: schema.Task, targets: tuple[Target, ...]) -> dict[str, npt.NDArray[np.float32]]:
    """Train the source model with AdamW (Loshchilov and Hutter 2019), the learning rate falling linearly to zero."""
    data = printed_digits(task.source_samples, derive(seed, "data"))
    model = build(task, targets, Inputs(tuple(data.x.shape[1:])), seed)
    steps = task.source_epochs * -(-len(data) // SOURCE_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SOURCE_LR, weight_decay=SOURCE_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for epoch in range(task.source_epochs):
        order = torch.randperm(len(data), generator=torch_generator(seed, "shuffle", epoch))
        for index in torch.split(order, SOURCE_BATCH):
            batch = data.take(index)
            optimizer.zero_grad(set_to_none=True)
            loss(model(batch.x), batch.y, targets, task.target_weights).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return {name: tensor.numpy(force=True).copy() for name, tensor in model.state_dict().items()}
