"""The one training loop: epochs or steps of mini-batches over resident tensors, by the plan of `[local]`.

What the settings of `[local]` mean beyond a plain step stands in modules of its own, and composes: what learns
(`trainable.py`), the optimiser and its rates (`optimisers.py`), when to stop (`validation.py`), what holds the model near
another one (`anchors.py`), what each of several targets counts (`balance.py`), samples of another domain (`adaptation.py`).
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from client import anchors
from client.adaptation import adaptation
from client.balance import make_balance
from client.optimisers import make_optimizer, plateau, scheduled
from client.trainable import freeze, mask
from client.validation import Watch, validation_loss
from config.durable import Arrays
from config.errors import UserError
from config.schema import Experiment
from config.seeds import torch_generator, torch_seeded
from privacy.dpsgd import Permit, Privatiser
from strategies.trainable import rate_factors, stage, trained
from tasks.data import Data
from tasks.metrics import class_weights, losses, sample_losses
from tasks.task import Task


@dataclass(frozen=True)
class Trained:
    """What training reports: optimiser steps, for each target its mean loss over the samples seen, if any, and the arrays
    that the client must give back in its next round (`Beside.memory`)."""

    steps: int
    losses: dict[str, float]
    memory: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """What a client has beside its training samples: its validation part, what its last round left in memory, and
    labelled samples of a source domain."""

    validation: Data | None = None
    memory: Arrays = field(default_factory=dict)
    source: Data | None = None


LOOP = "loop"
"""Kind of what the loop itself leaves in a client's memory, for names such as "loop@plateau"."""

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
    beside: Beside | None = None,
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
    plan, seed, beside = experiment.local, experiment.run.seed, beside or Beside()
    memory = dict(beside.memory)
    size = len(data) if plan.batch_size == 0 else min(plan.batch_size, len(data))
    steps_an_epoch = -(-len(data) // size)
    total = epochs * steps_an_epoch if epochs else plan.steps or plan.epochs * steps_an_epoch
    if permit is not None:
        total = permit.mechanism.steps
    adapting = adaptation(experiment, task, beside.source, data, round_, client, memory)
    weights = class_weights(task.targets, adapting.labels if adapting else data.y)
    rate = scheduled(plan, round_, experiment.run.rounds)
    watch = Watch(plan.patience, beside.validation, task) if plan.patience and beside.validation else None
    if plan.schedule == "plateau" and beside.validation:
        rate *= plateau(plan, memory, validation_loss(model, beside.validation, task))
    balance = make_balance(plan, task.targets, memory)
    held = mask(model, experiment, client)
    pull, teacher = anchors.pull(model, experiment), anchors.teacher(model, task, experiment)
    share = 1 - teacher.distill if teacher else 1.0
    corrections = [correct, pull.correct if pull else None, held.correct if held else None]
    names = list(model.state_dict())
    factors = rate_factors(plan, names)
    extra = [*balance.parameters, *(adapting.open(model) if adapting else ())]
    sums: dict[str, Tensor] = {t.name: torch.zeros(()) for t in task.targets}
    seen, steps, at = 0, 0, -1
    private: Privatiser | None = None

    def each(index: Tensor) -> Tensor:
        nonlocal seen
        batch = data.take(index)
        batch = Data(task.prepare(batch.x, training=True), batch.y)
        outputs = model(batch.x)
        parts = sample_losses(outputs, batch.y, task.targets, weights, plan.label_smoothing)
        seen += len(index)
        for name, values in parts.items():
            sums[name] += values.detach().sum()
        data_loss = torch.stack([w * parts[t.name] for w, t in zip(task.weights, task.targets, strict=True)]).sum(0)
        return data_loss if teacher is None else share * data_loss + teacher.each(batch, outputs)

    with torch_seeded(seed, "train", round_, client), ExitStack() as opened:
        while steps < total:
            epoch, position = divmod(steps, steps_an_epoch)
            if position == 0 and private is None:
                order = torch.randperm(len(data), generator=torch_generator(seed, "shuffle", round_, client, epoch))
                stage_before, at = at, stage(experiment, round_, epoch)
                now = {n for n in trained(experiment, names, at) if learns is None or learns(n)}
                learning = freeze(model, now, plan.statistics)
                if at != stage_before:
                    slower = rate / plan.gradual_divide**at
                    rates = {n: f * slower for n, f in factors.items()}
                    optimizer = make_optimizer(learning, plan, rates, extra)
            if permit is not None:
                private = private or opened.enter_context(permit.on(model))
                private.gradients(permit.sample(len(data)), each)
            else:
                index = batch_at(order, position, size, at_least_two=any(map(_normalises_batches, model.modules())))
                batch = data.take(index)
                if adapting is not None:
                    batch = adapting.batch(index, batch)
                batch = Data(task.prepare(batch.x, training=True), batch.y)
                outputs, aligned = (
                    adapting.outputs(model, batch.x, steps / total) if adapting else (model(batch.x), None)
                )
                parts = losses(outputs, batch.y, task.targets, weights, plan.label_smoothing)
                rest = teacher.each(batch, outputs).mean() if teacher else None
                for more in (aligned, term(model, batch, outputs) if term else None):
                    if more is not None:
                        rest = more if rest is None else rest + more
                shares = {t.name: share * w * parts[t.name] for w, t in zip(task.weights, task.targets, strict=True)}
                present = {t.name for t in task.targets if t.labelled(batch.y[t.name])}
                optimizer.zero_grad(set_to_none=True)
                balance.backward(shares, present, rest, learning)
                seen += len(batch)
                for name, value in parts.items():
                    sums[name] += value.detach() * len(batch)
            if plan.clip_norm:
                nn.utils.clip_grad_norm_(learning.values(), plan.clip_norm)
            for change in corrections:
                if change is not None:
                    change(learning)
            optimizer.step()
            if held is not None:
                held.restore(learning)
            steps += 1
            if position == steps_an_epoch - 1 or steps == total:
                balance.epoch_ends()
            if watch is not None and position == steps_an_epoch - 1 and watch.ends(model):
                break
    if watch is not None:
        watch.restore(model)
    memory |= balance.remember() | (adapting.remember() if adapting else {})
    return Trained(steps, {name: float(value) / seen for name, value in sums.items()} if seen else {}, memory)


def batch_at(order: Tensor, position: int, size: int, at_least_two: bool) -> Tensor:
    """The batch at a position (from 0) of an epoch over `order`, int64; the last one is shorter where it must be.

    `at_least_two`: a last batch of a single sample gets one more from the batch before it, if batches are of three or
    more, because batch normalisation learns nothing from one value.
    """
    begin, end = position * size, min((position + 1) * size, len(order))
    if at_least_two and len(order) > size > 2 and len(order) % size == 1:
        last = len(order) - 2
        begin, end = (last, len(order)) if end == len(order) else (begin, min(end, last))
    return order[begin:end]


def _normalises_batches(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
