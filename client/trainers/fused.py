"""Training on a CPU without a framework: a network's layers handed to `fused.c`, which trains a client in one call.

Where networks are small, a framework's step costs more than its arithmetic. The C file is compiled at first use, which
takes some seconds (`meadow/native/build.py`). A client's result does not depend on the others: they are trained in turn.
"""

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from meadow.client.trainers.flat import FlatKernel, padded
from meadow.client.trainers.job import Job, beyond_plain_steps, first_of
from meadow.client.trainers.kernel import Member
from meadow.client.trainers.network import Layer, Network
from torch import Tensor

from meadow.config.schema import Experiment
from meadow.native.build import NotCompiled, compiled

LARGEST_CONVOLUTION = 2_000_000
"""Multiplications of a sample in one convolution up to which `fused.c` is faster than torch: above, products are large
enough for oneDNN, and a framework's step costs little beside them."""

_NUMBERS = (
    "kind", "act", "c", "h", "w", "oc", "oh", "ow", "kh", "kw", "ph", "pw", "groups", "weight", "bias"
)  # fmt: skip
_KINDS = ("linear", "conv", "pool", "norm", "bounded", "flatten")
_ACTIVATIONS = ("", "relu", "tanh")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_double) for name in ("rate_w", "rate_b", "eps", "scale")),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "size", "features", "weight", "bias")),
        *((name, ctypes.c_double) for name in ("rate_w", "rate_b", "importance", "offset", "spread")),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "heads", "parameters", "batch", "flat_input")),
        *((name, ctypes.c_double) for name in ("momentum", "weight_decay")),
        ("nesterov", ctypes.c_int64),
    )


class Fused(FlatKernel):
    """A `meadow.client.trainers.kernel.Kernel` of compiled code for a CPU."""

    name = "fused"
    keeps_samples = True

    def __init__(self, network: Network, experiment: Experiment) -> None:
        # Rows of a linear weight begin at multiples of LANES.
        linear = {name: (padded(shape[1]), 1) for name, shape in network.shapes.items() if len(shape) == 2}
        super().__init__(network, linear)
        self._plan, self._library = experiment.local, library()
        self._net: int | None = None
        self._batch = 0

    @staticmethod
    def why_not(job: Job) -> str:
        engine = job.experiment.engine
        if reason := beyond_plain_steps(job) or first_of(
            {
                "engine.exact = true": engine.exact and engine.trainer == "auto",
                f'engine.device = "{engine.device}": it runs on the CPU': engine.device != "cpu",
            }
        ):
            return reason
        assert isinstance(job.network, Network)
        return unfit(job.network) or _not_compiled()

    def _begin(self, members: Sequence[Member], rates: Mapping[str, float]) -> None:
        self._open(max(member.batch for member in members))
        names = [n for layer in self.network.layers for n in (layer.weight, layer.bias)]
        names += [n for pair in self.network.heads for n in pair]
        given = np.array([rates.get(name, 0.0) for name in names])
        self._library.fused_rates(self._net, given.ctypes.data)

    def _train_one(self, member: Member, work: Tensor, parameters: dict[str, Tensor]) -> list[float]:
        heads = len(self.network.targets)
        losses = np.zeros(heads)
        truths = (ctypes.c_void_p * heads)(*(each.data_ptr() for each in member.y))
        weights = (ctypes.c_void_p * heads)(*(None if each is None else each.data_ptr() for each in member.weights))
        self._library.fused_train(
            self._net,
            self._start.data_ptr(),
            work.data_ptr(),
            member.x.data_ptr(),
            math.prod(self.network.shape),
            truths,
            weights,
            member.order.data_ptr(),
            len(member.x),
            member.batch,
            member.steps,
            losses.ctypes.data,
        )
        return losses.tolist()

    def _open(self, batch: int) -> None:
        """Room for batches of this size."""
        if batch <= self._batch:
            return
        self.__del__()
        plan, network = self._plan, self.network
        layers, heads = len(network.layers), len(network.heads)
        begin = self._begins | {"": -1}
        about = _Plan(
            layers, heads, len(self._start), batch, not network.image, plan.momentum, plan.weight_decay, plan.nesterov
        )
        tops = [
            _Head(
                int(target.kind == "value"), target.size, network.features, begin[weight], begin[bias], 0, 0, importance,
                target.offset, target.scale,
            )
            for target, importance, (weight, bias) in zip(
                network.targets, network.importance, network.heads, strict=True
            )
        ]  # fmt: skip
        self._net = self._library.fused_open(
            ctypes.byref(about),
            (_Layer * layers)(*(_described(layer, begin) for layer in network.layers)),
            (_Head * heads)(*tops),
            math.prod(network.shape),
        )
        if not self._net:
            raise MemoryError(f"no memory for batches of {batch} samples")
        self._batch = batch

    def __del__(self) -> None:
        if getattr(self, "_net", None):
            self._library.fused_close(self._net)
            self._net = None


def _described(layer: Layer, begin: Mapping[str, int]) -> _Layer:
    return _Layer(
        _KINDS.index(layer.kind), _ACTIVATIONS.index(layer.activation), *layer.before, *layer.after, *layer.kernel,
        *layer.padding, layer.groups, begin[layer.weight], begin[layer.bias], 0, 0, layer.eps, layer.scale,
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `fused.c`. Raises NotCompiled where it cannot be compiled."""
    found = compiled("fused.c", "-fno-signed-zeros")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    declare = {
        "open": (pointer, [pointer, pointer, pointer, count]),
        "close": (None, [pointer]),
        "rates": (None, [pointer, pointer]),
        "train": (None, [pointer] * 4 + [count] + [pointer] * 3 + [count] * 3 + [pointer]),
    }
    for name, (result, arguments) in declare.items():
        function = getattr(found, f"fused_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def _not_compiled() -> str:
    """Why there is no compiled `fused.c`, or ""."""
    try:
        library()
    except NotCompiled as reason:
        return str(reason)
    return ""


def unfit(network: Network) -> str:
    """The layer that is not for `fused.c`, or ""."""
    for layer in network.layers:
        if layer.kind not in _KINDS:
            return f"fused.c knows no layer of the kind {layer.kind!r}"
        (c, *_), (oc, h, w), (kh, kw) = layer.before, layer.after, layer.kernel
        if layer.kind == "conv" and c * oc * h * w * kh * kw > LARGEST_CONVOLUTION:
            return f"{layer.weight.removesuffix('.weight')} is large enough for torch"
    return ""
