"""Trains a small network in one call of `fused.c`; declares its structures."""

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from meadow.native.build import COUNT, POINTER, NotCompiled, declared

KINDS = ("linear", "conv", "pool", "norm", "bounded", "flatten")
ACTIVATIONS = ("", "relu", "tanh")
"""Layer types and activations, in the order of their numbers in `fused.c`."""

Floats = npt.NDArray[np.float32]


def _fields(integers: str, doubles: str) -> list[tuple[str, Any]]:
    return [
        *((name, ctypes.c_int64) for name in integers.split()),
        *((name, ctypes.c_double) for name in doubles.split()),
    ]


class Layer(ctypes.Structure):
    """A layer: input c, h, w; output oc, oh, ow; kernel and padding; offsets of weight and bias (-1: none)."""

    _fields_ = _fields("kind act c h w oc oh ow kh kw ph pw groups weight bias", "rate_w rate_b eps scale")


class Head(ctypes.Structure):
    """A linear head and its loss. kind: 0 classes, 1 a value."""

    _fields_ = _fields("kind size features weight bias", "rate_w rate_b importance offset spread")


class Plan(ctypes.Structure):
    """The network: numbers of layers, heads and parameters, the largest batch, and the settings of SGD."""

    _fields_ = (
        *_fields("layers heads parameters batch flat_input", "momentum weight_decay"),
        ("nesterov", ctypes.c_int64),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Load `fused.c`. Raises NotCompiled."""
    train = [*[POINTER] * 4, COUNT, *[POINTER] * 3, *[COUNT] * 3, POINTER]
    found = declared(
        "fused.c",
        {
            "fused_sizes": (None, [POINTER]),
            "fused_open": (POINTER, [POINTER, POINTER, POINTER, COUNT]),
            "fused_close": (None, [POINTER]),
            "fused_rates": (None, [POINTER, POINTER]),
            "fused_train": (None, train),
        },
    )
    theirs = (ctypes.c_int64 * 3)()
    found.fused_sizes(theirs)
    if list(theirs) != [ctypes.sizeof(each) for each in (Plan, Layer, Head)]:
        raise NotCompiled("fused.c and meadow/native/fused.py declare different structures")
    return found


class Net:
    """A network for batches of up to `plan.batch` samples. Only one thread may use it at a time.

    inputs: values per sample. Raises MemoryError.
    """

    def __init__(self, plan: Plan, layers: Sequence[Layer], heads: Sequence[Head], inputs: int) -> None:
        self._library, self._heads = library(), len(heads)
        self._net = self._library.fused_open(
            ctypes.byref(plan), (Layer * len(layers))(*layers), (Head * len(heads))(*heads), inputs
        )
        if not self._net:
            raise MemoryError(f"no memory for batches of {plan.batch} samples")
        weakref.finalize(self, self._library.fused_close, self._net)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set a round's learning rates: weight and bias of each layer, then of each head."""
        given = np.array(rates, np.float64)
        self._library.fused_rates(self._net, given.ctypes.data)

    def train(
        self,
        start: Floats,
        work: Floats,
        x: int,
        inputs: int,
        y: Sequence[int],
        weights: Sequence[int | None],
        order: int,
        samples: int,
        batch: int,
        steps: int,
    ) -> list[float]:
        """Train one client from `start` into `work`. Returns each head's loss, summed over the samples.

        x, y, weights, order: addresses of the inputs, float32 (samples, inputs); of each head's labels (int64) or
        values (float32); of its class weights (or None); and of the order of the samples, int64 (epochs, samples).
        """
        losses = np.zeros(self._heads)
        pointers = ctypes.c_void_p * self._heads
        self._library.fused_train(
            self._net, start.ctypes.data, work.ctypes.data, x, inputs, pointers(*y), pointers(*weights), order, samples,
            batch, steps, losses.ctypes.data,
        )  # fmt: skip
        return losses.tolist()
