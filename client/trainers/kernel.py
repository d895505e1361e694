"""Kernels, which train known layers faster than autograd on prepared samples, and the trainer that runs one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meadow.arrays.lru import LRU
from meadow.arrays.named import Arrays
from meadow.client.loop.optimisers import scheduled
from meadow.client.loop.training import Trained, Training
from meadow.client.trainers.job import Job
from meadow.client.trainers.network import Network
from meadow.config.schema import Experiment, Local
from meadow.runtime.seeds import torch_generator
from meadow.strategies.protocol import steps_of
from meadow.strategies.trainable import rate_factors, trained
from meadow.tasks.data import Data
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.losses import class_weights
from meadow.tasks.task import Task

KEPT = 2**28
"""Bytes of prepared samples that a trainer caches, of the most recent clients."""

Sums = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Member:
    """A client for a kernel. x: float32 (n, *shape). y, by target: int64 or float32 (n,). weights, by target: of classes, or
    None. order: int64 (epochs, n). It takes `steps` steps of `batch` samples; an epoch's last may have fewer."""

    client: int
    x: Tensor
    y: Sequence[Tensor]
    weights: Sequence[Tensor | None]
    order: Tensor
    batch: int
    steps: int


@dataclass(frozen=True)
class Result:
    """The result of a kernel, block after block. losses: of each member, each target's loss summed over the samples seen.
    arrays: each member's, if no weights were given. totals: else each block's weighted sum in float64; None if an array of
    a member is not finite."""

    losses: list[list[float]]
    arrays: list[Arrays]
    totals: Sequence[Sums | None] = ()


class Kernel(Protocol):
    """Trains a network with the SGD of `[local]` (momentum, weight decay).

    keeps_samples: whether to prepare a client's samples once and cache them.
    """

    name: str
    blocks_at_once: int
    keeps_samples: bool
    network: Network

    def __init__(self, network: Network, experiment: Experiment) -> None: ...

    @staticmethod
    def why_not(job: Job) -> str:
        """As `meadow.client.trainers.job.Trainer.why_not`; with "", the kernel fits the job's network."""
        ...

    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Result:
        """Train each member of at most `blocks_at_once` blocks from `start`.

        rates: learning rates by name; an array without one does not learn. weights: each member's weights in its block's
        sum, by name.
        """
        ...


@dataclass(frozen=True)
class KernelTrainer:
    """A `meadow.client.trainers.job.Trainer` that runs a kernel, which it makes at first use."""

    kernel: type[Kernel]
    experiment: Experiment
    task: Task
    network: Network | str
    _made: list[Kernel] = field(default_factory=list, repr=False, compare=False)
    _kept: LRU[int, tuple[Data, Data, Sequence[Tensor | None]]] = field(
        default_factory=lambda: LRU(KEPT), repr=False, compare=False
    )

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def blocks_at_once(self) -> int:
        return self.kernel.blocks_at_once

    def why_not(self, job: Job) -> str:
        return self.kernel.why_not(job)

    def train(self, model: nn.Module, training: Training) -> Trained:
        member = self.member(training)
        rates = self.rates(training.round, training.plan, training.learns)
        done = self.made.train(state_of(model), [[member]], rates)
        load_into(model, done.arrays[0])
        return self.trained(member, done.losses[0])

    def train_blocks(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Training]],
        weights: Sequence[Sequence[Mapping[str, float]]],
    ) -> tuple[list[list[Trained]], Sequence[Sums | None]]:
        """Train whole blocks from `start`. Returns each client's report, and each block's weighted sum (`Result.totals`)."""
        members = [[self.member(training) for training in block] for block in blocks]
        first = blocks[0][0]
        done = self.made.train(start, members, self.rates(first.round, first.plan), weights)
        losses = iter(done.losses)
        return [[self.trained(member, next(losses)) for member in block] for block in members], done.totals

    @property
    def made(self) -> Kernel:
        if not self._made:
            assert isinstance(self.network, Network)
            self._made.append(self.kernel(self.network, self.experiment))
        return self._made[0]

    def member(self, training: Training) -> Member:
        """The client for the kernel, with the same batches in the same order as in the loop."""
        data, plan = training.data, training.plan
        steps, size = steps_of(plan, len(data), training.epochs), min(plan.batch_size, len(data))
        rounds, seed = -(-steps // -(-len(data) // size)), self.experiment.run.seed
        draws = (torch_generator(seed, "shuffle", training.round, training.client, epoch) for epoch in range(rounds))
        order = torch.stack([torch.randperm(len(data), generator=draw) for draw in draws])
        kept = self._kept.get(training.client)
        if kept is not None and kept[0] is data:
            _, own, by_class = kept
        else:
            weights = class_weights(self.task.targets, data.y)
            by_class = [weights.get(t.name) for t in self.task.targets]
            own = Data(self.task.prepare(data.x), data.y)
            if self.kernel.keeps_samples:
                own = Data(own.x.contiguous(), data.y)
                self._kept.put(training.client, (data, own, by_class), own.nbytes)
        return Member(training.client, own.x, [own.y[t.name] for t in self.task.targets], by_class, order, size, steps)

    def rates(self, round_: int, plan: Local, learns: Callable[[str], bool] | None = None) -> dict[str, float]:
        """The learning rate of each array that learns in this round, by name."""
        names = list(self.made.network.shapes)
        now = plan.lr * scheduled(plan, round_, self.experiment.run.rounds)
        factors = rate_factors(plan, names)
        learning = trained(self.experiment, names)
        return {n: now * factors[n] for n in names if n in learning and (learns is None or learns(n))}

    def trained(self, member: Member, losses: Sequence[float]) -> Trained:
        """The report of a member's training, as the loop would make it."""
        samples, per = len(member.x), -(-len(member.x) // member.batch)
        whole, rest = divmod(member.steps, per)
        seen = whole * samples + min(rest * member.batch, samples)
        targets = [t.name for t in self.task.targets]
        return Trained(member.steps, {name: loss / seen for name, loss in zip(targets, losses, strict=True)})
