"""The training objective of a step: the data's loss on a batch, plus the terms of `[local]`, `[anchor]`, `[adapt]` and of
the algorithm. It also accumulates the mean losses that the client reports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meadow.client.loop.adaptation import Adaptation
from meadow.client.loop.anchors import Teacher
from meadow.client.loop.balance import Balance
from meadow.config.schema import Local
from meadow.strategies.protocol import Term
from meadow.tasks.data import Data
from meadow.tasks.losses import class_weights, losses, mean_loss, sample_losses
from meadow.tasks.task import Task


@dataclass
class Objective:
    """The objective of one client's training. `data` are its samples as stored; batches are drawn from `samples`.

    Without augmentation and adaptation all samples are prepared once, at the start.
    """

    model: nn.Module
    data: Data
    task: Task
    plan: Local
    balance: Balance
    adapting: Adaptation | None
    teacher: Teacher | None
    term: Term | None
    _seen: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        targets = self.task.targets
        self.weights = class_weights(targets, self.adapting.labels if self.adapting else self.data.y)
        self.share = 1 - self.teacher.distill if self.teacher else 1.0
        self.ready = self.adapting is None and not self.task.augments
        self.samples = Data(self.task.prepare(self.data.x, training=True), self.data.y) if self.ready else self.data
        labelled = {t.name: t.labelled(self.data.y[t.name]) for t in targets}
        self.complete = self.ready and all(count == len(self.data) for count in labelled.values())
        # With one class target, all labels known and no class weights, torch's own mean loss is faster.
        self.plain = self.complete and len(targets) == 1 and not self.weights and targets[0].kind == "class"

    def backward(self, index: Tensor, batch: Data, learning: Mapping[str, nn.Parameter], done: float) -> None:
        """Set the gradients of `learning`, which are None. `batch`: the client's samples at `index`; `done`: the finished
        share of the round."""
        if self.adapting is not None:
            batch = self.adapting.batch(index, batch)
        if not self.ready:
            batch = Data(self.task.prepare(batch.x, training=True), batch.y)
        outputs, rest = self._outputs(batch, done)
        parts = self._losses(outputs, batch)
        self._seen.append((len(batch), {name: value.detach() for name, value in parts.items()}))
        present = parts.keys() if self.complete else {t.name for t in self.task.targets if t.labelled(batch.y[t.name])}
        shares = {
            t.name: parts[t.name] if (factor := self.share * w) == 1 else factor * parts[t.name]
            for w, t in zip(self.task.weights, self.task.targets, strict=True)
        }
        self.balance.backward(shares, present, rest, learning)

    def each(self, index: Tensor) -> Tensor:
        """The loss of each sample at `index`, (n,), a function of that sample alone; it includes the teacher's term."""
        batch = self.samples.take(index)
        if not self.ready:
            batch = Data(self.task.prepare(batch.x, training=True), batch.y)
        outputs = self.model(batch.x)
        parts = sample_losses(outputs, batch.y, self.task.targets, self.weights, self.plan.label_smoothing)
        if len(batch):
            self._seen.append((len(batch), {name: values.detach().mean() for name, values in parts.items()}))
        weighted = [
            parts[t.name] if w == 1 else w * parts[t.name]
            for w, t in zip(self.task.weights, self.task.targets, strict=True)
        ]
        data_loss = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(0)
        return data_loss if self.teacher is None else self.share * data_loss + self.teacher.each(batch, outputs)

    def means(self) -> dict[str, float]:
        """Each target's mean loss over all samples so far; empty without any."""
        if not self._seen:
            return {}
        samples = sum(count for count, _ in self._seen)
        return {
            t.name: math.fsum(count * float(parts[t.name]) for count, parts in self._seen) / samples
            for t in self.task.targets
        }

    def _outputs(self, batch: Data, done: float) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """The model's outputs, and the sum of the terms added to the data's loss, or None."""
        if self.adapting is None:
            outputs, alignment = self.model(batch.x), None
        else:
            outputs, alignment = self.adapting.outputs(self.model, batch.x, done)
        distilled = self.teacher.each(batch, outputs).mean() if self.teacher else None
        own = self.term(self.model, batch, outputs) if self.term else None
        added = [value for value in (distilled, alignment, own) if value is not None]
        return outputs, sum(added[1:], start=added[0]) if added else None

    def _losses(self, outputs: Mapping[str, Tensor], batch: Data) -> dict[str, Tensor]:
        targets, smoothing = self.task.targets, self.plan.label_smoothing
        if self.plain:
            return {targets[0].name: mean_loss(targets[0], outputs, batch.y, smoothing)}
        return losses(outputs, batch.y, targets, self.weights, smoothing)
