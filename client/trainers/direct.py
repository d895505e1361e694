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

import torch
from meadow.client.trainers.flat import FlatKernel
from meadow.client.trainers.job import Job, beyond_plain_steps, first_of
from meadow.client.trainers.kernel import Member, Result
from meadow.client.trainers.layers import CrossEntropy, Descent, first_learning, operations
from meadow.client.trainers.network import Network
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.config.schema import Experiment

GATHERED = 2**22
"""Numbers of samples that are gathered at once."""


class Direct(FlatKernel):
    """A `meadow.client.trainers.kernel.Kernel` by torch's operations without autograd's tape."""

    name = "direct"
    keeps_samples = False

    def __init__(self, network: Network, experiment: Experiment) -> None:
        convolutions = {layer.weight for layer in network.layers if layer.kind == "conv"}
        super().__init__(network, {name: _inputs_last(network.shapes[name]) for name in convolutions})
        self._sgd = Descent(experiment.local)
        self._operations = operations(network, self._sgd)
        self._loss = CrossEntropy(network.importance[0])
        self._rates: Mapping[str, float] = {}
        self._stop = 0

    @staticmethod
    def why_not(job: Job) -> str:
        device = job.experiment.engine.device
        return beyond_plain_steps(job) or first_of(
            {
                f'engine.device = "{device}": it runs on the CPU': device != "cpu",
                "it takes one target of classes, and others are learned": job.kinds != ("class",),
                "the classes have weights": job.weighted,
                "labels are missing": not job.complete,
            }
        )

    @torch.no_grad()
    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Result:
        """As `meadow.client.trainers.kernel.Kernel.train`."""
        before = torch.get_float32_matmul_precision()
        try:
            return super().train(start, blocks, rates, weights)
        finally:
            torch.set_float32_matmul_precision(before)

    def _begin(self, members: Sequence[Member], rates: Mapping[str, float]) -> None:
        self._rates, self._stop = rates, first_learning(self._operations, rates)

    def _train_one(self, member: Member, work: Tensor, parameters: dict[str, Tensor]) -> list[float]:
        if self._sgd.begin(self._start_views, parameters, self._rates):
            work.copy_(self._start)
        x = member.x if self.network.image else member.x.flatten(1)
        windows = self.network.image and x.dim() == 3
        if windows:
            x = x.transpose(1, 2).contiguous()
        stop = self._stop
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
        return [math.fsum(count * float(loss) for count, loss in seen)]


def _batches(x: Tensor, y: Tensor, orders: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of each epoch in its order, gathered many at once."""
    at_once = size * max(1, GATHERED // (size * x[0].numel()))
    for order in orders:
        for some in torch.split(order, at_once):
            there = x.index_select(0, some), y.index_select(0, some)
            yield from zip(*(torch.split(each, size) for each in there), strict=True)


def _inputs_last(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a convolution's weights (out, in, ...) whose inputs lie side by side."""
    found, at = [0] * len(shape), 1
    for axis in (1, *reversed(range(2, len(shape))), 0):
        found[axis] = at
        at *= shape[axis]
    return tuple(found)
