"""Multi-task loss weighting (`local.balance`): how much each target counts in a step.

Under every method a target's loss is first multiplied by its entry of `task.target_weights`, and a target without a label
in the batch is left out. A method's state stays with the client from round to round.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.config.schema import Local
from meadow.strategies.trainable import HEADS, layer
from meadow.tasks.data import Target

Losses = Mapping[str, Tensor]
"""Each target's loss times its fixed weight, scalars, by target."""


@dataclass
class Balance:
    """Fixed weights: the plain sum. The base of all methods.

    memory: the state of the client's last round. device: the model's. The loop adds `parameters` to the optimiser's, and
    calls `backward` in each step, `epoch_ends` after each epoch and `remember` at the end of the round.
    """

    plan: Local
    targets: Sequence[Target]
    memory: Arrays
    device: str | torch.device = "cpu"
    parameters: list[nn.Parameter] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Take up the state."""

    def backward(
        self, each: Losses, present: Collection[str], rest: Tensor | None, learning: Mapping[str, nn.Parameter]
    ) -> None:
        """Set the gradients of `learning`, which are None, to those of the balanced losses plus `rest`.

        present: the targets with a label in the batch; only these are balanced. rest: an unweighted scalar, or None.
        """
        balanced = self.balanced({name: value for name, value in each.items() if name in present})
        # A target without labels has loss 0, so its head gets a gradient of zeros instead of None.
        terms = [balanced.get(name, value) for name, value in each.items()]
        terms += [rest] if rest is not None else []
        total = sum(terms[1:], start=terms[0])
        total.backward()  # type: ignore[no-untyped-call]

    def balanced(self, each: Losses) -> Losses:
        """The losses of the present targets, each with its weight applied."""
        return each

    def epoch_ends(self) -> None:
        """Called at the end of an epoch, and at the end of the round."""

    def remember(self) -> Arrays:
        """The state for the client's next round."""
        return {}


class Uncertainty(Balance):
    """Uncertainty weighting (Kendall et al. 2018, equation 7): learns s = log sigma^2 of each target, from 0 on.

    A class, labels or quantiles: exp(-s) L + s / 2. A value, whose L is a squared error: exp(-s) L / 2 + s / 2.
    """

    NAME = "balance/log-variance"

    def __post_init__(self) -> None:
        start = self.memory.get(self.NAME, np.zeros(len(self.targets), dtype=np.float32))
        self.parameters = [nn.Parameter(torch.tensor(float(v)).to(self.device)) for v in start]
        self.s = {t.name: s for t, s in zip(self.targets, self.parameters, strict=True)}
        self.halves = {t.name: 0.5 if t.kind == "value" else 1.0 for t in self.targets}

    def balanced(self, each: Losses) -> Losses:
        return {n: self.halves[n] * torch.exp(-self.s[n]) * v + self.s[n] / 2 for n, v in each.items()}

    def remember(self) -> Arrays:
        return {self.NAME: np.array([float(s.detach()) for s in self.parameters], dtype=np.float32)}


class DynamicAverage(Balance):
    """DWA (Liu et al. 2019, equation 7): weights K softmax(r / T), r = L(e - 1) / L(e - 2).

    L(e) is a target's mean loss over the steps of the client's epoch e. The weight is 1 until there are two epochs.
    """

    NAME = "balance/epoch-losses"

    def __post_init__(self) -> None:
        self.seen = self.memory.get(self.NAME, np.full((2, len(self.targets)), np.nan))
        self.now: dict[str, list[float]] = {t.name: [] for t in self.targets}

    def weights(self) -> dict[str, float]:
        """Each target's weight in the current epoch."""
        ratio = self.seen[1] / np.where(self.seen[0] > 0, self.seen[0], np.nan)
        known = np.isfinite(ratio)
        result = np.ones(len(self.targets))
        if known.any():
            power = np.exp((ratio[known] - ratio[known].max()) / self.plan.dwa_temperature)
            result[known] = known.sum() * power / power.sum()
        return {t.name: float(w) for t, w in zip(self.targets, result, strict=True)}

    def balanced(self, each: Losses) -> Losses:
        weights = self.weights()
        for name, value in each.items():
            self.now[name].append(float(value.detach()))
        return {name: weights[name] * value for name, value in each.items()}

    def epoch_ends(self) -> None:
        means = [np.mean(self.now[t.name]) if self.now[t.name] else np.nan for t in self.targets]
        self.seen = np.stack([self.seen[1], np.array(means)])
        self.now = {t.name: [] for t in self.targets}

    def remember(self) -> Arrays:
        return {self.NAME: self.seen}


class GradNorm(Balance):
    """GradNorm (Chen et al. 2018, algorithm 1): gradient descent at `gradnorm_lr` of sum |G - mean(G) r^alpha| over w.

    w are the targets' weights; their sum is the number of targets, and each stays above 0.01. G = w |dL/dW|, W the
    learning arrays of the trunk's top layer. r is L / L(0) divided by its mean, L(0) the client's first loss.
    """

    NAME = "balance/gradnorm"
    LEAST = 0.01

    def __post_init__(self) -> None:
        n = len(self.targets)
        self.w, self.first = self.memory.get(self.NAME, np.stack([np.ones(n), np.full(n, np.nan)]))

    def backward(
        self, each: Losses, present: Collection[str], rest: Tensor | None, learning: Mapping[str, nn.Parameter]
    ) -> None:
        at = [i for i, t in enumerate(self.targets) if t.name in present]
        trunk = [name for name in learning if not name.startswith(HEADS)]
        if at and trunk:
            top = [learning[name] for name in trunk if layer(name) == layer(trunk[-1])]
            self._move(at, {i: each[self.targets[i].name] for i in at}, top)
        super().backward(each, present, rest, learning)

    def balanced(self, each: Losses) -> Losses:
        return {t.name: float(w) * each[t.name] for t, w in zip(self.targets, self.w, strict=True) if t.name in each}

    def _move(self, at: Sequence[int], each: Mapping[int, Tensor], top: Sequence[nn.Parameter]) -> None:
        losses = np.array([float(each[i].detach()) for i in at])
        lengths = np.array([_length(torch.autograd.grad(each[i], top, retain_graph=True)) for i in at])
        self.first[at] = np.where(np.isnan(self.first[at]), losses, self.first[at])
        ratio = losses / np.maximum(self.first[at], 1e-12)
        pace = (ratio / max(ratio.mean(), 1e-12)) ** self.plan.gradnorm_alpha
        norms = self.w[at] * lengths
        slope = np.sign(norms - norms.mean() * pace) * lengths
        moved = np.maximum(self.w[at] - self.plan.gradnorm_lr * slope, self.LEAST)
        self.w[at] = moved * self.w[at].sum() / moved.sum()

    def remember(self) -> Arrays:
        return {self.NAME: np.stack([self.w, self.first])}


class PCGrad(Balance):
    """PCGrad (Yu et al. 2020, algorithm 1) on the trunk; heads, which targets do not share, get the plain sum."""

    def backward(
        self, each: Losses, present: Collection[str], rest: Tensor | None, learning: Mapping[str, nn.Parameter]
    ) -> None:
        trunk = [p for name, p in learning.items() if not name.startswith(HEADS)]
        gradients = []
        for name in each if trunk else ():
            if name in present:
                parts = torch.autograd.grad(each[name], trunk, retain_graph=True, materialize_grads=True)
                gradients.append(torch.cat([part.flatten() for part in parts]))
        super().backward(each, present, rest, learning)
        if len(gradients) < 2:
            return
        # The plain sum is corrected in place, so `rest` keeps its own gradient.
        change = projected_sum(gradients) - torch.stack(gradients).sum(0)
        for parameter, part in zip(trunk, torch.split(change, [p.numel() for p in trunk]), strict=True):
            moved = part.view_as(parameter)
            parameter.grad = moved if parameter.grad is None else parameter.grad + moved


def projected_sum(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the targets' gradients (1-D, equal lengths), after each is projected off those it conflicts with.

    The others come in random order, drawn from torch's generator.
    """
    result = torch.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        left = own.clone()
        for j in torch.randperm(len(gradients)).tolist():
            other = gradients[j]
            against = torch.dot(left, other)
            if j != i and against < 0:
                left -= against / torch.dot(other, other) * other
        result += left
    return result


BALANCES: dict[str, type[Balance]] = {
    "fixed": Balance,
    "uncertainty": Uncertainty,
    "dwa": DynamicAverage,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
}
"""The methods by `local.balance`."""


def _length(gradients: Sequence[Tensor]) -> float:
    return float(torch.sqrt(torch.stack([(g.double() ** 2).sum() for g in gradients]).sum()))
