"""The `fused` trainer: compiled C code (`fused.c`) that trains a client on a CPU in one call.

In small networks the framework's overhead exceeds the arithmetic. The C file is compiled at installation or first use
(`meadow/native/build.py`). Clients are trained in turn, so a client's result does not depend on the others.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from meadow.client.trainers.flat import FlatKernel, padded
from meadow.client.trainers.job import Job, beyond_plain_steps, first_of
from meadow.client.trainers.kernel import Member
from meadow.client.trainers.network import Layer, Network
from meadow.config.schema import Experiment
from meadow.native.build import NotCompiled
from meadow.native.fused import ACTIVATIONS, KINDS, Head, Net, Plan, library
from meadow.native.fused import Layer as NativeLayer

LARGEST_CONVOLUTION = 2_000_000
"""Multiplications per sample of a convolution up to which `fused.c` is faster than torch, which uses oneDNN."""


class Fused(FlatKernel):
    """A `meadow.client.trainers.kernel.Kernel` of compiled code for a CPU."""

    name = "fused"
    keeps_samples = True

    def __init__(self, network: Network, experiment: Experiment) -> None:
        # Rows of a linear weight begin at multiples of LANES.
        linear = {name: (padded(shape[1]), 1) for name, shape in network.shapes.items() if len(shape) == 2}
        super().__init__(network, linear)
        self._plan = experiment.local
        self._net: Net | None = None
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
        return unsupported_layer(job.network) or _not_compiled()

    def _begin(self, members: Sequence[Member], rates: Mapping[str, float]) -> None:
        self._net = self._open(max(member.batch for member in members))
        names = [n for layer in self.network.layers for n in (layer.weight, layer.bias)]
        names += [n for pair in self.network.heads for n in pair]
        self._net.set_rates([rates.get(name, 0.0) for name in names])

    def _train_one(self, member: Member, work: Tensor, parameters: dict[str, Tensor]) -> list[float]:
        assert self._net is not None
        return self._net.train(
            self._start.numpy(),
            work.numpy(),
            member.x.data_ptr(),
            math.prod(self.network.shape),
            [each.data_ptr() for each in member.y],
            [None if each is None else each.data_ptr() for each in member.weights],
            member.order.data_ptr(),
            len(member.x),
            member.batch,
            member.steps,
        )

    def _open(self, batch: int) -> Net:
        """The compiled network with memory for batches of this size."""
        if self._net is not None and batch <= self._batch:
            return self._net
        plan, network, self._batch = self._plan, self.network, batch
        layers, heads = len(network.layers), len(network.heads)
        begin = self._begins | {"": -1}
        about = Plan(
            layers, heads, len(self._start), batch, not network.image, plan.momentum, plan.weight_decay, plan.nesterov
        )
        tops = [
            Head(
                int(target.kind == "value"), target.size, network.features, begin[weight], begin[bias], 0, 0, importance,
                target.offset, target.scale,
            )
            for target, importance, (weight, bias) in zip(
                network.targets, network.importance, network.heads, strict=True
            )
        ]  # fmt: skip
        self._net = None  # free its memory before allocating more
        return Net(about, [_described(layer, begin) for layer in network.layers], tops, math.prod(network.shape))


def _described(layer: Layer, begin: Mapping[str, int]) -> NativeLayer:
    return NativeLayer(
        KINDS.index(layer.kind), ACTIVATIONS.index(layer.activation), *layer.before, *layer.after, *layer.kernel,
        *layer.padding, layer.groups, begin[layer.weight], begin[layer.bias], 0, 0, layer.eps, layer.scale,
    )  # fmt: skip


def _not_compiled() -> str:
    """The reason why `fused.c` is not compiled, or ""."""
    try:
        library()
    except NotCompiled as reason:
        return str(reason)
    return ""


def unsupported_layer(network: Network) -> str:
    """The reason why `fused.c` should not train this network, or ""."""
    for layer in network.layers:
        if layer.kind not in KINDS:
            return f"fused.c has no {layer.kind!r} layer"
        (c, *_), (oc, h, w), (kh, kw) = layer.before, layer.after, layer.kernel
        if layer.kind == "conv" and c * oc * h * w * kh * kw > LARGEST_CONVOLUTION:
            return f"{layer.weight.removesuffix('.weight')} is a large convolution, which torch computes faster"
    return ""
