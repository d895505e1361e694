"""The constants of DP-SGD, its sampling and noise, and the interface of clipped sums of gradients."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meadow.privacy.noise import Stream

Adjacency = Literal["add-remove", "replace"]
"""Neighbouring data sets differ by one added or removed example, or by one replaced example."""

Sums = Callable[[], Mapping[str, Tensor]]
"""Returns the tensors to which clipped gradients are added, by parameter name; a step's first call fills them with noise."""

_STABILISER = 1e-6
"""As in Opacus: keeps a clipped gradient from exceeding the clip."""


@dataclass(frozen=True)
class Mechanism:
    """The public constants of a client's DP-SGD in one round. None of them may depend on private data.

    Each example is in each of `steps` steps independently with probability `sample_rate`. Gradients are clipped to norm
    `clip`. The noise has standard deviation `noise_multiplier` times the sum's sensitivity (`ClippedSum.sensitivity`). The
    noisy sum is divided by `denominator`. In a history (`meadow.privacy.accounting`) it is (sample_rate, noise_multiplier,
    steps). Raises ValueError for a value out of range; noise_multiplier = 0 is allowed, with an epsilon of infinity.
    """

    sample_rate: float
    noise_multiplier: float
    clip: float
    denominator: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"Expected 0 < sample_rate={self.sample_rate} <= 1.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"Expected 0 <= noise_multiplier={self.noise_multiplier} < infinity.")
        for name in ("clip", "denominator"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Expected 0 < {name}={getattr(self, name)} < infinity.")
        if self.steps < 1:
            raise ValueError(f"Expected steps={self.steps} >= 1.")


def poisson(n: int, rate: float, stream: Stream) -> Tensor:
    """A Poisson sample: ascending indices, int64, each of 0..n-1 independently with probability `rate`; may be empty."""
    return torch.from_numpy(np.flatnonzero(stream.uniform(n).numpy() < rate))


def gaussian(out: Tensor, deviation: float, stream: Stream) -> None:
    """Fill a contiguous tensor with Gaussian noise, drawn on the CPU in float32, so it is the same on every device."""
    if out.device.type == "cpu" and out.dtype == torch.float32:
        stream.fill(out.view(-1).numpy(), deviation)
    else:
        out.copy_(stream.normal(out.numel()).mul_(deviation).view(out.shape))


class ClippedSum(ABC):
    """The sum of a batch's per-example gradients, each clipped to norm `mechanism.clip`, divided by `mechanism.denominator`.

    learning: the parameters that learn, by name. numbers_per_sample: how many it keeps. at_once: the most samples in a
    pass (0: limited by memory only). undo: restores the model.
    """

    at_once = 0

    def __init__(self, model: nn.Module, learning: Mapping[str, nn.Parameter], mechanism: Mechanism) -> None:
        self.model, self.learning, self.mechanism = model, learning, mechanism
        self.numbers_per_sample = sum(p.numel() for p in learning.values())
        self.undo = ExitStack()

    def sensitivity(self, adjacency: Adjacency) -> float:
        """The largest l2 distance between the sums, before division, of two neighbouring data sets.

        An example contributes at most `clip`, whatever the others are; replacing it moves the sum by at most twice that.
        """
        return self.mechanism.clip if adjacency == "add-remove" else 2 * self.mechanism.clip

    @property
    def begins_alone(self) -> bool:
        """Whether the next sample must be alone in its pass, to compare its gradient with autograd's."""
        return False

    @abstractmethod
    def add(self, values: Tensor, into: Sums) -> Tensor | None:
        """Add the clipped gradients of losses (n,) that the model has just computed; those that are not finite add nothing.

        Returns None, or bool (n,) if nothing was added: the caller must repeat the pass with only the samples marked True.
        """

    @abstractmethod
    def forget(self) -> None:
        """Remove everything that a pass, complete or not, left on modules and parameters."""

    def close(self) -> None:
        """Restore the model."""
        self.forget()
        self.undo.close()

    def weights(self, norms: Tensor) -> Tensor:
        """The weight of each sample's gradient: min(1, clip / norm) / denominator, with the norms' shape and dtype."""
        return torch.from_numpy(self._factors(norms.cpu().numpy()) / self.mechanism.denominator).to(norms.device)

    def _factors(self, norms: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.minimum(self.mechanism.clip / (norms + _STABILISER), 1.0)
