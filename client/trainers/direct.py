"""The `direct` trainer: calls the operations that autograd would run, one after another, without its tape.

Autograd and module calls take a third of a small model's step. Here each layer's forward and backward operations are called
directly (`client/trainers/layers.py`), and a parameter is updated as soon as its gradient is known. A client's result
depends only on its samples, their order and the starting parameters. It differs from the loop's only in the order of sums
(tests/client/test_direct.py says by how much). It needs exactly one target, a class with all labels known and no class
weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.client.trainers.flat import FlatKernel
from meadow.client.trainers.job import Job, beyond_plain_steps, first_of
from meadow.client.trainers.kernel import Member, Result
from meadow.client.trainers.layers import CrossEntropy, Descent, first_learning, operations
from meadow.client.trainers.network import Network
from meadow.config.schema import Experiment

GATHERED = 2**22
"""Scalars of samples that one gather copies at most."""


class Direct(FlatKernel):
    """A `meadow.client.trainers.kernel.Kernel` of torch's operations without autograd's tape."""

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
                "it needs exactly one target, and it must be a class": job.kinds != ("class",),
                "the classes have weights": job.weighted,
                "some labels are missing": not job.complete,
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
    """Yield the batches of each epoch in its order; gathers several at once."""
    at_once = size * max(1, GATHERED // (size * x[0].numel()))
    for order in orders:
        for some in torch.split(order, at_once):
            there = x.index_select(0, some), y.index_select(0, some)
            yield from zip(*(torch.split(each, size) for each in there), strict=True)


def _inputs_last(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a convolution's weights (out, in, ...) with the input channels contiguous in memory."""
    return torch.empty(shape[0], *shape[2:], shape[1], device="meta").movedim(-1, 1).stride()
