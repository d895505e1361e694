"""The optimiser of `[local]` with a learning rate for each parameter, and the schedule of the rate over rounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from meadow.arrays.named import Arrays
from meadow.config.schema import Local

PLATEAU = "plateau"
"""Name of the state of schedule = "plateau" in a client's memory: float64 [best loss, rounds since, factor]."""


class SGD:
    """torch's SGD without its class's overhead at each step (hooks, profiling, dynamo's guards), which is a tenth of a
    small model's step."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], momentum: float, nesterov: bool) -> None:
        self.param_groups = [dict(group) for group in groups]
        self.momentum, self.nesterov = momentum, nesterov
        self._moving: list[list[Tensor | None]] = [[None] * len(group["params"]) for group in groups]

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group, moving in zip(self.param_groups, self._moving, strict=True):
            at = [i for i, parameter in enumerate(group["params"]) if parameter.grad is not None]
            buffers = [moving[i] for i in at]
            sgd(
                [group["params"][i] for i in at],
                [group["params"][i].grad for i in at],
                buffers,
                foreach=False,
                weight_decay=group["weight_decay"],
                momentum=self.momentum,
                lr=group["lr"],
                dampening=0.0,
                nesterov=self.nesterov,
                maximize=False,
            )
            for i, buffer in zip(at, buffers, strict=True):
                moving[i] = buffer


def make_optimizer(
    learning: Mapping[str, nn.Parameter], plan: Local, factors: Mapping[str, float], extra: Sequence[nn.Parameter] = ()
) -> SGD | torch.optim.Optimizer:
    """A new optimiser over the parameters that learn, each at `plan.lr` times its factor.

    `extra`: parameters outside the model (loss weights, a domain classifier), at `plan.lr` without weight decay.
    """
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in learning.items():
        by_rate.setdefault(plan.lr * factors[name], []).append(parameter)
    groups = [{"params": params, "lr": lr, "weight_decay": plan.weight_decay} for lr, params in by_rate.items()]
    if extra:
        groups.append({"params": list(extra), "lr": plan.lr, "weight_decay": 0.0})
    if plan.optimizer == "sgd":
        return SGD(groups, plan.momentum, plan.nesterov)
    if plan.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=plan.lr, momentum=plan.momentum)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return kinds[plan.optimizer](groups, lr=plan.lr)


def scheduled(plan: Local, round_: int, rounds: int) -> float:
    """The schedule's factor of the rate in a round (from 1); for schedule = "plateau" see `plateau`.

    step: `schedule_factor` once for every `schedule_every` finished rounds. cosine (Loshchilov and Hutter 2017, equation
    5): (1 + cos(pi (round - 1) / rounds)) / 2. In the first `warmup` rounds also times round / warmup. Training after the
    last round (fine-tuning for evaluation) uses the last round's rate.
    """
    round_ = min(round_, rounds)
    factor = min(1.0, round_ / plan.warmup) if plan.warmup else 1.0
    if plan.schedule == "step":
        factor *= plan.schedule_factor ** ((round_ - 1) // plan.schedule_every)
    elif plan.schedule == "cosine":
        factor *= (1 + math.cos(math.pi * (round_ - 1) / rounds)) / 2
    return factor


def plateau(plan: Local, memory: Arrays, loss: float) -> float:
    """The factor of schedule = "plateau", given the validation loss of the model received in this round.

    As torch's ReduceLROnPlateau with a relative threshold of 1e-4: after more than `schedule_patience` rounds without a
    loss below (1 - 1e-4) times the best, the factor is multiplied by `schedule_factor`. Updates the state in `memory`.
    """
    best, since, factor = memory.get(PLATEAU, np.array([np.inf, 0.0, 1.0]))
    if loss < best * (1 - 1e-4):
        best, since = loss, 0
    else:
        since += 1
    if since > plan.schedule_patience:
        factor, since = factor * plan.schedule_factor, 0
    memory[PLATEAU] = np.array([best, since, factor], dtype=np.float64)
    return float(factor)
