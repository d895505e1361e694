"""Bounds that follow from the arithmetic, and so hold on every processor, in whatever order its kernels add."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.tasks.data import Data

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


def in_double(data: Data) -> Data:
    """The same samples in float64, so that what is trained on them tells a formula from one that is nearly the same."""
    y = {name: values.double() if values.is_floating_point() else values for name, values in data.y.items()}
    return Data(data.x.double(), y)


def stepped(after: Arrays, before: Arrays, by: Mapping[str, Any], dtype: Any = np.float64) -> None:
    """`after` is `before` less `by`: to a thousand roundings of numbers of size 1 (or larger), as many as a full
    batch of some fifty samples takes in a small model."""
    assert after.keys() == before.keys() >= by.keys()
    for name, value in after.items():
        assert value.dtype == dtype, name
        less = np.asarray(by[name]) if name in by else np.zeros(())
        close(value, before[name].astype(np.float64) - less, 1000, terms=1.0, dtype=dtype, name=name)


def floats(arrays: Arrays) -> dict[str, npt.NDArray[np.float64]]:
    """The arrays in float64, to be worked with."""
    return {name: value.astype(np.float64) for name, value in arrays.items()}
