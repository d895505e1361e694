"""The training loop: epochs or steps of mini-batches over tensors in memory, as `[local]` says.

Settings beyond a plain step have modules of their own: what learns (`trainable.py`), the optimiser and its rates
(`optimisers.py`), the loss (`objective.py`), early stopping (`validation.py`), regularisation towards another model
(`anchors.py`), weights of several targets (`balance.py`), samples of another domain (`adaptation.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.client.loop import anchors
from meadow.client.loop.adaptation import adaptation
from meadow.client.loop.balance import BALANCES
from meadow.client.loop.objective import Objective
from meadow.client.loop.optimisers import make_optimizer, plateau, scheduled
from meadow.client.loop.trainable import Mask, freeze, mask
from meadow.client.loop.validation import EarlyStopping, validation_loss
from meadow.config.schema import Experiment, Local
from meadow.privacy.dpsgd.step import Permit
from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import cached
from meadow.runtime.seeds import torch_generator, torch_seeded
from meadow.strategies.protocol import Correction, FitResult, Optimizer, Term, steps_of
from meadow.strategies.trainable import rate_factors, stage, trained
from meadow.tasks.data import Data
from meadow.tasks.evaluation import device_of, names_of
from meadow.tasks.task import Task


class Training(NamedTuple):
    """One client's training in one round. A tuple, because each client needs one and a frozen dataclass takes five times as
    long.

    plan: `[local]`, or what replaces it. epochs: if given, replaces `plan.epochs` and `plan.steps`. learns: restricts the
    parameters of `local.trainable` by name. correct: changes each step's final gradients. term: is added to each batch's
    loss. A penalty that does not depend on the data (proximal terms, control variates) belongs in `correct`, because DP-SGD
    would clip it in the loss. permit: makes each step private. validation: the client's validation part. memory: the loop's
    state from the client's last round (`Trained.memory`). source: labelled samples of a source domain.
    """

    data: Data
    round: int
    client: int
    plan: Local
    epochs: int = 0
    learns: Callable[[str], bool] | None = None
    correct: Correction | None = None
    term: Term | None = None
    permit: Permit | None = None
    validation: Data | None = None
    memory: Arrays | None = None
    source: Data | None = None


@dataclass(frozen=True)
class Trained(FitResult):
    """The result of training, with the loop's state for the client's next round."""

    memory: Arrays = field(default_factory=dict)


LOOP = "loop"
"""Kind of the loop's own arrays in a client's memory, in names such as "loop@plateau"."""

_SCALARS_AT_ONCE = 2**22
"""Scalars of samples that one gather copies at most."""


def keeps(experiment: Experiment) -> bool:
    """Whether training leaves state for the client's next round (`Trained.memory`)."""
    plan = experiment.local
    balanced = plan.balance not in ("fixed", "pcgrad")
    return plan.schedule == "plateau" or balanced or experiment.adapt.method != "none"


def train(model: nn.Module, training: Training, task: Task, experiment: Experiment) -> Trained:
    """Train the model in place on a client's data for one round.

    Batches are drawn without replacement within an epoch; their order depends on (run.seed, round, client, epoch)
    alone. The loss is the weighted sum over targets of the mean over the batch. This function sets the model's
    `requires_grad` flags and modes, and moves all data to its device.

    With a `permit` each step is a DP-SGD step: its batch is a Poisson sample, and a sample's loss is the weighted sum of
    its targets' losses (`sample_losses`). Raises UserError for a `term`, which needs a whole batch.
    """
    plan, permit, path = training.plan, training.permit, (training.round, training.client)
    if permit is not None and training.term is not None:
        raise UserError(
            f'strategy.name = "{experiment.strategy.name}" with privacy.unit = "example": it adds a term to the loss of a '
            "whole batch, so the gradient of a single sample cannot be clipped; use another strategy"
        )
    if plan is not experiment.local:
        experiment = experiment.model_copy(update={"local": plan})
    device, memory, validation = device_of(model), dict(training.memory or {}), training.validation
    data, source = training.data.to(device), training.source.to(device) if training.source else None
    size = min(plan.batch_size or len(data), len(data))
    an_epoch = -(-len(data) // size)
    total = steps_of(plan, len(data), training.epochs) if permit is None else permit.mechanism.steps
    adapting = adaptation(experiment, task, source, data, *path, memory)
    rate = scheduled(plan, training.round, experiment.run.rounds)
    watch = EarlyStopping(plan.patience, validation, task) if plan.patience and validation else None
    if plan.schedule == "plateau" and validation:
        rate *= plateau(plan, memory, validation_loss(model, validation, task))
    balance = BALANCES[plan.balance](plan, task.targets, memory, device)
    entries = mask(model, experiment, training.client)
    pull, teacher = anchors.pull(model, experiment), anchors.teacher(model, task, experiment)
    changes = [change for change in (training.correct, pull and pull.correct, entries and entries.correct) if change]
    extra = [*balance.parameters, *(adapting.open(model) if adapting else ())]
    objective = Objective(model, data, task, plan, balance, adapting, teacher, training.term)
    learner = Learner(model, experiment, training.round, rate, training.learns, extra, changes, entries)
    steps, private = 0, None
    with torch_seeded(experiment.run.seed, "train", *path), ExitStack() as opened:
        while steps < total:
            epoch, position = divmod(steps, an_epoch)
            if permit is not None:
                if private is None:
                    learner.begin(epoch)
                    private = opened.enter_context(permit.on(model))
                private.gradients(permit.sample(len(data)), objective.each)
            else:
                if position == 0:
                    learner.begin(epoch)
                    draw = torch_generator(experiment.run.seed, "shuffle", *path, epoch)
                    batches = batches_of(objective.samples, draw, size, at_least_two=learner.normalises)
                learner.optimizer.zero_grad()
                objective.backward(*next(batches), learner.learning, steps / total)
            learner.step()
            steps += 1
            if position == an_epoch - 1 or steps == total:
                balance.epoch_ends()
            if watch is not None and position == an_epoch - 1 and watch.should_stop(model):
                break
    if watch is not None:
        watch.restore(model)
    return Trained(steps, objective.means(), memory | balance.remember() | (adapting.remember() if adapting else {}))


@dataclass
class Learner:
    """The parameters that learn in a round, and their optimiser, which is new at each stage of trainable = "gradual".

    rate: the round's learning rate. extra: parameters outside the model. changes: of each step's final gradients. mask: of
    the entries that may change.
    """

    model: nn.Module
    experiment: Experiment
    round: int
    rate: float
    learns: Callable[[str], bool] | None
    extra: Sequence[nn.Parameter]
    changes: Sequence[Correction]
    mask: Mask | None
    stage: int = -1
    learning: dict[str, nn.Parameter] = field(init=False)
    optimizer: Optimizer = field(init=False)
    normalises: bool = field(init=False)
    """Whether a batch normalisation is in training mode."""

    def begin(self, epoch: int) -> None:
        """Set the flags and modes of the model for an epoch (from 0)."""
        model, plan, names, before = self.model, self.experiment.local, names_of(self.model), self.stage
        self.stage = stage(self.experiment, self.round, epoch)
        now = trained(self.experiment, names, self.stage)
        if self.learns is not None:
            now = frozenset(filter(self.learns, now))
        self.learning = freeze(model, now, plan.statistics)
        if self.stage != before:
            slower = self.rate / plan.gradual_divide**self.stage
            rates = {n: f * slower for n, f in rate_factors(plan, names).items()}
            self.optimizer = make_optimizer(self.learning, plan, rates, self.extra)
            self.normalises = any(map(_normalises_batches, cached(model, "modules", lambda: [*model.modules()])))

    def step(self) -> None:
        """Take a step of the optimiser, by the gradients that the parameters have now."""
        if limit := self.experiment.local.clip_norm:
            nn.utils.clip_grad_norm_(self.learning.values(), limit)
        for change in self.changes:
            change(self.learning)
        self.optimizer.step()
        if self.mask is not None:
            self.mask.restore(self.learning)


def batches_of(samples: Data, draw: torch.Generator, size: int, at_least_two: bool) -> Iterator[tuple[Tensor, Data]]:
    """Yield (indices, batch) of each batch of an epoch in random order. `at_least_two`: as `batch_at`."""
    order = torch.randperm(len(samples), generator=draw)
    indices = [batch_at(order, i, size, at_least_two) for i in range(-(-len(order) // size))]
    at_once = max(1, _SCALARS_AT_ONCE // max(1, size * samples.x[0].numel()))
    for first in range(0, len(indices), at_once):
        some = indices[first : first + at_once]
        gathered = samples.take(torch.cat(some))
        begin = 0
        for index in some:
            end = begin + len(index)
            yield index, Data(gathered.x[begin:end], {name: y[begin:end] for name, y in gathered.y.items()})
            begin = end


def batch_at(order: Tensor, position: int, size: int, at_least_two: bool) -> Tensor:
    """Indices, int64, of the batch at a position (from 0) of an epoch over `order`; the last batch may be shorter.

    `at_least_two`: if `size` > 2, a last batch of one sample gets another from the batch before it, because batch
    normalisation learns nothing from one value.
    """
    begin, end = position * size, min((position + 1) * size, len(order))
    if at_least_two and len(order) > size > 2 and len(order) % size == 1:
        last = len(order) - 2
        begin, end = (last, len(order)) if end == len(order) else (begin, min(end, last))
    return order[begin:end]


def _normalises_batches(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
