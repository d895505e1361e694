"""The training loop without its tape: for known layers, the operations that autograd would run, called one after another.

A small model's step costs autograd and the modules' calls a third of its time. Here each layer's forward and backward
operations are called by themselves (`client/trainers/layers.py`), on parameters that lie in one vector and take their
steps as soon as their gradients are known. A client's numbers depend on nothing but its samples, their order and where it
starts; they are the loop's but for the order of sums (tests/client/test_direct.py says by how much). It covers one class
target whose labels are all known, without weights of the classes; the loop trains all else.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from meadow.client.trainers.layers import CrossEntropy, Descent, lowest, operations
from meadow.client.trainers.network import Member, Network, Outcome, Sums, Unknown
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.config.schema import Local
from meadow.native.sums import add_up, together
from meadow.tasks.data import MISSING

LANES = 16
"""Arrays begin at multiples of 64 bytes, as torch's own do: kernels choose their path by alignment."""
GATHERED = 2**22
"""Numbers of samples that are gathered at once."""


class Direct:
    """`meadow.client.trainers.network.Kernels` that are exact: a client's numbers do not depend on the others'. Raises
    Unknown for targets other than one of classes."""

    title = "direct"
    blocks_at_once = 1
    keeps_samples = False

    def __init__(self, network: Network, plan: Local) -> None:
        if len(network.targets) > 1 or network.targets[0].kind != "class":
            raise Unknown("there is not one target of classes")
        self.network = network
        self._begins: dict[str, int] = {}
        size = 0
        for name, shape in network.shapes.items():
            self._begins[name] = size
            size += -(-math.prod(shape) // LANES) * LANES
        convolutions = {layer.weight for layer in network.layers if layer.kind == "conv"}
        self._strides = {name: _strides(shape, name in convolutions) for name, shape in network.shapes.items()}
        self._start, self._received = torch.zeros(size), Arrays()
        self._start_views = self._views(self._start)
        self._works = list[tuple[Tensor, dict[str, Tensor]]]()
        self._sgd = Descent(plan)
        self._operations = operations(network, self._sgd)
        self._loss = CrossEntropy(network.importance[0])

    def covers(self, labels: Sequence[Tensor], weights: Sequence[Tensor | None]) -> bool:
        """Whether all labels are known, and no class has a weight of its own."""
        return weights[0] is None and not bool((labels[0] == MISSING).any())

    @torch.no_grad()
    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Outcome:
        """As `meadow.client.trainers.network.Kernels.train`."""
        if start is not self._received:  # a node's blocks begin at the same arrays
            for name, view in self._start_views.items():
                view.copy_(torch.from_numpy(start[name]))
            self._received = start
        losses, arrays, totals = list[list[float]](), list[Arrays](), list[Sums | None]()
        before = torch.get_float32_matmul_precision()
        try:
            for number, block in enumerate(blocks):
                if weights is None:
                    for member in block:
                        losses.append([self._member(member, rates, 0)])
                        arrays.append({name: view.numpy().copy() for name, view in self._works[0][1].items()})
                    continue
                total, finite = np.empty(len(self._start)), True
                at_once = together(len(self._start))
                for begin in range(0, len(block), at_once):
                    some = range(begin, min(begin + at_once, len(block)))
                    losses += [[self._member(block[i], rates, i - begin)] for i in some]
                    works = [work.numpy() for work, _ in self._works[: len(some)]]
                    theirs = [weights[number][i] for i in some]
                    finite &= add_up(total, works, theirs, self._begins, first=begin == 0)
                views = self._views(torch.from_numpy(total))
                totals.append({n: np.ascontiguousarray(v.numpy()) for n, v in views.items()} if finite else None)
        finally:
            torch.set_float32_matmul_precision(before)
        return Outcome(losses, arrays, totals)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat.as_strided(self.network.shapes[name], self._strides[name], begin)
            for name, begin in self._begins.items()
        }

    def _member(self, member: Member, rates: Mapping[str, float], place: int) -> float:
        """Train a client in the work at a place; the loss, summed over the samples seen."""
        while len(self._works) <= place:
            work = torch.zeros_like(self._start)
            self._works.append((work, self._views(work)))
        work, parameters = self._works[place]
        if self._sgd.begin(self._start_views, parameters, rates):
            work.copy_(self._start)
        x = member.x if self.network.image else member.x.flatten(1)
        windows = self.network.image and x.dim() == 3
        if windows:
            x = x.transpose(1, 2).contiguous()
        stop = lowest(self._operations, rates)
        learning = list(enumerate(self._operations))[: stop - 1 if stop else None : -1]
        seen = []
        for at, y in islice(_batches(x, member.y[0], member.order, member.batch), member.steps):
            if windows:
                at = at.transpose(1, 2).unsqueeze(2)
            for operation in self._operations:
                at = operation.forward(at)
            loss, back = self._loss.of(at, y)
            for i, operation in learning:
                back = operation.backward(back, i > stop)
            self._sgd.stepped()
            seen.append((len(y), loss))
        return math.fsum(count * float(loss) for count, loss in seen)


def _batches(x: Tensor, y: Tensor, orders: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of each epoch in its order, gathered many at once."""
    at_once = size * max(1, GATHERED // (size * x[0].numel()))
    for order in orders:
        for some in torch.split(order, at_once):
            there = x.index_select(0, some), y.index_select(0, some)
            yield from zip(*(torch.split(each, size) for each in there), strict=True)


def _strides(shape: Sequence[int], convolution: bool) -> tuple[int, ...]:
    """Of an array that is whole in memory; the weights (out, in, ...) of a convolution have their inputs side by side."""
    order = [0, *range(2, len(shape)), 1] if convolution else range(len(shape))
    found, at = [0] * len(shape), 1
    for axis in reversed(order):
        found[axis] = at
        at *= shape[axis]
    return tuple(found)
