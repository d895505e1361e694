"""The context that a node gives an algorithm's client in a round (`meadow.strategies.protocol.ClientContext`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays, auxiliary
from meadow.client.loop.optimisers import make_optimizer, scheduled
from meadow.client.loop.training import LOOP, Trained, Training
from meadow.client.release import PrivateRelease
from meadow.client.trainers.choose import Trainers
from meadow.config import schema
from meadow.config.schema import Experiment
from meadow.privacy.dpsgd.step import Permit
from meadow.strategies.protocol import Batch, Correction, Optimizer, Roles, Term, steps_of
from meadow.strategies.trainable import rate_factors
from meadow.tasks.data import Data, Target
from meadow.tasks.evaluation import device_of, load_into, state_of
from meadow.tasks.losses import class_weights, losses
from meadow.tasks.task import Task


class Observer(Protocol):
    """Watches the clients of a node, for an audit, and changes nothing."""

    def trains(self, context: "LocalContext", leaves: bool) -> Callable[[Trained], None]:
        """Called when a client begins to train; the returned function is called at the end. `leaves`: whether the trained
        model leaves the client."""

    def noises(self, client: int, release: PrivateRelease) -> None:
        """Called before the client's newest update gets its noise under local DP."""


@dataclass(frozen=True)
class LocalContext:
    """One client in one round. `whole` is the complete model; `model`, which learns, is all of it or a view of it.

    work: the share of its steps that the client completes (less than 1 for a simulated straggler). permit: makes its one
    training of this round private. remembered: the loop's state for the client's next round; `fit` fills it.
    """

    experiment: Experiment
    task: Task
    roles: Roles
    whole: nn.Module
    model: nn.Module
    trainers: Trainers
    data: Data
    round: int
    client: int
    received: Arrays
    auxiliary: Mapping[str, Arrays]
    memory: Mapping[str, Arrays]
    initial: Callable[[], Arrays]
    personal: Arrays
    work: float = 1.0
    validation: Data | None = None
    source: Data | None = None
    permit: Permit | None = None
    remembered: Arrays = field(default_factory=dict)
    observers: Sequence[Observer] = ()

    @property
    def settings(self) -> schema.Strategy:
        return self.experiment.strategy

    @property
    def local(self) -> schema.Local:
        return self.experiment.local

    @property
    def size(self) -> int:
        return len(self.data)

    def start(self) -> Arrays:
        if self.roles.personal or self.roles.fixed:
            start = self.initial() | self.personal | self.received
            return {name: start[name] for name in self.whole.state_dict()}
        return dict(self.received)

    def load(self, arrays: Arrays) -> None:
        load_into(self.whole, arrays)

    def arrays(self) -> Arrays:
        return state_of(self.whole)

    def fit(
        self,
        *,
        epochs: int = 0,
        repeat: int = 1,
        learns: Callable[[str], bool] | None = None,
        correct: Correction | None = None,
        term: Term | None = None,
        leaves: bool = True,
    ) -> Trained:
        plan, permit = self.local, self.permit if leaves else None
        if repeat > 1 or self.work < 1:
            steps = max(1, int(self.work * steps_of(plan, self.size, epochs)))
            plan, epochs = plan.model_copy(update={"steps": steps * repeat}), 0
        training = Training(
            self.data, self.round, self.client, plan, epochs, learns, correct, term, permit,
            self.validation, self.memory.get(LOOP), self.source,
        )  # fmt: skip
        observing = [observer.trains(self, leaves) for observer in self.observers]
        trained = self.trainers.train(self.model, training)
        if not self.remembered:
            self.remembered.update(auxiliary(LOOP, trained.memory))
        for ends in observing:
            ends(trained)
        return trained

    def loss(self, model: Callable[[Tensor], Mapping[str, Tensor]], batch: Batch) -> Tensor:
        weights = class_weights(self.task.targets, self.data.to(batch.x.device).y)
        parts = losses(model(batch.x), batch.y, self.task.targets, weights, self.local.label_smoothing)
        each = [w * parts[t.name] for w, t in zip(self.task.weights, self.task.targets, strict=True)]
        return sum(each[1:], start=each[0])

    def batch(self) -> Batch:
        data = self.data.to(device_of(self.model))
        return Data(self.task.prepare(data.x), data.y)

    def optimizer(self, model: nn.Module) -> Optimizer:
        factors = {name: rate / self.local.lr for name, rate in self._rates.items()}
        return make_optimizer(dict(model.named_parameters()), self.local, factors)

    def rate(self, name: str) -> float:
        return self._rates[name]

    @property
    def _rates(self) -> dict[str, float]:
        now = self.local.lr * scheduled(self.local, self.round, self.experiment.run.rounds)
        return {name: now * factor for name, factor in rate_factors(self.local, self.whole.state_dict()).items()}

    def class_counts(self) -> dict[str, Tensor]:
        counts = {}
        for target in self.task.targets:
            if target.kind == "class":
                truth = self.data.y[target.name]
                counts[target.name] = torch.bincount(truth[target.known(truth)], minlength=target.size).float()
        return counts


def with_wrong_labels(data: Data, targets: Sequence[Target]) -> Data:
    """The data of a label-flipping attacker: class c of C becomes C - 1 - c, a label y becomes 1 - y, and a value is
    mirrored about the target's offset. Missing labels stay missing."""
    flipped = {}
    for target in targets:
        y = data.y[target.name]
        if target.kind == "class":
            flipped[target.name] = torch.where(target.known(y), target.size - 1 - y, y)
        else:
            flipped[target.name] = 1 - y if target.kind == "labels" else 2 * target.offset - y
    return Data(data.x, data.y | flipped)
