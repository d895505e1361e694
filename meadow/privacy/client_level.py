"""Client-level DP: hide a client's whole participation by clipping updates and adding noise once to their sum.

DP-FedAvg (McMahan et al. 2018, algorithm 1, with the fixed-denominator estimator): w + (sum of clipped updates + noise) /
denominator. All clients weigh the same, because a weight by samples could make a client's contribution larger than the
clip. The denominator is a constant, because the number of replies is private under Poisson sampling. The server adds the
noise and sees the clipped updates, so this protects against those who see the models, not against the server. In local DP
(`noised`) each client adds the noise itself.

Adaptive clipping (Andrew et al. 2021, arXiv:1905.03871) moves the clip towards a quantile of the updates' norms, estimated
from a noised count. The count costs privacy too: `update_noise` raises the updates' noise so that both together cost as
much as `noise_multiplier`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from meadow.arrays.named import Arrays
from meadow.runtime.errors import UserError

_ROUNDING = 1 + 1e-6


@dataclass(frozen=True)
class Clipped:
    """A client's update, float64, of norm at most the clip. within: 1 if it was not shortened, else 0."""

    update: dict[str, npt.NDArray[np.float64]]
    within: int


def norm(update: Mapping[str, npt.NDArray[Any]]) -> float:
    """The Euclidean norm over all arrays, in float64 and scaled so that it cannot over- or underflow."""
    largest = max((float(np.abs(a.astype(np.float64)).max()) for a in update.values() if a.size), default=0.0)
    if largest == 0 or not math.isfinite(largest):
        return largest
    squares = sum(float(np.square(a.astype(np.float64) / largest).sum()) for a in update.values())
    return largest * math.sqrt(squares)


def clip(sent: Arrays, trained: Arrays, bound: float) -> Clipped:
    """The update trained - sent, over all names of `sent`, shortened to norm `bound` if it is longer.

    An update that is not finite becomes zero and not within: the client must stay in the public count. A name that the
    client did not train is zero. Raises ValueError if bound is not positive and finite, a shape differs, or `trained` has
    a name that was not sent.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"Expected 0 < clip={bound} < infinity.")
    if unknown := trained.keys() - sent.keys():
        raise ValueError(f"Expected arrays that were sent, not {sorted(unknown)}.")
    update = {}
    for name, before in sent.items():
        after = trained.get(name, before)
        if after.shape != before.shape:
            raise ValueError(f"Expected {name} with shape {before.shape}, not {after.shape}.")
        with np.errstate(invalid="ignore", over="ignore"):
            update[name] = after.astype(np.float64) - before.astype(np.float64)
    size = norm(update)
    if not math.isfinite(size):
        return Clipped({name: np.zeros_like(u) for name, u in update.items()}, 0)
    if size <= bound:
        return Clipped(update, 1)
    shortened = {name: u * (bound / size) for name, u in update.items()}
    while norm(shortened) > bound:  # by rounding alone
        shortened = {name: u * (1 - 2**-50) for name, u in shortened.items()}
    return Clipped(shortened, 0)


def combine(
    sent: Arrays,
    updates: Iterable[Mapping[str, npt.NDArray[np.floating]]],
    bound: float,
    noise_multiplier: float,
    denominator: float,
    generator: np.random.Generator,
) -> Arrays:
    """The next model: sent + (sum of the clipped updates + noise of deviation noise_multiplier * bound) / denominator.

    Without updates the model moves by noise alone. `denominator` is a constant of the experiment (the expected cohort),
    never the number of replies. The noise is drawn in the order of the names, because a resumed server may have its arrays
    in another order. Sums are float64; the result has the dtypes of `sent`. An update that exceeds the bound by float32
    rounding is shortened. Raises ValueError for a longer one, and for a denominator that is not positive.
    """
    if not 0 < denominator < math.inf:
        raise ValueError(f"Expected 0 < denominator={denominator} < infinity.")
    sums = {name: np.zeros(array.shape, np.float64) for name, array in sent.items()}
    for update in updates:
        size = norm(update)
        if not size <= bound * _ROUNDING:
            raise ValueError(f"Expected updates of norm <= clip={bound}, not {size}.")
        for name, value in update.items():
            sums[name] += value.astype(np.float64) * min(1.0, bound / size if size else 1.0)
    moved: Arrays = {}
    for name, array in sorted(sent.items()):
        noise = generator.normal(0.0, noise_multiplier * bound, array.shape) if noise_multiplier > 0 else 0.0
        moved[name] = (array.astype(np.float64) + (sums[name] + noise) / denominator).astype(array.dtype)
    return {name: moved[name] for name in sent}


def noised(
    update: Mapping[str, npt.NDArray[np.float64]], bound: float, noise_multiplier: float, generator: np.random.Generator
) -> dict[str, npt.NDArray[np.float64]]:
    """Local DP: a clipped update plus noise of deviation noise_multiplier * bound, drawn in the order of the names.

    The client adds it before the update leaves. The server does not clip the result, which is longer than the bound.
    """
    return {
        name: value + generator.normal(0.0, noise_multiplier * bound, value.shape)
        for name, value in sorted(update.items())
    }


@dataclass(frozen=True)
class AdaptiveClip:
    """The constants of adaptive clipping, and the clip of the first round.

    quantile (gamma): the target share of updates within the clip. rate (eta): how fast the clip moves. count_noise
    (sigma_b): standard deviation of the noise on the count of updates within the clip.
    """

    first: float
    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.first < math.inf:
            raise ValueError(f"Expected 0 < clip={self.first} < infinity.")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"Expected 0 <= quantile={self.quantile} <= 1.")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"Expected 0 < rate={self.rate} < infinity.")
        if not 0 <= self.count_noise < math.inf:
            raise ValueError(f"Expected 0 <= count_noise={self.count_noise} < infinity.")


def next_clip(
    bound: float, within: Iterable[int], plan: AdaptiveClip, denominator: float, generator: np.random.Generator
) -> float:
    """The clip of the next round: bound * exp(-rate (b - quantile)), b the noised share of updates within the clip.

    If b < quantile, the clip grows. Each bit counts as bit - 1/2, so that a client moves the count by at most 1/2 (Andrew
    et al. 2021, section 2.2); the count is divided by the constant denominator.
    """
    noise = generator.normal(0.0, plan.count_noise) if plan.count_noise > 0 else 0.0
    count = sum(bit - 0.5 for bit in within) + noise
    return bound * math.exp(-plan.rate * (count / denominator + 0.5 - plan.quantile))


def update_noise(noise_multiplier: float, count_noise: float) -> float:
    """The updates' noise multiplier with which updates and count together cost as much as `noise_multiplier`.

    z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), theorem 1 of Andrew et al. 2021. Raises UserError if the count alone costs as
    much or more.
    """
    if noise_multiplier == 0:
        return 0.0
    if 2 * count_noise <= noise_multiplier:
        raise UserError(
            f"privacy.clip_count_noise = {count_noise:g}: the count alone would cost as much as all of noise multiplier "
            f"{noise_multiplier:g}: write more than {noise_multiplier / 2:g}, or privacy.adaptive_clip = false"
        )
    return 1 / math.sqrt(noise_multiplier**-2 - (2 * count_noise) ** -2)


def refuse_small_cohort(expected: float, plan: AdaptiveClip) -> None:
    """Raise UserError if the cohort is too small for the noise on the count.

    The share b has a deviation of count_noise / expected, and a round moves the clip's logarithm by rate * b. With a
    deviation above 0.2 and rate 0.2, chance alone moves the clip by more than 4% a round.
    """
    if expected <= 0 or plan.count_noise / expected > 0.2:
        raise UserError(
            f"privacy.adaptive_clip: a cohort of {expected:g} is too small for clip_count_noise = {plan.count_noise:g}: the "
            f"share within the clip would be known to +-{plan.count_noise / max(expected, 1e-9):.2g} only; take "
            f"{math.ceil(5 * plan.count_noise)} clients a round or more, less noise on the count, or a fixed clip"
        )
