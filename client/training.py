"""The one training loop: epochs or steps of mini-batches over resident tensors, by the plan of `[local]`."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config.errors import UserError
from config.schema import Experiment, Local
from config.seeds import torch_generator, torch_seeded
from privacy.dpsgd import Permit
from strategies.sharing import HEADS
from tasks.data import Data
from tasks.metrics import class_weights, losses, sample_losses
from tasks.task import Task


@dataclass(frozen=True)
class Trained:
    """What training reports: optimiser steps, and for each target its mean loss over the samples that it saw, if any."""

    steps: int
    losses: dict[str, float]


Correction = Callable[[Mapping[str, nn.Parameter]], None]
"""Changes the gradients of the parameters that learn, by name, after they are final (clipped and noised, if private)."""

Term = Callable[[nn.Module, Data, Mapping[str, Tensor]], Tensor]
"""A term beside the data's loss for a batch: of the model, the prepared batch and the model's outputs on it, a scalar."""


def train(
    model: nn.Module,
    data: Data,
    task: Task,
    experiment: Experiment,
    round_: int,
    client: int,
    epochs: int = 0,
    *,
    learns: Callable[[str], bool] | None = None,
    correct: Correction | None = None,
    term: Term | None = None,
    permit: Permit | None = None,
) -> Trained:
    """Train the model in place on a client's data for one round.

    Batches are drawn without replacement within an epoch; their order depends on (run.seed, round, client, epoch)
    alone. `epochs`, if given, takes the place of `local.epochs` and `local.steps`. The loss is the weighted sum over
    targets of each one's mean over the batch, and `term` if given. `learns` narrows what `local.trainable` lets learn, by
    parameter name. A penalty that does not depend on the data (proximal terms, control variates) belongs in `correct`:
    under DP-SGD what is added to the loss is clipped, and what is added to the gradients before the noise is lost. The
    model's `requires_grad` flags and modes are set here.

    With a `permit` its steps of DP-SGD take the place of all that: each one's batch is a Poisson sample, and a sample's
    loss is the weighted sum of its targets' (`sample_losses`). Raises UserError for a `term`, which sees a whole batch.
    """
    if permit is not None and term is not None:
        raise UserError(
            f'strategy.name = "{experiment.strategy.name}" with privacy.unit = "example": its local rule adds to the loss '
            "of a whole batch, so no sample's share of it can be clipped; use another strategy"
        )
    plan, seed = experiment.local, experiment.run.seed
    freeze(model, plan, learns)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model, plan)
    size = len(data) if plan.batch_size == 0 else min(plan.batch_size, len(data))
    steps_an_epoch = -(-len(data) // size)
    total = epochs * steps_an_epoch if epochs else plan.steps or plan.epochs * steps_an_epoch
    total = permit.mechanism.steps if permit else total
    weights = class_weights(task.targets, data.y)
    sums: dict[str, Tensor] = {t.name: torch.zeros(()) for t in task.targets}
    seen = 0

    def each(index: Tensor) -> Tensor:
        nonlocal seen
        batch = data.take(index)
        parts = sample_losses(model(task.prepare(batch.x, training=True)), batch.y, task.targets, weights)
        seen += len(index)
        for name, values in parts.items():
            sums[name] += values.detach().sum()
        return torch.stack([w * parts[t.name] for w, t in zip(task.weights, task.targets, strict=True)]).sum(0)

    with torch_seeded(seed, "train", round_, client), permit.on(model) if permit else nullcontext() as private:
        for step in range(total):
            if permit and private:
                private.gradients(permit.sample(len(data)), each)
                if correct is not None:
                    correct(learning)
                optimizer.step()
                continue
            epoch, position = divmod(step, steps_an_epoch)
            if position == 0:
                order = torch.randperm(len(data), generator=torch_generator(seed, "shuffle", round_, client, epoch))
            batch = data.take(order[position * size : (position + 1) * size])
            batch = Data(task.prepare(batch.x, training=True), batch.y)
            outputs = model(batch.x)
            parts = losses(outputs, batch.y, task.targets, weights)
            loss = sum(w * parts[t.name] for w, t in zip(task.weights, task.targets, strict=True))
            assert isinstance(loss, Tensor)
            if term is not None:
                loss = loss + term(model, batch, outputs)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if correct is not None:
                correct(learning)
            optimizer.step()
            seen += len(batch)
            for name, value in parts.items():
                sums[name] += value.detach() * len(batch)
    return Trained(total, {name: float(value) / seen for name, value in sums.items()} if seen else {})


def freeze(model: nn.Module, plan: Local, learns: Callable[[str], bool] | None = None) -> None:
    """Let only what `local.trainable` and `learns` name learn; a frozen module is in `eval()`: no statistic moves."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            (plan.trainable == "all" or name.startswith(HEADS)) and (learns is None or learns(name))
        )
    for child in model.children():
        if not any(p.requires_grad for p in child.parameters()):
            child.eval()


def make_optimizer(model: nn.Module, plan: Local) -> torch.optim.Optimizer:
    """The optimiser of `[local]` over the parameters that learn, the trunk at `trunk_lr_factor` times the rate."""
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n.startswith(HEADS)], "lr": plan.lr},
        {
            "params": [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(HEADS)],
            "lr": plan.lr * plan.trunk_lr_factor,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if plan.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=plan.weight_decay)
    return torch.optim.SGD(groups, momentum=plan.momentum, weight_decay=plan.weight_decay)
