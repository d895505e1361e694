"""Training on a CPU without a framework: a network's layers handed to `fused.c`, which trains a client in one call.

Where networks are small, a framework's step costs more than its arithmetic. The C file is compiled at installation or first
use (`meadow/native/build.py`). A client's result does not depend on the others: they are trained in turn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from meadow.client.trainers.network import Layer, Member, Network, Outcome, Sums, Unknown
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.config.schema import Local
from meadow.native.build import NotCompiled
from meadow.native.fused import ACTIVATIONS, KINDS, Head, Net, Plan, library
from meadow.native.fused import Layer as NativeLayer
from meadow.native.sums import add_up, together

LANES = 16
LARGEST_CONVOLUTION = 2_000_000
"""Multiplications of a sample in one convolution up to which `fused.c` is faster than torch: above, products are large
enough for oneDNN, and a framework's step costs little beside them."""


@dataclass(frozen=True)
class Slot:
    """Where an array stands in the flat vector: from `begin` on; rows of a linear weight are `row` floats apart."""

    begin: int
    shape: tuple[int, ...]
    row: int

    @property
    def end(self) -> int:
        return self.begin + (self.shape[0] * self.row if len(self.shape) == 2 else math.prod(self.shape))

    def of(self, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array as a view of the flat vector."""
        part = flat[self.begin : self.end]
        if len(self.shape) == 2:
            return part.reshape(self.shape[0], self.row)[:, : self.shape[1]]
        return part.reshape(self.shape)


class Fused:
    """`meadow.client.trainers.network.Kernels` for a CPU. Raises Unknown where `fused.c` cannot be compiled, does not
    know a layer, or would be slower."""

    title = "fused"
    blocks_at_once = 1
    keeps_samples = True

    def __init__(self, network: Network, plan: Local) -> None:
        if reason := unfit(network):
            raise Unknown(reason)
        try:
            library()
        except NotCompiled as reason_for:
            raise Unknown(str(reason_for)) from reason_for
        self.network, self._plan = network, plan
        self._slots: dict[str, Slot] = {}
        size = 0
        for name, shape in network.shapes.items():
            slot = self._slots[name] = Slot(size, shape, _padded(shape[1]) if len(shape) == 2 else 0)
            size = _padded(slot.end)
        self._begins = {name: slot.begin for name, slot in self._slots.items()}
        self._start, self._received = _zeros(size), Arrays()
        self._works = list[npt.NDArray[np.float32]]()
        self._net: Net | None = None
        self._batch = 0

    def covers(self, labels: Sequence[Tensor], weights: Sequence[Tensor | None]) -> bool:
        """All clients."""
        return True

    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Outcome:
        """As `meadow.client.trainers.network.Kernels.train`."""
        if start is not self._received:  # a node's blocks begin at the same arrays
            for name, slot in self._slots.items():
                slot.of(self._start)[...] = start[name]
            self._received = start
        self._net = self._open(max(member.batch for block in blocks for member in block))
        names = [n for layer in self.network.layers for n in (layer.weight, layer.bias)]
        names += [n for pair in self.network.heads for n in pair]
        self._net.set_rates([rates.get(name, 0.0) for name in names])
        losses, arrays, totals = list[list[float]](), list[Arrays](), list[Sums | None]()
        for number, block in enumerate(blocks):
            if weights is None:
                for member in block:
                    losses.append(self._member(member, 0))
                    arrays.append({name: slot.of(self._works[0]).copy() for name, slot in self._slots.items()})
                continue
            total, finite = np.empty(len(self._start)), True
            at_once = together(len(self._start))
            for begin in range(0, len(block), at_once):
                some = range(begin, min(begin + at_once, len(block)))
                losses += [self._member(block[i], i - begin) for i in some]
                theirs = [weights[number][i] for i in some]
                finite &= add_up(total, self._works[: len(some)], theirs, self._begins, first=begin == 0)
            totals.append({name: slot.of(total) for name, slot in self._slots.items()} if finite else None)
        return Outcome(losses, arrays, totals)

    def _member(self, member: Member, place: int) -> list[float]:
        """Train a client in the work at a place; each target's loss, summed over the samples seen."""
        while len(self._works) <= place:
            self._works.append(_zeros(len(self._start)))
        assert self._net is not None
        return self._net.train(
            self._start,
            self._works[place],
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
        """The network with room for batches of this size."""
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
        self._net = None  # its memory is given back before more is asked for
        return Net(about, [_described(layer, begin) for layer in network.layers], tops, math.prod(network.shape))


def _described(layer: Layer, begin: Mapping[str, int]) -> NativeLayer:
    return NativeLayer(
        KINDS.index(layer.kind), ACTIVATIONS.index(layer.activation), *layer.before, *layer.after, *layer.kernel,
        *layer.padding, layer.groups, begin[layer.weight], begin[layer.bias], 0, 0, layer.eps, layer.scale,
    )  # fmt: skip


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES


def _zeros(size: int) -> npt.NDArray[np.float32]:
    """Of torch, at a multiple of 64 bytes: a vector that lies in two lines of a cache takes two loads."""
    return torch.zeros(size).numpy()


def unfit(network: Network) -> str:
    """The layer that is not for `fused.c`, or ""."""
    for layer in network.layers:
        if layer.kind not in KINDS:
            return f"fused.c has no {layer.kind}"
        (c, *_), (oc, h, w), (kh, kw) = layer.before, layer.after, layer.kernel
        if layer.kind == "conv" and c * oc * h * w * kh * kw > LARGEST_CONVOLUTION:
            return f"{layer.weight.removesuffix('.weight')} is large enough for torch"
    return ""
