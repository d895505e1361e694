"""The constants of DP-SGD, its two draws, and what a clipped sum of gradients is."""

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
"""Which data sets are neighbours: one has one example more, or one example is another."""

Sums = Callable[[], Mapping[str, Tensor]]
"""Gives what clipped gradients are added to, by parameter name; the first call of a step draws the noise into it."""

_STABILISER = 1e-6
"""Opacus's, so that a clipped gradient is never longer than the clip."""


@dataclass(frozen=True)
class Mechanism:
    """The public constants of a client's DP-SGD in one round. None of them may be a function of private data.

    Each example takes part in each of `steps` steps with probability `sample_rate` on its own. Gradients are clipped to
    norm `clip`; the noise has standard deviation `noise_multiplier` times the sum's sensitivity
    (`ClippedSum.sensitivity`); the noisy sum is divided by `denominator`.
    Its part of a history (`meadow.privacy.accounting`) is (sample_rate, noise_multiplier, steps). Raises ValueError for
    a value out of range; a noise multiplier of 0 is allowed, and its epsilon is infinity.
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
    """Indices, int64 and rising, of a Poisson sample: each of 0..n-1 with probability `rate` on its own; may be empty."""
    return torch.from_numpy(np.flatnonzero(stream.uniform(n).numpy() < rate))


def gaussian(out: Tensor, deviation: float, stream: Stream) -> None:
    """Fill a contiguous tensor with Gaussian noise, drawn on the CPU in float32 so that it is the same on every device."""
    if out.device.type == "cpu" and out.dtype == torch.float32:
        stream.fill(out.view(-1).numpy(), deviation)
    else:
        out.copy_(stream.normal(out.numel()).mul_(deviation).view(out.shape))


class ClippedSum(ABC):
    """The sum of a batch's per-example gradients, each clipped to norm `mechanism.clip`, divided by `mechanism.denominator`.

    How single examples' gradients are seen is the subclass's matter. learning: the parameters that learn, by name. held: how
    many numbers it keeps for each sample. at_once: the most samples that it takes at once (0: as many as memory lets).
    undo: puts the model back as it was.
    """

    at_once = 0

    def __init__(self, model: nn.Module, learning: Mapping[str, nn.Parameter], mechanism: Mechanism) -> None:
        self.model, self.learning, self.mechanism = model, learning, mechanism
        self.numbers_per_sample = sum(p.numel() for p in learning.values())
        self.undo = ExitStack()

    def sensitivity(self, adjacency: Adjacency) -> float:
        """By how much the sum, before it is divided, can differ in l2 norm between two neighbouring data sets.

        An example's part is at most `clip` long and the parts do not depend on each other: `clip` where an example is added
        or removed, twice that where it is replaced.
        """
        return self.mechanism.clip if adjacency == "add-remove" else 2 * self.mechanism.clip

    @property
    def begins_alone(self) -> bool:
        """Whether the next sample must be taken alone, so that it can be held against autograd."""
        return False

    @abstractmethod
    def add(self, values: Tensor, into: Sums) -> Tensor | None:
        """Add the clipped gradients of losses (n,) that the model has just made.

        A sample whose gradient is not finite adds nothing. None, or bool (n,): nothing was added, and the samples where it
        is true must be taken again without the others.
        """

    @abstractmethod
    def forget(self) -> None:
        """Take away all that a pass left on modules and parameters, whether it came to its end or not."""

    def close(self) -> None:
        """Let the model be as it was."""
        self.forget()
        self.undo.close()

    def weights(self, norms: Tensor) -> Tensor:
        """What each sample's gradient counts: min(1, clip / norm) / denominator, of the norms' shape and dtype."""
        return torch.from_numpy(self._factors(norms.cpu().numpy()) / self.mechanism.denominator).to(norms.device)

    def _factors(self, norms: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.minimum(self.mechanism.clip / (norms + _STABILISER), 1.0)
