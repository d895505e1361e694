"""The training loop: epochs or steps of mini-batches over tensors in memory, as `[local]` says.

Settings beyond a plain step have modules of their own: what learns (`trainable.py`), the optimiser and its rates
(`optimisers.py`), the loss (`objective.py`), early stopping (`validation.py`), regularisation towards another model
(`anchors.py`), weights of several targets (`balance.py`), samples of another domain (`adaptation.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.client.loop import anchors
from meadow.client.loop.adaptation import adaptation
from meadow.client.loop.balance import make_balance
from meadow.client.loop.objective import Objective, Term
from meadow.client.loop.optimisers import Optimizer, make_optimizer, plateau, scheduled
from meadow.client.loop.trainable import freeze, mask
from meadow.client.loop.validation import EarlyStopping, validation_loss
from meadow.config.schema import Experiment, Local
from meadow.privacy.dpsgd.step import Permit
from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import once
from meadow.runtime.seeds import torch_generator, torch_seeded
from meadow.strategies.protocol import FitResult
from meadow.strategies.trainable import rate_factors, stage, trained
from meadow.tasks.data import Data
from meadow.tasks.evaluation import device_of, names_of
from meadow.tasks.task import Task


@dataclass(frozen=True)
class Trained(FitResult):
    """The result of training, with the loop's state for the client's next round (`Extras.memory`)."""

    memory: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Extras:
    """Optional inputs of training: the client's validation part, the loop's state from the client's last round, and
    labelled samples of a source domain."""

    validation: Data | None = None
    memory: Arrays = field(default_factory=dict)
    source: Data | None = None


LOOP = "loop"
"""Kind of the loop's own arrays in a client's memory, in names such as "loop@plateau"."""


def keeps(experiment: Experiment) -> bool:
    """Whether training leaves state for the client's next round (`Trained.memory`)."""
    plan = experiment.local
    balanced = plan.balance not in ("fixed", "pcgrad")
    return plan.schedule == "plateau" or balanced or experiment.adapt.method != "none"


Correction = Callable[[Mapping[str, nn.Parameter]], None]
"""Changes the final gradients (clipped and noised, if private) of the parameters that learn, by name."""

_SCALARS_AT_ONCE = 2**22
"""Scalars of samples that one gather copies at most."""


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
    extras: Extras | None = None,
    permit: Permit | None = None,
) -> Trained:
    """Train the model in place on a client's data for one round.

    Batches are drawn without replacement within an epoch; their order depends on (run.seed, round, client, epoch)
    alone. `epochs`, if given, replaces `local.epochs` and `local.steps`. The loss is the weighted sum over targets of the
    mean over the batch, plus `term` if given. `learns` restricts the parameters of `local.trainable` by name. A penalty
    that does not depend on the data (proximal terms, control variates) belongs in `correct`, because DP-SGD would clip it
    in the loss. This function sets the model's `requires_grad` flags and modes, and moves all data to its device.

    With a `permit` each step is a DP-SGD step: its batch is a Poisson sample, and a sample's loss is the weighted sum of
    its targets' losses (`sample_losses`). Raises UserError for a `term`, which needs a whole batch.
    """
    if permit is not None and term is not None:
        raise UserError(
            f'strategy.name = "{experiment.strategy.name}" with privacy.unit = "example": it adds a term to the loss of a '
            "whole batch, so the gradient of a single sample cannot be clipped; use another strategy"
        )
    plan, extras, device = experiment.local, extras or Extras(), device_of(model)
    data, source = data.to(device), extras.source.to(device) if extras.source else None
    memory = dict(extras.memory)
    size, an_epoch, total = length(plan, len(data), epochs)
    total = total if permit is None else permit.mechanism.steps
    adapting = adaptation(experiment, task, source, data, round_, client, memory)
    rate = scheduled(plan, round_, experiment.run.rounds)
    watch = EarlyStopping(plan.patience, extras.validation, task) if plan.patience and extras.validation else None
    if plan.schedule == "plateau" and extras.validation:
        rate *= plateau(plan, memory, validation_loss(model, extras.validation, task))
    balance = make_balance(plan, task.targets, memory)
    balance.place(device)
    held = mask(model, experiment, client)
    pull, teacher = anchors.pull(model, experiment), anchors.teacher(model, task, experiment)
    changes = [change for change in (correct, pull and pull.correct, held and held.correct) if change]
    extra = [*balance.parameters, *(adapting.open(model) if adapting else ())]
    objective = Objective(model, data, task, plan, balance, adapting, teacher, term)
    learner = Learner(model, experiment, round_, rate, learns, extra)
    steps, private = 0, None
    with torch_seeded(experiment.run.seed, "train", round_, client), ExitStack() as opened:
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
                    order = torch.randperm(
                        len(data), generator=torch_generator(experiment.run.seed, "shuffle", round_, client, epoch)
                    )
                    batches = batches_of(objective.samples, order, size, at_least_two=learner.normalises)
                learner.optimizer.zero_grad()
                objective.backward(*next(batches), learner.learning, steps / total)
            if plan.clip_norm:
                nn.utils.clip_grad_norm_(learner.learning.values(), plan.clip_norm)
            for change in changes:
                change(learner.learning)
            learner.optimizer.step()
            if held is not None:
                held.restore(learner.learning)
            steps += 1
            if position == an_epoch - 1 or steps == total:
                balance.epoch_ends()
            if watch is not None and position == an_epoch - 1 and watch.should_stop(model):
                break
    if watch is not None:
        watch.restore(model)
    memory |= balance.remember() | (adapting.remember() if adapting else {})
    return Trained(steps, objective.means(), memory)


class Learner:
    """The parameters that learn in a round, and their optimiser, which is new at each stage of trainable = "gradual"."""

    learning: dict[str, nn.Parameter]
    optimizer: Optimizer
    normalises: bool
    """Whether a batch normalisation is in training mode."""

    def __init__(
        self,
        model: nn.Module,
        experiment: Experiment,
        round_: int,
        rate: float,
        learns: Callable[[str], bool] | None,
        extra: Sequence[nn.Parameter],
    ) -> None:
        self.model, self.experiment, self.round, self.rate = model, experiment, round_, rate
        self.learns, self.extra, self.stage = learns, extra, -1
        self.names = names_of(model)

    def begin(self, epoch: int) -> None:
        """Set the flags and modes of the model for an epoch (from 0)."""
        plan, before = self.experiment.local, self.stage
        self.stage = stage(self.experiment, self.round, epoch)
        now = trained(self.experiment, self.names, self.stage)
        if self.learns is not None:
            now = frozenset(filter(self.learns, now))
        self.learning = freeze(self.model, now, plan.statistics)
        if self.stage != before:
            slower = self.rate / plan.gradual_divide**self.stage
            rates = {n: f * slower for n, f in rate_factors(plan, self.names).items()}
            self.optimizer = make_optimizer(self.learning, plan, rates, self.extra)
            self.normalises = any(
                map(_normalises_batches, once(self.model, "modules", lambda: [*self.model.modules()]))
            )


def length(plan: Local, samples: int, epochs: int = 0) -> tuple[int, int, int]:
    """(batch size, steps of an epoch, steps of the round or of `epochs` epochs) for this many samples."""
    size = samples if plan.batch_size == 0 else min(plan.batch_size, samples)
    an_epoch = -(-samples // size)
    return size, an_epoch, epochs * an_epoch if epochs else plan.steps or plan.epochs * an_epoch


def batches_of(samples: Data, order: Tensor, size: int, at_least_two: bool) -> Iterator[tuple[Tensor, Data]]:
    """Yield (indices, batch) of each batch of an epoch over `order`. `at_least_two`: as `batch_at`."""
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
