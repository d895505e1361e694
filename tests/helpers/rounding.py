"""Bounds that follow from the arithmetic, and so hold on every processor, in whatever order its kernels add."""

import math
from typing import Any

import numpy as np
from torch import Tensor

LAMBDA = 4.0


def rounding(operations: float, dtype: Any = np.float32) -> float:
    """How far a result may be off after so many roundings, relative to the sum of its terms' sizes.

    Each rounding is off by at most u, half an ulp of 1, up or down. n of them are off by n u at worst, and by
    LAMBDA sqrt(n) u with probability 1 - 2 exp(-LAMBDA^2 / 2) at least, which is 0.9993 (Higham and Mary 2019, "A new
    approach to probabilistic rounding error analysis", theorem 2.4); since the most of a rounding is rarely reached, far
    more often.
    """
    return LAMBDA * math.sqrt(operations) * float(np.finfo(dtype).eps) / 2


def close(found: Any, exact: Any, operations: float, terms: Any = 0.0, dtype: Any = np.float32, name: str = "") -> None:
    """Each entry of `found` is off the exact one (worked out in float64) by so many roundings of `dtype` at most.

    `terms` is the sum of the sizes of what was added up, for all entries or for each; without cancellation the size of
    the result, which is the least that it counts as.
    """
    one, other = (np.asarray(v.detach() if isinstance(v, Tensor) else v).astype(np.float64) for v in (found, exact))
    assert one.shape == other.shape, (name, one.shape, other.shape)
    apart, bound = np.abs(one - other), rounding(operations, dtype) * np.maximum(np.abs(other), terms)
    assert np.all(apart <= bound), (
        name,
        f"off by {apart.max():.3g}",
        f"{(apart / bound).max():.3g} of the bound",
        one,
        other,
    )
